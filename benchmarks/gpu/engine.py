"""Engine: what CUDA graphs gain for timm's model, for free merging and for ours, and what reading counts costs ours.

Two effects have ratios of their own: merging alone is the bound in one graph over ours; the engine alone is timm in one
graph over ours with r = 0. Before anything is timed, every variant must give the logits of the same model without
graphs.
"""

import copy
import gc
import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from atm_triton.config import ATMConfig
from atm_triton.flops import mean, scheduled
from atm_triton.graphs import replays_on
from atm_triton.measure.evaluate import share
from atm_triton.measure.throughput import free_merge_bound, keep_freed_memory, time_in_turn
from atm_triton.patch import install
from benchmarks.gpu import StageError
from benchmarks.gpu.models import DIGITS, Case, made, opened, patched
from benchmarks.gpu.setting import Setting, one_line, short
from benchmarks.gpu.timing import compiled
from benchmarks.gpu.unfused import UnfusedBlock

PLAIN = [*((name, batch) for name in ("DeiT-S", "DeiT-B") for batch in (64, 256, 8, 1)), (DIGITS, 64), (DIGITS, 256)]
PLAIN += [("ViT-L", 64), ("DINOv2-S", 8)]
COMPILED = [("DeiT-S", 256), ("DeiT-B", 256)]  # again with torch.compile, in this order
COMPILATION = 60  # seconds that must be left for a cell that compiles
WARMING = 90  # seconds for the processes that fill the compilers' caches on disk
REPEATS = 15
WARM_UP, PASSES = 3, 6  # calls before a capture; passes within which the engine must have captured all its graphs
LOGITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}  # relative distance: ties may resolve anew
ROUNDED = 2.0  # 16-bit logits may be this many times as far from float32 as those of the blocks
TIMM, BOUND, UNFUSED, ONE_GRAPH, COMPILED_TOO = "timm", "free-merge bound", "unfused", "one graph", "compiled"
WHOLE, UNMERGED = "ATM static, one graph", "ATM static, r = 0"


class Cell(NamedTuple):
    """A model at a batch size, with or without torch.compile, whose variants are timed in turn."""

    name: str
    batch: int
    compiles: bool


@dataclass(frozen=True)
class Variant:
    """A way to run a model. ``expected``: gives the logits that ``call`` must give; ``plan``: names the plan of the
    bound and of the whole graph to compare with; ``engine``: ``call`` is a model that its engine must run; ``exact``:
    gives in float32 the logits that ``expected`` gives in 16 bits."""

    call: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]
    plan: str | None = None
    engine: bool = False
    exact: Callable[[Tensor], Tensor] | None = None


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    keep_freed_memory()
    model = (None, None)
    fill_caches(setting)
    section |= {"rows": [], "left_out": [], "wrong": [], "repeats": setting.pick(REPEATS, 1)}
    section["tolerances"] = {short(dtype): most for dtype, most in LOGITS.items()}
    for cell in cells(setting):
        if cell.compiles and not setting.has(COMPILATION):
            section["left_out"].append(f"torch.compile of {cell.name} at {cell.batch}: no time")
            continue
        if model[0] != cell.name:
            model = cell.name, made(cell.name, setting)
        case = opened(model[1], cell.name, cell.batch, setting)
        section["rows"] += measure(cell, case, setting, section)
        if cell.compiles:
            torch._dynamo.reset()
        gc.collect()  # a model and its engine refer to each other, and would keep the memory of their graphs
        if setting.on_gpu:
            torch.cuda.empty_cache()
        setting.save()
    if section["wrong"]:
        raise StageError("; ".join(section["wrong"]))


