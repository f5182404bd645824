"""The search of a calibration: how many tokens each block should merge, for a goal in GFLOPs.

It starts from three kinds of plan: the paper's curve (Eq. 1), the same mean count in every block, and counts allotted
by how much merging in each block alone changes. These changes do not add up, so the search then varies the best of
these plans at random, at equal cost, and keeps a variation if a whole pass finds it better. All this is measured on the
"fit" images. The result and all plans that it started from are judged on the "choose" images. The best of them is then
tried with its first blocks idle. Labels are never used. The search is seeded, so a run that continues an interrupted
one asks for the same measurements.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from atm_triton.calibration.costs import Costs
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.fitting import Fitted, Fitting, Plan, theta_at
from atm_triton.calibration.measuring import Mean
from atm_triton.reference import threshold

SEEN = ("fit", "choose")  # the parts of the images that the search may see
LEVELS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of a block's tokens of A: each block merges these alone, as a probe
CURVES = ((0.0, 1.0), *product((0.5, 1.0, 2.0), (1.5, 3.0, 6.0)))  # spread and rise, as in eq1
LATE = (1 / 6, 1 / 4)  # shares of the blocks, from the first, that the chosen plan is also tried without
STEPS = 48  # how many variations of the best plan are tried
CLOSE = 0.002  # how near a measured cost must come to the goal, as a share of the unmerged model's cost
FAR = 0.01  # the same where costs change in steps
STEEP = 10  # the change falls with about this power of the cost; used to compare plans of slightly different cost
TIE = 0.03  # a plan that was fitted longer must beat an earlier one by more than this share of the change


class Search:
    """Finds the best plan for a goal. ``most``: how many blocks may merge; None: any number. ``show`` is called with
    the least mean divergence so far."""

    def __init__(
        self, fitting: Fitting, proportional: bool, most: int | None, seed: int, show: Callable[[float], None]
    ) -> None:
        self.fitting, self.costs, self.proportional = fitting, fitting.costs, proportional
        self.most = self.costs.merging if most is None else min(most, self.costs.merging)
        self.rng, self._show, self._least = random.Random(seed), show, math.inf

    def plan(self, counts: tuple[float, ...]) -> Plan:
        return Plan(counts, proportional_attention=self.proportional)

    def run(self, goal: float) -> Fitted:
        """The plan that changes least at a cost of ``goal``, fitted to all images that the search may see."""
        starts = self.starts(goal)
        best = self.climbed(starts[0], goal)
        chosen = self.chosen([*starts, best, *self.better(self.grouped(best.plan), best, goal)], goal)
        chosen = self.chosen([chosen, *self.better(self.late(chosen.plan), chosen, goal)], goal)
        return self.settled(chosen.plan, goal, SEEN)

    def chosen(self, fits: list[Fitted], goal: float) -> Fitted:
        """The first whose change on images that the plans were not fitted to is within :data:`TIE` of the least."""
        means = [self.fitting.meter.mean(fitted.config, ("choose",)) for fitted in fits]
        changes = [at_goal(mean, goal) for mean in means]
        return next(fitted for fitted, c in zip(fits, changes, strict=True) if c <= (1 + TIE) * min(changes))

    def starts(self, goal: float) -> list[Fitted]:
        """The plans to begin with, the best first."""
        counts = self.allotted(goal)
        starts = [self.settled(self.plan(counts), goal)]
        if self.most == self.costs.merging:
            even = self.settled(self.plan(self.costs.scaled([1.0] * self.costs.merging, goal)), goal)
            starts += [even, *self.curves(goal, even)]
        starts = self.near(starts, goal)
        if not starts:
            raise UnreachableError(
                f"no plan comes close to {goal:.4g} GFLOPs: the cost changes in large steps, because the images are "
                "alike or have few tokens; choose another target, or more varied images"
            )
        return ranked(starts, goal)

    def near(self, fits: list[Fitted], goal: float) -> list[Fitted]:
        """Those whose measured cost is within :data:`FAR` of the goal."""
        return [fitted for fitted in fits if abs(fitted.mean.gflops - goal) <= FAR * self.costs.unmerged]

    def settled(
        self, plan: Plan, goal: float, parts: tuple[str, ...] = ("fit",), tries: int = 4, within: float = CLOSE
    ) -> Fitted:
        """The plan scaled until it costs ``goal`` on these parts of the images, as nearly as ``tries`` tries allow.
        ``within``: how near is near enough, as a share of the unmerged model's cost."""
        low, high, scale = -math.inf, math.inf, 0.0  # logs: too expensive, too cheap, tried now
        tried: list[tuple[float, Fitted]] = []
        for _ in range(tries):
            fitted = self.fitting.run(plan.scaled(math.exp(scale)), *parts)
            self.saw(fitted)
            tried.append((scale, fitted))
            off = fitted.mean.gflops - goal
            if abs(off) <= within * self.costs.unmerged:
                break
            low, high = (max(low, scale), high) if off > 0 else (low, min(high, scale))
            slope = fitted.mean.gflops - self.costs.highest  # as if savings grew with the scale
            if len(tried) > 1:
                (a, first), (b, second) = tried[-2:]
                slope = (second.mean.gflops - first.mean.gflops) / (b - a)
            following = scale - max(-2.0, min(off / min(slope, -0.01 * goal), 2.0))
            if not low < following < high:
                following = (low + high) / 2 if math.inf not in (-low, high) else scale + math.copysign(0.5, off)
            scale = following
        return min((fitted for _, fitted in tried), key=lambda fitted: abs(fitted.mean.gflops - goal))

    def saw(self, fitted: Fitted) -> None:
        self._least = min(self._least, fitted.mean.divergence)
        self._show(self._least)

    def plainest(self) -> Plan:
        """A plan that merges almost nothing: one threshold, or one r, for all blocks, or for the first ``most``."""
        few = self.most < self.costs.merging
        if self.fitting.adapt == "static" or few:
            return self.plan(tuple(float(block < self.most) for block in range(self.costs.merging)))
        return replace(self.plan(()), thresholds=(theta_at(0.01),) * self.costs.merging)

    # ------------------------------------------------------------------------------------------ plans to begin with

    def allotted(self, goal: float) -> tuple[float, ...]:
        """The counts with the least sum of changes at the cost ``goal``, given what each block changes alone."""
        losses, grid = self.losses()
        blocks = list(range(self.costs.merging))
        while len(blocks) > self.most:  # leave out the block without which the others change least
            without = [[other for other in blocks if other != block] for block in blocks]
            blocks = min(without, key=lambda rest: self._least_sum(losses, grid, rest, goal)[1])
        return self._least_sum(losses, grid, blocks, goal)[0]

    def losses(self) -> tuple[Tensor, Tensor]:
        """The change [blocks, counts] if one block alone merges, and the counts [counts]: measured at some counts, and
        a power law between and beyond these."""
        M, half = self.costs.merging, (self.costs.N - self.costs.prefix) / 2
        self.fitting.run(self.plan((0.0,) * M), "fit")
        self.fitting.keep()
        counts = torch.tensor([max(level * half, 1.0) for level in LEVELS]).double().log()
        grid = torch.arange(0, half, 0.5).double()
        losses = torch.zeros(M, len(grid)).double()
        for block in range(M):
            alone = [self.plan((*[0.0] * block, r, *[0.0] * (M - block - 1))) for r in counts.exp().tolist()]
            changes = torch.tensor([max(self.fitting.run(plan, "fit").mean.change, 1e-12) for plan in alone]).double()
            logs = changes.log().cummax(0).values
            after = torch.bucketize(grid[1:].log(), counts).clamp(1, len(LEVELS) - 1)
            rise = (counts[after] - counts[after - 1]).clamp(min=1e-9)
            slope = ((logs[after] - logs[after - 1]) / rise).clamp(min=1.0)
            losses[block, 1:] = (logs[after] + slope * (grid[1:].log() - counts[after])).exp()
        return losses, grid

    def _least_sum(
        self, losses: Tensor, grid: Tensor, blocks: list[int], goal: float
    ) -> tuple[tuple[float, ...], float]:
        """The counts, in these blocks only, with the least sum of losses at the cost ``goal``, and that sum. A GFLOP
        has a price, and each block merges as many tokens as pay at that price."""
        M = self.costs.merging
        alone = [[float(other == block) for other in range(M)] for block in range(M)]
        saved = torch.tensor([self.costs.highest - self.costs.of(counts) for counts in alone]).double()
        mask = torch.tensor([block in blocks for block in range(M)])
        low, high = -40.0, 40.0  # log of the price
        for _ in range(40):
            middle = (low + high) / 2
            gain = math.exp(middle) * saved[:, None] * grid - losses
            best = torch.where(mask, gain.argmax(1), 0)
            dearer = self.costs.of(self.costs.within(grid[best].tolist())) > goal
            low, high = (middle, high) if dearer else (low, middle)
        best = torch.where(mask, (math.exp(high) * saved[:, None] * grid - losses).argmax(1), 0)
        counts = self.costs.scaled(grid[best].tolist(), goal)
        return counts, losses.gather(1, best[:, None]).sum().item()

    def curves(self, goal: float, near: Fitted) -> list[Fitted]:
        """Plans by Eq. 1 with several spreads and rises, at the cost ``goal``. ``near``: a plan to start from. If each
        block has one r, these are the mean counts that the curves give if each image merges its own number."""
        if self.fitting.adapt == "static":
            fitting = Fitting(self.fitting.meter, self.costs, "image")
            own = Search(fitting, self.proportional, None, 0, lambda least: None)
            curves = own.curves(goal, own.settled(near.plan, goal))
            return [self.settled(self.plan(curve.mean.merged[: self.costs.merging]), goal) for curve in curves]
        thetas = [theta for theta in near.config.thresholds or () if theta is not None]
        begin = 1 - sorted(thetas)[len(thetas) // 2] if thetas else 0.1
        curves = []
        for spread, rise in CURVES:
            plan = replace(self.plan(()), thresholds=eq1(max(begin, 1e-6), spread, rise, self.costs.merging))
            curves.append(self.settled(plan, goal))
            begin = 1 - next(theta for theta in curves[-1].plan.thresholds or () if theta is not None)
        return curves

    # ---------------------------------------------------------------------------------------------- changes of a plan

    def climbed(self, best: Fitted, goal: float) -> Fitted:
        """Try :data:`STEPS` random changes of a plan, keep those that improve it, and return the result."""
        for _ in range(STEPS):
            child = self.fitting.run(self.changed(best, goal), "fit")
            self.saw(child)
            if at_goal(child.mean, goal) < at_goal(best.mean, goal):
                best = child
                self.fitting.keep()
        return best

    def changed(self, fitted: Fitted, goal: float) -> Plan:
        """The plan with some or all of its counts changed at random, at the same cost."""
        counts, rng = list(fitted.mean.merged[: self.costs.merging]), self.rng
        missing = fitted.mean.gflops - self.costs.of(counts)  # images that differ cost more than one with mean counts
        merging = [block for block, r in enumerate(counts) if r > 0]
        idle = [block for block, r in enumerate(counts) if r == 0]
        if idle and len(merging) < self.most and rng.random() < 0.3:
            block = rng.choice(idle)
            counts[block] = 1.0
            merging.append(block)
        some = merging if rng.random() < 0.5 else rng.sample(merging, min(2, len(merging)))
        width = 0.3 if len(some) > 2 else 0.6
        for block in some:
            counts[block] *= math.exp(rng.gauss(0, width))
        counts = [0.0 if r < 0.5 else r for r in counts]
        if not any(counts):
            return fitted.plan
        return replace(fitted.plan, thresholds=None, counts=self.costs.scaled(counts, goal - missing))

    def better(self, plans: list[Plan], fitted: Fitted, goal: float) -> list[Fitted]:
        """Those of the plans that change less than a fitted one at the cost ``goal``."""
        others = self.near([self.settled(plan, goal) for plan in plans], goal)
        return [other for other in others if at_goal(other.mean, goal) < at_goal(fitted.mean, goal)]

    def grouped(self, plan: Plan) -> list[Plan]:
        """Variants of the plan with another split depth or the other attention."""
        splits = (self.fitting.depth, self.costs.merging // 2)
        variants = [replace(plan, split_depth=split) for split in splits]
        return [*variants, replace(plan, proportional_attention=not plan.proportional_attention)]

    def late(self, plan: Plan) -> list[Plan]:
        """Variants of the plan with its first blocks idle."""
        return [plan.without(round(share * self.fitting.depth)) for share in LATE]


def eq1(distance: float, spread: float, rise: float, blocks: int) -> tuple[float, ...]:
    """Thresholds by the paper's Eq. 1: alpha is 1 - ``distance``, theta_min is 1 - 10^spread * ``distance``, and the
    curve reaches theta_min after ``rise`` blocks."""
    alpha, lowest = theta_at(distance), theta_at(10**spread * distance)
    beta = math.log1p(alpha - lowest) / rise
    return tuple(threshold(block, alpha, beta, lowest) for block in range(1, blocks + 1))


def at_goal(mean: Mean, goal: float) -> float:
    """The change that the plan would have if it cost exactly ``goal``."""
    return mean.change * (mean.gflops / goal) ** STEEP


def ranked(fits: list[Fitted], goal: float) -> list[Fitted]:
    return sorted(fits, key=lambda fitted: at_goal(fitted.mean, goal))


def expected(costs: Costs, images: dict[str, int], more: int) -> float:
    """Roughly how many images will go through the model. ``more``: passes of all images seen, outside the search."""
    fits = 5 + 0.55 * len(LEVELS) * costs.merging + 3 * (len(CURVES) + len(LATE) + 2) + 0.8 * STEPS
    judged, seen = len(CURVES) + len(LATE) + 4, sum(images[part] for part in SEEN)
    return fits * images["fit"] + judged * images["choose"] + (3 + more) * seen + 2 * sum(images.values())
