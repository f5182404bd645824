"""calibrate(model, loader, target): find the least change at a given cost, or the least cost at a given change.

Takes a model, images without labels and a target: a cost in GFLOPs, or a limit on the change, in the measure that fits
the model's answers (:mod:`atm_triton.measure.comparison`). Three eighths of the images fit the thresholds, three
choose among the fitted plans, and the other two, which neither step has seen, measure what is promised.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.calibration.costs import Costs
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.fitting import Fitted, Fitting, Plan, check_hooks
from atm_triton.calibration.measuring import Mean, Measured, Meter
from atm_triton.calibration.progress import Progress
from atm_triton.calibration.resume import Notes
from atm_triton.calibration.search import FAR, SEEN, Search, expected
from atm_triton.config import ADAPT, ATMConfig
from atm_triton.flops import unmerged
from atm_triton.measure.comparison import Measure, measure_of, percentile
from atm_triton.patch import check_model, knows_sizes
from atm_triton.reference import largest_r

PARTS = {"fit": 3, "choose": 3, "promise": 2}  # in eighths
MOST = {"fit": 256, "choose": 1024}  # images per part; more take time and tell little more
LEAST_IMAGES = 64
SCALES = (-20.0, 10.0)  # log2, from a plan that merges almost nothing to one that merges everything
ROUGH, FINE = 9, 12  # halvings of this range: to find a cost at which a limit holds; to merge as much as it allows
ALIKE = 1e-4  # rounding may make compared answers to equal images differ by this; a divergence grows with its square
NEAR = 0.01  # share of the range of all pixels; a camera's noise is about as large
WORST = 100  # up to this many images the 99th percentile is the largest value


@dataclass(frozen=True)
class Target:
    """What a calibration aims for. Give exactly one of: ``max_gflops`` (1e9, in the paper's convention); for logits
    ``max_kl``, the mean KL(unmerged || merged) in nats, or ``min_agreement``, in [0, 1]; for features ``max_distance``,
    the mean of 1 - cosine, or ``max_distance_p99``, its 99th percentile, both in [0, 2]. :class:`Measure` defines them.
    A mean must meet its limit by two standard errors on the images that the search uses. These errors take images as
    independent. With one r per batch they are not, so the limit holds less surely.

    Raises:
        ValueError: no target or more than one is given, or a number is out of range.
    """

    max_gflops: float | None = None
    max_kl: float | None = None
    min_agreement: float | None = None
    max_distance: float | None = None
    max_distance_p99: float | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"target: got {', '.join(given) or 'nothing'}; want one of {', '.join(f.name for f in fields(self))}"
            )
        most = {"min_agreement": 1, "max_distance": 2, "max_distance_p99": 2}.get(self.name, math.inf)
        if not 0 < self.value <= most or self.value == math.inf:
            raise ValueError(
                f"target: {self.name}={self.value} is out of range; give one above 0"
                + (f" up to {most}" if most < math.inf else "")
            )

    @property
    def name(self) -> str:
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def value(self) -> float:
        return getattr(self, self.name)

    def check_fits(self, measure: Measure) -> None:
        """Raise ValueError if ``measure`` does not provide the quantity that this target limits."""
        fitting = ["max_distance", "max_distance_p99"] if measure.of_features else ["max_kl", "min_agreement"]
        if self.name not in ("max_gflops", *fitting):
            raise ValueError(
                f"target: {self.name} does not fit what is compared, {measure}; give {', '.join(fitting)} or max_gflops"
            )

    def holds(self, mean: Mean) -> bool:
        """Whether the change is small enough. Only for targets that limit the change. A mean has to meet its limit by
        two standard errors of images, because a plan changes less on the images it was chosen by than on others."""
        if self.max_distance_p99 is not None:
            return mean.p99 <= self.max_distance_p99
        if self.min_agreement is None:
            return mean.divergence + 2 * mean.divergence_se <= self.value
        share = mean.agreement or 0.0
        return share - 2 * (share * (1 - share) / mean.images) ** 0.5 >= self.min_agreement

    def doubt(self, promise: "Promise") -> str | None:
        """Why the target may not hold on other images; None if it should."""
        if self.max_gflops is not None:
            over = promise.gflops > (1 + FAR) * self.max_gflops
            return f"{promise.gflops:.4g} GFLOPs are above {self.max_gflops:g}" if over else None
        measured = {
            "max_kl": ("KL", promise.kl),
            "max_distance": ("distance", promise.distance),
            "max_distance_p99": ("the distance's 99th percentile", promise.distance_p99),
        }
        what, change = measured.get(self.name, ("", None))
        if change is not None and change > self.value:
            return f"{what} {change:.3g} is above {self.value:g}"
        if self.max_distance_p99 is not None and promise.images <= WORST:
            return f"the distance's 99th percentile is that of the worst of {promise.images} images"
        if self.min_agreement is None or promise.agreement is None or promise.agreement_se is None:
            return None
        if promise.agreement < self.min_agreement:
            return f"agreement {promise.agreement:.4g} is below {self.min_agreement:g}"
        if promise.agreement_se > 1 - self.min_agreement:
            return f"agreement is known to {promise.agreement_se:.2g} on {promise.images} images"
        return None


@dataclass(frozen=True)
class Promise:
    """Cost and change, measured on ``images`` images that the search did not see. ``measure`` names how answers were
    compared (:class:`Measure`). Means come with standard errors (``*_se``). Logits have KL and agreement, in [0, 1];
    features have a distance and its 99th percentile (up to 100 images: the worst). With one r per batch, the errors of
    cost and divergence come from the means of batches, and are None for a single batch.

    A few images decide the divergence. A small sample may contain none of them, and its spread then looks small too.
    So the errors of cost and divergence use the spread of all images, including those that the search saw, where that
    is larger than the spread of these images."""

    images: int
    gflops: float
    gflops_se: float | None
    kl: float | None
    kl_se: float | None
    agreement: float | None
    agreement_se: float | None
    distance: float | None = None
    distance_se: float | None = None
    distance_p99: float | None = None
    measure: str = "softmax"

    @classmethod
    def of(cls, measured: Measured, measure: Measure, batch_size: int = 1, seen: Sequence[Measured] = ()) -> "Promise":
        """Make a promise of ``measured``. ``batch_size``: how many images share one r; ``seen``: what was measured on
        the images that the search saw."""
        n = len(measured.divergence)
        values: dict[str, Any] = dict.fromkeys(("kl", "kl_se", "agreement", "agreement_se"))
        if measured.agree is not None:
            kept = measured.agree.sum().item()
            rate = (kept + 1) / (n + 2)  # that all of these images agree does not prove that all images do
            values |= {"agreement": kept / n, "agreement_se": (rate * (1 - rate) / n) ** 0.5}
        else:
            values["distance_p99"] = percentile(measured.divergence)
        for column, name in (("gflops", "gflops"), ("divergence", measure.divergence)):
            own, *others = (_batch_means(getattr(part, column), batch_size) for part in (measured, *seen))
            spread = own.std(correction=1) if len(own) > 1 else None
            if others and spread is not None:
                spread = max(spread, torch.cat([own, *others]).std(correction=1))
            error = None if spread is None else (spread / len(own) ** 0.5).item()
            values |= {name: getattr(measured, column).mean().item(), f"{name}_se": error}
        return cls(images=n, measure=measure.name, **values)

    def __str__(self) -> str:
        measure = Measure(self.measure)
        return measure.text(getattr(self, measure.divergence), self.agreement, self.distance_p99)


def _batch_means(column: Tensor, batch_size: int) -> Tensor:
    return torch.stack([batch.mean() for batch in column.split(batch_size)])


@dataclass(frozen=True)
class Calibration:
    """The ``config`` found for a ``target`` on ``images`` images, and its ``promise``. ``family`` is "curve" if the
    thresholds follow the paper's Eq. 1, perhaps after some idle blocks, else "free". ``passes`` counts images that went
    through the model in this run."""

    config: ATMConfig
    target: Target
    images: int
    promise: Promise
    unmerged_gflops: float
    family: str
    passes: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    model: VisionTransformer,
    loader: Iterable,
    target: Target,
    adapt: str = "image",
    proportional_attention: bool | None = None,
    cls_only_last: bool = True,
    max_merging_blocks: int | None = None,
    dense: bool = False,
    sigmoid: bool = False,
    backend: str = "auto",
    seed: int = 0,
    notes: Notes | None = None,
    progress: bool = True,
) -> Calibration:
    """Find how a model should merge, from images without labels. Labels in the loader are ignored.

    Under torchrun every process passes the same loader, and the processes share out the images.

    Args:
        model: unpatched, in eval mode, on its device; it stays so.
        loader: batches of images [B, C, H, W], or pairs whose first item is such a batch. All images are kept in
            memory; thresholds are fitted to at most 256 of them.
        adapt: "image", "batch" (in batches as large as the loader's), or "static".
        proportional_attention: as in :class:`ATMConfig`; the search starts with it and may change it.
        cls_only_last: as in :class:`ATMConfig`.
        backend: as in :class:`ATMConfig`.
        max_merging_blocks: how many blocks may merge; None: any number. Matching takes time in every merging block,
            and FLOPs do not show it: with adapt="image" four of twelve blocks may be faster than eleven at the same
            GFLOPs.
        dense: compare patch tokens; set this if you read ``forward_features``. The last block then computes all tokens
            and merges like the others.
        sigmoid: the labels do not exclude one another. A single logit is always treated so.
        seed: seed of the search; the same seed on the same images gives the same configuration.
        notes: keep measurements in a file, so that a later run can continue an interrupted one: in
            ``with Notes(Path("mine.partial")) as notes:`` (:class:`atm_triton.calibration.resume.Notes`).
        progress: show a bar, or a line every half minute if stderr is not a terminal.

    Returns:
        The configuration that was found, with the cost and the change that it promises.

    Raises:
        ValueError: the target cannot be reached or does not fit what is compared; the images are too few, blank, or of
            a shape that the model does not take; the model answers all images alike, or nothing in it can merge.
        TypeError: the model cannot be merged, or the batches are not float images.
    """
    _check_asked(model, adapt, max_merging_blocks)
    measure = measure_of(model, dense, sigmoid)
    target.check_fits(measure)
    parts, number = split_images(loader, seed)
    shape = tuple(parts["fit"][0].shape[1:])
    _check_images(model, shape, parts)
    settings: dict[str, Any] = {"cls_only_last": cls_only_last and not dense, "backend": backend}
    costs = Costs(model, shape, settings["cls_only_last"])
    _check_merges(costs)
    if target.max_gflops is not None:
        _check_reachable(target.max_gflops, costs, max_merging_blocks)
    proportional = knows_sizes(model) if proportional_attention is None else proportional_attention
    numbers = {name: sum(map(len, batches)) for name, batches in parts.items()}
    halvings = 0 if target.max_gflops is not None else ROUGH + FINE
    with Progress(expected(costs, numbers, halvings), progress) as bar:
        meter = Meter(model, parts, settings, measure, bar.update)
        _check_answers(meter)
        if notes is not None:
            meter.remember(notes)
        bar.refresh()

        def show(least: float) -> None:
            bar.set_postfix_str(f"least {measure.divergence.replace('kl', 'KL')} {least:.2g}", refresh=False)

        search = Search(Fitting(meter, costs, adapt), proportional, max_merging_blocks, seed, show)
        fitted = _chosen(search, target)
        shared = len(parts["promise"][0]) if adapt == "batch" else 1
        seen = [meter.measure(fitted.config, part) for part in SEEN]
        meter.warns = True
        promise = Promise.of(meter.measure(fitted.config, "promise"), measure, shared, seen)
    passes = round(meter.images)
    return Calibration(
        config=fitted.config,
        target=target,
        images=number,
        promise=promise,
        unmerged_gflops=costs.unmerged,
        family=fitted.plan.family,
        passes=passes,
        seed=seed,
    )


def split_images(loader: Iterable, seed: int) -> tuple[dict[str, list[Tensor]], int]:
    """Shuffle the images and split them into batches for each part, with at most :data:`MOST` images in some parts.
    Also returns how many images the loader has."""
    batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in loader]
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"loader: got {got}; want batches of images [B, C, H, W], normalised floats")
    batch_size = max(map(len, batches), default=0)  # the first may be smaller if some images could not be read
    number = sum(map(len, batches))
    if number < LEAST_IMAGES:
        raise ValueError(f"{number} images are too few to calibrate on; give {LEAST_IMAGES} or more")
    images = torch.cat(batches)
    order = list(range(number))
    random.Random(seed).shuffle(order)
    parts, first, eighths = {}, 0, 0
    for name, share in PARTS.items():
        eighths += share
        last = number * eighths // 8
        parts[name] = list(images[order[first:last][: MOST.get(name)]].split(batch_size))
        first = last
    return parts, number


def _check_asked(model: VisionTransformer, adapt: str, max_merging_blocks: int | None) -> None:
    check_model(model)
    check_hooks(model)
    if adapt not in ADAPT:
        raise ValueError(f"adapt={adapt!r} is unknown; choose one of {', '.join(ADAPT)}")
    if max_merging_blocks is not None and max_merging_blocks < 1:
        raise ValueError(f"max_merging_blocks={max_merging_blocks} is too small; give 1 or more")


def _check_answers(meter: Meter) -> None:
    if meter.spread() < ALIKE or meter.apart() < ALIKE**2:
        raise ValueError("the model answers all images alike, so no merging changes it; check images, weights and head")
    if meter.normalised():
        raise ValueError("all answers lie in 0 .. 1, as probabilities do; want logits: remove the last activation")


def _check_images(model: VisionTransformer, shape: tuple[int, ...], parts: dict[str, list[Tensor]]) -> None:
    _check_fits(model, shape)
    _check_not_blank(parts)
    _check_differ(parts)


def _check_fits(model: VisionTransformer, shape: tuple[int, ...]) -> None:
    try:
        unmerged(model, shape)
    except (RuntimeError, AssertionError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"images {list(shape)} do not fit the model: {why}; want its channels and size") from error


def _check_not_blank(parts: dict[str, list[Tensor]]) -> None:
    if all(torch.equal(x.amin((2, 3)), x.amax((2, 3))) for batches in parts.values() for x in batches):
        raise ValueError("the images are blank, each of one value throughout; give images as the model will meet them")


def _check_differ(parts: dict[str, list[Tensor]]) -> None:
    every = [x for batches in parts.values() for x in batches]
    low, high = torch.stack([x.amin(0) for x in every]).amin(0), torch.stack([x.amax(0) for x in every]).amax(0)
    if (high - low).max() < NEAR * (high.max() - low.min()):
        raise ValueError(
            f"the images are one image, {sum(map(len, every))} times: no pixel differs by {NEAR:.0%} of the contrast; "
            "give images as the model will meet them"
        )


def _check_merges(costs: Costs) -> None:
    if costs.merging == 0:
        raise ValueError("no block can merge: the last, here the only one, computes the class token alone")
    if largest_r(costs.N, costs.prefix) == 0:
        raise ValueError("images of one patch token have nothing to merge; give larger ones")


def _check_reachable(max_gflops: float, costs: Costs, max_merging_blocks: int | None) -> None:
    lowest = costs.lowest(max_merging_blocks)
    if max_gflops < lowest:
        raise ValueError(
            f"max_gflops={max_gflops:g} is below {_rounded_up(lowest)}, the lowest that merging can reach here; "
            "ask for more"
        )
    if max_gflops >= costs.highest:
        raise ValueError(
            f"max_gflops={max_gflops:g}: the model costs {costs.highest:.4g} without merging; ask for less"
        )


def _rounded_up(number: float) -> str:
    """The number rounded up to four digits."""
    unit = 10 ** (math.floor(math.log10(number)) - 3)
    return f"{math.ceil(number / unit) * unit:.4g}"


def _chosen(search: Search, target: Target) -> Fitted:
    """The best plan for a target. If the target limits the change, search at the cost of the plainest plan that meets
    it, then scale the plan that was found until it only just meets the target."""
    if target.max_gflops is not None:
        return search.run(target.max_gflops)
    goal = _largest(search, target, search.plainest(), ROUGH).mean.gflops
    return _largest(search, target, search.run(goal).plan, FINE)


def _largest(search: Search, target: Target, plan: Plan, steps: int) -> Fitted:
    """The plan scaled up as far as the target still holds on the images that the search may see."""

    def at(log2: float) -> Fitted:
        return search.fitting.run(plan.scaled(2**log2), *SEEN)

    low, high = SCALES
    largest = at(low)
    if not target.holds(largest.mean):
        change = search.fitting.meter.by.text(largest.mean.divergence, largest.mean.agreement, largest.mean.p99)
        raise UnreachableError(
            f"the target cannot be met: even merging almost nothing gives {change}, and a mean must meet it by "
            "two standard errors"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        tried = at(middle)
        largest, low, high = (tried, middle, high) if target.holds(tried.mean) else (largest, low, middle)
    return largest
