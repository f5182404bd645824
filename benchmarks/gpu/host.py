"""Host: what a call costs before the GPU has anything to do, and how many kernels a merging block launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from atm_triton import ATMBlock, ATMConfig, library, ops
from benchmarks.gpu.setting import Setting, qkv, some_sizes
from benchmarks.gpu.timing import host_us

OURS = (
    "match_image_kernel",
    "unit_rows_kernel",
    "match_tiles_kernel",
    "assign_kernel",
    "lists_kernel",
    "merge_kernel",
    "unmerge_kernel",
    "attention_kernel",
)
CALLS = 150  # in a row: fewer than a GPU's queue holds, so that none waits


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
    """Each operation through ``atm_triton.ops`` and through ``torch.ops.atm_triton``, at a size that a GPU is done with
    before the next call arrives."""
    B, N, H, d = setting.pick((2, 197, 6, 64), (1, 9, 2, 16))
    device, C, dtype = setting.device, H * d, torch.float16
    q, k, v = qkv(B, H, N, d, dtype, device)
    x, attended = (torch.randn(B, N, C, dtype=dtype, device=device) for _ in range(2))
    sizes, norm, M = some_sizes(B, N, device), nn.LayerNorm(C, device=device, dtype=dtype), N - N // 8
    log2_sizes = sizes.log2()
    similarity, partner, _ = library.match(k, sizes, 1, False, 0.5)
    assignment, *lists = library.assign(similarity, partner, N - M, 1)
    merged, *_ = library.merge(x, sizes, assignment, *lists, M)
    of = torch.ops.atm_triton
    affine = (norm.weight, norm.bias, norm.eps)
    return {
        "match": (
            lambda: ops.match(k, sizes, 1, False, 0.5, "triton"),
            lambda: of.match(k, sizes, 1, False, 0.5),
        ),
        "assign": (
            lambda: ops.assign(similarity, partner, N - M, 1, False, "triton"),
            lambda: of.assign(similarity, partner, N - M, 1),
        ),
        "merge": (
            lambda: ops.merge(x, sizes, assignment, M, "triton", ops.Lists(*lists)),
            lambda: of.merge(x, sizes, assignment, *lists, M),
        ),
        "add_merge_norm": (
            lambda: ops.add_merge_norm(x, attended, None, sizes, assignment, ops.Lists(*lists), M, norm),
            lambda: of.add_merge_norm(x, attended, None, sizes, assignment, *lists, *affine, M),
        ),
        "unmerge": (lambda: ops.unmerge(merged, assignment, "triton"), lambda: of.unmerge(merged, assignment)),
        "attention": (
            lambda: ops.attention(q, k, v, sizes, backend="triton", log2_sizes=log2_sizes),
            lambda: of.attention(q, k, v, log2_sizes),
        ),
    }


def block_launches(setting: Setting) -> dict[str, Any]:
    """The kernels that a merging block of DeiT-S launches by a given r, and by counting: how many, how many of them are
    ours, and their names."""
    B, N, H, C = setting.pick((64, 197, 6, 384), (1, 17, 2, 32))
    x, size = torch.randn(B, N, C, device=setting.device), some_sizes(B, N, setting.device)
    rows = {}
    configs = {
        "static": ATMConfig(adapt="static", schedule=(N // 8,) * 12, backend="triton"),
        "batch": ATMConfig(alpha=0.2, theta_min=0.1, backend="triton"),
        "image": ATMConfig(alpha=0.2, theta_min=0.1, adapt="image", backend="triton"),
    }
    for name, config in configs.items():
        block = ATMBlock(C, H, qkv_bias=True, block_index=0, depth=12, config=config).eval().to(setting.device)
        names = launched(lambda block=block: block(x, size), setting)
        ours = sum(any(own in kernel for own in OURS) for kernel in names)
        rows[name] = {"all": len(names), "ours": ours, "names": dict(Counter(names))}
    return rows


def launched(call: Callable[[], Any], setting: Setting) -> list[str]:
    """The names of what a call runs on the GPU, in order; on the CPU of torch's own operations."""
    call()
    kind = DeviceType.CUDA if setting.on_gpu else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as trace:
        call()
        if setting.on_gpu:
            torch.cuda.synchronize()
    return [event.name for event in trace.events() if event.device_type == kind]
