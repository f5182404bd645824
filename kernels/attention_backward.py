"""The derivative of attention, flash style: recomputes probabilities from the logarithms of their sums.

With p = softmax(q k^T * scale + log n), o = p v and g the gradient of o (Dao et al., FlashAttention, Appendix B):
dv = p^T g, ds = p * (g v^T - sum(g * o)), dq = ds k * scale, dk = ds^T q * scale. One kernel goes by rows of queries,
the other by rows of keys, so no atomics are needed and every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import attention
from atm_triton.kernels.common import aligned, block_for, check_strides, image_bounds

PER_BIT = tl.constexpr(1.0 / attention.LOG2_E)  # removes log2 e from the scale again


@triton.jit
def _rows(base, row, stride_n, inside):
    """Load rows of a head [rows, D]; missing rows are 0."""
    c = tl.arange(0, inside.shape[1])
    return tl.load(base + row[:, None] * stride_n + c[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(queries, keys, scale, log2_sizes, j, there, lse, PRECISION: tl.constexpr):
    """The probabilities [rows, columns]; ``scale`` includes the factor log2 e."""
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    if log2_sizes is not None:
        s += tl.load(log2_sizes + j, mask=there, other=0.0)[None, :]
    return tl.where(there[None, :], tl.exp2(s - lse[:, None]), 0.0)


@triton.jit
def gradient_of_q_kernel(
    q,
    k,
    v,
    log2_sizes,
    grad,
    out,
    lse,
    delta,
    q_cu_seqlens,
    cu_seqlens,
    dq,
    scale,
    stride_h,
    stride_n,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes some queries of one head of one image. Writes ``delta``, the sums of g * o, for the kernel
    below."""
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query, asking = image_bounds(q_cu_seqlens, image)
    if tile * ROWS >= asking:
        return
    start, length = image_bounds(cu_seqlens, image)
    at_head = head.to(tl.int64) * stride_h
    q += first_query * stride_n + at_head
    k += start * stride_n + at_head
    v += start * stride_n + at_head
    if log2_sizes is not None:
        log2_sizes += start
    at = first_query * H + head  # offset in tensors stored as [Tq, H, ...]
    i, c = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    valid = i < asking
    inside = valid[:, None] & (c < d)[None, :]
    queries = _rows(q, i, stride_n, inside)
    g = _rows(grad + at * d, i, H * d, inside)
    o = _rows(out + at * d, i, H * d, inside)
    of_row = tl.load(lse + at + i * H, mask=valid, other=0.0)
    sums = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + at + i * H, sums, mask=valid)
    total = tl.zeros([ROWS, D], tl.float32)
    for first in tl.range(0, length, COLUMNS, num_stages=STAGES):
        j = first + tl.arange(0, COLUMNS)
        there = j < length
        of_key = there[:, None] & (c < d)[None, :]
        keys = _rows(k, j, stride_n, of_key)
        values = _rows(v, j, stride_n, of_key)
        p = _scores(queries, keys, scale, log2_sizes, j, there, of_row, PRECISION)
        dp = tl.dot(g, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - sums[:, None])
        total = tl.dot(ds.to(keys.dtype), keys, total, input_precision=PRECISION)
    tl.store(
        dq + at * d + i[:, None] * (H * d) + c[None, :],
        (total * (scale * PER_BIT)).to(dq.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def gradient_of_kv_kernel(
    q,
    k,
    v,
    log2_sizes,
    grad,
    lse,
    delta,
    q_cu_seqlens,
    cu_seqlens,
    dk,
    dv,
    scale,
    stride_h,
    stride_n,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes some keys of one head of one image."""
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = image_bounds(cu_seqlens, image)
    if tile * COLUMNS >= length:
        return
    first_query, asking = image_bounds(q_cu_seqlens, image)
    at_head = head.to(tl.int64) * stride_h
    q += first_query * stride_n + at_head
    k += start * stride_n + at_head
    v += start * stride_n + at_head
    if log2_sizes is not None:
        log2_sizes += start
    at = first_query * H + head
    grad += at * d
    j, c = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, D)
    there = j < length
    of_key = there[:, None] & (c < d)[None, :]
    keys = _rows(k, j, stride_n, of_key)
    values = _rows(v, j, stride_n, of_key)
    of_keys = tl.zeros([COLUMNS, D], tl.float32)
    of_values = tl.zeros([COLUMNS, D], tl.float32)
    for first in tl.range(0, asking, ROWS, num_stages=STAGES):
        i = first + tl.arange(0, ROWS)
        valid = i < asking
        inside = valid[:, None] & (c < d)[None, :]
        queries = _rows(q, i, stride_n, inside)
        g = _rows(grad, i, H * d, inside)
        of_row = tl.load(lse + at + i * H, mask=valid, other=float("inf"))  # probability 0 beyond the queries
        sums = tl.load(delta + at + i * H, mask=valid, other=0.0)
        p = _scores(queries, keys, scale, log2_sizes, j, there, of_row, PRECISION)
        of_values = tl.dot(tl.trans(p.to(g.dtype)), g, of_values, input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - sums[:, None])
        of_keys = tl.dot(tl.trans(ds.to(queries.dtype)), queries, of_keys, input_precision=PRECISION)
    to = (start * H + head) * d + j[:, None] * (H * d) + c[None, :]
    tl.store(dk + to, (of_keys * (scale * PER_BIT)).to(dk.dtype.element_ty), mask=of_key)
    tl.store(dv + to, of_values.to(dv.dtype.element_ty), mask=of_key)


def attention_backward_table(dtype: torch.dtype, d: int, Nq: int) -> dict[str, int]:
    """Tiles for a dtype, d channels per head, at most Nq queries per image. Larger tiles spill on some chip. Measured
    on an H200, triton 3.6.0, bfloat16: 256 images of 197 tokens, 6 heads of 64 channels."""
    if dtype == torch.float32:  # three products instead of one
        return {"ROWS": 16, "COLUMNS": 16, "STAGES": 1, "num_warps": 8}
    if Nq <= 16:
        return {"ROWS": 16, "COLUMNS": 32 if d <= 64 else 16, "STAGES": 3 if d <= 64 else 1, "num_warps": 4}
    return {"ROWS": 64 if d <= 64 else 32, "COLUMNS": 32, "STAGES": 2, "num_warps": 4}


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    q_cu_seqlens: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    Nq: int,
    N: int,
    scale: float,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v.

    Args:
        grad: [H, Tq, d], the gradient of ``out``.
        out: [H, Tq, d] and lse: float32 [Tq, H], from :func:`atm_triton.kernels.attention.attention`.
        q, k, v, log2_sizes, q_cu_seqlens, cu_seqlens, Nq, N, scale: the arguments of that call.
        config: replaces the table's.

    Returns:
        [H, Tq, d], [H, T, d], [H, T, d] in the dtype of q, views of [Tq, H, d] and [T, H, d] in memory.

    Raises:
        ValueError: tokens are too far apart.
    """
    H, Tq, d = q.shape
    grad, out = (x.transpose(0, 1).contiguous() for x in (grad.to(q.dtype), out))
    strides = k.stride()[:2]
    if k.stride(2) != 1 or not q.stride() == k.stride() == v.stride():  # the kernels take only one set of strides
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        strides = (d, H * d)  # torch may report other strides for a single token
    check_strides("k", k, N)
    dq, dk, dv = (torch.empty((x.shape[1], H, d), dtype=x.dtype, device=x.device) for x in (q, k, v))
    B = len(cu_seqlens) - 1
    if not (B and Tq):
        return dq.zero_().transpose(0, 1), dk.zero_().transpose(0, 1), dv.zero_().transpose(0, 1)
    config = config or attention_backward_table(q.dtype, d, Nq)
    log2_sizes, grad, out, lse, q_cu_seqlens, cu_seqlens = map(
        aligned, (log2_sizes, grad, out, lse, q_cu_seqlens, cu_seqlens)
    )
    delta = torch.empty_like(lse)
    constants = {"H": H, "d": d, "D": block_for(d), **config}
    constants["PRECISION"] = attention.FLOAT32_DOTS[attention.BACKEND] if q.dtype == torch.float32 else None
    tail = (scale * attention.LOG2_E, *strides)
    given = (q, k, v, log2_sizes, grad)
    begins = (q_cu_seqlens, cu_seqlens)
    grid = (-(-Nq // config["ROWS"]), H, B)
    gradient_of_q_kernel[grid](*given, out, lse, delta, *begins, dq, *tail, **constants)
    grid = (-(-N // config["COLUMNS"]), H, B)
    gradient_of_kv_kernel[grid](*given, lse, delta, *begins, dk, dv, *tail, **constants)
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)
