"""Repeat: the same input must give the same bits every time. A value that changes reveals a race."""

from typing import Any

import torch
from torch import Tensor, nn

from atm_triton import ops
from atm_triton.packed import Images, Packed
from benchmarks.gpu import StageError
from benchmarks.gpu.setting import Setting, qkv, short, some_sizes

RUNS = 20


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    rows, runs = [], setting.pick(RUNS, 3)
    section["rows"] = rows
    shapes = setting.pick([(64, 197, 6, 64), (8, 577, 12, 64)], [(1, 17, 2, 16)])
    for B, N, H, d in shapes:
        for dtype in (torch.bfloat16, torch.float32) if setting.on_gpu else (torch.float32,):
            first = None
            step = merge_step(B, N, H, d, dtype, setting.device)
            for number in range(runs):
                out = step()
                first = out if first is None else first
                for name, tensor in out.items():
                    if not torch.equal(tensor, first[name]):
                        raise StageError(f"{name} of run {number + 1} is not that of the first: B={B} N={N} {dtype}")
            rows.append({"B": B, "N": N, "H": H, "d": d, "dtype": short(dtype), "runs": runs})


def merge_step(B: int, N: int, H: int, d: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The kernels of a merging block, as a call without arguments that returns all tensors by name."""
    T, images = B * N, Images.of(B, N, device)
    q, k, v = qkv(T, H, d, dtype, device)
    x, attended = (torch.randn(T, H * d, dtype=dtype, device=device) for _ in range(2))
    sizes, norm = some_sizes(T, device), nn.LayerNorm(H * d, device=device, dtype=dtype)
    r = torch.full((B,), N // 8, device=device)

    def step() -> dict[str, Tensor]:
        pairs = ops.match(k, sizes, images, 1, True, 0.1, "triton")
        assignment = ops.assign(pairs, r, images, 1, T - B * (N // 8), True, "triton")
        merged, normed = ops.add_merge_norm(Packed(x=x, sizes=sizes, images=images), attended, None, assignment, norm)
        return {
            "similarity": pairs.similarity,
            "partner": pairs.partner,
            "counts": pairs.counts,
            "slots": assignment.slots,
            "merged": merged.x,
            "normed": normed,
            "attention": ops.attention(q, k, v, sizes, images, backend="triton"),
        }

    return step
