"""attention: computes softmax(q k^T * scale + log n) v without scores in memory (Appendix A; ToMe, Section 3)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels.common import aligned, block_for, check_strides, image_bounds

LOG2_E = 1.4426950408889634  # the softmax is computed with powers of two
BACKEND = "hip" if torch.version.hip else "cuda"
FLOAT32_DOTS = {"cuda": "tf32x3", "hip": "ieee"}  # fast float32 accuracy; neither compiles well for the other


@triton.jit
def _attend(
    query,
    k,
    v,
    log2_sizes,
    first,
    length,
    scale,
    k_stride_n,
    v_stride_n,
    top,
    total,
    mixed,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Continue the softmax with up to COLUMNS keys from ``first``. WHOLE: there are exactly COLUMNS, so no mask is
    needed. ``top``, ``total``, ``mixed``: so far, the highest score, the sum of terms and the weighted values."""
    j, c = first + tl.arange(0, COLUMNS), tl.arange(0, D)
    there = j < length
    inside = (c < d)[None, :]
    if not WHOLE:
        inside = inside & there[:, None]
    keys = tl.load(k + j[:, None] * k_stride_n + c[None, :], mask=inside, other=0.0)
    s = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if log2_sizes is not None:
        if WHOLE:
            s += tl.load(log2_sizes + j)[None, :]
        else:
            s += tl.load(log2_sizes + j, mask=there, other=float("-inf"))[None, :]
    elif not WHOLE:
        s = tl.where(there[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, axis=1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(s - higher[:, None])
    values = tl.load(v + j[:, None] * v_stride_n + c[None, :], mask=inside, other=0.0)
    total = total * shrink + tl.sum(p, axis=1)
    mixed = tl.dot(p.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    return higher, total, mixed


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    log2_sizes,
    q_cu_seqlens,
    cu_seqlens,
    out,
    lse,
    scale,
    q_stride_h,
    q_stride_n,
    k_stride_h,
    k_stride_n,
    v_stride_h,
    v_stride_n,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    TAILS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes some queries of one head of one image. ``scale`` includes the factor log2 e. Keys after the
    last whole tile go into the narrowest of TAILS tiles that holds them: COLUMNS wide, half of that, a quarter, ...
    Without TAILS every tile has a mask, which is slower but takes fewer registers."""
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query, asking = image_bounds(q_cu_seqlens, image)
    if tile * ROWS >= asking:
        return
    start, length = image_bounds(cu_seqlens, image)
    at_head = head.to(tl.int64)  # heads may lie far apart
    q += first_query * q_stride_n + at_head * q_stride_h
    k += start * k_stride_n + at_head * k_stride_h
    v += start * v_stride_n + at_head * v_stride_h
    at = first_query * H + head  # offset in tensors stored as [Tq, H, ...]
    if log2_sizes is not None:
        log2_sizes += start
    i, c = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    inside = (i < asking)[:, None] & (c < d)[None, :]
    query = tl.load(q + i[:, None] * q_stride_n + c[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    whole = length // COLUMNS * COLUMNS if TAILS else length
    for first in tl.range(0, whole, COLUMNS, num_stages=STAGES):
        top, total, mixed = _attend(
            query, k, v, log2_sizes, first, length, scale, k_stride_n, v_stride_n, top, total, mixed,
            COLUMNS, TAILS > 0, d, D, PRECISION,
        )  # fmt: skip
    left = length - whole
    for n in tl.static_range(TAILS):
        if (left > (0 if n + 1 == TAILS else (COLUMNS >> (n + 1)))) & (left <= (COLUMNS >> n)):
            top, total, mixed = _attend(
                query, k, v, log2_sizes, whole, length, scale, k_stride_n, v_stride_n, top, total, mixed,
                COLUMNS >> n, False, d, D, PRECISION,
            )  # fmt: skip
    to = out + at * d + i[:, None] * (H * d) + c[None, :]
    tl.store(to, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + at + i * H, top + tl.log2(total), mask=i < asking)


def attention_table(dtype: torch.dtype, d: int, Nq: int) -> dict[str, int]:
    """Tiles for a dtype, d channels per head, at most Nq queries per image. Larger tiles spill on some chip. Measured
    on an H200, triton 3.6.0, bfloat16, with log n: 6 heads of 64 channels, 1 to 256 images of 117 to 577 tokens; 12 of
    32; not float32. Up to 256 tokens narrow tiles pay, because much of the work is in the last tile."""
    if dtype == torch.float32:  # three products instead of one
        if d > 64:
            return {"ROWS": 16, "COLUMNS": 32, "STAGES": 2, "TAILS": 0, "num_warps": 8}
        if Nq <= 16:
            return {"ROWS": 16, "COLUMNS": 16, "STAGES": 2, "TAILS": 0, "num_warps": 4}
        return {"ROWS": 64, "COLUMNS": 16, "STAGES": 2, "TAILS": 0, "num_warps": 4}  # 8 warps have half the speed
    if d > 64 or Nq <= 16:
        return {"ROWS": 16 if Nq <= 16 else 64, "COLUMNS": 64, "STAGES": 2, "TAILS": 0, "num_warps": 4}
    if Nq <= 256:
        return {"ROWS": 64, "COLUMNS": 32, "STAGES": 3 if d % 16 == 0 else 2, "TAILS": 2, "num_warps": 4}
    return {"ROWS": 64, "COLUMNS": 64, "STAGES": 2, "TAILS": 3, "num_warps": 4}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    q_cu_seqlens: Tensor,
    cu_seqlens: Tensor,
    Nq: int,
    N: int,
    scale: float,
    lse: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Attention with the logarithm of the sizes added to the scores. Each image attends only to itself.

    Args:
        q: [H, Tq, d]; k, v: [H, T, d]; channels contiguous (last stride 1), other strides arbitrary.
        log2_sizes: float32 [T], log2 of the number of patches that each token stands for; None: one each.
        q_cu_seqlens, cu_seqlens: int32 [B + 1], where the queries and the keys of each image begin.
        Nq, N: upper bounds on the queries and the keys of an image; scale: the factor of q k^T.
        lse: float32 [Tq, H], filled with log2 of the sum that each softmax divides by; the derivative needs it.
        config: replaces the table's.

    Returns:
        [H, Tq, d] in the dtype of q, a view of [Tq, H, d] in memory.

    Raises:
        ValueError: channels are not contiguous, or tokens are too far apart.
    """
    H, Tq, d = q.shape
    check_strides("q", q, Nq)
    check_strides("k", k, N)
    check_strides("v", v, N)
    out = torch.empty((Tq, H, d), dtype=q.dtype, device=q.device)
    B = len(cu_seqlens) - 1
    if B and Tq:
        tensors = (q, k, v, *map(aligned, (log2_sizes, q_cu_seqlens, cu_seqlens)), out)
        config = config or attention_table(q.dtype, d, Nq)
        attention_kernel[(-(-Nq // config["ROWS"]), H, B)](
            *tensors,
            lse,
            scale * LOG2_E,
            *(stride for x in (q, k, v) for stride in x.stride()[:2]),
            H=H,
            d=d,
            D=block_for(d),
            PRECISION=FLOAT32_DOTS[BACKEND] if q.dtype == torch.float32 else None,
            **config,
        )
    return out.transpose(0, 1)
