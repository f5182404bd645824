"""ATMConfig: which tokens merge, how many, and how it is computed."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Self, TypeVar

from atm_triton.operating_points import choose
from atm_triton.reference import threshold

T = TypeVar("T")
ADAPT = ("batch", "image", "static")
BACKENDS = ("auto", "triton", "reference")
_CURVE = ("alpha", "beta", "theta_min")
_MERGING = (*_CURVE, "split_depth", "adapt", "schedule", "thresholds", "proportional_attention", "cls_only_last")
REMEDY = "atm-triton calibrate finds them, or give alpha, beta and theta_min, or thresholds"


@dataclass(frozen=True)
class ATMConfig:
    """The settings of adaptive token merging.

    Thresholds belong to a trained model; those of another model merge too much or too little. They therefore have no
    default. Give ``alpha``, ``beta`` and ``theta_min`` together, or ``thresholds``, or a ``schedule``. Without any of
    these, :func:`atm_triton.apply_patch` uses the paper's thresholds for a model of its tables and refuses any other.

    Args:
        alpha: threshold of the first block, a cosine similarity (Eq. 1).
        beta: decay rate, in [0, 1] (Eq. 1).
        theta_min: lowest threshold, -1 <= theta_min <= alpha <= 1 (Eq. 1).
        split_depth: number of blocks with alternate grouping; later blocks group tokens by size (Section 3.3). None:
            three quarters of the depth, rounded down. The model's depth: alternate grouping everywhere, as in ToMe.
        adapt: "batch": all images of a batch merge r tokens, the mean of their counts, rounded down (Section 3.4).
            "image": each image merges by its own count (Section 3.2), independently of the rest of its batch.
            "static": ``schedule`` gives r.
        schedule: r per block, only for "static". An r above half of the mergeable tokens is lowered to that half.
        thresholds: one threshold per block instead of Eq. 1, for "batch" and "image". None: the block does not merge
            and does not look for partners.
        proportional_attention: add log n to the attention scores of a token that stands for n patches (Appendix A).
            None: decided when the model runs. A model that averages its patch tokens beside a class token, as
            fine-tuned MAE does, runs without it (Appendix A); all others, and a block on its own, run with it.
        cls_only_last: if the classifier reads only the class token, the last block does not merge and computes only
            that token (Appendix A). This changes no logit. False: the last block merges like every other.
        backend: "auto" uses the Triton kernels where they can run and the plain-torch reference elsewhere; "triton"
            and "reference" force one of them.
        engine: run inference on a GPU through CUDA graphs (:mod:`atm_triton.engine`) where possible. False: never.
        source: where the values come from, as text for people.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range, or Eq. 1 is given only in part.

    Examples:
        >>> ATMConfig(alpha=0.99, beta=0.04, theta_min=0.88).theta(2, depth=12)
        0.9491892...
    """

    alpha: float | None = None
    beta: float | None = None
    theta_min: float | None = None
    split_depth: int | None = None
    adapt: str = "batch"
    schedule: tuple[int, ...] | None = None
    thresholds: tuple[float | None, ...] | None = None
    proportional_attention: bool | None = None
    cls_only_last: bool = True
    backend: str = "auto"
    engine: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        self._check_curve()
        if self.split_depth is not None:
            object.__setattr__(self, "split_depth", _count("split_depth", self.split_depth))
        self._check_adapt()
        for name, unset in (("proportional_attention", True), ("cls_only_last", False), ("engine", False)):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (unset and value is None):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if not isinstance(self.source, str):
            raise TypeError(f"source must be a string, got {self.source!r}")

    def _check_curve(self) -> None:
        curve = {name: getattr(self, name) for name in _CURVE}
        given = [name for name, value in curve.items() if value is not None]
        for name in given:
            object.__setattr__(self, name, _real(name, curve[name], 0 if name == "beta" else -1, 1))
        if 0 < len(given) < len(curve):
            missing = " and ".join(name for name in curve if name not in given)
            raise ValueError(f"{' and '.join(given)} without {missing}; give all three of them, or thresholds")
        if self.alpha is not None and self.theta_min is not None and self.alpha < self.theta_min:
            raise ValueError(f"alpha={self.alpha} is below theta_min={self.theta_min}; raise alpha or lower theta_min")

    def _check_adapt(self) -> None:
        if self.adapt not in ADAPT:
            raise ValueError(f"adapt={self.adapt!r} is unknown; choose one of {', '.join(ADAPT)}")
        if self.adapt == "static" and self.schedule is None:
            raise ValueError('adapt="static" needs a schedule, r for each block; give one')
        if self.adapt != "static" and self.schedule is not None:
            raise ValueError(f'a schedule needs adapt="static", got adapt={self.adapt!r}; leave one of them out')
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _each("schedule", self.schedule, _count))
        if self.thresholds is not None:
            if self.adapt == "static":
                raise ValueError('adapt="static" takes its r from schedule; leave thresholds out')
            object.__setattr__(self, "thresholds", _each("thresholds", self.thresholds, _theta))

    @property
    def has_thresholds(self) -> bool:
        """Whether anything says how much merges: Eq. 1, a threshold per block, or a schedule."""
        return any(given is not None for given in (self.alpha, self.thresholds, self.schedule))

    def check_depth(self, depth: int) -> None:
        """Raise ValueError if this configuration does not fit a model of ``depth`` blocks."""
        if self.split_depth is not None and self.split_depth > depth:
            raise ValueError(f"split_depth={self.split_depth} is beyond the model's {depth} blocks")
        for name in ("schedule", "thresholds"):
            values = getattr(self, name)
            if values is not None and len(values) != depth:
                raise ValueError(f"{name} has {len(values)} values for a model of {depth} blocks; give one for each")

    def theta(self, block: int, depth: int) -> float | None:
        """The threshold of a block in a model of ``depth`` blocks, counted from 1 as in Eq. 1. None: the block does not
        merge.

        Raises:
            ValueError: the depth does not fit, the block is outside it, or there are no thresholds.
        """
        self.check_depth(depth)
        _check_block(block, depth)
        if self.thresholds is not None:
            return self.thresholds[block - 1]
        if self.alpha is None or self.beta is None or self.theta_min is None:  # they are given together or not at all
            raise ValueError(f"the configuration has no thresholds; {REMEDY}")
        return threshold(block, self.alpha, self.beta, self.theta_min)

    def groups_by_size(self, block: int, depth: int) -> bool:
        """Whether a block, counted from 1, is beyond the splitting depth l_s (Section 3.3)."""
        _check_block(block, depth)
        return block > (3 * depth // 4 if self.split_depth is None else self.split_depth)

    def changed(self, **values: Any) -> Self:
        """A copy with other values. If ``source`` says where this configuration comes from, it names those fields that
        change what merges: the figures in it no longer hold."""
        names = [name for name, value in values.items() if name in _MERGING and value != getattr(self, name)]
        note = f" (changed here: {', '.join(names)}; these figures no longer hold)" if names and self.source else ""
        return replace(self, **{"source": self.source + note, **values})

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote, or a document that holds it under "config"."""
        try:
            document = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the configuration is not JSON: {error}") from None
        values = document.get("config", document) if isinstance(document, dict) else None
        if not isinstance(values, dict):
            raise ValueError(f"the configuration must be a JSON object, got {text.strip()[:40]!r}")
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"the configuration has unknown fields: {', '.join(sorted(unknown))}")
        return cls(**values)

    @classmethod
    def preset(
        cls,
        name: str,
        max_gflops: float | None = None,
        top1_drop: float | None = None,
        fine_tuned: bool = False,
        **changes: Any,
    ) -> Self:
        """An operating point of the paper.

        With ``max_gflops`` it is the most accurate one at or below that cost, with ``top1_drop`` the cheapest one that
        loses at most that many points of top-1. With neither it is the cheapest that loses nothing or, if all points
        lose something, the cheapest of those that lose least. ``source`` says which point it is and gives the paper's
        figures.

        These figures hold for the checkpoints that the paper used. Another model needs thresholds of its own:
        :func:`atm_triton.calibrate` finds them from images without labels.

        Args:
            name: a model of the paper, by timm's or the paper's name ("deit_small_patch16_224", "DeiT-S").
            max_gflops: 1e9 multiply-accumulates per image.
            top1_drop: percentage points. Give at most one of the two targets.
            fine_tuned: use Table A3 (30 epochs of fine-tuning).
            changes: further fields, such as ``backend``; as :meth:`changed` takes them.

        Raises:
            ValueError: the model is unknown, the paper does not reach the target, or both targets are given.
        """
        point, unmerged = choose(name, max_gflops, top1_drop, fine_tuned)
        source = (
            f"paper, Table {point.table}, {point.model}{', fine-tuned' if fine_tuned else ''}, "
            f"alpha {point.alpha}, beta {point.beta}, theta_min {point.theta_min}: "
            f"{point.gflops:.2f} GFLOPs, {point.top1:.2f} % top-1 on ImageNet-1k "
            f"(unmerged {unmerged.gflops:.2f}, {unmerged.top1:.2f} %)"
        )
        values: dict[str, Any] = {name: getattr(point, name) for name in _CURVE} | {"source": source}
        if point.model == "MAE":  # it averages its patch tokens and is evaluated without log n (Appendix A)
            values |= {"proportional_attention": False, "cls_only_last": False}
        return cls(**values).changed(**changes)


def _is(kind: type, value: Any) -> bool:
    """Whether a value is a number of this kind. Unlike Python, this does not count a bool as a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _real(name: str, value: Any, low: float, high: float) -> float:
    if not _is(Real, value):
        raise TypeError(f"{name} must be a number in [{low}, {high}], got {value!r}")
    if not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")
    return float(value)


def _theta(name: str, value: Any) -> float | None:
    return None if value is None else _real(name, value, -1, 1)


def _count(name: str, value: Any) -> int:
    if not _is(Integral, value):
        raise TypeError(f"{name} must be a whole number, 0 or more, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")
    return int(value)


def _each(name: str, values: Any, check: Callable[[str, Any], T]) -> tuple[T, ...]:
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f"{name} must be a list with one value per block, got {values!r}")
    return tuple(check(f"{name}[{index}]", value) for index, value in enumerate(values))


def _check_block(block: int, depth: int) -> None:
    if not 1 <= block <= depth:
        raise ValueError(f"block={block} is outside 1 .. {depth}; blocks count from 1, as in the paper")
