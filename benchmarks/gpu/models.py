"""Models: images a second, unpatched, with free merging, with ours and with merging as it is commonly written."""

import copy
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.config import ATMConfig
from atm_triton.evaluate import share
from atm_triton.flops import cost, planned, unmerged
from atm_triton.patch import apply_patch, install
from atm_triton.throughput import free_merge_bound, keep_freed_memory, peak_memory, time_in_turn
from benchmarks.gpu import StageError
from benchmarks.gpu.setting import Setting, one_line, short
from benchmarks.gpu.timing import compiled
from benchmarks.gpu.unfused import UnfusedBlock

MODELS = ("DeiT-S", "DeiT-B", "ViT-L")
NAMES = {"DeiT-S": "deit_small_patch16_224", "DeiT-B": "deit_base_patch16_224", "ViT-L": "vit_large_patch16_224"}
NAMES |= {"DINOv2-S": "vit_small_patch14_dinov2"}
BATCHES = (256, 64, 8, 1)
SHARE = 3.26 / 4.60  # of the paper's FLOPs: what ATM leaves of DeiT-S without loss, and here of the others too
REPEATS = 15
COMPILED = (("DeiT-S", 256), ("DeiT-S", 1), ("DeiT-B", 256), ("DeiT-S", 64), ("ViT-L", 256))  # in bfloat16, in order
COMPILING = 170  # seconds of this stage after which nothing more is compiled
COMPILATION = 110  # seconds that a session may take that compiles
LOGITS = 1e-3  # relative distance of float32 logits by the kernels and by the reference: a tie may fall otherwise
TIMM, BOUND, OURS, UNFUSED = "timm", "free-merge bound", "ATM static", "unfused"


@dataclass(frozen=True)
class Session:
    """What is timed in turn: a model in a dtype at a batch size, with or without torch.compile."""

    name: str
    dtype: torch.dtype
    batch: int
    compiles: bool


def sessions(setting: Setting) -> list[Session]:
    """Without torch.compile first: that takes the time that is left."""
    if setting.tiny:
        return [Session("DeiT-S", torch.float32, 2, True)]
    dtypes = (torch.bfloat16, torch.float16)
    plain = [Session(name, dtype, batch, False) for name in MODELS for dtype in dtypes for batch in BATCHES]
    return plain + [Session(name, torch.bfloat16, batch, True) for name, batch in COMPILED]


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    keep_freed_memory()
    start = setting.seconds()
    section |= {"rows": [], "left_out": [], "schedules": {}, "repeats": setting.pick(REPEATS, 2)}
    section["left_out"].append(
        "torch.compile in float16, and at the batch sizes not listed: "
        + ", ".join(f"{name} at {batch}" for name, batch in COMPILED)
    )
    models: dict[str, tuple[VisionTransformer, ATMConfig]] = {}
    for session in sessions(setting):
        if session.name not in models:
            models = {session.name: prepare(session.name, setting, section)}  # one at a time in memory
            setting.save()
        if session.compiles and not (setting.has(0, start + COMPILING) and setting.has(COMPILATION)):
            section["left_out"].append(f"torch.compile of {session.name} at {session.batch}: no time")
            continue
        section["rows"] += measure(session, *models[session.name], setting, section)
        if session.compiles:
            setting.save()


def prepare(name: str, setting: Setting, section: dict[str, Any]) -> tuple[VisionTransformer, ATMConfig]:
    """A float32 model of random weights on the device, its schedule, and the proof that the two backends agree."""
    shape = {} if not setting.tiny else {"img_size": 48, "embed_dim": 32, "depth": 3, "num_heads": 2}
    with torch.device(setting.device):
        model = timm.create_model(NAMES[name], **shape).eval()
    image_shape = (3, *model.patch_embed.img_size)
    r, whole = schedule(model, name, image_shape)
    config = ATMConfig(adapt="static", schedule=(r,) * len(model.blocks), backend="triton")
    spent = cost(model, planned(model, image_shape, config.schedule, config.cls_only_last))
    images = torch.randn(2, *image_shape, device=setting.device)
    with torch.inference_mode():
        by_kernels, by_reference = (
            apply_patch(share(model), replace(config, backend=backend))(images).double()
            for backend in ("triton", "reference")
        )
    error = ((by_kernels - by_reference).norm() / by_reference.norm()).item()
    section["schedules"][name] = {"r": r, "gflops": spent.paper_gflops, "gflops_unmerged": whole, "error": error}
    if not error <= LOGITS:
        raise StageError(f"{name}: float32 logits by the kernels are {error:.2g} from the reference's, above {LOGITS}")
    return model, config


