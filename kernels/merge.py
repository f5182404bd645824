"""merge: gathers the tokens of every slot, in their order, and sums them in float32.

The fused form also does what a block does around a merge, in the same pass over memory: the residual sum before and the
LayerNorm after it. ``add_norm`` does this for rows that do not merge. Each input row is read once and each output row
written once. There are no atomics, so every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels.common import aligned, block_for

Norm = tuple[Tensor | None, Tensor | None, float]  # weight [C], bias [C], eps


@triton.jit
def channels(part: tl.constexpr, valid, C: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """The channels of a part [PART], whether each exists, and the mask that this and ``valid`` rows make."""
    c = part * PART + tl.arange(0, PART)
    inside, mask = c < C, valid[:, None]
    if PARTS * PART > C:
        mask = mask & inside[None, :]
    return c, inside, mask


@triton.jit
def _for_each(vector, c, inside, ROWS: tl.constexpr):
    """Load a vector over channels once per row [ROWS, PART]. In this layout it need not move between threads."""
    at = c[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.load(vector + at, mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rows(
    x, attended, gamma, token, valid, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Load the tokens to merge, x or x + gamma * attended, in float32, as a tuple of parts [ROWS, PART]. Missing rows
    are 0."""
    rows = ()
    for part in tl.static_range(PARTS):
        c, inside, mask = channels(part, valid, C, PARTS, PART)
        at = token.to(tl.int64)[:, None] * C + c[None, :]
        row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if attended is not None:
            update = tl.load(attended + at, mask=mask, other=0.0).to(tl.float32)
            if gamma is not None:
                update *= _for_each(gamma, c, inside, ROWS)
            row += update
        rows += (row,)
    return rows


@triton.jit
def _weighted(rows, share, PARTS: tl.constexpr):
    weighted = ()
    for part in tl.static_range(PARTS):
        weighted += (share[:, None] * rows[part],)
    return weighted


@triton.jit
def _add(a, b, PARTS: tl.constexpr):
    both = ()
    for part in tl.static_range(PARTS):
        both += (a[part] + b[part],)
    return both


