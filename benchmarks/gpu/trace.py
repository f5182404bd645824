"""Trace: what the GPU does in a pass that reads the count of each merging block, and how long it idles around reads."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch.profiler import ProfilerActivity, profile

from atm_triton.config import ATMConfig
from atm_triton.measure.configurations import digits_config
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.patch import apply_patch
from benchmarks.gpu.setting import Setting

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
READS = ("DtoH", "_local_scalar_dense")  # names of events that read a count on the host; the second on a CPU


class Event(NamedTuple):
    """An event of the trace, in microseconds."""

    start: float
    end: float
    name: str


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    batch = setting.pick(256, 1)
    passes = {
        "digits": digits_pass(setting, batch),
        "DeiT-S": deit_pass(setting, batch),
        "image": deit_pass(setting, batch, "image"),
    }
    for name, call in passes.items():
        path = setting.out / ("trace.json.gz" if name == "digits" else f"trace_{name}.json.gz")
        record(call, setting, path)
        events = timeline(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], setting.on_gpu)
        section[name] = {"batch": batch, "file": path.name, **gaps(events)}


def digits_pass(setting: Setting, batch: int) -> Callable[[], Any]:
    model = apply_patch(open_model().to(setting.device), digits_config())
    images, _ = next(iter(open_images(model, limit=batch, batch_size=batch)))
    images = images.to(setting.device)
    return lambda: model(images)


def deit_pass(setting: Setting, batch: int, adapt: str = "batch") -> Callable[[], Any]:
    """A pass of DeiT-S with random weights. Hardly any similarity reaches its thresholds; what matters is that counts
    are read."""
    shape = {} if not setting.tiny else {"img_size": 48, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = timm.create_model("deit_small_patch16_224", **shape).eval().to(setting.device)
    config = ATMConfig(alpha=0.999, beta=0.04, theta_min=0.99, adapt=adapt)
    model = apply_patch(model.to(torch.bfloat16) if setting.on_gpu else model, config)
    side = model.patch_embed.img_size
    images = torch.randn(batch, 3, *side, device=setting.device, dtype=next(model.parameters()).dtype)
    return lambda: model(images)


def record(call: Callable[[], Any], setting: Setting, path: Path) -> None:
    """Write the trace of one pass to ``path``, after two passes to warm up."""
    for _ in range(2):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    if setting.on_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as trace:
        call()
        if setting.on_gpu:
            torch.cuda.synchronize()
    trace.export_chrome_trace(str(path))


def timeline(events: list[dict[str, Any]], on_gpu: bool) -> list[Event]:
    """The events on the GPU (on a CPU: torch's operations) by their start."""
    kinds = ON_GPU if on_gpu else ("cpu_op",)
    chosen = [event for event in events if event.get("ph") == "X" and event.get("cat") in kinds]
    return sorted(Event(start=event["ts"], end=event["ts"] + event["dur"], name=event["name"]) for event in chosen)


def gaps(events: list[Event]) -> dict[str, Any]:
    """For each read of a count, the longest idle time until the next read, and the two events around it. ``busy`` is
    the share of the pass with work."""
    reads = [index for index, event in enumerate(events) if any(name in event.name for name in READS)]
    gaps = []
    for read, following in zip(reads, [*reads, len(events)][1:], strict=True):
        longest = {"microseconds": 0.0, "after": "", "before": ""}
        end, last = events[read].end, events[read].name
        for event in events[read + 1 : following + 1]:
            if event.start - end > longest["microseconds"]:
                longest = {"microseconds": event.start - end, "after": last[:60], "before": event.name[:60]}
            if event.end > end:
                end, last = event.end, event.name
        gaps.append(longest)
    busy, end = 0.0, 0.0
    for event in events:
        busy += max(0.0, event.end - max(end, event.start))
        end = max(end, event.end)
    whole = end - events[0].start if events else 0.0
    return {
        "reads": len(reads),
        "longest_gap_microseconds": max((gap["microseconds"] for gap in gaps), default=None),
        "gaps": gaps,
        "pass_microseconds": whole,
        "busy": busy / whole if whole else None,
    }
