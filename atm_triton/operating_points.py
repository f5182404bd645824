"""The paper's operating points (Tables A2-A5): thresholds, and what the paper measured with them on its checkpoints."""

import json
import math
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path

_DATA = Path(__file__).parent / "operating_points.json"

PAPER_NAMES = {  # timm's or our name of a model: the paper's
    "deit_tiny_patch16_224": "DeiT-T",
    "deit_small_patch16_224": "DeiT-S",
    "deit_base_patch16_224": "DeiT-B",
    "lvvit_t": "LV-ViT-T",
    "lvvit_s": "LV-ViT-S",
    "lvvit_m": "LV-ViT-M",
    "t2t_vit_t_14": "T2T-ViT-14",
    "t2t_vit_t_19": "T2T-ViT-19",
    "vit_base_patch16_224.mae": "MAE",
}


@dataclass(frozen=True)
class OperatingPoint:
    """A row of Tables A2-A5. ``gflops`` is in 1e9 multiply-accumulates per image, ``top1`` in percent on ImageNet-1k.
    ``alpha``, ``beta`` and ``theta_min`` are None for the model without merging."""

    table: str
    model: str
    alpha: float | None
    beta: float | None
    theta_min: float | None
    gflops: float
    top1: float
    fine_tuned: bool


@cache
def operating_points() -> tuple[OperatingPoint, ...]:
    """All 186 rows, in the paper's order."""
    return tuple(OperatingPoint(**row) for row in json.loads(_DATA.read_text()))


def choose(
    name: str, max_gflops: float | None = None, top1_drop: float | None = None, fine_tuned: bool = False
) -> tuple[OperatingPoint, OperatingPoint]:
    """Choose an operating point. With ``max_gflops`` it is the most accurate point at or below that cost, with
    ``top1_drop`` the cheapest that loses at most that many points. With neither it is the cheapest that loses nothing,
    or, if all points lose something, the cheapest of those that lose least.

    Args:
        name: timm's name, with or without a tag ("deit_small_patch16_224.fb_in1k"), or the paper's ("DeiT-S").
        max_gflops, top1_drop: give at most one of them.
        fine_tuned: choose among the points after 30 epochs of fine-tuning (Table A3) instead.

    Returns:
        The chosen point and the model's unmerged one.

    Raises:
        ValueError: the model is unknown, no point reaches the target, or both targets are given.
        TypeError: a target is not a number, or ``name`` is not a string.
    """
    if max_gflops is not None and top1_drop is not None:
        raise ValueError("preset wants at most one of max_gflops and top1_drop")
    for what, target in (("max_gflops", max_gflops), ("top1_drop", top1_drop)):
        if target is not None and (isinstance(target, bool) or not isinstance(target, Real) or math.isnan(target)):
            raise TypeError(f"{what} must be a number, got {target!r}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a model's name, timm's or the paper's, got {name!r}")
    rows = [p for p in operating_points() if p.model == paper_name(name) and p.fine_tuned == fine_tuned]
    if not rows:
        raise ValueError(f"the paper has no fine-tuned points for {name!r} (Table A3: DeiT-T, DeiT-S, DeiT-B)")
    unmerged = next(p for p in rows if p.alpha is None)
    merged = [p for p in rows if p.alpha is not None]
    least = unmerged.top1 - max(p.top1 for p in merged)
    if max_gflops is not None:
        reached = [p for p in merged if p.gflops <= max_gflops]
        best = max(reached, key=lambda p: (p.top1, -p.gflops), default=None)
        lowest = f"{min(p.gflops for p in merged)} GFLOPs; raise max_gflops={max_gflops}"
    else:
        drop = max(least, 0.0) if top1_drop is None else top1_drop
        reached = [p for p in merged if p.top1 >= round(unmerged.top1 - drop, 6)]
        best = min(reached, key=lambda p: (p.gflops, -p.top1), default=None)
        lowest = f"a drop of {least:.2f}; raise top1_drop={top1_drop}"
    if best is None:
        raise ValueError(f"the paper's points for {unmerged.model} go no lower than {lowest}")
    return best, unmerged


def paper_name(name: str) -> str:
    """The paper's name of a model, given timm's name (with or without a tag), ours, or the paper's.

    Raises:
        ValueError: the paper has no operating points for it.
    """
    names = {paper.lower(): paper for paper in PAPER_NAMES.values()} | PAPER_NAMES
    base = name.split(".")[0]
    paper = names.get(name) or names.get(name.lower()) or (names.get(base) if base in PAPER_NAMES else None)
    if paper is None:
        known = ", ".join(f"{ours} ({paper})" for ours, paper in PAPER_NAMES.items())
        raise ValueError(
            f"the paper has no operating points for {name!r}; it has them for {known}; atm-triton calibrate finds "
            "thresholds for any model"
        )
    return paper
