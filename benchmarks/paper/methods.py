"""Find for every method the setting whose GFLOPs come closest to a cost, in the same way for all.

Each method has one number that sets its cost, and it is bisected. If the cost depends on shapes alone, one image
suffices; if it depends on similarities, it is measured on the images to choose by. Labels are not used. The other
settings of a method are as published; ATM's are those calibrated for the nearest cost, which is more search than the
others get.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from atm_triton import ATMConfig, apply_patch
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.fitting import Plan
from atm_triton.flops import cost, unmerged
from atm_triton.measure.evaluate import Patch, share
from atm_triton.summary import summary
from benchmarks.baselines import baseline
from benchmarks.baselines.dtome import DToMe
from benchmarks.model_with_images import ModelWithImages
from benchmarks.paper.subject import Subject

POINTS = sorted({round(2 * 1.02**step) for step in range(450)}, reverse=True)  # M of ATS, from 14,538 to 2
NEAR = 0.03  # share of the unmerged model's cost; a method that comes no closer is left out
METHODS = (  # methods with several published settings appear once for each
    *("tome", "tome, rising", "tome, falling", "threshold, batch", "threshold, image", "evit, fused", "evit"),
    *("mctf", "mctf, fast", "pitome", "ats", "zero_tprune", "tofu", "dtome", "atm, batch", "atm, image"),
)
LINES = {  # in plots: a style (one colour per method, solid if images have their own counts), settings on the line
    "ATM": ("C0o-", ("atm, image",)),
    "ATM, one r per batch": ("C0o--", ("atm, batch",)),
    "one threshold": ("C2v-", ("threshold, image",)),
    "one threshold, one r per batch": ("C2v--", ("threshold, batch",)),
    "ToMe": ("C1s--", ("tome", "tome, rising", "tome, falling")),
    "EViT": ("C3^--", ("evit", "evit, fused")),
    "MCTF": ("C4D--", ("mctf", "mctf, fast")),
    "PiToMe": ("C5P--", ("pitome",)),
    "ATS": ("C6X-", ("ats",)),
    "Zero-TPrune": ("C7*--", ("zero_tprune",)),
    "ToFu": ("C8p--", ("tofu",)),
    "DToMe": ("kh-", ("dtome",)),
}


@dataclass(frozen=True)
class Way:
    """A method with its settings. ``patch`` puts it into a model, whose last block then computes the class token alone.
    ``own_count``: images differ in cost, so that the cost is measured on the images to choose by."""

    settings: dict[str, Any]
    patch: Patch
    own_count: bool = False


def of_baseline(name: str, *, own_count: bool = False, cls_only_last: bool = True, **settings: Any) -> Way:
    return Way(
        settings=settings, patch=baseline(name, cls_only_last=cls_only_last, **settings).apply, own_count=own_count
    )


def of_config(config: ATMConfig) -> Way:
    return Way({"config": asdict(config)}, lambda model: apply_patch(model, config))


def nearest(subject: Subject, ways: Sequence[Way], goal: float, within: float = NEAR) -> Way | None:
    """Bisect ``ways``, sorted from the highest to the lowest cost, for the one closest to ``goal``. None if it is
    farther away than ``within`` times the unmerged model's cost."""
    first, last = 0, len(ways) - 1
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if counted(subject, ways[middle]) > goal else (first, middle)
    off, way = min(((abs(counted(subject, way) - goal), way) for way in (ways[first], ways[last])), key=lambda p: p[0])
    whole = cost(subject.model, unmerged(subject.model, tuple(subject.image().shape[1:]))).paper_gflops
    return way if off <= within * whole else None


@torch.inference_mode()
def counted(subject: Subject, way: Way) -> float:
    """GFLOPs per image: the mean over the images to choose by if images differ in cost, otherwise those of one
    image."""
    model: VisionTransformer = way.patch(share(subject.model))
    batches = [batch[0] for batch in subject.loader] if way.own_count else [subject.image()]
    total = 0.0
    for images in batches:
        model(images.to(next(model.parameters())))
        total += len(images) * summary(model).paper_gflops
    return total / sum(map(len, batches))


def scaled(subject: ModelWithImages, config: ATMConfig, goal: float) -> ATMConfig | None:
    """Scale the thresholds' distances from 1 until the images to choose by cost ``goal``; None if no scale does."""
    thetas = tuple(config.theta(block, subject.depth) for block in range(1, subject.costs.merging + 1))
    knows_sizes = subject.proportional if config.proportional_attention is None else config.proportional_attention
    return subject.at_cost(
        Plan(counts=(), thresholds=thetas, split_depth=config.split_depth, proportional_attention=knows_sizes),
        config.adapt,
        goal,
    )


def constant_threshold(subject: Subject, adapt: str, goal: float) -> Way | None:
    plan = Plan(
        counts=(),
        thresholds=(0.9,) * subject.costs.merging,
        split_depth=subject.depth,
        proportional_attention=subject.proportional,
    )
    config = subject.at_cost(plan, adapt, goal)
    return None if config is None else of_baseline("threshold", theta=config.thresholds[0], adapt=adapt)


