"""Find for every method the setting whose GFLOPs come closest to a cost; the last block computes all tokens.

The cost of methods with a schedule follows from the image shape. For methods with thresholds one number is found on the
images to choose by: the threshold itself, or how far the paper's curve stays below 1. Calibrated thresholds are those
that ``calibrate`` finds on these images for the cost, comparing patch tokens.
"""

from collections.abc import Callable
from typing import Any

from atm_triton import ATMConfig, Target, calibrate
from atm_triton.calibration.errors import UnreachableError
from benchmarks.paper import methods as paper
from benchmarks.paper.methods import NEAR, Way, nearest, of_baseline, of_config, published
from benchmarks.photos.compare import Photos

CURVE = ATMConfig.preset("DeiT-S")  # its distances from 1 are scaled
LOWEST, HIGHEST = -5.0, 0.3  # log10 of a distance from 1 at which nothing, or everything, merges
CLOSE = 0.004  # of the unmerged GFLOPs; with one r per batch the cost may jump, and then the nearest is taken
TRIES = 14
DROPPING = ("evit, fused", "zero_tprune", "tofu")  # methods that drop patches, which then have no token
FROM_PAPER = (
    *("tome", "tome, rising", "tome, falling", "threshold, batch", "threshold, image", "evit, fused", "mctf"),
    *("pitome", "zero_tprune", "tofu"),
)
METHODS = (*FROM_PAPER, *(f"atm, {kind}, {adapt}" for kind in ("curve", "calibrated") for adapt in ("batch", "image")))
LINES = {  # styles in plots, as for the paper's experiments
    "ATM": ("C0o-", ("atm, calibrated, image",)),
    "ATM, one r per batch": ("C0o--", ("atm, calibrated, batch",)),
    "the paper's curve": ("C9o-", ("atm, curve, image",)),
    "the paper's curve, one r per batch": ("C9o--", ("atm, curve, batch",)),
    **{name: line for name, line in paper.LINES.items() if set(line[1]) & set(FROM_PAPER)},
}


def at_cost(photos: Photos, method: str, goal: float) -> Way | None:
    """Find settings of a method of :data:`METHODS` that cost ``goal`` GFLOPs. None if no setting comes close."""
    candidates = published(photos.depth, photos.N, cls_only_last=False)
    if method in candidates:
        return nearest(photos, candidates[method], goal)
    kind, adapt = method.removeprefix("atm, ").rsplit(", ", 1)
    if kind == "calibrated":
        return calibrated(photos, adapt, goal)
    made = {"threshold": threshold, "curve": curve}[kind]
    return scaled(photos, lambda log10: made(photos, adapt, 10**log10), (kind, adapt), goal)


def threshold(photos: Photos, adapt: str, distance: float) -> Way:
    """Merging with one threshold for all blocks."""
    return of_baseline("threshold", cls_only_last=False, theta=1 - distance, adapt=adapt)


def curve(photos: Photos, adapt: str, distance: float) -> Way:
    """The paper's thresholds for DeiT-S, with their distances from 1 scaled until the first is ``distance``."""
    first = 1 - CURVE.theta(1, photos.depth)
    below = [(1 - CURVE.theta(block, photos.depth)) * distance / first for block in range(1, photos.depth + 1)]
    return of_config(with_thresholds(tuple(max(1 - one, -1.0) for one in below), adapt))


def with_thresholds(thetas: tuple[float | None, ...], adapt: str, **options: Any) -> ATMConfig:
    return ATMConfig(adapt=adapt, thresholds=thetas, cls_only_last=False, **options)


def scaled(photos: Photos, made: Callable[[float], Way], name: Any, goal: float) -> Way | None:
    """Find the number with which ``made`` costs ``goal`` on the images to choose by; larger numbers cost less. Costs
    measured for one goal are reused for the next. None if no number comes close."""
    known = photos.costs.setdefault(name, {LOWEST: photos.whole, HIGHEST: 0.0})
    for _ in range(TRIES):
        best = min(known, key=lambda at: abs(known[at] - goal))
        if abs(known[best] - goal) <= CLOSE * photos.whole:
            break
        low = max(at for at in known if known[at] > goal)
        high = min(at for at in known if known[at] <= goal and at > low)
        share = (known[low] - goal) / (known[low] - known[high])
        at = low + min(max(share, 0.2), 0.8) * (high - low)
        known[at] = photos.gflops(made(at))
    best = min(known, key=lambda at: abs(known[at] - goal))
    return made(best) if abs(known[best] - goal) <= NEAR * photos.whole else None


def calibrated(photos: Photos, adapt: str, goal: float) -> Way:
    loader = [(images,) for images in photos.chosen_by.split(photos.batch)]
    calibration = calibrate(photos.model, loader, Target(max_gflops=goal), adapt=adapt, dense=True, progress=False)
    return of_config(calibration.config)


def measured_at(photos: Photos, method: str, saved: float) -> dict[str, Any]:
    """The row of a method that saves this share of the GFLOPs, or the reason why there is none."""
    goal = photos.goal(saved)
    try:
        way = at_cost(photos, method, goal)
    except UnreachableError as error:
        return {"missing": str(error)}
    if way is None:
        return {"missing": f"no setting comes close to {goal:.4g} GFLOPs"}
    return {"settings": way.settings, **photos.outcome(way, method not in DROPPING).to_dict(photos.photos)}
