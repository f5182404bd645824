"""Host: the host time of a call before the GPU has work, and how many kernels a merging block launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from atm_triton import ATMBlock, ATMConfig, ops
from atm_triton.packed import Images, Packed
from benchmarks.gpu.setting import Setting, qkv, some_sizes
from benchmarks.gpu.timing import host_us

OURS = (
    "match_image_kernel",
    "unit_rows_kernel",
    "match_tiles_kernel",
    "assign_kernel",
    "assign_long_kernel",
    "join_kernel",
    "merge_kernel",
    "add_norm_kernel",
    "unmerge_kernel",
    "attention_kernel",
)
CALLS = 150  # calls in a row: fewer than a GPU's queue holds, so that none waits


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    calls, runs = setting.pick((CALLS, 5), (1, 1))
    rows = section["rows"] = []
    for name, (through_ops, through_torch) in operations(setting).items():
        row = {"operation": name, "ops_microseconds": host_us(through_ops, setting.device, calls, runs)}
        row["torch_ops_microseconds"] = host_us(through_torch, setting.device, calls, runs)
        rows.append(row)
    section["launches"] = block_launches(setting)


def operations(setting: Setting) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Each operation as a call through ``atm_triton.ops`` and one through ``torch.ops.atm_triton``, so small that the
    GPU finishes before the next call."""
    B, N, H, d = setting.pick((2, 197, 6, 64), (1, 9, 2, 16))
    device, C, dtype = setting.device, H * d, torch.float16
    images, T, M = Images.of(B, N, device), B * N, N - N // 8
    q, k, v = qkv(T, H, d, dtype, device)
    x, attended = (torch.randn(T, C, dtype=dtype, device=device) for _ in range(2))
    tokens, norm = Packed(x=x, sizes=some_sizes(T, device), images=images), nn.LayerNorm(C, device=device, dtype=dtype)
    r = torch.full((B,), N - M, device=device)
    sizes, log2_sizes, cu_seqlens = tokens.sizes, tokens.sizes.log2(), images.cu_seqlens
    pairs = ops.match(k, sizes, images, 1, False, 0.5, "triton")
    assignment = ops.assign(pairs, r, images, 1, B * M, True, "triton")
    slots, left, lists = assignment.slots, assignment.images, (assignment.order, assignment.spans)
    merged = ops.merge(tokens, assignment, "triton").x
    of = torch.ops.atm_triton
    affine = (norm.weight, norm.bias, norm.eps)
    return {
        "match": (
            lambda: ops.match(k, sizes, images, 1, False, 0.5, "triton"),
            lambda: of.match(k, sizes, cu_seqlens, 1, False, 0.5, N),
        ),
        "assign": (
            lambda: ops.assign(pairs, r, images, 1, B * M, True, "triton"),
            lambda: of.assign(pairs.similarity, pairs.partner, r, cu_seqlens, 1, N, B * M),
        ),
        "merge": (
            lambda: ops.merge(tokens, assignment, "triton"),
            lambda: of.merge(x, sizes, slots, *lists, left.cu_seqlens),
        ),
        "add_merge_norm": (
            lambda: ops.add_merge_norm(tokens, attended, None, assignment, norm),
            lambda: of.add_merge_norm(x, attended, None, sizes, slots, *lists, left.cu_seqlens, *affine),
        ),
        "unmerge": (lambda: ops.unmerge(merged, slots, "triton"), lambda: of.unmerge(merged, slots)),
        "attention": (
            lambda: ops.attention(q, k, v, sizes, images, backend="triton", log2_sizes=log2_sizes),
            lambda: of.attention(q, k, v, log2_sizes, cu_seqlens, cu_seqlens, N, N),
        ),
    }


def block_launches(setting: Setting) -> dict[str, Any]:
    """Count the kernels that a merging block of DeiT-S launches with a given r and with counts: all of them, ours, and
    how often each name occurs."""
    B, N, H, C = setting.pick((64, 197, 6, 384), (1, 17, 2, 32))
    x, sizes = torch.randn(B, N, C, device=setting.device), some_sizes(B * N, setting.device).view(B, N)
    rows = {}
    configs = {
        "static": ATMConfig(adapt="static", schedule=(N // 8,) * 12, backend="triton"),
        "batch": ATMConfig(alpha=0.2, beta=0.04, theta_min=0.1, backend="triton"),
        "image": ATMConfig(alpha=0.2, beta=0.04, theta_min=0.1, adapt="image", backend="triton"),
    }
    for name, config in configs.items():
        block = ATMBlock(C, H, qkv_bias=True, block_index=0, depth=12, config=config).eval().to(setting.device)
        names = launched(lambda block=block: block(x, sizes), setting)
        ours = sum(any(own in kernel for own in OURS) for kernel in names)
        rows[name] = {"all": len(names), "ours": ours, "names": dict(Counter(names))}
    return rows


def launched(call: Callable[[], Any], setting: Setting) -> list[str]:
    """The names of the kernels that a call runs on the GPU, in order; on the CPU the names of torch's operations."""
    call()
    kind = DeviceType.CUDA if setting.on_gpu else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as trace:
        call()
        if setting.on_gpu:
            torch.cuda.synchronize()
    return [event.name for event in trace.events() if event.device_type == kind]
