"""How fast merging is: the same weights unpatched, with free merging, with a constant r and with ATM, timed in turn.

The free-merge bound is what merging would give if it cost nothing: the same tokens in every block, left over by a slice
instead of a merge, with timm's own attention. Its time over ours is the share of the possible gain that is reached.
"""

import ctypes
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise reports to the terminal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from atm_triton.block import ATMBlock, Step
from atm_triton.config import ATMConfig
from atm_triton.evaluate import check_finite, share
from atm_triton.flops import Cost, cost, planned, unmerged
from atm_triton.model import Record
from atm_triton.patch import apply_patch, install

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
UNPATCHED, BOUND, TOME, ATM = "timm", "free-merge bound", "ToMe", "ATM"


@dataclass(frozen=True)
class Variant:
    """One way to run a model: ``run`` makes one pass over all batches; ``gflops`` and ``tokens`` (mean tokens that
    enter each block) are an image's."""

    name: str
    run: Callable[[], None]
    gflops: float
    tokens: tuple[float, ...]
    note: str = ""


class FreeMergeBlock(ATMBlock):
    """A block whose merge is a slice: ``keep`` tokens go on, whichever come first."""

    keep: int

    def step(self, x: Tensor, size: Tensor | None, log2_size: Tensor | None = None, merges: bool = True) -> Step:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x[:, : self.keep]
        return Step(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), None)


def free_merge_bound(model: VisionTransformer, record: Record, config: ATMConfig) -> VisionTransformer:
    """A copy of an unpatched ``model``, sharing its weights, that keeps the tokens of ``record`` for free."""

    def slicing(block: Any, index: int) -> FreeMergeBlock:
        bound = FreeMergeBlock.of(block, config, index, len(record.rows), model.num_prefix_tokens)
        bound.keep = record.rows[index]
        return bound

    return install(share(model), slicing, config)


def constant_r(model: VisionTransformer, image_shape: tuple[int, ...], macs: float, cls_only_last: bool) -> int:
    """The constant r whose MACs an image come closest to ``macs``."""
    depth, N = len(model.blocks), unmerged(model, image_shape).tokens[0]

    def distance(r: int) -> float:
        return abs(cost(model, planned(model, image_shape, (r,) * depth, cls_only_last)).macs - macs)

    return min(range(N // 2 + 1), key=distance)


def variants(model: VisionTransformer, batches: list[Tensor], config: ATMConfig) -> list[Variant]:
    """The four ways to run an unpatched ``model`` in eval mode over ``batches`` [B, C, H, W] on its device."""
    shape = tuple(batches[0].shape[1:])
    atm = apply_patch(share(model), config)
    records = []
    for number, batch in enumerate(batches):
        check_finite(batch, "images", number)
        check_finite(model(batch), "the unpatched model's logits", number)
        check_finite(atm(batch), "the merged model's logits", number)
        records.append(atm.blocks.last)
    costs = [cost(model, record) for record in records]
    macs = statistics.fmean(c.macs for c in costs)
    bounds = [free_merge_bound(model, record, config) for record in records]
    r, depth = constant_r(model, shape, macs, config.cls_only_last), len(model.blocks)
    alike = replace(config, adapt="static", schedule=(r,) * depth, thresholds=None, split_depth=depth, source="")
    tome = apply_patch(share(model), alike)
    tome_record = planned(model, shape, (r,) * depth, config.cls_only_last)
    whole = unmerged(model, shape)
    return [
        _variant(UNPATCHED, [model] * len(batches), batches, [whole], [cost(model, whole)]),
        _variant(BOUND, bounds, batches, records, costs),
        _variant(TOME, [tome] * len(batches), batches, [tome_record], [cost(model, tome_record)], f"r = {r}"),
        _variant(ATM, [atm] * len(batches), batches, records, costs),
    ]


def _variant(
    name: str,
    models: list[VisionTransformer],
    batches: list[Tensor],
    records: list[Record],
    costs: list[Cost],
    note: str = "",
) -> Variant:
    def run() -> None:
        for model, batch in zip(models, batches, strict=True):
            model(batch)

    tokens = tuple(statistics.fmean(column) for column in zip(*(r.tokens for r in records), strict=True))
    return Variant(name, run, statistics.fmean(c.paper_gflops for c in costs), tokens, note)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next call, for as long as the process lives: otherwise it returns
    memory now to one variant's cost and now to another's, and page faults drown what is measured."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # glibc
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, 2**30)


@torch.inference_mode()
def time_in_turn(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, ``repeats`` times in turn after a warm-up, each turn in an order of its own: what ran before
    leaves traces in caches, clocks and the allocator."""
    names, order = list(runs), random.Random(0)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(repeats), desc="time", unit="turn", disable=None):
        for name in order.sample(names, len(names)):
            seconds[name].append(_seconds(runs[name], device))
    return seconds


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@torch.inference_mode()
def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of one run, above what was allocated before it (weights, images)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    live = peak = 0
    for event in events:  # in the order of time
        if event.get("name") == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return peak


@torch.inference_mode()
def measure(model: VisionTransformer, batches: list[Tensor], config: ATMConfig, repeats: int) -> list[dict[str, Any]]:
    """Time :func:`variants`; a row each: images a second (median, and the least and most of the turns), ``speedup``
    over the unpatched model and ``of_bound`` = time(bound) / time, both medians over the turns, ``gflops``, ``tokens``
    and ``peak_mib``."""
    device = batches[0].device
    ways = variants(model, batches, config)
    seconds = time_in_turn({way.name: way.run for way in ways}, repeats, device)
    images = sum(len(batch) for batch in batches)
    rows = []
    for way in ways:
        rate = [images / s for s in seconds[way.name]]
        rows.append(
            {
                "name": way.name,
                "note": way.note,
                "images_per_second": statistics.median(rate),
                "slowest": min(rate),
                "fastest": max(rate),
                "speedup": _median_ratio(seconds[UNPATCHED], seconds[way.name]),
                "of_bound": _median_ratio(seconds[BOUND], seconds[way.name]),
                "gflops": way.gflops,
                "tokens": way.tokens,
                "peak_mib": peak_memory(way.run, device) / 2**20,
                "seconds": seconds[way.name],
            }
        )
    return rows


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