@triton.jit
def _store_with_norm(
    rows,
    weight,
    bias,
    eps,
    out,
    normed,
    slot,
    valid,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Store rows and, if ``normed`` is given, their LayerNorm."""
    at, rounded = slot[:, None] * C, ()
    total = tl.zeros([ROWS, PART], tl.float32)
    for part in tl.static_range(PARTS):
        c, inside, mask = channels(part, valid, C, PARTS, PART)
        row = rows[part].to(out.dtype.element_ty)
        tl.store(out + at + c[None, :], row, mask=mask)
        rounded += (row.to(tl.float32),)  # take the norm of the stored values
        total += rounded[part]
    if normed is not None:
        mean = tl.sum(total, axis=1) / C
        centred = ()
        squares = tl.zeros([ROWS, PART], tl.float32)
        for part in tl.static_range(PARTS):
            c, inside, mask = channels(part, valid, C, PARTS, PART)
            centred += (tl.where(inside[None, :], rounded[part] - mean[:, None], 0.0),)
            squares += centred[part] * centred[part]
        deviation = tl.sqrt_rn(tl.sum(squares, axis=1) / C + eps)
        for part in tl.static_range(PARTS):
            c, inside, mask = channels(part, valid, C, PARTS, PART)
            y = centred[part] / deviation[:, None]
            if weight is not None:
                y = y * _for_each(weight, c, inside, ROWS)
            if bias is not None:
                y += _for_each(bias, c, inside, ROWS)
            tl.store(normed + at + c[None, :], y.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images"])
def merge_kernel(
    x,
    attended,
    gamma,
    sizes,
    order,
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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Each program merges ``ROWS`` slots; surplus programs return at once. A slot with fewer tokens than others of its
    program keeps adding 0."""
    T = tl.load(cu_seqlens + images)  # T', over all images
    if tl.program_id(0) * ROWS >= T:
        return
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = slot < T
    begin = tl.load(spans + 2 * slot, mask=valid, other=0)
    length = tl.load(spans + 2 * slot + 1, mask=valid, other=0) - begin
    most = tl.max(length, axis=0)
    n = length.to(tl.float32)
    if sizes is not None:
        n = tl.zeros([ROWS], tl.float32)
        for k in tl.range(0, most):
            token = tl.load(order + begin + k, mask=k < length, other=0)
            n += tl.load(sizes + token, mask=k < length, other=0.0)
    n = tl.where(valid, n, 1.0)
    tl.store(merged_sizes + slot, n, mask=valid)
    tl.store(log2_sizes + slot, tl.log2(n), mask=valid)
    n = tl.where(length > 0, n, 1.0)
    rows = ()
    for _ in tl.static_range(PARTS):
        rows += (tl.zeros([ROWS, PART], tl.float32),)
    for k in tl.range(0, most):
        there = k < length
        token = tl.load(order + begin + k, mask=there, other=0)
        share = 1.0 / n
        if sizes is not None:
            size = tl.load(sizes + token, mask=there, other=0.0)
            share = tl.div_rn(size, n)  # exactly 1 for a single token, which passes unchanged
        more = _rows(x, attended, gamma, token, there, C, ROWS, PARTS, PART)
        rows = _add(rows, _weighted(more, share, PARTS), PARTS)
    _store_with_norm(rows, weight, bias, eps, merged, normed, slot, valid, C, ROWS, PARTS, PART)


@triton.jit(do_not_specialize=["T"])
def add_norm_kernel(
    x,
    attended,
    gamma,
    weight,
    bias,
    eps,
    summed,
    normed,
    T,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Each program takes ``ROWS`` rows."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = token < T
    rows = _rows(x, attended, gamma, token, valid, C, ROWS, PARTS, PART)
    _store_with_norm(rows, weight, bias, eps, summed, normed, token, valid, C, ROWS, PARTS, PART)


def parts_of(C: int) -> tuple[int, int]:
    """Split C channels into parts whose size is a power of two: 384 channels are three parts of 128. Returns the number
    of parts and their size. If there would be too many parts, or small ones, it is one part that is partly empty."""
    part = C & -C
    return (C // part, part) if C // part <= 5 and part >= 16 else (1, block_for(C))


def rows_table(dtype: torch.dtype, C: int) -> dict[str, int]:
    """Rows per program and warps of merge, add_norm and unmerge. In 16 bits a program takes whole rows of up to 6144
    bytes of x, 96 per thread of two warps; rows of five parts take four warps, because two spill on sm_100. In float32
    it takes up to 3072 bytes, 48 per thread of two warps or 24 of four, and at most four rows if parts have up to 16
    channels: more spills on sm_80. The bits of a row depend only on its dtype and C.

    Measured on an H200, triton 3.6.0, bfloat16: merge and add_norm with the norm, 384 channels, 1,576 to 50,432 slots;
    768, 37,000 and 50,432; unmerge to 197, 12,608 and 50,432 tokens of 384 and 768.
    """
    parts, part = parts_of(C)
    if dtype == torch.float32:
        nbytes, warps = 3072, 4 if C >= 768 else 2
    else:
        nbytes, warps = 6144, 4 if parts == 5 else 2
    most = 4 if dtype == torch.float32 and part <= 16 else 16
    rows = min(most, max(1, nbytes // (parts * part * dtype.itemsize)))
    return {"ROWS": 1 << (rows.bit_length() - 1), "num_warps": max(warps, min(8, parts * part // 1024))}


def merge(
    x: Tensor,
    sizes: Tensor | None,
    order: Tensor,
    spans: Tensor,
    cu_seqlens: Tensor,
    attended: Tensor | None = None,
    gamma: Tensor | None = None,
    norm: Norm | None = None,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute the size-weighted mean of the tokens in each slot (Definition 2).

    Args:
        x: rows [T, C]: the tokens of all images.
        sizes: float32 [T]; None for all ones.
        order: int32 [T]; spans: int32 [T', 2]; both from assign.
        cu_seqlens: int32 [B + 1], where the merged images begin. There are cu_seqlens[B] slots. If ``spans`` has more
            rows, so do the results, and the extra rows are undefined.
        attended: [T, C]: what attention adds to the residual stream; x + gamma * attended is merged.
        gamma: [C], the LayerScale; None for 1.
        norm: weight [C], bias [C] (each may be None) and eps of the LayerNorm that follows.
        config: replaces the table's.

    Returns:
        merged [T', C] and its LayerNorm (None without ``norm``), both in the dtype of x, whatever the other dtypes;
        merged sizes float32 [T']; their log2.
    """
    C, rows = x.shape[1], len(spans)
    merged = torch.empty((rows, C), dtype=x.dtype, device=x.device)
    normed = torch.empty_like(merged) if norm is not None else None
    merged_sizes = torch.empty(rows, dtype=torch.float32, device=x.device)
    log2_sizes = torch.empty_like(merged_sizes)
    if rows:
        inputs = map(aligned, (x, attended, gamma, sizes, order, spans, cu_seqlens))
        out = (merged, normed, merged_sizes, log2_sizes)
        numbers = (len(cu_seqlens) - 1, *_aligned_norm(norm))
        parts, part = parts_of(C)
        config = config or rows_table(x.dtype, C)
        grid = (-(-rows // config["ROWS"]),)
        merge_kernel[grid](*inputs, *numbers, *out, C=C, PARTS=parts, PART=part, **config)
    return merged, normed, merged_sizes, log2_sizes


def add_norm(
    x: Tensor,
    attended: Tensor,
    gamma: Tensor | None,
    norm: Norm,
    out: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute x + gamma * attended, [T, C], and its LayerNorm, both in the dtype of x. The sum is written to ``out`` if
    given. Other arguments as in :func:`merge`."""
    T, C = x.shape
    summed = torch.empty((T, C), dtype=x.dtype, device=x.device) if out is None else out
    normed = torch.empty_like(summed)
    if T:
        inputs = (*map(aligned, (x, attended, gamma)), *_aligned_norm(norm))
        parts, part = parts_of(C)
        config = config or rows_table(x.dtype, C)
        grid = (-(-T // config["ROWS"]),)
        add_norm_kernel[grid](*inputs, summed, normed, T, C=C, PARTS=parts, PART=part, **config)
    return summed, normed


def _aligned_norm(norm: Norm | None) -> Norm:
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    return aligned(weight), aligned(bias), eps
