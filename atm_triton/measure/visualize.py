"""Merged tokens in numbers and in pictures: which patches are one token after each block, and what they attend to."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.block import ATMBlock
from atm_triton.measure.models import data_config
from atm_triton.summary import summary
from atm_triton.transformer import MergingTransformer

CELL = 16  # pixels of a patch in a picture, at least
OUTLINE = (1.0, 1.0, 0.0)


@torch.inference_mode()
def merge_map(model: VisionTransformer, image: Tensor) -> list[Tensor]:
    """Show which patches have become one token after each block of a patched model.

    Args:
        model: patched, in eval mode.
        image: [C, H, W] or [1, C, H, W], normalised as the model takes it.

    Returns:
        For each block int64 [grid height, grid width] on the CPU: the number of the token that a patch belongs to,
        counted from 0. Merged patches have the same number; a patch whose token was dropped has -1.

    Raises:
        ValueError: the model is not patched, or there is more than one image.
    """
    _check_patched(model)
    images = image if image.dim() == 4 else image.unsqueeze(0)
    if images.dim() != 4 or len(images) != 1:
        raise ValueError(f"image has shape {list(image.shape)}; want one image, [C, H, W]")
    parameter = next(model.parameters())
    traces = model.traces(images.to(parameter))
    P = model.num_prefix_tokens
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    as_they_were = torch.arange(P + rows * columns).unsqueeze(0)
    maps = []
    for trace in traces:
        slots = (as_they_were if trace is None else trace.cpu().long())[0, P:]
        maps.append(torch.where(slots < 0, -1, slots - P).view(rows, columns))
    return maps


def _check_patched(model: VisionTransformer) -> None:
    if not isinstance(model, MergingTransformer):
        raise ValueError(f"{type(model).__name__} is not patched: apply_patch first")


def attention_maps(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """The attention in each block of a patched model, averaged over heads, between the N tokens that entered the first.

    A merged token attends like the token that it is part of. The attention that such a token receives is divided evenly
    among its parts, which is what log n stands for. So rows sum to 1, and if only equal tokens merge, these are the
    maps of the unpatched model. Dropped tokens have zeros.

    Args:
        model: patched, in eval mode; images: [B, C, H, W], as the model takes them.

    Returns:
        For each block [B, N, N] in the model's dtype, queries first; with gradients if they are enabled. Here the last
        block attends from all tokens, even if the classifier reads only one.

    Raises:
        ValueError: the model is not patched or is in training mode, or images have another shape.
    """
    _check_patched(model)
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes what is attended to: model.eval()")
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"images has shape {list(images.shape)}; want one image or more, [B, C, H, W]")
    with ExitStack() as stack:
        blocks = [block for block in model.blocks.modules() if isinstance(block, ATMBlock)]  # also in wrappers
        seen = [stack.enter_context(_attending(block.attention)) for block in blocks]
        traces = model.traces(images)
    as_they_were = torch.arange(model.blocks.last.tokens[0], device=images.device).expand(len(images), -1)
    entered = [as_they_were if trace is None else trace.long() for trace in (None, *traces[:-1])]
    return [_of_all(attention, trace) for attention, trace in zip(seen, entered, strict=True)]


@contextmanager
def _attending(attn: Attention) -> Iterator[list[Tensor]]:
    """Collect the attention [H, M, M] of each image. It is computed unfused, but with the scale of fused attention,
    which ignores the module's own."""
    seen, own = [], (attn.fused_attn, attn.scale)
    if attn.fused_attn:
        attn.fused_attn, attn.scale = False, attn.head_dim**-0.5
    hook = attn.attn_drop.register_forward_hook(lambda _, args, out: seen.extend(out))
    try:
        yield seen
    finally:
        hook.remove()
        attn.fused_attn, attn.scale = own


