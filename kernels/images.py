"""Where an image lies: in a dense batch, or between two entries of ``cu_seqlens`` where images are packed."""

import triton
import triton.language as tl


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
