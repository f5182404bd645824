"""Counts the multiply-accumulates of a VisionTransformer from the number of tokens that it really computed.

``macs``: convolutions, linear layers and the two products of attention, as torch's FlopCounterMode counts them (halved,
with unfused attention). ``paper_gflops``: what the paper calls FLOPs, which is ``macs`` plus one operation per element
of every LayerNorm; LV-ViT has a count of its own. The products of the matching are in neither number and are reported
separately.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atm_triton.block import inside, is_matrix
from atm_triton.record import Record
from atm_triton.reference import largest_r
from atm_triton.transformer import leading_tokens

Value = TypeVar("Value", float, float | Tensor)
Count = float | Tensor  # tokens per image: the same for all, a mean, or [B]


@dataclass(frozen=True)
class Cost(Generic[Value]):
    """Multiply-accumulates per image: ``stem``, each of ``blocks``, ``head``. ``paper``: the operations that the paper
    counts. ``matching``: the cosine similarities, which are in no total. Whole numbers if all images cost the same,
    otherwise means, or tensors [B] with the cost of each image."""

    stem: int
    blocks: tuple[Value, ...]
    head: int
    paper: Value
    matching: Value

    @property
    def macs(self) -> Value:
        return self.stem + sum(self.blocks) + self.head

    @property
    def paper_gflops(self) -> Value:
        return self.paper / 1e9


def block_macs(block: Block, N: Count, queries: Count, rows: Count) -> Count:
    """The cost of one block with D channels and A channels in attention: 2 N D A for keys and values; per query D A
    (and its gate), 2 N A for two products and A D for the projection; per row the linear layers of the MLP.

    Args:
        N: tokens that enter the block.
        queries: tokens whose attention is computed.
        rows: tokens that the MLP sees.
    """
    attn = inside(block.attn, Attention) or block.attn
    qkv, A = linear_macs(attn.qkv), attn.num_heads * attn.head_dim
    of_query = 2 * N * A + linear_macs(attn.proj) + (0 if attn.gate is None else linear_macs(attn.gate))
    asking = queries if is_matrix(attn.qkv) else N
    return (2 * N + asking) * qkv // 3 + queries * of_query + rows * linear_macs(block.mlp)


def linear_macs(module: nn.Module) -> int:
    """The cost of one row in the linear layers of a module. This includes adapters as well as the layers they adapt,
    and layers that are not torch's own but have its attributes, such as quantised ones."""
    inner = sum(map(linear_macs, module.children()))
    return inner or getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


def cost(model: VisionTransformer, record: Record) -> Cost[float]:
    """The cost per image of the forward pass in ``record``; the mean if images differ."""
    each = cost_of_each(model, record)
    return Cost(
        stem=each.stem,
        blocks=tuple(map(mean, each.blocks)),
        head=each.head,
        paper=mean(each.paper),
        matching=mean(each.matching),
    )


def mean(number: float | Tensor) -> float:
    """The mean over the images."""
    return number.double().mean().item() if isinstance(number, Tensor) else number


def cost_of_each(model: VisionTransformer, record: Record) -> Cost[float | Tensor]:
    """:func:`cost` of every image: tensors [B] if images differ."""
    blocks = [inside(block, Block) or block for block in model.blocks]
    recorded = zip(blocks, record.tokens, record.queries, record.rows, strict=True)
    own = record.ran  # the record of a schedule is for timm's blocks, whatever the model's own do
    counts = [_computed(block, *count) if own else tuple(count) for block, *count in recorded]
    macs = tuple(_macs(block, *c) if own else block_macs(block, *c) for block, c in zip(blocks, counts, strict=True))
    stem, stem_norms = _counted(model, "patch_embed", record.image_shape)
    head, head_norms = _counted(model, "forward_head", (_read_by_head(record), model.embed_dim))
    ends = stem + stem_norms + head + head_norms
    if hasattr(model, "paper_stem"):
        ends = model.paper_stem(record.image_shape)
    return Cost(
        stem=stem,
        blocks=macs,
        head=head,
        paper=ends
        + sum(paper_block(model, each, *count) for each, count in zip(macs, counts, strict=True))
        + paper_last_norm(model, record.rows[-1]),
        matching=sum(
            _matching_macs(block, N, model.num_prefix_tokens)
            for block, (N, *_), matched in zip(blocks, counts, record.matched, strict=True)
            if matched
        ),
    )


def paper_block(model: VisionTransformer, macs: Count, N: Count, queries: Count, rows: Count) -> Count:
    """A block's operations as the paper counts them, given its ``macs``; other arguments as in :func:`block_macs`. A
    model may define its own count by methods ``paper_block`` and ``paper_stem`` (everything but the blocks)."""
    if hasattr(model, "paper_block"):
        return model.paper_block(N, queries, rows)
    return macs + (N + rows) * model.embed_dim


def paper_last_norm(model: VisionTransformer, rows: Count) -> Count:
    """The norm after the blocks as the paper counts it."""
    counts = isinstance(model.norm, nn.LayerNorm) and not hasattr(model, "paper_block")
    return rows * model.embed_dim if counts else 0