def fill_caches(setting: Setting) -> None:
    """Run every cell once, all cells in parallel. Most of a cell's time is compilation, and compilers keep their
    results on disk. A failure here is reported when the cell is measured."""
    if not setting.on_gpu:
        return
    command = (sys.executable, "-m", "benchmarks.gpu.engine")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([*command, *map(str, cell)], **quiet) for cell in cells(setting)]
    end = setting.seconds() + WARMING
    for process in started:
        try:
            process.wait(max(end - setting.seconds(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_once(name: str, batch: str, compiles: str) -> None:
    setting = Setting(device=torch.device("cuda"), tiny=False, out=Path(), save=lambda: None)
    case = opened(made(name, setting), name, int(batch), setting)
    measure(Cell(name, int(batch), compiles == "True"), case, setting, {"repeats": 1, "wrong": [], "left_out": []})


def cells(setting: Setting) -> list[Cell]:
    """The cells to measure. Those with torch.compile come last and take the time that is left."""
    if setting.tiny:
        return [Cell("DeiT-S", 2, True), Cell(DIGITS, 2, False)]
    plain = [Cell(name, batch, compiles=False) for name, batch in PLAIN]
    return plain + [Cell(name, batch, compiles=True) for name, batch in COMPILED]


class OneGraph:
    """Runs a call on images of one shape as one CUDA graph, captured at first use; without a GPU it makes the call
    itself. Like the engine it copies the images in and returns a copy of the logits."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self.call, self.replay, self.mib = call, None, 0.0

    def __call__(self, images: Tensor) -> Tensor:
        if self.replay is None:
            self.images, replays = images.clone(), replays_on(images.device)
            for _ in range(WARM_UP):  # CUDA sets up workspaces and modules on first use
                self.call(self.images)
            self.replay = replays.capture(partial(self.call, self.images))
            self.mib = replays.mib()
        self.images.copy_(images)
        return self.replay().clone()


@torch.inference_mode()
def measure(cell: Cell, case: Case, setting: Setting, section: dict[str, Any]) -> list[dict[str, Any]]:
    """Time the variants of a cell, a row for each. ``of_timm``, ``of_timm_graph``, ``of_bound``: the time of timm, of
    timm in one graph and of the bound in one graph, over this time; ``whole``: this time over that of ours in one
    graph. All are medians over the turns. Variants that fail or give wrong logits are not timed."""
    images, by_name, errors = case.images, variants(cell, case, setting), {}
    for name, variant in by_name.items():
        what = f"{name} of {cell.name} at {cell.batch}"
        try:
            errors[name] = check(variant, images)
        except torch.OutOfMemoryError:
            section["left_out"].append(f"{what}: out of memory")
        except Exception as error:  # of any kind, a compiler's or a driver's too
            line = str(error) if isinstance(error, StageError) else one_line(error)
            section["left_out" if COMPILED_TOO in name else "wrong"].append(f"{what}: {line}")
    runs = {name: partial(by_name[name].call, images) for name in errors}
    seconds = time_in_turn(shuffled(runs), section["repeats"], setting.device)

    def over(above: str, below: str) -> float | None:
        return ratio(seconds[above], seconds[below]) if above in seconds and below in seconds else None

    rows = []
    for name, error in errors.items():
        variant = by_name[name]
        times = 1e3 * torch.tensor(seconds[name], dtype=torch.float64)
        lower, median, upper = times.quantile(times.new_tensor([0.25, 0.5, 0.75])).tolist()
        row = {"model": cell.name, "dtype": short(images.dtype), "batch": cell.batch, "session": cell.compiles}
        row |= {"name": name, "milliseconds": median, "quartiles": [lower, upper], "error": error}
        row |= {"images_per_second": 1e3 * cell.batch / median, "seconds": seconds[name]}
        row |= {"of_timm": over(TIMM, name), "of_timm_graph": over(f"{TIMM}, {ONE_GRAPH}", name)}
        if variant.plan is not None:
            bound, whole = (f"{one}{variant.plan}" for one in (f"{BOUND}, {ONE_GRAPH}", WHOLE))
            row |= {"of_bound": over(bound, name), "whole": over(name, whole)}
        rows.append(row | held(variant))
    return rows


def variants(cell: Cell, case: Case, setting: Setting) -> dict[str, Variant]:
    model, shape = case.model, tuple(case.images.shape[1:])
    whole = model if case.images.dtype == torch.float32 else copy.deepcopy(model).float()
    by_name = {TIMM: Variant(model, model), f"{TIMM}, {ONE_GRAPH}": Variant(OneGraph(model), model)}
    bounds = {}
    for mark, static in case.plans.items():
        record = replace(scheduled(model, shape, static.schedule, static.cls_only_last), batch=cell.batch)
        bounds[mark] = bound = free_merge_bound(model, record, replace(static, engine=False))
        blocks = patched(model, static, engine=False)
        by_name[f"{BOUND}{mark}"] = Variant(bound, bound)
        by_name[f"{BOUND}, {ONE_GRAPH}{mark}"] = Variant(OneGraph(bound), bound)
        by_name[f"{WHOLE}{mark}"] = Variant(OneGraph(blocks), blocks)
        if not mark:
            unfused, exact = (install(share(of), partial(unfused_block, of, static), static) for of in (model, whole))
            # scattered sums have no fixed order
            by_name[f"{UNFUSED}, {ONE_GRAPH}"] = Variant(OneGraph(unfused), unfused, exact=exact)
    # for the engine alone: its last block computes all tokens, as timm's does
    unmerged = replace(case.plans[""], schedule=(0,) * len(model.blocks), cls_only_last=False)
    ways = {f"ATM {adapt}": (config, case.plan[adapt]) for adapt, config in case.configs.items()}
    for name, (config, mark) in {**ways, UNMERGED: (unmerged, None)}.items():
        ours, blocks = (patched(model, config, engine) for engine in (True, False))
        exact = None if model is whole else patched(whole, config, engine=False)
        by_name[name] = Variant(call=ours, expected=blocks, plan=mark, engine=True, exact=exact)
    if cell.compiles:
        torch._dynamo.reset()
        for name, plain in ((TIMM, share(model)), (BOUND, bounds[""])):
            by_name[f"{name}, {COMPILED_TOO}"] = Variant(graph(plain, setting), by_name[name].expected)
    return by_name


def unfused_block(model: VisionTransformer, config: ATMConfig, block: Block, index: int) -> UnfusedBlock:
    return UnfusedBlock.of(block, config, index, len(model.blocks), model.num_prefix_tokens)


def graph(model: VisionTransformer, setting: Setting) -> Callable[[Tensor], Tensor]:
    """The model compiled by torch.compile, as one CUDA graph."""
    run = compiled(model, setting.device, mode="reduce-overhead")

    def call(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the previous call may be overwritten
        return run(images)

    return call


def check(variant: Variant, images: Tensor) -> float:
    """Compare the logits with those expected once all graphs are captured; returns their relative distance. The images
    are in reverse order, so that a graph that replays its captured input would be detected.

    Raises:
        StageError: the distance is too large, or the engine did not run.
    """
    call = variant.call
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(PASSES if variant.engine else WARM_UP if images.is_cuda else 1):
            call(images)
            if variant.engine and None not in call.engine.graphs.values():
                break
        else:
            if variant.engine:
                raise StageError(f"after {PASSES} passes there is more to capture beside {call.engine}")
        if images.is_cuda:  # torch.compile does so at unpredictable times
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        logits, expected = (run(images.flip(0)).double() for run in (call, variant.expected))
    if variant.engine and call.blocks.last.way != "engine":
        raise StageError(f"the engine did not run: {call.blocks.last.way}")
    for warning in said:
        if "eagerly" in str(warning.message):
            raise StageError(str(warning.message))
    allowed, what = LOGITS[images.dtype], "those without graphs"
    if variant.exact is not None:
        exact = variant.exact(images.flip(0).float()).double()
        allowed, what, expected = ROUNDED * distance(expected, exact), "those in float32", exact
    error = distance(logits, expected)
    if not error <= allowed:
        raise StageError(f"logits are {error:.2g} from {what}, above {allowed:.2g}")
    return error


def ratio(above: list[float], below: list[float]) -> float:
    """The median over the turns of the ratio of two times."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def shuffled(runs: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The runs in random order, so that the last to be warmed up is not always the same."""
    return {name: runs[name] for name in random.Random(1).sample(list(runs), len(runs))}


def distance(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


def held(variant: Variant) -> dict[str, Any]:
    """The number of a variant's graphs and the MiB that they hold; for the engine also the tokens merged per image."""
    if isinstance(variant.call, OneGraph):
        return {"graphs": 1, "mib": variant.call.mib}
    if not variant.engine:
        return {}
    engine = variant.call.engine
    merged = float(sum(map(mean, variant.call.blocks.last.merged)))
    graphs = sum(replay is not None for replay in engine.graphs.values())
    return {"graphs": graphs, "mib": engine.replays.mib(), "merged": merged}


if __name__ == "__main__":
    run_once(*sys.argv[1:])