def published(depth: int, N: int, cls_only_last: bool = True) -> dict[str, list[Way]]:
    """The methods whose cost depends on shapes alone, for a model of ``depth`` blocks and N tokens, each with its
    settings from the highest to the lowest cost."""
    ratios, rates = ([1 - step / steps for step in range(1, last)] for steps, last in ((400, 201), (200, 200)))
    quarters = sorted({depth * quarter // 4 for quarter in (1, 2, 3)})  # 3, 6, 9 of twelve blocks, as published
    in_quarters, spread = {"blocks": quarters}, sorted({depth * block // 12 for block in (0, 2, 5, 8, 10)})
    settings = {
        "tome": ("tome", [{"r": r} for r in range(1, N)]),
        "tome, rising": ("tome", [{"r": (r, 1.0)} for r in range(1, N)]),
        "tome, falling": ("tome", [{"r": (r, -1.0)} for r in range(1, N)]),
        "evit, fused": ("evit", [{"keep_rate": rate, **in_quarters} for rate in rates]),
        "evit": ("evit", [{"keep_rate": rate, **in_quarters, "fuse_token": False} for rate in rates]),
        "mctf": ("mctf", [{"r": r} for r in range(1, N)]),
        "mctf, fast": ("mctf", [{"r": 1 - ratio, **in_quarters} for ratio in ratios]),
        "pitome": ("pitome", [{"ratio": ratio} for ratio in ratios]),
        "zero_tprune": ("zero_tprune", [{"keep_rate": rate, "blocks": spread} for rate in (1.0, *rates)]),
        "tofu": ("tofu", [{"r": r} for r in range(1, N)]),
    }
    return {
        method: [of_baseline(name, cls_only_last=cls_only_last, **one) for one in ways]
        for method, (name, ways) in settings.items()
    }


def sampling(subject: Subject, goal: float, within: float) -> Way | None:
    """ATS in the last three quarters of the blocks, as published, or in fewer of the last blocks if ``goal`` is out of
    reach otherwise."""
    for first in range(subject.depth // 4, subject.depth):
        blocks = tuple(range(first, subject.depth))
        ways = [of_baseline("ats", own_count=True, M=M, blocks=blocks) for M in POINTS]
        if counted(subject, ways[0]) >= goal:
            break
    return nearest(subject, ways, goal, within)


def fitted(subject: Subject, goal: float, within: float) -> Way | None:
    """DToMe with the r whose thresholds, fitted to the images to choose by, cost closest to ``goal`` on these
    images."""

    @cache
    def of_r(r: int) -> Way:
        thresholds = DToMe.fitted(subject.model, subject.loader, r).thresholds
        return of_baseline("dtome", own_count=True, thresholds=thresholds)

    every_r = range(1, subject.costs.N)
    ways = [Way({"r": r}, lambda model, r=r: of_r(r).patch(model), own_count=True) for r in every_r]
    way = nearest(subject, ways, goal, within)
    return None if way is None else of_r(way.settings["r"])


def at_cost(subject: Subject, method: str, goal: float, within: float = NEAR) -> Way | None:
    """Find settings of a method of :data:`METHODS` that cost ``goal`` GFLOPs; settings that come in steps may be off by
    ``within`` times the unmerged model's cost. None if no setting comes close.

    Raises:
        UnreachableError: the model lacks what the method needs, or no thresholds are given for it.
    """
    candidates = published(subject.depth, subject.costs.N)
    if method in candidates:
        return nearest(subject, candidates[method], goal, within)
    name, _, adapt = method.partition(", ")
    if name in ("ats", "dtome"):
        return {"ats": sampling, "dtome": fitted}[name](subject, goal, within)
    if name == "threshold":
        return constant_threshold(subject, adapt, goal)
    config = subject.thresholds.near(adapt, goal)
    if config is None:
        raise UnreachableError(f'no thresholds are calibrated for adapt="{adapt}"; give them by --config')
    met = scaled(subject, config, goal)
    return None if met is None else of_config(met)


Finder = Callable[[Subject, str, float], Way | None]


def measured_at(subject: Subject, name: str, goal: float, find: Finder = at_cost) -> dict[str, Any]:
    """The row of the settings that ``find`` finds for a name at a cost, or the reason why there are none."""
    try:
        way = find(subject, name, goal)
    except UnreachableError as error:
        return {"missing": str(error)}
    if way is None:
        return {"missing": f"no setting comes close to {goal:.4g} GFLOPs"}
    return measured(subject, way, f"{name}, {goal:.4g} GFLOPs")


def measured(subject: Subject, way: Way, title: str) -> dict[str, Any]:
    return {"settings": way.settings, **subject.outcome(way.patch, title).to_dict()}
