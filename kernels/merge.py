"""merge: every slot gathers its tokens, in their order, and sums them in float32.

The fused form does what a block does around a merge in the same pass over memory: residual sum before, LayerNorm after.
Each input row is read once and each output row written once; no atomics, so every run gives the same bits.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import tune


@triton.jit
def _row(x, attended, gamma, token, c, inside, C, RESIDUAL: tl.constexpr, SCALED: tl.constexpr):
    """A token as the merge sees it: x, or x + gamma * attended."""
    at = token.to(tl.int64) * C + c
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        update = tl.load(attended + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            update *= tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
        row += update
    return row


@triton.jit
def merge_kernel(
    x,
    attended,
    gamma,
    sizes,
    tokens,
    spans,
    weight,
    bias,
    merged,
    normed,
    merged_sizes,
    log2_sizes,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SIZED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One program a slot."""
    slot = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + 2 * slot), tl.load(spans + 2 * slot + 1)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    n = (end - begin).to(tl.float32)
    if SIZED:
        n = tl.zeros([], tl.float32)
        k = begin
        while k < end:
            n += tl.load(sizes + tl.load(tokens + k))
            k += 1
    row = tl.zeros([BLOCK_C], tl.float32)
    k = begin
    while k < end:
        token = tl.load(tokens + k)
        share = 1.0 / n
        if SIZED:
            share = tl.div_rn(tl.load(sizes + token), n)  # exactly 1 where a token is alone: it passes unchanged
        row += share * _row(x, attended, gamma, token, c, inside, C, RESIDUAL, SCALED)
        k += 1
    row = row.to(merged.dtype.element_ty)
    tl.store(merged + slot * C + c, row, mask=inside)
    tl.store(merged_sizes + slot, n)
    tl.store(log2_sizes + slot, tl.log2(n))
    if NORM:
        row = row.to(tl.float32)  # as rounded: the norm of what is stored
        mean = tl.sum(row, axis=0) / C
        centred = tl.where(inside, row - mean, 0.0)
        y = centred / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / C + eps)
        if AFFINE:
            y = y * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + slot * C + c, y.to(normed.dtype.element_ty), mask=inside)


def merge_table(dtype: torch.dtype, block: int, fused: bool) -> tune.Config:
    """``block``: channels, rounded up to a power of two: eight a thread, which is 16 bytes of bfloat16. ``fused``: with
    the norm."""
    return {"num_warps": max(1, min(8, block // 256))}


def merge_candidates() -> list[tune.Config]:
    return tune.every(num_warps=(1, 2, 4, 8))


def merge(
    x: Tensor,
    sizes: Tensor | None,
    tokens: Tensor,
    spans: Tensor,
    attended: Tensor | None = None,
    gamma: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Size-weighted means over the tokens of each slot (Definition 2).

    Args:
        x: rows [R, C]: the tokens of all images.
        sizes: float32 [R] in all; None for all ones.
        tokens, spans: from assign.
        attended: [R, C]: what attention adds to the residual stream; x + gamma * attended is merged.
        gamma: [C], the LayerScale; None for 1.
        norm: weight [C], bias [C] (each may be None) and eps of the LayerNorm that follows.
        slots: how many slots there are, if not as many as spans.

    Returns:
        merged [slots, C]; its LayerNorm (None without ``norm``); merged sizes float32 [slots]; their log2.
    """
    C = x.shape[1]
    x, sizes = x.contiguous(), None if sizes is None else sizes.contiguous()
    attended = None if attended is None else attended.contiguous()
    slots = len(spans) if slots is None else slots
    merged = torch.empty((slots, C), dtype=x.dtype, device=x.device)
    normed = torch.empty_like(merged) if norm is not None else None
    merged_sizes = torch.empty(slots, dtype=torch.float32, device=x.device)
    log2_sizes = torch.empty_like(merged_sizes)
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    if slots:
        block = max(16, triton.next_power_of_2(C))

        launch = partial(
            merge_kernel[(slots,)],
            x,
            attended,
            gamma,
            sizes,
            tokens,
            spans,
            weight,
            bias,
            merged,
            normed,
            merged_sizes,
            log2_sizes,
            eps,
            C=C,
            BLOCK_C=block,
            SIZED=sizes is not None,
            RESIDUAL=attended is not None,
            SCALED=gamma is not None,
            NORM=norm is not None,
            AFFINE=weight is not None,
            BIASED=bias is not None,
        )
        fused = norm is not None
        config = merge_table(x.dtype, block, fused)
        if tune.SEARCH:
            key = {"dtype": x.dtype, "block": block, "fused": fused}
            config = tune.tuned("merge", key, config, merge_candidates(), launch)
        launch(**config)
    return merged, normed, merged_sizes, log2_sizes
