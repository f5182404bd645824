"""unmerge: gives every token the row of its slot. A row is read once for each of its tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels.common import aligned
from atm_triton.kernels.merge import channels, parts_of, rows_table


@triton.jit(do_not_specialize=["rows", "T"])
def unmerge_kernel(
    x, slots, out, rows, T, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Each program takes ``ROWS`` tokens."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = token < T
    slot = tl.load(slots + token, mask=valid, other=-1)
    kept = (slot >= 0) & (slot < rows)  # a dropped token has nothing to read
    for part in tl.static_range(PARTS):
        c, _, there = channels(part, kept, C, PARTS, PART)
        row = tl.load(x + slot.to(tl.int64)[:, None] * C + c[None, :], mask=there, other=0.0)
        c, _, there = channels(part, valid, C, PARTS, PART)
        tl.store(out + token[:, None] * C + c[None, :], row, mask=there)


def unmerge(x: Tensor, slots: Tensor, config: dict[str, int] | None = None) -> Tensor:
    """x'[slots], 0 for a dropped token.

    Args:
        x: [T', C]; slots: int32 [T], the row that each token takes; a number outside 0 .. T' - 1 drops the token.
        config: replaces the table's.

    Returns:
        [T, C] in the dtype of x.
    """
    (rows, C), T = x.shape, len(slots)
    out = torch.empty((T, C), dtype=x.dtype, device=x.device)
    if T:
        parts, part = parts_of(C)
        config = config or rows_table(x.dtype, C)
        grid = (-(-T // config["ROWS"]),)
        unmerge_kernel[grid](aligned(x), aligned(slots), out, rows, T, C=C, PARTS=parts, PART=part, **config)
    return out
