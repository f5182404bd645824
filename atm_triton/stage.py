"""A stage: the part of a pass between two merges whose counts the host reads, as a function from rows to rows.

A stage computes what the blocks compute, except that every residual sum is fused with the norm after it. Which tokens
merge depends on the images. A stage therefore ends where a block has assigned its tokens and attended, and the next one
begins with the merge, once the host knows how many rows are left. Blocks may also merge inside a stage, which then
keeps the number of rows that it began with. Rows beyond the last image hold garbage that nothing reads.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple, TypeGuard

import torch
from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton import ops
from atm_triton.block import ATMBlock, is_plain, rows, scale_of
from atm_triton.graphs import Branch
from atm_triton.packed import Assignment, Images, Packed

LEFT = 0.85  # the share of its tokens that a block with a theta is assumed to keep


class Pending(NamedTuple):
    """The T tokens of a block between its attention and its merge: ``x`` [T, C]; ``attended`` [T, C], what attention
    adds to it; ``sizes`` [T] (None: one each); and the assignment: ``slots``, ``order``, ``spans``, and ``cu_seqlens``
    of the merged images."""

    x: Tensor
    attended: Tensor
    sizes: Tensor | None
    slots: Tensor
    order: Tensor
    spans: Tensor
    cu_seqlens: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Pending":
        """The same with ``change`` applied to every tensor."""
        return Pending(
            x=change(self.x),
            attended=change(self.attended),
            sizes=None if self.sizes is None else change(self.sizes),
            slots=change(self.slots),
            order=change(self.order),
            spans=change(self.spans),
            cu_seqlens=change(self.cu_seqlens),
        )

    def first(self, T: int | None) -> "Pending":
        """The first T rows. None: all."""
        return self.each(lambda tensor: tensor[:T])._replace(cu_seqlens=self.cu_seqlens)


class Stage(NamedTuple):
    """``start``: the first block whose attention the stage computes. It begins with the merge of the block before, or
    with the stem. ``last``: the block whose attention ends the stage, None: the pass ends. ``counted``: those of its
    blocks whose own counts decide how many tokens merge."""

    start: int
    last: int | None
    counted: tuple[int, ...]


def stages(blocks: Sequence[ATMBlock], leading: int | None, rows: int, read: float) -> list[Stage]:
    """Divide a pass over this many ``rows`` into stages; there is only one if r is given.

    Otherwise a stage ends wherever the host reads counts. These places are chosen so that the whole pass takes the
    least time in a rough model: a read takes as long as ``read`` GFLOP of matrix products, a block costs in proportion
    to the rows that enter it, and every block with a threshold keeps ``LEFT`` of its tokens.
    """
    merging = blocks if leading is None else blocks[:-1]
    counted = [index for index, block in enumerate(merging) if block.theta is not None]
    gflop = [2e-9 * rows * sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    plans: list[tuple[float, tuple[Stage, ...]]] = [(0.0, ())]  # the best up to the start, and up to each read
    for last in (*counted, None):
        ways = []
        for merges, (cost, before) in enumerate(plans):
            read_at = before[-1].last if before else None
            start, end = 0 if read_at is None else read_at + 1, len(blocks) if last is None else last + 1
            stage = Stage(start=start, last=last, counted=tuple(index for index in counted if start <= index < end))
            ways.append((cost + read + LEFT**merges * sum(gflop[start:end]), (*before, stage)))
        plans.append(min(ways, key=itemgetter(0)))
    return list(plans[-1][1])


def enter(model: VisionTransformer, images: Tensor, out: Tensor | None = None) -> Tensor:
    """The stem: images [B, channels, H, W] to the tokens [B, N, C] that enter the first block. One kernel does this if
    the model cuts images into patches that do not overlap and adds positions as timm does. ``out``: rows [B N, C] to
    write the tokens to."""
    if not _cuts(model, images):
        return model.stem(images)
    embed, proj = model.patch_embed, model.patch_embed.proj
    h, w = embed.dynamic_feat_size(images.shape[-2:])
    dtype = ops.autocast_dtype(images.device.type) or proj.weight.dtype
    nothing = torch.zeros((1, h * w, len(proj.weight)), dtype=dtype, device=images.device)
    position = model._pos_embed(nothing if embed.flatten else nothing.unflatten(1, (h, w)))[0]
    x = ops.stem(images, proj.weight, proj.bias, position, out)
    return model.norm_pre(model.patch_drop(x))


def _cuts(model: VisionTransformer, images: Tensor) -> bool:
    embed = model.patch_embed
    proj = getattr(embed, "proj", None)
    if type(embed) is not PatchEmbed or type(proj) is not nn.Conv2d:
        return False
    if type(model)._pos_embed not in _POSITIONS or "_pos_embed" in model.__dict__:
        return False
    if type(model.pos_drop) not in (nn.Dropout, nn.Identity):  # it would see only the positions
        return False
    conv = (proj.kernel_size, proj.stride, proj.padding, proj.dilation, proj.groups, proj.in_channels)
    fits = tuple(images.shape[-2:]) == embed.img_size or (model.dynamic_img_size and not embed.dynamic_img_pad)
    fits = fits and all(side % length == 0 for side, length in zip(images.shape[-2:], proj.kernel_size, strict=True))
    cast = images.dtype == proj.weight.dtype or ops.autocast_dtype(images.device.type) is not None
    patch = tuple(embed.patch_size)
    whole = conv == (patch, patch, (0, 0), (1, 1), 1, images.shape[1])
    return fits and cast and whole and type(embed.norm) is nn.Identity


_POSITIONS = (VisionTransformer._pos_embed, VisionTransformerDistilled._pos_embed)


def begin(block: ATMBlock, pending: Pending, T: int, images: Images) -> tuple[Packed, Tensor]:
    """The merge at the beginning of a stage of T rows: the merged tokens and their norm for the MLP."""
    assignment = Assignment(
        slots=pending.slots, num_slots=T, images=images, order=pending.order, spans=pending.spans[:T]
    )
    tokens = Packed(x=pending.x, sizes=pending.sizes, images=images)
    return block.merge(tokens, pending.attended, assignment)


def run(
    blocks: Sequence[ATMBlock],
    stage: Stage,
    tokens: Packed,
    y: Tensor | None,
    trace: Tensor | None,
    merging: int,
    leading: int | None,
    counted: Callable[[Tensor], None],
    branch: Branch,
    out: Pending | None = None,
) -> tuple[Packed | Pending, Tensor | None]:
    """Run a stage, from the MLP of the block that has just merged, or from the stem, to its end.

    Args:
        tokens, y: from :func:`begin`; or the tokens of the stem, and None.
        trace: int32 [B N], the row in which each token of the first block is. None: nobody asked.
        merging: how many blocks may merge: all, or all but the last.
        leading: how many tokens the last block computes, None: all.
        counted: called with the counts [B] of each block whose own counts decide how many tokens merge.
        branch: where tokens are matched and assigned while attention runs.
        out: where to write what is to merge, if possible.

    Returns:
        What is to merge, or the tokens after the last block; and the trace.
    """
    before = blocks[stage.start - 1] if stage.start else None
    y = blocks[0].norm1(tokens.x) if y is None else y
    for index, block in enumerate(blocks[stage.start :], start=stage.start):
        into = out if index == stage.last else None
        if before is not None:
            to = None if into is None else into.x
            x, y = residual(tokens.x, feed_forward(before.mlp, y), before.ls2, block.norm1, to)
            tokens = tokens.with_x(x)
        if leading is not None and index == len(blocks) - 1:
            return block.forward_leading(tokens, leading, y), trace
        mixed, assignment = attend(block, tokens, y, index < merging, counted, branch, into)
        attended = project(block.attention, mixed, None if into is None else into.attended)
        branch.join()
        if assignment is not None and trace is not None:
            trace = assignment.slots.index_select(0, trace)  # no token is dropped here
        if assignment is None:
            x, y = residual(tokens.x, attended, block.ls1, block.norm2)
            tokens = tokens.with_x(x)
        elif index == stage.last:
            return left_by(tokens, attended, assignment), trace
        else:
            tokens, y = block.merge(tokens, attended, assignment)
        before = block
    last = blocks[-1]
    return tokens.with_x(tokens.x + rows(last.ls2(feed_forward(last.mlp, y)))), trace


def left_by(tokens: Packed, attended: Tensor, assignment: Assignment) -> Pending:
    """What the last block of a stage leaves to :func:`begin` of the next one."""
    order, spans = ops.lists(assignment)
    return Pending(
        x=tokens.x,
        attended=attended,
        sizes=tokens.sizes,
        slots=assignment.slots,
        order=order,
        spans=spans,
        cu_seqlens=assignment.images.cu_seqlens,
    )


def attend(
    block: ATMBlock,
    tokens: Packed,
    y: Tensor,
    merges: bool,
    counted: Callable[[Tensor], None],
    branch: Branch,
    into: Pending | None,
) -> tuple[Tensor, Assignment | None]:
    """A block's attention before its projection, for tokens [T, C] with norm ``y``, and what merges afterwards, which
    is computed on the ``branch``."""
    y = tokens.images.shaped(y)
    attn = block.attention
    q, k, v = block.heads(attn.qkv(y))
    q, k = attn.q_norm(q), attn.k_norm(k)
    assignment = branch.run(assign, block, k, tokens, counted, into) if merges else None
    return block.mix(y, q, k, v, tokens), assignment


def assign(
    block: ATMBlock, keys: Tensor, tokens: Packed, counted: Callable[[Tensor], None], into: Pending | None
) -> Assignment | None:
    """Decide what merges. If counts decide how much, the assignment has room for all T tokens."""
    images, pairs = tokens.images, block.match(keys, tokens)
    if pairs is None:
        return None
    given = block.given_r(images)
    if pairs.counts is not None:
        counted(pairs.counts)
    T = len(tokens.x) - (0 if given is None else images.B * given)
    options = (block.num_prefix_tokens, T, given is not None, block.config.backend)
    out = None if into is None else (into.slots, into.order, into.spans, into.cu_seqlens)
    return ops.assign(pairs, block.r_of(images), images, *options, out=out)


def residual(
    x: Tensor, update: Tensor, scale: nn.Module, norm: nn.Module, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + scale(update), rows [T, C], and its norm; in one kernel if the modules are plain."""
    update = rows(update)
    if is_plain(norm, scale):
        return ops.add_norm(x, update, scale_of(scale, x), norm, out)
    x = x + scale(update)
    return x, norm(x)


