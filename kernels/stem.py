"""stem: turns images into tokens. Patches that do not overlap are the rows of a matrix, so embedding them is one matrix
product. Positions are added to it before it is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import attention
from atm_triton.kernels.common import aligned


@triton.jit(do_not_specialize=["B", "h", "w", "N"])
def stem_kernel(
    images,
    weight,
    bias,
    position,
    out,
    B,
    h,
    w,
    N,
    CHANNELS: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program computes some channels of some patches, which may span several images. Programs next to each other
    share their patches."""
    K: tl.constexpr = CHANNELS * PH * PW
    patches = h * w
    columns = tl.cdiv(C, COLUMNS)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    m = tile * ROWS + tl.arange(0, ROWS)
    c = column * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = m < B * patches, c < C
    image, patch = (m // patches).to(tl.int64), m % patches
    width, plane = w * PW, h * PH * w * PW
    corner = image * plane * CHANNELS + (patch // w) * PH * width + (patch % w) * PW
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, K, DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, DEPTH)
        pixel = (k // (PH * PW)) * plane + (k // PW % PH) * width + k % PW
        pixels = tl.load(images + corner[:, None] + pixel[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
        weights = tl.load(weight + c[None, :] * K + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0)
        product = tl.dot(pixels.to(weights.dtype), weights, product, input_precision=PRECISION)
    if bias is not None:
        product += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    both = real[:, None] & inside[None, :]
    token = N - patches + patch  # the prefix tokens come first
    moved = tl.load(position + token[:, None] * C + c[None, :], mask=both, other=0.0).to(tl.float32)
    embedded = product.to(weight.dtype.element_ty).to(tl.float32)  # rounded like the output of a convolution
    at = (image * N + token)[:, None] * C + c[None, :]
    tl.store(out + at, (embedded + moved).to(out.dtype.element_ty), mask=both)


def stem_table(dtype: torch.dtype, wide: bool, together: bool) -> dict[str, int]:
    """Tiles of patches, channels and pixels to sum over. ``wide``: images are float32 and weights have 16 bits;
    ``together``: one row of pixels of a patch takes a multiple of 16 bytes."""
    if dtype == torch.float32:  # three products instead of one
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "STAGES": 2, "num_warps": 8}
    if together and not wide:  # larger tiles spill
        return {"ROWS": 64, "COLUMNS": 128, "DEPTH": 64, "STAGES": 3, "num_warps": 4}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 32 if wide else 64, "STAGES": 3, "num_warps": 8}


def stem(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    out: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Cut images into patches that do not overlap, and embed these.

    Args:
        images: [B, channels, H, W]; H and W are multiples of a patch's sides.
        weight: [C, channels, height, width] of the convolution that embeds a patch; bias: [C] or None, in its dtype.
        position: [N, C]: the prefix tokens, then what is added to each patch.
        out: a contiguous tensor to write to.
        config: replaces the table's.

    Returns:
        [B, N, C] in the dtype of ``position``.
    """
    (B, channels, H, W), (C, _, ph, pw) = images.shape, weight.shape
    N = len(position)
    h, w = H // ph, W // pw
    out = torch.empty((B, N, C), dtype=position.dtype, device=images.device) if out is None else out
    out[:, : N - h * w] = position[: N - h * w]
    wide, together = images.dtype.itemsize > weight.dtype.itemsize, pw * images.dtype.itemsize % 16 == 0
    config = config or stem_table(weight.dtype, wide, together)
    stem_kernel[(-(-C // config["COLUMNS"]) * -(-B * h * w // config["ROWS"]),)](
        *map(aligned, (images, weight, bias, position)),
        out,
        B,
        h,
        w,
        N,
        CHANNELS=channels,
        PH=ph,
        PW=pw,
        C=C,
        PRECISION=attention.FLOAT32_DOTS[attention.BACKEND] if weight.dtype == torch.float32 else None,
        **config,
    )
    return out
