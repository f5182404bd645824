"""The search of a calibration: fit configurations on some images, choose among them on others.

Only forward passes of whole configurations are compared, at one cost, by their *change*
(:mod:`atm_triton.calibration.meter`). While shapes are fitted, the change is measured on the hardest images to fit
alone, those that the best draws change most, and the cost on a few of chance. Another shape may have hard images of its
own, so the last are judged on all images to choose by. Labels are never used. The search is seeded: a run that goes on
where another was interrupted asks the same questions.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate, pairwise

from tqdm import tqdm

from atm_triton.calibration.curves import Drawer, Predictor, Shape
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.meter import Mean, Meter, hardest
from atm_triton.config import ATMConfig

SEEN = ("fit", "choose")  # parts of the images
DRAWS, KEPT, STEPS, FINALISTS = 60, 8, 30, 4
CURVES, BENDS = 2, 12  # of the curves those that are kept and bent apart from the others, and how often
FEW, SOME = 128, 256  # images to fit on which a draw is measured first, and the cost of what is kept or changed
MANY = 1024  # images of a part for the cost of the last
PILOTS = 2  # draws that tell which images are hard
BEYOND = 0.96  # of the goal: how much more the pilots change there tells what a little cost is worth
CLOSE = 0.004  # of the unmerged model's cost: how near a measured cost must come to the goal; of a draw twice as far
CLOSER = 0.001  # in the end
COARSE = 4  # times that far is taken where nothing is nearer: one r for few small batches changes in steps
TIE = 0.03  # a rougher shape must be better by more than this share of the change


Found = tuple[Shape, float]  # a shape and the scale at which it meets the goal
Scored = tuple[float, Found]  # with its change


class Search:
    """The best shapes for one goal in GFLOPs. ``most``: blocks that merge; None: any number. ``bar`` counts the shapes
    and shows the least divergence so far."""

    def __init__(
        self,
        meter: Meter,
        predictor: Predictor,
        adapt: str,
        proportional: bool,
        most: int | None,
        seed: int,
        bar: tqdm,
    ) -> None:
        self.meter, self.predictor, self.adapt, self.proportional = meter, predictor, adapt, proportional
        self.most, self.seed, self.bar, self.least = most, seed, bar, math.inf
        self._stage: tuple[float, bool] | None = None  # what the least divergence is of
        self._lately = 0.0  # by how much costs were foretold too low
        self._slope = 0.0  # of log change over log cost

    def config(self, found: Found) -> ATMConfig:
        shape, scale = found
        return shape.config(scale, **self.meter.fields)

    def meet(
        self,
        shape: Shape,
        goal: float,
        wrong: float | None,
        limit: int | None,
        parts: tuple[str, ...] = ("fit",),
        within: float = CLOSE,
    ) -> tuple[float, Mean] | None:
        """The scale at which a shape costs ``goal`` on parts of the images, and what was measured there; None if none
        does. The foretold cost, moved by what it was wrong by, leads to the next scale to try. ``wrong``: what it is
        too low by for a shape nearby; None: what it lately was. ``within``: of the unmerged model's cost."""
        low, high = -math.inf, math.inf  # of log10 scale: too dear, too cheap
        tried = []
        close = within * self.predictor.unmerged
        wanted = goal - (self._lately if wrong is None else wrong)
        scale = self.foretold(shape, wanted)
        for attempt in range(8):
            config = self.config((shape, scale))
            mean = self.meter.mean(config, parts, limit)
            if attempt == 0 and wrong is None:
                self._lately += max(-2 * close, min(2 * close, (mean.gflops - goal) / 2))
            if abs(mean.gflops - goal) <= close:
                return scale, mean
            tried.append((abs(mean.gflops - goal), scale, mean))
            if self.adapt == "static":
                break  # whole numbers do not come nearer
            at = math.log10(scale)
            low, high = (max(low, at), high) if mean.gflops > goal else (low, min(high, at))
            wanted += 0.9 * (goal - mean.gflops)
            following = math.log10(self.foretold(shape, wanted))
            if not low < following < high:
                following = (low + high) / 2 if math.inf not in (-low, high) else at + (0.1 if low == at else -0.1)
            scale = 10**following
        far, scale, mean = min(tried, key=lambda attempt: attempt[0])
        return (scale, mean) if far <= COARSE * max(close, CLOSE * self.predictor.unmerged) else None

    def cost(self, found: Found) -> float:
        """What is foretold that it costs."""
        config = self.config(found)
        if self.adapt == "static":
            return self.predictor.of_schedule(config.schedule)
        return self.predictor.of_thresholds(config.thresholds, self.adapt)

    def foretold(self, shape: Shape, goal: float) -> float:
        """The scale at which a shape should cost ``goal``."""
        low, high = -4.0, 4.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost((shape, 10**middle)) > goal else (low, middle)
        return 10**high

    def run(self, goal: float) -> Found:
        """Draw, keep the best, change them, and choose among the last on images that none of this has seen. The best
        curves go a way of their own to the last choice: they have little to overfit with."""
        rng = random.Random(self.seed)
        drawer = Drawer(self.predictor, self.adapt, self.proportional, self.most, rng, goal)
        drawn = self.sketched([drawer.draw(number) for number in range(DRAWS)], goal)
        kept = drawn[:KEPT] + curves(drawn[KEPT:])[: max(0, CURVES - len(curves(drawn[:KEPT])))]
        fitted = ranked([self.measured(found[0], goal, found) for _, found in kept])
        if not fitted:
            raise UnreachableError(
                f"no shape costs {goal:.4g} GFLOPs nearly enough: what merges changes in steps, as where images are "
                "alike or have few tokens; take another target, or more and other images"
            )
        bent = self.climbed(curves(fitted)[:CURVES], drawer.bent, BENDS, goal)
        last = ranked(self.climbed(fitted[:3], drawer.changed, STEPS, goal) + fitted)[:FINALISTS] + bent
        different = {found[0]: found for _, found in last}.values()
        return smoothest([(self.judged(found, goal), found) for found in different])

    def sketched(self, shapes: Iterable[Shape], goal: float) -> list[Scored]:
        """Shapes measured on a few images, ranked. The best tell which images are hard."""
        drawn = []
        for shape in shapes:
            met = self.meet(shape, goal, None, FEW, within=2 * CLOSE)
            if met is not None:
                self._show(goal, False, met[1].divergence)
                drawn.append((met[1].change, (shape, met[0])))
            self.bar.update()
        if not drawn:
            raise UnreachableError(f"no draw costs {goal:.4g} GFLOPs; take another target, or more images")
        drawn = ranked(drawn)
        self._slope = 0.0
        pilots = [found for _, found in drawn[:PILOTS]]
        self.meter.focus([self.config(found) for found in pilots], "fit")
        slopes = [self._steepness(found, goal) for found in pilots]
        self._slope = sum(slopes) / len(slopes)
        return drawn

    def _steepness(self, found: Found, goal: float) -> float:
        """By which power of the cost the change of a shape falls."""
        changes = []
        for cost in (goal, BEYOND * goal):
            met = self.meet(found[0], cost, goal - self.cost(found), SOME)
            changes.append(None if met is None else self._hardest((found[0], met[0]), met[1], cost).change)
        if not all(changes):
            return 0.0
        return min(math.log(changes[1] / changes[0]) / math.log(BEYOND), 0.0)

    def climbed(self, beam: list[Scored], changed: Callable[[Shape], Shape], steps: int, goal: float) -> list[Scored]:
        """Shapes, changed in turn where that is better."""
        beam = list(beam)
        for step in range(steps if beam else 0):
            change, found = beam[step % len(beam)]
            child = self.measured(changed(found[0]), goal, found)
            if child is not None and child[0] < change:
                beam[step % len(beam)] = child
        return beam

    def settled(self, found: Found, goal: float) -> Found:
        """With the scale at which it costs the goal on many of all images that the search may see."""
        met = self.meet(found[0], goal, goal - self.cost(found), MANY, SEEN, CLOSER)
        return found if met is None else (found[0], met[0])

    def measured(self, shape: Shape, goal: float, near: Found) -> Scored | None:
        """With its change on the hardest images to fit. ``near``: a shape like it that met the goal."""
        met = self.meet(shape, goal, goal - self.cost(near), SOME)
        self.bar.update()
        if met is None:
            return None
        found = shape, met[0]
        mean = self._hardest(found, met[1], goal)
        self._show(goal, True, mean.divergence)
        return mean.change, found

    def judged(self, found: Found, goal: float) -> float:
        """The change on all images to choose by, at the cost of ``goal``."""
        mean = self.meter.mean(self.config(found), ("choose",))
        self.bar.update()
        return self._at(goal, mean).change

    def _hardest(self, found: Found, mean: Mean, goal: float) -> Mean:
        """On the hardest images to fit, at the cost of ``goal``. ``mean``: of images of chance. With one r for a batch
        it is theirs that these merge by: in batches of hard images it would be another."""
        config = self.config(found)
        if self.adapt == "batch":
            totals = [round(total) for total in accumulate(mean.merged, initial=0)]
            schedule = tuple(after - before for before, after in pairwise(totals))
            config = replace(config, adapt="static", thresholds=None, schedule=schedule)
        return self._at(goal, replace(self.meter.mean(config, (hardest("fit"),)), gflops=mean.gflops))

    def _at(self, goal: float, mean: Mean) -> Mean:
        """What was measured at a cost near ``goal``, with the change that it should have there."""
        return replace(mean, change=(goal / mean.gflops) ** self._slope * mean.change)

    def _show(self, goal: float, focused: bool, divergence: float) -> None:
        if (goal, focused) != self._stage:
            self._stage, self.least = (goal, focused), math.inf
        self.least = min(self.least, divergence)
        self.bar.set_postfix_str(f"least {self.meter.by.divergence}{' of the hardest' * focused} {self.least:.2g}")


def shapes() -> int:
    """How many a search measures, or a few less."""
    return DRAWS + KEPT + STEPS + BENDS + FINALISTS + CURVES


def curves(scored: list[Scored]) -> list[Scored]:
    """Those that are curves over all blocks."""
    return [found for found in scored if found[1][0].bend is not None]


def ranked(scored: list[Scored | None]) -> list[Scored]:
    """Those that met their goal, the least change first."""
    return sorted((found for found in scored if found is not None), key=lambda pair: pair[0])


def smoothest(candidates: list[Scored]) -> Found:
    """Of the candidates with the least change, or within TIE of it, the least rough."""
    least = min(change for change, _ in candidates)
    tied = [found for change, found in candidates if change <= (1 + TIE) * least]
    return min(tied, key=lambda found: found[0].roughness)
