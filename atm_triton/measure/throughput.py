"""Measures how fast merging is: unpatched, with free merging, with a constant r and with ATM, timed in turn.

All use the same weights. The free-merge bound is what merging would give if it cost nothing: every block has the same
number of tokens, but a slice removes them instead of a merge, and attention is timm's own. Its time divided by ours is
the share of the possible gain that is reached.
"""

import ctypes
import json
import math
import os
import random
import statistics
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise reports to the terminal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from atm_triton.block import ATMBlock, Step
from atm_triton.config import ATMConfig
from atm_triton.flops import Cost, cost, mean, scheduled, unmerged
from atm_triton.measure.evaluate import check_finite, share
from atm_triton.ops import Match
from atm_triton.packed import Images, Packed
from atm_triton.patch import apply_patch, install
from atm_triton.record import Record
from atm_triton.reference import batch_r, of_tokens

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
UNPATCHED, BOUND, TOME, ATM, ONE_R = "timm", "free-merge bound", "ToMe", "ATM", "one r per batch"


@dataclass(frozen=True)
class Variant:
    """One way to run a model: ``run`` makes one pass over all batches, each with its own entry of ``models``.
    ``gflops`` and ``tokens`` (mean tokens that enter each block) are per image."""

    name: str
    models: list[VisionTransformer]
    run: Callable[[], None]
    gflops: float
    tokens: tuple[float, ...]
    note: str = ""


class FreeMergeBlock(ATMBlock):
    """A block whose merge is a slice: it keeps as many tokens as ``left`` says, whichever come first. If images differ
    in length, it keeps the first ``rows`` rows of the whole batch: their values mean nothing, but every image has the
    right number of them."""

    left: Images
    rows: int

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        if step.leading is not None:
            return self.forward_leading(tokens, step.leading)
        images = tokens.images
        y = self.norm1(images.shaped(tokens.x))
        attended = self.attn(y) if images.equal else self.called_attn(y, self.attend, tokens, False)[0]
        x = images.shaped(tokens.x) + self.drop_path1(self.ls1(attended))
        x = x[:, : self.left.N] if self.left.equal else x.flatten(end_dim=-2)[: self.rows]
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return Packed(x=x.flatten(end_dim=-2), sizes=None, images=self.left)


class CountedBlock(ATMBlock):
    """A block in which ``counts``, int64 [B], says how many tokens of each image may merge: the first of A, whatever
    their similarities, which are computed all the same."""

    counts: Tensor

    def match(self, keys: Tensor, tokens: Packed) -> Match | None:
        pairs, images = super().match(keys, tokens), tokens.images
        if pairs is None:
            return None
        in_a = pairs.partner >= 0
        before = F.pad(in_a.cumsum(dim=0), (1, 0))
        most = of_tokens(self.counts + before[images.cu_seqlens[:-1].long()], images, len(in_a))
        chosen = in_a & (before[1:] <= most)
        return pairs._replace(similarity=torch.where(chosen, 1.0, -math.inf), counts=self.counts)


def free_merge_bound(model: VisionTransformer, record: Record, config: ATMConfig) -> VisionTransformer:
    """Copy an unpatched ``model``, sharing its weights; the copy keeps as many tokens as ``record`` says, at no
    cost."""

    def slicing(block: Any, index: int) -> FreeMergeBlock:
        bound = FreeMergeBlock.of(block, config, index, len(record.rows), model.num_prefix_tokens)
        device, kept = next(block.parameters()).device, record.rows[index]
        if isinstance(kept, Tensor):
            bound.left, bound.rows = Images.of_lengths(kept.to(device)), int(kept.sum())
        else:
            bound.left, bound.rows = Images.of(record.batch, kept, device), record.batch * kept
        return bound

    return install(share(model), slicing, config)