def _of_all(maps: list[Tensor], entered: Tensor) -> Tensor:
    """Expand ``maps`` [H, M, M] of each image to all its tokens, [B, N, N]. ``entered`` [B, N] maps these to the M."""
    whole = []
    for attention, token in zip(maps, entered, strict=True):
        there = token >= 0
        sizes = token[there].bincount(minlength=attention.shape[-1])
        shared = (attention.mean(0) / sizes)[token][:, token]
        whole.append(torch.where(there & there.unsqueeze(1), shared, 0))
    return torch.stack(whole)


def pixels(model: VisionTransformer, image: Tensor) -> np.ndarray:
    """Undo the normalisation of an image [C, H, W]: float [H, W, 3] in [0, 1]."""
    config = data_config(model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen = (image.float().cpu() * std + mean).clamp(0, 1)
    return seen.expand(3, -1, -1).permute(1, 2, 0).numpy()


def paint(seen: np.ndarray, tokens: Tensor) -> np.ndarray:
    """Paint every token in the mean colour of its patches, with an outline around it; a dropped patch is black.

    Args:
        seen: [H, W, 3]; tokens: [rows, columns], one map of :func:`merge_map`; patches are H / rows high.
    """
    rows, columns = tokens.shape
    height, width = seen.shape[0] // rows, seen.shape[1] // columns
    cells = seen[: rows * height, : columns * width].reshape(rows, height, columns, width, 3).mean(axis=(1, 3))
    colours, numbers = np.zeros_like(cells), tokens.numpy()
    for token in np.unique(numbers[numbers >= 0]):
        colours[numbers == token] = cells[numbers == token].mean(axis=0)
    painted = colours.repeat(CELL, axis=0).repeat(CELL, axis=1)
    of_pixel = numbers.repeat(CELL, axis=0).repeat(CELL, axis=1)
    edge = np.zeros(of_pixel.shape, dtype=bool)
    edge[1:] |= of_pixel[1:] != of_pixel[:-1]
    edge[:, 1:] |= of_pixel[:, 1:] != of_pixel[:, :-1]
    painted[edge] = OUTLINE
    return painted


@dataclass(frozen=True)
class Picture:
    """A row of panels: the image, then its tokens after each of ``blocks`` (counted from 1). ``left``: how many patch
    tokens remain after each."""

    title: str
    gflops: float
    blocks: tuple[int, ...]
    left: tuple[int, ...]
    panels: tuple[np.ndarray, ...]


def picture(model: VisionTransformer, image: Tensor, blocks: tuple[int, ...], title: str) -> Picture:
    """The :class:`Picture` of an image [C, H, W] and a patched model."""
    depth = len(model.blocks)
    wrong = [block for block in blocks if not 1 <= block <= depth]
    if wrong:
        raise ValueError(f"block {wrong[0]} is outside 1 .. {depth}")
    maps, seen = merge_map(model, image), pixels(model, image)
    with torch.inference_mode():
        model(image.unsqueeze(0).to(next(model.parameters())))
    left = tuple(len(maps[block - 1].unique()) - int((maps[block - 1] < 0).any()) for block in blocks)
    panels = (seen, *(paint(seen, maps[block - 1]) for block in blocks))
    return Picture(title=title, gflops=summary(model).paper_gflops, blocks=tuple(blocks), left=left, panels=panels)


def draw(rows: list[Picture], path: Path) -> None:
    """Draw pictures into a file, one per row; needs matplotlib."""
    from matplotlib.figure import Figure

    columns = max(len(row.panels) for row in rows)
    figure = Figure(figsize=(1.9 * columns, 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, panels in zip(rows, axes, strict=True):
        captions = [f"{row.title}\n{row.gflops:.3f} GFLOPs"]
        captions += [f"block {block}\n{left} patch tokens" for block, left in zip(row.blocks, row.left, strict=True)]
        for panel, seen, caption in zip(panels, row.panels, captions, strict=True):
            panel.imshow(seen, interpolation="antialiased")  # "nearest" would drop outlines
            panel.set_title(caption, fontsize=9)
            panel.set_axis_off()
    figure.savefig(path, dpi=120)
