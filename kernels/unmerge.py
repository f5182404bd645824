"""unmerge: every token takes the row of its slot. One program a token: a row is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels.images import aligned, block_for


@triton.jit(do_not_specialize=["rows"])
def unmerge_kernel(x, slots, out, rows, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    c = tl.arange(0, BLOCK_C)
    width = tl.where((slot >= 0) & (slot < rows), C, 0)  # nothing to read for a dropped token
    row = tl.load(x + slot.to(tl.int64) * C + c, mask=c < width, other=0.0)
    tl.store(out + token * C + c, row, mask=c < C)


def unmerge_table(dtype: torch.dtype, block: int) -> dict[str, int]:
    """``block``: channels, rounded up to a power of two: eight a thread, as in merge."""
    return {"num_warps": max(1, min(8, block // 256))}


def unmerge(x: Tensor, slots: Tensor, config: dict[str, int] | None = None) -> Tensor:
    """x'[slots], 0 for a dropped token.

    Args:
        x: [T', C]; slots: int32 [T], the row that each token takes; any other number than 0 .. T' - 1 drops it.
        config: instead of the table's.

    Returns:
        [T, C] in the dtype of x.
    """
    (rows, C), T = x.shape, len(slots)
    out = torch.empty((T, C), dtype=x.dtype, device=x.device)
    if T:
        block = block_for(C)
        config = config or unmerge_table(x.dtype, block)
        unmerge_kernel[(T,)](aligned(x), aligned(slots), out, rows, C=C, BLOCK_C=block, **config)
    return out