def feed_forward(mlp: nn.Module, y: Tensor) -> Tensor:
    """The MLP on normalised tokens. If it is timm's own, its first layer and GELU may be one kernel."""
    return mlp.fc2(ops.linear_gelu(rows(y), mlp.fc1.weight, mlp.fc1.bias)) if _is_timms(mlp) else mlp(y)


def _is_timms(mlp: nn.Module) -> TypeGuard[Mlp]:
    """Whether an MLP and everything in it are timm's and torch's own, with the exact GELU."""
    modules = (mlp, *(getattr(mlp, name, None) for name in ("fc1", "act", "norm")))
    if tuple(map(type, modules)) != (Mlp, nn.Linear, nn.GELU, nn.Identity):
        return False
    drops = (getattr(mlp, name, None) for name in ("drop1", "drop2"))
    exact = getattr(mlp.act, "approximate", None) == "none"
    return exact and all(type(drop) in (nn.Dropout, nn.Identity) for drop in drops)


def project(attn: Attention, mixed: Tensor, out: Tensor | None) -> Tensor:
    """The projection of attention's result, rows [T, C], written to ``out`` if the module is torch's own."""
    proj = attn.proj
    if out is None or type(proj) is not nn.Linear:
        return rows(attn.proj_drop(proj(mixed)))
    mixed = rows(mixed)
    weight, bias = (None if p is None else p.to(out.dtype) for p in (proj.weight, proj.bias))
    if bias is None:
        return torch.mm(mixed.to(out.dtype), weight.t(), out=out)
    return torch.addmm(bias, mixed.to(out.dtype), weight.t(), out=out)
