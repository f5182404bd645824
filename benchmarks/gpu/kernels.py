"""Kernels: microseconds of every operation, beside its bound and the reference in eager mode."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from atm_triton import ops, reference
from atm_triton.packed import Images, Packed
from benchmarks.gpu import traffic
from benchmarks.gpu.setting import Setting, qkv, short, some_sizes
from benchmarks.gpu.timing import copy_bandwidth, empty_us, median_us, product_rate, replayed

WIDTHS = {"DeiT-S": (6, 64), "DeiT-B": (12, 64)}  # H, d
TINY_WIDTHS = {"DeiT-S": (2, 16), "DeiT-B": (3, 16)}
COPY_BYTES = 2**31
PRODUCT_SIDE = 8192


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    section["empty_us"] = empty_us(setting.device)
    section["copy_gb_per_second"] = copy_bandwidth(setting.device, setting.pick(COPY_BYTES, 2**20))
    rows, rates = [], {}
    section |= {"rows": rows, "product_tflop_per_second": rates}
    for (H, d), B, N, dtype in shapes(setting):
        if short(dtype) not in rates:
            rates[short(dtype)] = product_rate(setting.device, setting.pick(PRODUCT_SIDE, 64), dtype)
        rows += measure(setting, section["copy_gb_per_second"], rates[short(dtype)], B, N, H, d, dtype)
        setting.save()
    section["copy_gb_per_second_after"] = copy_bandwidth(setting.device, setting.pick(COPY_BYTES, 2**20))


def shapes(setting: Setting) -> list[tuple]:
    """The shapes to measure: (H, d), B, N, dtype."""
    widths, lengths = setting.pick((WIDTHS, (197, 149, 101)), (TINY_WIDTHS, (17,)))
    batches, dtype = setting.pick(((256, 64, 8, 1), torch.bfloat16), ((1,), torch.float32))
    chosen = [(width, B, N, dtype) for width in widths.values() for B in batches for N in lengths]
    return [*chosen, (widths["DeiT-S"], batches[0], lengths[0], torch.float32)]


def measure(
    setting: Setting, copy: float, product: float, B: int, N: int, H: int, d: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Time every operation, a row for each. Kernels run as a CUDA graph, because a launch may take longer than the
    kernel. ``of_copy``: the share of the copy bandwidth; ``bound_us``: the time of its bytes at that bandwidth or of
    its products at the measured rate, whichever is longer."""
    device, rows = setting.device, []
    for operation, (by_kernel, by_reference, nbytes, flops) in calls(setting, B, N, H, d, dtype).items():
        microseconds = median_us(replayed(by_kernel, device), device)
        rate = nbytes / microseconds / 1e3
        row = {"operation": operation, "dtype": short(dtype), "B": B, "N": N, "H": H, "d": d}
        row |= {"microseconds": microseconds, "bytes": nbytes, "gb_per_second": rate, "of_copy": rate / copy}
        row |= {"flops": flops, "bound_us": max(nbytes / copy / 1e3, flops / product / 1e6)}
        rows.append(row | {"reference_eager": median_us(by_reference, device)})
    return rows


def calls(
    setting: Setting, B: int, N: int, H: int, d: int, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int, int]]:
    """Each operation: a call by kernels, a call by the reference, the bytes it must move, the FLOPs of its products."""
    device, C, e = setting.device, H * d, dtype.itemsize
    M = N - max(1, N // 24)  # a block merges 8 of 197 tokens to save 30 % of the FLOPs
    images, T, left = Images.of(B, N, device), B * N, B * M
    q, k, v = qkv(T, H, d, dtype, device)
    x, attended = (torch.randn(T, C, dtype=dtype, device=device) for _ in range(2))
    sizes, norm = some_sizes(T, device), nn.LayerNorm(C, eps=1e-6, device=device, dtype=dtype)
    tokens, log2_sizes = Packed(x=x, sizes=sizes, images=images), sizes.log2()
    pairs, r = ops.match(k, sizes, images, 1, False, 0.5, "triton"), torch.full((B,), N - M, device=device)
    assignment = ops.assign(pairs, r, images, 1, left, True, "triton")
    slots, merged = assignment.slots, x[:left]
    layer = nn.Linear(C, 4 * C, device=device, dtype=dtype)

    def reference_match() -> Any:
        similarity, partner = reference.match(k, sizes, 1, False, images)
        return similarity, partner, reference.count(similarity, 0.5, images)

    def reference_assign() -> Any:
        slots, _ = reference.assign(pairs.similarity, pairs.partner, r, 1, images)
        return slots, reference.lists(slots, left)

    def reference_norm() -> Any:
        merged, merged_sizes = reference.merge(x + attended, sizes, slots, left)
        return F.layer_norm(merged, (C,), norm.weight, norm.bias, norm.eps), merged_sizes

    return {
        "match": (
            lambda: ops.match(k, sizes, images, 1, False, 0.5, "triton"),
            reference_match,
            traffic.match_bytes(B, N, C, e),
            traffic.match_flops(B, N, C),
        ),
        "assign": (
            lambda: ops.assign(pairs, N - M, images, 1, left, True, "triton"),
            reference_assign,
            traffic.assign_bytes(B, N, M),
            0,
        ),
        "unmerge": (
            lambda: ops.unmerge(merged, slots, "triton"),
            lambda: reference.unmerge(merged, slots),
            traffic.unmerge_bytes(B, N, M, C, e),
            0,
        ),
        "merge": (
            lambda: ops.merge(tokens, assignment, "triton"),
            lambda: reference.merge(x, sizes, slots, left),
            traffic.merge_bytes(B, N, M, C, e),
            0,
        ),
        "add_merge_norm": (
            lambda: ops.add_merge_norm(tokens, attended, None, assignment, norm),
            reference_norm,
            traffic.add_merge_norm_bytes(B, N, M, C, e),
            0,
        ),
        "add_norm": (
            lambda: ops.add_norm(x, attended, None, norm),
            lambda: (x + attended, norm(x + attended)),
            traffic.add_norm_bytes(B, N, C, e),
            0,
        ),
        "linear_gelu": (
            lambda: ops.linear_gelu(x, layer.weight, layer.bias),
            lambda: F.gelu(layer(x)),
            traffic.linear_gelu_bytes(T, C, 4 * C, e),
            traffic.linear_gelu_flops(T, C, 4 * C),
        ),
        "attention": (
            lambda: ops.attention(q, k, v, sizes, images, backend="triton", log2_sizes=log2_sizes),
            lambda: reference.attention(q, k, v, sizes, images, fused=dtype == torch.float32),
            traffic.attention_bytes(B, N, C, e),
            traffic.attention_flops(B, N, C),
        ),
    }
