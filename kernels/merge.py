"""merge: every slot gathers its tokens, in their order, and sums them in float32.

The fused form does what a block does around a merge in the same pass over memory: residual sum before, LayerNorm after;
``add_norm`` is that for rows that stay as they are. Each input row is read once and each output row written once; no
atomics, so every run gives the same bits.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import tune
from atm_triton.kernels.images import aligned, block_for

Norm = tuple[Tensor | None, Tensor | None, float]  # weight [C], bias [C], eps


@triton.jit
def _row(x, attended, gamma, token, c, C: tl.constexpr):
    """A token as the merge sees it: x, or x + gamma * attended, in float32."""
    at, inside = token.to(tl.int64) * C + c, c < C
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if attended is not None:
        update = tl.load(attended + at, mask=inside, other=0.0).to(tl.float32)
        if gamma is not None:
            update *= tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
        row += update
    return row


@triton.jit
def _store_with_norm(row, weight, bias, eps, out, normed, slot, c, C: tl.constexpr):
    """Stores a row and, where asked for, its LayerNorm."""
    at, inside = slot * C + c, c < C
    row = row.to(out.dtype.element_ty)
    tl.store(out + at, row, mask=inside)
    if normed is not None:
        row = row.to(tl.float32)  # as rounded: the norm of what is stored
        mean = tl.sum(row, axis=0) / C
        centred = tl.where(inside, row - mean, 0.0)
        y = centred / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / C + eps)
        if weight is not None:
            y = y * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images"])
def merge_kernel(
    x,
    attended,
    gamma,
    sizes,
    tokens,
    spans,
    cu_seqlens,
    images,
    weight,
    bias,
    eps,
    merged,
    normed,
    merged_sizes,
    log2_sizes,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a slot; there may be more programs than slots."""
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(cu_seqlens + images):
        return
    begin, end = tl.load(spans + 2 * slot), tl.load(spans + 2 * slot + 1)
    c = tl.arange(0, BLOCK_C)
    n = (end - begin).to(tl.float32)
    if sizes is not None:
        n = tl.zeros([], tl.float32)
        for k in tl.range(begin, end):
            n += tl.load(sizes + tl.load(tokens + k))
    row = tl.zeros([BLOCK_C], tl.float32)
    for k in tl.range(begin, end):
        token = tl.load(tokens + k)
        share = 1.0 / n
        if sizes is not None:
            share = tl.div_rn(tl.load(sizes + token), n)  # exactly 1 where a token is alone: it passes unchanged
        row += share * _row(x, attended, gamma, token, c, C)
    tl.store(merged_sizes + slot, n)
    tl.store(log2_sizes + slot, tl.log2(n))
    _store_with_norm(row, weight, bias, eps, merged, normed, slot, c, C)


@triton.jit
def add_norm_kernel(x, attended, gamma, weight, bias, eps, summed, normed, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program a row."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    row = _row(x, attended, gamma, token, c, C)
    _store_with_norm(row, weight, bias, eps, summed, normed, token, c, C)


def merge_table(dtype: torch.dtype, block: int, fused: bool) -> tune.Config:
    """``block``: channels, rounded up to a power of two: eight a thread, which is 16 bytes of bfloat16. ``fused``: with
    the norm."""
    return {"num_warps": max(1, min(8, block // 256))}


def merge_candidates() -> list[tune.Config]:
    return tune.every(num_warps=(1, 2, 4, 8))


def add_norm_table(dtype: torch.dtype, block: int) -> tune.Config:
    """As merge."""
    return {"num_warps": max(1, min(8, block // 256))}


add_norm_candidates = merge_candidates


def merge(
    x: Tensor,
    sizes: Tensor | None,
    tokens: Tensor,
    spans: Tensor,
    cu_seqlens: Tensor,
    attended: Tensor | None = None,
    gamma: Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Size-weighted means over the tokens of each slot (Definition 2).

    Args:
        x: rows [T, C]: the tokens of all images.
        sizes: float32 [T]; None for all ones.
        tokens: int32 [T]; spans: int32 [T', 2]; both from assign.
        cu_seqlens: int32 [B + 1], where the merged images begin. There are cu_seqlens[B] slots; where ``spans`` has
            more rows than that, what is returned has them too, and they mean nothing.
        attended: [T, C]: what attention adds to the residual stream; x + gamma * attended is merged.
        gamma: [C], the LayerScale; None for 1.
        norm: weight [C], bias [C] (each may be None) and eps of the LayerNorm that follows.

    Returns:
        merged [T', C] and its LayerNorm (None without ``norm``), both in the dtype of x, whatever the others have;
        merged sizes float32 [T']; their log2.
    """
    C, slots = x.shape[1], len(spans)
    merged = torch.empty((slots, C), dtype=x.dtype, device=x.device)
    normed = torch.empty_like(merged) if norm is not None else None
    merged_sizes = torch.empty(slots, dtype=torch.float32, device=x.device)
    log2_sizes = torch.empty_like(merged_sizes)
    if slots:
        block = block_for(C)
        inputs = map(aligned, (x, attended, gamma, sizes, tokens, spans, cu_seqlens))
        out = (merged, normed, merged_sizes, log2_sizes)
        numbers = (len(cu_seqlens) - 1, *_aligned_norm(norm))
        launch = partial(merge_kernel[(slots,)], *inputs, *numbers, *out, C=C, BLOCK_C=block)
        key = {"dtype": x.dtype, "block": block, "fused": norm is not None}
        tune.run("merge", key, merge_table(**key), merge_candidates, launch)
    return merged, normed, merged_sizes, log2_sizes


def add_norm(
    x: Tensor, attended: Tensor, gamma: Tensor | None, norm: Norm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + gamma * attended, [T, C], written to ``out`` if that is given, and its LayerNorm, both in the dtype of x;
    arguments as in :func:`merge`."""
    T, C = x.shape
    summed = torch.empty((T, C), dtype=x.dtype, device=x.device) if out is None else out
    normed = torch.empty_like(summed)
    if T:
        block = block_for(C)
        inputs = (*map(aligned, (x, attended, gamma)), *_aligned_norm(norm))
        launch = partial(add_norm_kernel[(T,)], *inputs, summed, normed, C=C, BLOCK_C=block)
        key = {"dtype": x.dtype, "block": block}
        tune.run("add_norm", key, add_norm_table(**key), add_norm_candidates, launch)
    return summed, normed


def _aligned_norm(norm: Norm | None) -> Norm:
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    return aligned(weight), aligned(bias), eps