def constant_r(model: VisionTransformer, image_shape: tuple[int, ...], macs: float, cls_only_last: bool) -> int:
    """The constant r whose MACs per image come closest to ``macs``."""
    depth, N = len(model.blocks), unmerged(model, image_shape).N
    every_r = range(N // 2 + 1)

    @cache
    def macs_of(r: int) -> float:
        return cost(model, scheduled(model, image_shape, (r,) * depth, cls_only_last)).macs

    reached = max(macs, macs_of(every_r[-1]))
    first = bisect_left(every_r, -reached, key=lambda r: -macs_of(r))  # a larger r never costs more
    return min(every_r[max(first - 1, 0) : first + 1], key=lambda r: abs(macs_of(r) - macs))


def counted(model: VisionTransformer, record: Record, config: ATMConfig) -> VisionTransformer:
    """Copy an unpatched ``model``, sharing its weights; the copy merges as if its images had the counts of ``record``.
    The record may come from another model with the same depth and number of tokens."""

    def counting(block: Any, index: int) -> ATMBlock:
        counts, place = record.counts[index], (index, len(record.rows), model.num_prefix_tokens)
        if counts is None:
            return ATMBlock.of(block, config, *place)
        merging = CountedBlock.of(block, config, *place)
        merging.counts = counts.to(next(block.parameters()).device)
        return merging

    return install(share(model), counting, config)


def variants(
    model: VisionTransformer,
    batches: list[Tensor],
    config: ATMConfig,
    given: list[Record] | None = None,
    beside: ATMConfig | None = None,
) -> list[Variant]:
    """The ways to run ``model``, unpatched and in eval mode, over ``batches`` [B, C, H, W] on its device. ``given``:
    merge by the counts of these records, one per batch. With ``adapt="image"`` there is also a variant with one r per
    batch; ``beside`` adds another configuration."""
    shape = tuple(batches[0].shape[1:])
    whole, depth = unmerged(model, shape), len(model.blocks)
    for number, batch in enumerate(batches):
        check_finite(batch, "images", number)
        check_finite(model(batch), "the unpatched model's answers", number)
    atm, records = _merging(ATM, model, batches, config, given)
    costs = [cost(model, record) for record in records]
    bounds = [free_merge_bound(model, record, config) for record in records]
    r = constant_r(model, shape, statistics.fmean(c.macs for c in costs), config.cls_only_last)
    alike = replace(config, adapt="static", schedule=(r,) * depth, thresholds=None, split_depth=depth, source="")
    tome = apply_patch(share(model), alike)
    tome_record = scheduled(model, shape, (r,) * depth, config.cls_only_last)
    ways = [
        _variant(UNPATCHED, [model] * len(batches), batches, [whole], [cost(model, whole)]),
        _variant(BOUND, bounds, batches, records, costs),
        _variant(TOME, [tome] * len(batches), batches, [tome_record], [cost(model, tome_record)], f"r = {r}"),
        atm,
    ]
    if config.adapt == "image":
        ways.append(_one_r(model, batches, config, records))
    if beside is not None:
        other, _ = _merging(f'{ATM}, adapt="{beside.adapt}"', model, batches, beside, None)
        ways.append(replace(other, note="its own thresholds"))
    return ways


def _one_r(model: VisionTransformer, batches: list[Tensor], config: ATMConfig, records: list[Record]) -> Variant:
    """Merge the same number of tokens in all images of a batch: their mean in ``records``, where images differ."""
    models, merged = [], []
    for record, batch in zip(records, batches, strict=True):
        r = tuple(0 if counts is None else int(batch_r(counts)[0]) for counts in record.counts)
        models.append(apply_patch(share(model), replace(config, adapt="static", schedule=r, thresholds=None)))
        models[-1](batch)
        merged.append(models[-1].blocks.last)
    return _variant(ONE_R, models, batches, merged, [cost(model, record) for record in merged])


def _merging(
    name: str, model: VisionTransformer, batches: list[Tensor], config: ATMConfig, given: list[Record] | None
) -> tuple[Variant, list[Record]]:
    """Run ATM on every batch; returns the variant and the records of its passes."""
    if given is None:
        models = [apply_patch(share(model), config)] * len(batches)
    else:
        models = [counted(model, record, config) for record in given]
    records = []
    for number, (merging, batch) in enumerate(zip(models, batches, strict=True)):
        check_finite(merging(batch), "the merged model's answers", number)
        records.append(merging.blocks.last)
    return _variant(name, models, batches, records, [cost(model, record) for record in records]), records


def _variant(
    name: str,
    models: list[VisionTransformer],
    batches: list[Tensor],
    records: list[Record],
    costs: list[Cost[float]],
    note: str = "",
) -> Variant:
    def run() -> None:
        for model, batch in zip(models, batches, strict=True):
            model(batch)

    tokens = tuple(statistics.fmean(map(mean, column)) for column in zip(*(r.tokens for r in records), strict=True))
    return Variant(
        name=name,
        models=models,
        run=run,
        gflops=statistics.fmean(c.paper_gflops for c in costs),
        tokens=tokens,
        note=note,
    )


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for as long as the process lives. Otherwise it returns memory at random
    moments, and the page faults distort the time of whichever variant runs next."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # glibc
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, 2**30)


@torch.inference_mode()
def time_in_turn(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, timed in ``repeats`` turns after a warm-up. Every turn has a new order, because the previous
    run affects caches, clocks and the allocator."""
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
        before = time.perf_counter()
        run()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@torch.inference_mode()
def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Peak memory of one run in bytes, above what was allocated before it (weights, images)."""
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
    for event in events:  # sorted by time
        if event.get("name") == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return peak


@torch.inference_mode()
def measure(
    model: VisionTransformer,
    batches: list[Tensor],
    config: ATMConfig,
    repeats: int,
    given: list[Record] | None = None,
    beside: ATMConfig | None = None,
) -> list[dict[str, Any]]:
    """Time :func:`variants`. Returns a row for each: images per second (median, slowest and fastest turn), ``speedup``
    over the unpatched model and ``of_bound`` = time(bound) / time, both medians over the turns, ``gflops``, ``tokens``
    and ``peak_mib``."""
    device = batches[0].device
    ways = variants(model, batches, config, given, beside)
    seconds = time_in_turn({way.name: way.run for way in ways}, repeats, device)
    images = sum(len(batch) for batch in batches)
    rows = []
    for way in ways:
        rate = [images / s for s in seconds[way.name]]
        held = [getattr(model.blocks, "last", None) for model in way.models]  # torch warns if the profile frees them
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
        del held
    return rows


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
