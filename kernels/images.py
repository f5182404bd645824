"""Where an image lies: in a dense batch, or between two entries of ``cu_seqlens`` where images are packed."""

import triton
import triton.language as tl
from torch import Tensor

FARTHEST = 2**31  # elements within an image: its tokens are told apart in int32


@triton.jit
def image_bounds(cu_seqlens, b, N, PACKED: tl.constexpr):
    """The row of the image's first token (int64), and its number of tokens."""
    if PACKED:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        length = (tl.load(cu_seqlens + b + 1) - start).to(tl.int32)
    else:
        start = b.to(tl.int64) * N
        length = N
    return start, length


@triton.jit
def image_base(x, b, start, stride_b, stride_n, PACKED: tl.constexpr):
    """Where the image's rows begin in a strided tensor."""
    if PACKED:
        x += start * stride_n
    else:
        x += b.to(tl.int64) * stride_b
    return x


def check_strides(name: str, x: Tensor, longest: int) -> None:
    """Whether a kernel can read ``x`` [B, H, N, d] in place, where no image has more than ``longest`` tokens.

    Raises:
        ValueError: channels that do not lie together, or tokens of an image that lie too far apart.
    """
    _, _, stride_n, stride_d = x.stride()
    if stride_d != 1:
        raise ValueError(f"{name} has stride {stride_d} between channels; want 1 (make it contiguous)")
    if longest * stride_n >= FARTHEST:
        raise ValueError(
            f"{name} has stride {stride_n} between tokens: {longest} of them reach 2^31 elements; make it contiguous"
        )
