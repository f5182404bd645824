"""Settings at a cost: for every method the one whose GFLOPs come closest, found in the same way for all.

Each method has one number that sets its cost; it is bisected. Where the cost hangs on shapes alone one image tells it;
where it hangs on similarities, the images to choose by do. Labels are not used. The rest of a method is as published,
or for ATM as it was calibrated, which is more search than the others get.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from atm_triton import ATMConfig, apply_patch
from atm_triton.evaluate import Patch, share
from atm_triton.search import SEEN
from atm_triton.shapes import Shape
from atm_triton.summary import summary
from benchmarks.baselines import baseline
from benchmarks.paper.subject import Subject

NEAR = 0.03  # of the unmerged model's cost: a method that comes no nearer is left out


@dataclass(frozen=True)
class Way:
    """A method with settings; ``patch`` puts it into a model, whose last block serves the class token alone."""

    name: str
    settings: dict[str, Any]
    patch: Patch


def of_baseline(name: str, **settings: Any) -> Way:
    return Way(name, settings, baseline(name, cls_only_last=True, **settings).apply)


def of_config(name: str, config: ATMConfig) -> Way:
    return Way(name, {"config": asdict(config)}, lambda model: apply_patch(model, config))


def by_shapes(subject: Subject, name: str, setting: str, values: list[Any], goal: float, **fixed: Any) -> Way | None:
    """The setting among ``values``, from the dearest to the cheapest, that comes closest to ``goal``; None if none is
    near."""
    ways = [of_baseline(name, **fixed, **{setting: value}) for value in values]
    first, last = 0, len(ways) - 1
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if counted(subject, ways[middle]) > goal else (first, middle)
    off, way = min(((abs(counted(subject, way) - goal), way) for way in (ways[first], ways[last])), key=lambda p: p[0])
    return way if off <= NEAR * subject.predictor.unmerged else None


@torch.inference_mode()
def counted(subject: Subject, way: Way) -> float:
    """GFLOPs of an image, where they hang on its shape alone."""
    model: VisionTransformer = way.patch(share(subject.model))
    model(subject.image())
    return summary(model).paper_gflops


def by_similarity(subject: Subject, shape: Shape, goal: float) -> ATMConfig:
    """Thresholds of a shape, scaled until the images to choose by cost ``goal``."""
    search = subject.search(shape.adapt)
    met = search.meet(shape, goal, None, None, SEEN)
    if met is None:
        raise ValueError(f"{goal:.4g} GFLOPs cannot be met by these thresholds")
    return search.config((shape, met[0]))


def shape_of(config: ATMConfig, depth: int, adapt: str) -> Shape:
    """The shape of thresholds, for either way to adapt."""
    thetas = [config.theta(block, depth) for block in range(1, depth + 1)]
    weights = tuple(None if theta is None else 1 - theta for theta in thetas)
    return Shape(weights, adapt, config.split_depth, config.proportional_attention is not False)


def at_cost(subject: Subject, goal: float, configs: dict[str, ATMConfig]) -> list[Way]:
    """Every method at ``goal`` GFLOPs; ``configs``: ATM's thresholds for "batch" and for "image", to be scaled."""
    depth, tokens = len(subject.model.blocks), subject.predictor.N
    counts, ratios = list(range(1, tokens)), [1 - step / 400 for step in range(1, 201)]
    rates = [1 - step / 200 for step in range(1, 200)]
    constant = by_similarity(subject, Shape((1.0,) * depth, "batch", depth), goal)
    ways = [
        by_shapes(subject, "tome", "r", counts, goal),
        of_baseline("threshold", theta=constant.thresholds[0]),
        by_shapes(subject, "evit", "keep_rate", rates, goal),
        by_shapes(subject, "evit", "keep_rate", rates, goal, fuse_token=False),
        by_shapes(subject, "mctf", "r", counts, goal),
        by_shapes(subject, "pitome", "ratio", ratios, goal),
    ]
    for adapt, config in configs.items():
        found = by_similarity(subject, shape_of(config, depth, adapt), goal)
        ways.append(of_config(f"atm, {adapt}", found))
    return [way for way in ways if way is not None]
