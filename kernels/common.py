"""What the kernels share: the rows of an image, the sides of tiles, and what is asked of tensors in memory."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

FARTHEST = 2**31  # elements within an image: its tokens are told apart in int32
ALIGNED = 16  # bytes: a pointer that is a multiple of it and one that is not are two kernels to Triton


@triton.jit
def image_bounds(cu_seqlens, image):
    """The row of the image's first token (int64), and its number of tokens."""
    start = tl.load(cu_seqlens + image)
    return start.to(tl.int64), tl.load(cu_seqlens + image + 1) - start


def block_for(n: int) -> int:
    """The side of a tile that holds n: a power of two, and 16 at least, as a dot wants it. Triton's own function for it
    takes as long as a launch."""
    return max(16, 1 << (n - 1).bit_length()) if n > 1 else 16


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs' worth of hardware a device has; an H100's where it is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def aligned(x: Tensor | None) -> Tensor | None:
    """``x`` contiguous and where memory of its own would begin: a copy of a slice that begins elsewhere."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()


def check_strides(name: str, x: Tensor, N: int) -> None:
    """Whether a kernel can read ``x`` [H, T, d] in place, where no image has more than ``N`` tokens.

    Raises:
        ValueError: channels that do not lie together, or tokens of an image that lie too far apart.
    """
    _, stride_n, stride_d = x.stride()
    if stride_d != 1:
        raise ValueError(f"{name} has stride {stride_d} between channels; want 1 (make it contiguous)")
    if N * stride_n >= FARTHEST:
        raise ValueError(
            f"{name} has stride {stride_n} between tokens: {N} of them reach 2^31 elements; make it contiguous"
        )