def schedule(model: VisionTransformer, name: str, image_shape: tuple[int, ...]) -> tuple[int, float]:
    """The constant r that comes closest to the cost wanted, and what the unmerged model costs."""
    whole = cost(model, unmerged(model, image_shape)).paper_gflops
    wanted = SHARE * whole
    depth, N = len(model.blocks), unmerged(model, image_shape).tokens[0]

    def distance(r: int) -> float:
        return abs(cost(model, planned(model, image_shape, (r,) * depth, True)).paper_gflops - wanted)

    return min(range(1, N // 4), key=distance), whole


def measure(
    session: Session, model: VisionTransformer, config: ATMConfig, setting: Setting, section: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each variant: images a second (median, slowest, fastest), seconds of each turn, peak memory."""
    model = copy.deepcopy(model).to(session.dtype)
    images = torch.randn(session.batch, 3, *model.patch_embed.img_size, dtype=session.dtype, device=setting.device)
    runs, rows = {}, []
    where = {"model": session.name, "dtype": short(session.dtype), "batch": session.batch, "session": session.compiles}
    for name, call in variants(session, model, config, setting).items():
        try:
            with torch.inference_mode():
                logits = [call(images) for _ in range(3)][-1]  # a graph is captured by the second call
        except torch.OutOfMemoryError:
            section["left_out"].append(f"{name} of {session}: out of memory")
            continue
        except Exception as error:
            if "compiled" not in name:
                raise
            section["left_out"].append(f"{name} of {session}: {one_line(error)}")
            continue
        if not logits.isfinite().all():
            raise StageError(f"{name} of {session}: logits are not finite")
        runs[name] = lambda call=call: call(images)
    seconds = time_in_turn(shuffled(runs), section["repeats"], setting.device)
    for name in runs:
        row = where | {"name": name} | rates(seconds[name], session.batch)
        row |= {f"of_{other}": ratio(seconds[other], seconds[name]) for other in (TIMM, BOUND) if other in runs}
        row["peak_mib"] = None if "compiled" in name else peak_memory(runs[name], setting.device) / 2**20
        rows.append(row)  # a graph's memory is its own, and taken before
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return rows


def rates(seconds: list[float], images: int) -> dict[str, Any]:
    rate = [images / second for second in seconds]
    return {
        "images_per_second": statistics.median(rate),
        "slowest": min(rate),
        "fastest": max(rate),
        "milliseconds": statistics.median(seconds) * 1e3,
        "seconds": seconds,
    }


def ratio(above: list[float], below: list[float]) -> float:
    """The median over the turns of time over time."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def shuffled(runs: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """In an order of chance: what is warmed up last should not always be the same."""
    return {name: runs[name] for name in random.Random(1).sample(list(runs), len(runs))}


def variants(
    session: Session, model: VisionTransformer, config: ATMConfig, setting: Setting
) -> dict[str, Callable[[Tensor], Tensor]]:
    record = planned(model, (3, *model.patch_embed.img_size), config.schedule, config.cls_only_last)
    record = replace(record, batch=session.batch)
    depth = len(model.blocks)
    ours = apply_patch(share(model), config)
    found = {
        TIMM: model,
        BOUND: free_merge_bound(model, record, config),
        OURS: ours,
        UNFUSED: install(
            share(model), lambda block, i: UnfusedBlock.of(block, config, i, depth, model.num_prefix_tokens), config
        ),
    }
    if session.compiles:
        torch._dynamo.reset()
        found[f"{TIMM}, compiled"] = graph(share(model), setting)
        found[f"{OURS}, compiled"] = graph(apply_patch(share(model), config), setting)
    return found


def graph(model: VisionTransformer, setting: Setting) -> Callable[[Tensor], Tensor]:
    """By torch.compile, as one CUDA graph."""
    run = compiled(model, setting.device, mode="reduce-overhead")

    def call(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the call before are not wanted any more
        return run(images)

    return call
