"""A model with images to choose settings by and images to judge by: what several experiments measure on."""

import random
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from atm_triton import ATMConfig
from atm_triton.calibration.calibrate import split_images
from atm_triton.calibration.curves import Drawer, Predictor, Shape
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.meter import Meter, similarities
from atm_triton.calibration.search import Search, ranked
from atm_triton.measure.comparison import Measure, measure_of
from atm_triton.measure.distributed import own, silent
from atm_triton.measure.evaluate import Evaluation, Patch, evaluate, unpatched_answers
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.patch import knows_sizes
from atm_triton.reference import threshold

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 64
KEPT, LAST = 12, 4  # curves measured on the hardest images, and on others to choose by


class Bench:
    """A model in eval mode, batches of images (and anything) to choose settings by, and ``test``, batches of images and
    labels to judge by."""

    def __init__(self, model: VisionTransformer, loader: list[Any], test: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.model, self.loader, self.test, self.labelled = model, loader, test, True

    @classmethod
    def digits(cls, images: int, test: int) -> "Bench":
        """The digits model; ``images`` of its calibration split to choose by, ``test`` of its test split to judge."""
        model = open_model()
        loader = list(open_images(model, split="calibration", limit=images, batch_size=BATCH_SIZE))
        judged = own(list(open_images(model, split="test", limit=test, batch_size=BATCH_SIZE)))
        return cls(model, loader, judged)

    @cached_property
    def base(self) -> list[Tensor]:
        """The unpatched model's answers to the images to judge by."""
        return unpatched_answers(self.model, self.test, measure=self.measure)

    @cached_property
    def measure(self) -> Measure:
        measure = measure_of(self.model)
        if measure.name == "sigmoid":
            raise ValueError(f"what is measured here is of classes or features; atm-triton eval has {measure}")
        return measure

    @cached_property
    def parts(self) -> dict[str, list[Tensor]]:
        """The images to choose by as :func:`atm_triton.calibrate` takes them apart."""
        return split_images(self.loader, seed=0)[0]

    @cached_property
    def meter(self) -> Meter:
        return Meter(self.model, self.parts, {"cls_only_last": True, "backend": "auto"})

    @cached_property
    def predictor(self) -> Predictor:
        fit = self.parts["fit"]
        return Predictor(self.model, tuple(fit[0].shape[1:]), similarities(self.model, fit), True)

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def proportional(self) -> bool:
        """Whether attention knows sizes, where nothing else is said."""
        return knows_sizes(self.model)

    def goal(self, share: float) -> float:
        """GFLOPs that save this share of the MACs; they count norms too, which are no MACs."""
        return (1 - share) * self.predictor.unmerged

    def outcome(self, how: ATMConfig | Patch, title: str | None = None) -> Evaluation:
        """On the images to judge by."""
        return self.outcome_of(self.model, how, title)

    def outcome_of(self, model: VisionTransformer, how: ATMConfig | Patch, title: str | None = None) -> Evaluation:
        """The same of a model with other weights, against the answers of this one."""
        return evaluate(model, self.test, how, self.base, self.labelled, title)

    def judged(self, config: ATMConfig, **about: Any) -> dict[str, Any]:
        """A row of the outcome."""
        return {**about, "config": asdict(config), **self.outcome(config).to_dict()}

    def search(self, adapt: str) -> Search:
        return Search(self.meter, self.predictor, adapt, self.proportional, None, 0, tqdm(disable=True))

    def best_curve(self, adapt: str, goal: float, draws: int, split_depth: int | None = None) -> ATMConfig:
        """Of random curves of the paper the one with the least change; the fewer are left, the more images decide.
        ``split_depth``: of all of them; None: drawn too."""
        search = self.search(adapt)
        drawer = Drawer(self.predictor, adapt, self.proportional, None, random.Random(1), goal)
        bar = tqdm(range(draws), desc=f"curves, {adapt}", unit="curve", disable=silent(""))
        drawn = search.sketched((random_curve(drawer, split_depth) for _ in bar), goal)
        fitted = ranked([search.measured(found[0], goal, found) for _, found in drawn[:KEPT]])
        if not fitted:
            raise UnreachableError(f"none of {draws} curves costs {goal:.4g} GFLOPs")
        best = min((found for _, found in fitted[:LAST]), key=lambda found: search.judged(found, goal))
        return search.config(search.settled(best, goal))


def random_curve(drawer: Drawer, split_depth: int | None = None) -> Shape:
    """Eq. 1 with its own parameters drawn, as one would without knowing what they do to this model."""
    beta, spread = 10 ** drawer.rng.uniform(-5, 0), 10 ** drawer.rng.uniform(0, 2)

    def distances(d: float) -> list[float | None]:
        lowest = max(1 - spread * d, -1.0)
        return [1 - threshold(block, 1 - d, beta, lowest) for block in range(1, drawer.merging + 1)]

    split = drawer.rng.choice([None, drawer.depth])
    split = split if split_depth is None else split_depth
    return drawer.shaped(drawer.meeting(distances), split, "curve")
