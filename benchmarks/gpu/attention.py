"""Attention with log n: the kernel and torch's alternatives, each with its time and its error against float64.

The library takes the kernel wherever log n is added; these rows show where an alternative would be faster.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from atm_triton import ops, reference
from atm_triton.packed import Images
from benchmarks.gpu import StageError
from benchmarks.gpu.setting import Setting, one_line, qkv, short, some_sizes
from benchmarks.gpu.timing import compiled, median_us

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
SHAPES = (  # dtype, d, N, B, H; the first of them also with flex_attention, as long as there is time
    (BF16, 64, 197, 256, 6),
    (FLOAT, 64, 197, 256, 6),
    (BF16, 64, 1370, 16, 16),
    (HALF, 64, 197, 256, 6),
    (BF16, 80, 197, 64, 16),
    (BF16, 64, 149, 256, 6),
    (BF16, 64, 101, 256, 6),
    (BF16, 64, 197, 64, 6),
    (BF16, 64, 197, 256, 12),
    (BF16, 32, 197, 256, 3),
    (FLOAT, 32, 197, 256, 3),
    (BF16, 128, 197, 64, 8),
    (FLOAT, 64, 101, 64, 6),
    (BF16, 64, 577, 64, 12),
    (HALF, 64, 577, 16, 12),
    (BF16, 64, 197, 1, 6),
)
TINY = ((FLOAT, 16, 17, 1, 2), (HALF, 16, 17, 1, 2))
COMPILING = 30  # seconds of this stage after which flex_attention is left out
KERNEL, WRITTEN_OUT = "kernel", "written out"
CHECKED = 4  # images whose error is computed


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    start = setting.seconds()
    rows = section["rows"] = []
    for dtype, d, N, B, H in setting.pick(SHAPES, TINY):
        operands, images = qkv(B * N, H, d, dtype, setting.device), Images.of(B, N, setting.device)
        sizes = some_sizes(B * N, setting.device)
        flex = setting.has(15, start + COMPILING)
        of_shape = []
        for name, (call, sized) in candidates(*operands, sizes, images, flex).items():
            row = {"dtype": short(dtype), "d": d, "N": N, "B": B, "H": H, "candidate": name}
            row |= measured(call, operands, sizes if sized else None, images)
            rows.append(row)
            of_shape.append(row)
            if name == KERNEL and "failed" in row:
                raise StageError(f"the kernel at d={d} N={N} B={B} {short(dtype)}: {row['failed']}")
        judge(of_shape)
        if not flex:
            section.setdefault("left_out", []).append(f"flex_attention {short(dtype)} d={d} N={N} B={B}: no time")


def judge(rows: list[dict[str, Any]]) -> None:
    """Mark among the candidates of one shape the one ``taken`` by the library, and whether it was the ``fastest`` of
    those that add log n as exactly."""
    rivals = [row for row in rows if row["candidate"] in (KERNEL, WRITTEN_OUT, f"SDPA, mask in {short(FLOAT)}")]
    best = min((row["microseconds"] for row in rivals if row["microseconds"]), default=None)
    for row in rows:
        row["taken"] = row["candidate"] == KERNEL
        row["fastest"] = row["taken"] and row["microseconds"] == best


def measured(
    call: Callable[[], Tensor], operands: tuple[Tensor, Tensor, Tensor], sizes: Tensor | None, images: Images
) -> dict[str, Any]:
    """Time a call and compare its result, [H, T, d] or [B, H, N, d], with float64: ``microseconds``, ``error``
    (distance over norm) and ``largest_error``. A call that cannot run gives ``failed``, one line that says why."""
    device, checked = operands[0].device, Images.of(min(CHECKED, images.B), images.N, operands[0].device)
    T = checked.B * checked.N
    try:
        out = call()
        out = (out if out.dim() == 3 else out.transpose(0, 1).flatten(1, 2))[:, :T].double()
        microseconds = median_us(call, device)
    except Exception as error:  # a candidate that cannot run here is a result
        return {"microseconds": None, "failed": one_line(error)}
    want = reference.attention(
        *(x[:, :T].double() for x in operands), None if sizes is None else sizes[:T], checked, fused=False
    )
    error = ((out - want).norm() / want.norm()).item()
    return {"microseconds": microseconds, "error": error, "largest_error": (out - want).abs().max().item()}


def candidates(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, images: Images, flex: bool
) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """Each candidate by name: a call, and whether it adds log n. The logarithms are precomputed, as in a model."""
    log2_sizes, log_sizes = sizes.log2(), images.shaped(sizes).log()
    mask = log_sizes[:, None, None, :].to(q.dtype)
    heads = [x.unflatten(1, (images.B, images.N)).transpose(0, 1) for x in (q, k, v)]
    ways = {
        KERNEL: (lambda: ops.attention(q, k, v, sizes, images, backend="triton", log2_sizes=log2_sizes), True),
        "SDPA, no bias": (lambda: F.scaled_dot_product_attention(*heads), False),
        f"SDPA, mask in {short(q.dtype)}": (lambda: F.scaled_dot_product_attention(*heads, attn_mask=mask), True),
        WRITTEN_OUT: (lambda: reference.attention(q, k, v, sizes, images, fused=False), True),
    }
    if flex:

        def add_log_size(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + log_sizes[b, j]

        torch._dynamo.reset()
        attend = compiled(flex_attention, q.device)
        ways["flex_attention, compiled"] = (lambda: attend(*heads, score_mod=add_log_size), True)
    return ways
