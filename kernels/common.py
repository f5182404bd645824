"""Helpers that the kernels share: the rows of an image, the sides of tiles, and how tensors must lie in memory."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

FARTHEST = 2**31  # an image may span fewer elements than this, because offsets within it are int32
ALIGNED = 16  # bytes: a pointer that is a multiple of it and one that is not are two kernels to Triton


@triton.jit
def image_bounds(cu_seqlens, image):
    """The row of the image's first token (int64), and its number of tokens."""
    start = tl.load(cu_seqlens + image)
    return start.to(tl.int64), tl.load(cu_seqlens + image + 1) - start


def block_for(n: int) -> int:
    """The side of a tile that holds n: a power of two and at least 16, which tl.dot needs. Triton's own function for
    this takes as long as a launch."""
    return max(16, 1 << (n - 1).bit_length()) if n > 1 else 16


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device; without a GPU, that of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def aligned(x: Tensor | None) -> Tensor | None:
    """``x`` as a contiguous tensor at an aligned address; it is copied if it is not, as some slices are not."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()


def check_strides(name: str, x: Tensor, N: int) -> None:
    """Check that a kernel can read ``x`` [H, T, d] in place if no image has more than ``N`` tokens.

    Raises:
        ValueError: channels are not contiguous, or the tokens of an image are too far apart.
    """
    _, stride_n, stride_d = x.stride()
    if stride_d != 1:
        raise ValueError(f"{name} has stride {stride_d} between channels; want 1 (make it contiguous)")
    if N * stride_n >= FARTHEST:
        raise ValueError(
            f"{name} has stride {stride_n} between tokens: {N} of them reach 2^31 elements; make it contiguous"
        )