def scheduled(
    model: VisionTransformer, image_shape: tuple[int, ...], schedule: tuple[int, ...], cls_only_last: bool
) -> Record:
    """The record of a pass with a given r per block over images [C, H, W], computed without running the blocks."""
    skeleton = _skeleton(model)
    with torch.no_grad():
        image = torch.zeros(1, *image_shape, device="meta", dtype=next(skeleton.parameters()).dtype)
        patches = _run(skeleton, "patch_embed", image).numel() // model.embed_dim
    leading = leading_tokens(model) if cls_only_last else None
    P = model.num_prefix_tokens
    left = patches + P
    entered: list[int] = []
    rows: list[int] = []
    matched: list[bool] = []
    for block, r in enumerate(schedule, start=1):
        entered.append(left)
        if leading is not None and block == len(schedule):
            left, r = leading, 0
        else:
            r = min(r, largest_r(left, P))
            left -= r
        rows.append(left)
        matched.append(r > 0)
    return Record(
        batch=1,
        image_shape=image_shape,
        leading=leading,
        tokens=tuple(entered),
        rows=tuple(rows),
        counts=(None,) * len(schedule),
        matched=tuple(matched),
    )


def unmerged(model: VisionTransformer, image_shape: tuple[int, ...]) -> Record:
    """The record of ``model`` without merging and without the class-token-only last block."""
    return scheduled(model, image_shape, (0,) * len(model.blocks), cls_only_last=False)


def answer_shape(model: VisionTransformer) -> tuple[int, ...]:
    """The shape of a model's answer to one image, without running it: [K] logits or features, or [N, C] tokens if
    nothing pools them.

    Raises:
        TypeError: its head does not run on meta tensors.
    """
    skeleton = _skeleton(model)
    N = model.num_prefix_tokens + (getattr(model.patch_embed, "num_patches", None) or 1)
    with torch.no_grad():
        x = torch.zeros(1, N, model.embed_dim, device="meta", dtype=next(skeleton.parameters()).dtype)
        answer = _run(skeleton, "forward_head", x)
    if not isinstance(answer, Tensor):
        raise TypeError(f"the model answers with a {type(answer).__name__}; want a tensor of logits or features")
    return tuple(answer.shape[1:])


def _computed(block: Block, N: Count, queries: Count, rows: Count) -> tuple[Count, Count, Count]:
    """The numbers of tokens that a block computes: those of the record, unless the block has a method ``computed``,
    as one that drops tokens after its MLP does."""
    return block.computed(N, queries, rows) if hasattr(block, "computed") else (N, queries, rows)


def _macs(block: Block, N: Count, queries: Count, rows: Count) -> Count:
    """:func:`block_macs`, unless the block works in another way and has its own method ``macs``."""
    return block.macs(N, queries, rows) if hasattr(block, "macs") else block_macs(block, N, queries, rows)


def _matching_macs(block: Block, N: Count, num_prefix: int) -> Count:
    if hasattr(block, "matching_macs"):
        return block.matching_macs(N)
    a = (N - num_prefix) // 2
    return a * (N - num_prefix - a) * inside(block.attn, Attention).head_dim


def _read_by_head(record: Record) -> int:
    """The number of tokens that the head sees: only the leading ones, or all original ones."""
    return record.N if record.leading is None else record.leading


def _counted(model: VisionTransformer, part: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The multiply-accumulates of a part by torch's own counter, which counts attention only if it is written out as
    products; and the number of elements that go through LayerNorms."""
    skeleton, counter, normed = _skeleton(model), FlopCounterMode(display=False), []
    for module in skeleton.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: normed.append(args[0].numel()))
    # gradients are on because the counter's module tracker asks parameters for their graph
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, *shape, device="meta", dtype=next(skeleton.parameters()).dtype)
        with sdpa_kernel(SDPBackend.MATH), counter:
            _run(skeleton, part, x)
    return counter.get_total_flops() // 2, sum(normed)


def _run(skeleton: VisionTransformer, part: str, x: Tensor) -> Tensor:
    """Run a part of the model on meta tensors.

    Raises:
        TypeError: the part does not run on them.
    """
    try:
        return getattr(skeleton, part)(x)
    except NotImplementedError as error:
        raise TypeError(
            f"costs are not counted: {part} cannot run on meta tensors, for example because it is quantised or "
            "offloaded; model.blocks.last has the tokens"
        ) from error


def _skeleton(model: VisionTransformer) -> VisionTransformer:
    """A copy of the model in eval mode, on meta tensors, without blocks and hooks: counting does not touch the model.

    Raises:
        TypeError: fully_shard was called on the whole model, so it cannot be copied.
    """
    if hasattr(model, "unshard"):
        raise TypeError("costs of a model that is sharded as a whole are not counted: model.blocks.last has its tokens")
    tensors = (*model.parameters(), *model.buffers())
    with torch.inference_mode(False):
        shapes = {id(t): nn.Parameter(t.to("meta")) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors}
    hooks = (vars(module)[name] for module in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks"))
    # hooks are not copied either, because they may hold large objects
    none: dict[int, OrderedDict] = {id(each): OrderedDict() for each in hooks}
    return copy.deepcopy(model, {**shapes, **none, id(model.blocks): nn.Sequential()}).eval()
