"""unmerge: every token takes the row of its slot. One program a token: a row is read and written once."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import tune
from atm_triton.kernels.images import image_bounds


@triton.jit
def unmerge_kernel(
    x,
    assignment,
    cu_seqlens,
    new_cu_seqlens,
    out,
    N,
    M,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
    FROM_PACKED: tl.constexpr,
):
    """``PACKED``: of the tokens; ``FROM_PACKED``: of the slots."""
    image, token = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image, N, PACKED)
    if token >= length:
        return
    slots, M = image_bounds(new_cu_seqlens, image, M, FROM_PACKED)
    slot = tl.load(assignment + start + token)
    c = tl.arange(0, BLOCK_C)
    width = tl.where((slot >= 0) & (slot < M), C, 0)  # nothing to read for a dropped token
    row = tl.load(x + (slots + slot) * C + c, mask=c < width, other=0.0)
    tl.store(out + (start + token) * C + c, row, mask=c < C)


def unmerge_table(dtype: torch.dtype, block: int) -> tune.Config:
    """``block``: channels, rounded up to a power of two: eight a thread, as in merge."""
    return {"num_warps": max(1, min(8, block // 256))}


def unmerge_candidates() -> list[tune.Config]:
    return tune.every(num_warps=(1, 2, 4, 8))


def unmerge(
    x: Tensor,
    assignment: Tensor,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """x'[assignment], 0 for a dropped token.

    Args:
        x: [B, M, C], or packed [1, slots, C] with ``new_cu_seqlens``.
        assignment: int32 [B, N], or packed [1, T] with ``cu_seqlens``; max_tokens: no image is longer.

    Returns:
        [B, N, C], or packed [1, T, C].
    """
    (B, N), (_, M, C) = assignment.shape, x.shape
    x, assignment = x.contiguous(), assignment.contiguous()
    images, longest = (len(cu_seqlens) - 1, max_tokens) if cu_seqlens is not None else (B, N)
    out = torch.empty((B, N, C), dtype=x.dtype, device=x.device)
    if images and longest:
        block = max(16, triton.next_power_of_2(C))

        launch = partial(
            unmerge_kernel[(images, longest)],
            x,
            assignment,
            cu_seqlens,
            new_cu_seqlens,
            out,
            N,
            M,
            C=C,
            BLOCK_C=block,
            PACKED=cu_seqlens is not None,
            FROM_PACKED=new_cu_seqlens is not None,
        )
        config = unmerge_table(x.dtype, block)
        if tune.SEARCH:
            key = {"dtype": x.dtype, "block": block}
            config = tune.tuned("unmerge", key, config, unmerge_candidates(), launch)
        launch(**config)
    return out
