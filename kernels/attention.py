"""attention: softmax(q k^T * scale + log n) v, flash style: no scores in memory (Appendix A; ToMe, Section 3)."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import tune
from atm_triton.kernels.images import check_strides, image_base, image_bounds

LOG2_E = 1.4426950408889634  # softmax in powers of two
BACKEND = "hip" if torch.version.hip else "cuda"
FLOAT32_DOTS = {"cuda": "tf32x3", "hip": "ieee"}  # as accurate as float32, and fast; neither compiles well elsewhere


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    log2_sizes,
    cu_seqlens,
    out,
    scale,
    N,
    queries,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    LEADING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for some queries of one head of one image. ``scale`` has the factor log2 e in it. ``LEADING``: the
    first ``queries`` tokens of an image ask, and q and out hold those alone, dense also where images are packed."""
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = image_bounds(cu_seqlens, image, N, PACKED)
    first_query, asking = start, length
    if LEADING:
        first_query, asking = image.to(tl.int64) * queries, queries
    if tile * ROWS >= asking:
        return
    at_head = head.to(tl.int64)  # heads may lie far apart
    i = tile * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, D)
    inside = (i < asking)[:, None] & (c < d)[None, :]
    q_tile = tl.load(
        image_base(q, image, first_query, q_stride_b, q_stride_n, PACKED and not LEADING)
        + at_head * q_stride_h
        + i[:, None] * q_stride_n
        + c[None, :],
        mask=inside,
        other=0.0,
    )
    k_base = image_base(k, image, start, k_stride_b, k_stride_n, PACKED) + at_head * k_stride_h
    v_base = image_base(v, image, start, v_stride_b, v_stride_n, PACKED) + at_head * v_stride_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    for first in tl.range(0, length, COLUMNS, num_stages=STAGES):
        j = first + tl.arange(0, COLUMNS)
        there = j < length
        inside_k = there[:, None] & (c < d)[None, :]
        k_tile = tl.load(k_base + j[:, None] * k_stride_n + c[None, :], mask=inside_k, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        if BIAS:
            s += tl.load(log2_sizes + start + j, mask=there, other=float("-inf"))[None, :]
        else:
            s = tl.where(there[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        v_tile = tl.load(v_base + j[:, None] * v_stride_n + c[None, :], mask=inside_k, other=0.0)
        total = total * shrink + tl.sum(p, axis=1)
        mixed = tl.dot(p.to(v_tile.dtype), v_tile, mixed * shrink[:, None], input_precision=PRECISION)
        top = higher
    at = out + ((first_query + i)[:, None] * H + head) * d + c[None, :]
    tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attention_table(dtype: torch.dtype, d: int, Nq: int, bias: bool, packed: bool, leading: bool) -> tune.Config:
    """Tiles for a dtype, channels of a head, a number of queries and what the kernel is compiled for; what is larger
    spills on one chip or another."""
    if Nq <= 16:
        columns = 64 if dtype != torch.float32 else 16
        return {"ROWS": 16, "COLUMNS": columns, "STAGES": 2, "num_warps": 4}
    if dtype == torch.float32:  # three products instead of one
        warps = 4 if d <= 64 and (bias or not packed) else 8
        return {"ROWS": 64 if d <= 64 else 32, "COLUMNS": 32, "STAGES": 2, "num_warps": warps}
    return {"ROWS": 64, "COLUMNS": 64, "STAGES": 2, "num_warps": 4}


def attention_candidates(dtype: torch.dtype, Nq: int) -> list[tune.Config]:
    rows, columns = (32, 64, 128), (32, 64, 128)
    if dtype == torch.float32:
        rows, columns = (16, 32, 64), (16, 32, 64)
    if Nq <= 16:
        rows = (16,)
    return tune.every(ROWS=rows, COLUMNS=columns, STAGES=(1, 2, 3, 4), num_warps=(2, 4, 8))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Attention with the logarithm of the sizes added to the scores.

    Args:
        q: [B, H, Nq, d], or packed [1, H, T, d]; k, v: [B, H, N, d], or packed [1, H, T, d], also where q is dense:
            the first Nq tokens of each image; any strides but 1 for the last.
        log2_sizes: float32 [B, N] (packed [1, T]): log2 of the patches that each token stands for; None for
            one each.
        cu_seqlens: int32 [B + 1], where each packed image starts; max_tokens: no image is longer.

    Returns:
        [B, H, Nq, d] in the dtype of q, a view of [B, Nq, H, d] in memory.

    Raises:
        ValueError: channels that do not lie together, or tokens too far apart.
    """
    B, H, Nq, d = q.shape
    N = k.shape[2]
    packed, leading = cu_seqlens is not None, Nq != N
    images, longest = (len(cu_seqlens) - 1, Nq if leading else max_tokens) if packed else (B, Nq)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_strides(name, x, max_tokens if packed else max(N, Nq))
    out = torch.empty((B, Nq, H, d), dtype=q.dtype, device=q.device)
    log2_sizes = None if log2_sizes is None else log2_sizes.contiguous()
    if images and longest:
        strides = [s for x in (q, k, v) for s in (x.stride(0), x.stride(2), x.stride(1))]

        def grid(meta: dict[str, Any]) -> tuple[int, ...]:
            return triton.cdiv(longest, meta["ROWS"]), H, images

        launch = partial(
            attention_kernel[grid],
            q,
            k,
            v,
            log2_sizes,
            cu_seqlens,
            out,
            scale * LOG2_E,
            N,
            Nq,
            *strides,
            H=H,
            d=d,
            D=max(16, triton.next_power_of_2(d)),
            BIAS=log2_sizes is not None,
            PACKED=packed,
            LEADING=leading,
            PRECISION=FLOAT32_DOTS[BACKEND] if q.dtype == torch.float32 else None,
        )
        kind = {"bias": log2_sizes is not None, "packed": packed, "leading": leading}
        config = attention_table(q.dtype, d, longest, **kind)
        if tune.SEARCH:
            key = {"dtype": q.dtype, "d": d, "Nq": tune.like(longest), **kind}
            config = tune.tuned("attention", key, config, attention_candidates(q.dtype, longest), launch)
        launch(**config)
    return out.transpose(1, 2)
