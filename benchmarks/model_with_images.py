"""A model with images to choose settings by and images to judge by: what several experiments measure on."""

import math
import random
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from atm_triton import ATMConfig
from atm_triton.calibration.calibrate import split_images
from atm_triton.calibration.costs import Costs
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.fitting import Fitted, Fitting, Plan
from atm_triton.calibration.measuring import Meter
from atm_triton.calibration.search import FAR, SEEN, Search, at_goal, eq1, ranked
from atm_triton.measure.comparison import Measure, measure_of
from atm_triton.measure.distributed import own, silent
from atm_triton.measure.evaluate import Evaluation, Patch, evaluate, unpatched_answers
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.patch import knows_sizes

BATCH_SIZE = 64
TRIES = 12  # of scales until a cost is met
LAST = 4  # curves that are judged on images they were not fitted to


class ModelWithImages:
    """A model in eval mode with two sets of images: ``loader``, batches whose images choose settings (labels are not
    read), and ``test``, batches of images and labels that judge them."""

    def __init__(self, model: VisionTransformer, loader: list[Any], test: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.model, self.loader, self.test, self.labelled = model, loader, test, True

    @classmethod
    def digits(cls, images: int, test: int) -> "ModelWithImages":
        """The digits model, ``images`` images of its calibration split to choose by, ``test`` of its test split."""
        model = open_model()
        loader = list(open_images(model, split="calibration", limit=images, batch_size=BATCH_SIZE))
        judged = own(list(open_images(model, split="test", limit=test, batch_size=BATCH_SIZE)))
        return cls(model, loader, judged)

    @cached_property
    def base(self) -> list[Tensor]:
        """The unpatched model's answers on the test images."""
        return unpatched_answers(self.model, self.test, measure=self.measure)

    @cached_property
    def measure(self) -> Measure:
        measure = measure_of(self.model)
        if measure.name == "sigmoid":
            raise ValueError(f"this experiment compares classes or features, not {measure}; use atm-triton eval")
        return measure

    @cached_property
    def parts(self) -> dict[str, list[Tensor]]:
        """The images to choose by, split in parts as :func:`atm_triton.calibrate` splits them."""
        return split_images(self.loader, seed=0)[0]

    @cached_property
    def meter(self) -> Meter:
        return Meter(self.model, self.parts, {"cls_only_last": True, "backend": "auto"})

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.model, tuple(self.parts["fit"][0].shape[1:]), True)

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def proportional(self) -> bool:
        """Whether attention adds log n by default."""
        return knows_sizes(self.model)

    def goal(self, share: float) -> float:
        """The GFLOPs at which this share is saved. They include norms, which have no MACs."""
        return (1 - share) * self.costs.unmerged

    def outcome(self, how: ATMConfig | Patch, title: str | None = None) -> Evaluation:
        """Evaluate on the test images."""
        return self.outcome_of(self.model, how, title)

    def outcome_of(self, model: VisionTransformer, how: ATMConfig | Patch, title: str | None = None) -> Evaluation:
        """Evaluate a model with other weights on the test images, against the answers of this model."""
        return evaluate(model, self.test, how, self.base, self.labelled, title)

    def judged(self, config: ATMConfig, **about: Any) -> dict[str, Any]:
        """A result row: ``about``, the configuration and its outcome on the test images."""
        return {**about, "config": asdict(config), **self.outcome(config).to_dict()}

    def search(self, adapt: str) -> Search:
        return Search(Fitting(self.meter, self.costs, adapt), self.proportional, None, 0, lambda least: None)

    def at_cost(self, plan: Plan, adapt: str, goal: float) -> ATMConfig | None:
        """Scale a plan until the images to choose by cost ``goal``. None if no scale comes near it."""
        fitted = self.search(adapt).settled(plan, goal, SEEN, TRIES)
        return fitted.config if abs(fitted.mean.gflops - goal) <= FAR * self.costs.unmerged else None

    def best_curve(self, adapt: str, goal: float, draws: int, split_depth: int | None = None) -> ATMConfig:
        """Draw random curves of the paper and return the one that changes the answers least. ``split_depth`` holds for
        all of them; None draws it too."""
        search, rng = self.search(adapt), random.Random(1)
        bar = tqdm(range(draws), desc=f"curves, {adapt}", unit="curve", disable=silent(""))
        drawn = [search.settled(self._random_curve(search, rng, split_depth), goal, tries=TRIES) for _ in bar]
        near = [fitted for fitted in drawn if abs(fitted.mean.gflops - goal) <= FAR * self.costs.unmerged]
        if not near:
            raise UnreachableError(f"none of {draws} curves costs {goal:.4g} GFLOPs")

        def judged(fitted: Fitted) -> float:
            return at_goal(self.meter.mean(fitted.config, ("choose",)), goal)

        best = min(ranked(near, goal)[:LAST], key=judged)
        return search.settled(best.plan, goal, SEEN).config

    def _random_curve(self, search: Search, rng: random.Random, split_depth: int | None) -> Plan:
        """Draw the parameters of Eq. 1, as one would without knowing what they do to this model. For "static" the plan
        has the counts that these thresholds give."""
        spread, rise = rng.uniform(0, 2), math.exp(rng.uniform(math.log(0.5), math.log(4 * self.costs.merging)))
        split = rng.choice([None, self.depth]) if split_depth is None else split_depth
        plan = Plan(
            counts=(),
            thresholds=eq1(10 ** rng.uniform(-4, -1), spread, rise, self.costs.merging),
            split_depth=split,
            proportional_attention=self.proportional,
        )
        if search.fitting.adapt != "static":
            return plan
        fitted = Fitting(self.meter, self.costs, "image").run(plan, "fit")
        return Plan(
            counts=fitted.mean.merged[: self.costs.merging],
            thresholds=None,
            split_depth=split,
            proportional_attention=self.proportional,
        )
