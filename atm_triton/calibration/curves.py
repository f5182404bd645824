"""How much the blocks of a model merge relative to one another, up to a common factor: what a calibration searches.

Of thresholds a shape holds the distances 1 - theta, of a schedule the r. Two families are drawn: the paper's curve
(Eq. 1), and free ones, that curve in a window of blocks or blocks that merge given shares. A changed shape is free.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.config import ATMConfig
from atm_triton.flops import cost, paper_block, paper_last_norm, planned, unmerged
from atm_triton.reference import largest_r, threshold
from atm_triton.transformer import leading_tokens

FARTHEST = 2.0  # 1 - theta, of a theta of -1
TRIES = 10  # for a shape that need not merge tokens at right angles to meet the goal


@dataclass(frozen=True)
class Shape:
    """``weights``: of each block 1 - theta, or r, up to a factor; None where it does not merge. ``adapt``,
    ``split_depth`` and ``proportional_attention`` as in :class:`ATMConfig`; ``family``: "curve" or "free"; ``bend``:
    what :meth:`Drawer.curve` makes a curve over all blocks of, None for other shapes."""

    weights: tuple[float | None, ...]
    adapt: str
    split_depth: int | None = None
    proportional_attention: bool = True
    family: str = "free"
    bend: tuple[float, float] | None = None

    def config(self, scale: float, **fields: object) -> ATMConfig:
        fields |= {"adapt": self.adapt, "split_depth": self.split_depth}
        fields |= {"proportional_attention": self.proportional_attention}
        if self.adapt == "static":
            whole = [round(total) for total in accumulate(((w or 0) * scale for w in self.weights), initial=0)]
            return ATMConfig(schedule=tuple(after - before for before, after in pairwise(whole)), **fields)
        thetas = tuple(None if w is None else round(1 - min(w * scale, FARTHEST), 7) for w in self.weights)
        return ATMConfig(thresholds=thetas, **fields)

    @property
    def roughness(self) -> float:
        """The sum of the squared second differences of log10 weights over the blocks that merge, one after the other,
        whatever lies between them."""
        logs = [math.log10(w) for w in self.weights if w]
        return sum((a - 2 * b + c) ** 2 for a, b, c in zip(logs, logs[1:], logs[2:], strict=False))


class Predictor:
    """What a configuration costs, foretold from the similarities of the unmerged model.

    Args:
        similarities: of each block the best similarities of A's tokens [n, Na], of n images; empty for a model of which
            only schedules are asked.
    """

    def __init__(
        self, model: VisionTransformer, image_shape: tuple[int, ...], similarities: list[Tensor], cls_only_last: bool
    ) -> None:
        self.similarities = similarities
        self.model, self.prefix = model, model.num_prefix_tokens
        self.blocks = list(model.blocks)
        self.leading = leading_tokens(model) if cls_only_last else None
        self.merging = len(self.blocks) - (self.leading is not None)  # blocks that may merge
        record = unmerged(model, image_shape)
        self.N, self.unmerged = record.tokens[0], cost(model, record).paper_gflops
        nothing = cost(model, planned(model, image_shape, (0,) * len(self.blocks), cls_only_last)).paper_gflops
        self._rest = nothing - self._gflops([0.0] * self.merging)
        self.highest = nothing

    def lowest(self, most: int | None) -> float:
        """GFLOPs where the first blocks, at ``most`` so many, merge all that they can."""
        blocks = self.merging if most is None else min(most, self.merging)
        return self.of_schedule([self.N] * blocks + [0] * (self.merging - blocks))

    def _gflops(self, merged: list[float | Tensor]) -> float:
        """Of the blocks that may merge, by the tokens (of each image) that do; the last one with them."""
        tokens, total = self.N, 0.0
        for index, block in enumerate(self.blocks):
            r = merged[index] if index < self.merging else 0
            alone = self.leading is not None and index == len(self.blocks) - 1
            rows = self.leading if alone else tokens - r
            total = total + paper_block(self.model, block, tokens, rows if alone else tokens, rows)
            tokens = tokens - r
        total = (total + paper_last_norm(self.model, rows)) / 1e9
        return total.mean().item() if isinstance(total, Tensor) else total

    def of_schedule(self, schedule: list[int]) -> float:
        """GFLOPs of an image, exactly."""
        tokens, merged = self.N, []
        for r in schedule[: self.merging]:
            merged.append(min(r, largest_r(tokens, self.prefix)))
            tokens -= merged[-1]
        return self._rest + self._gflops(merged)

    def of_thresholds(self, thresholds: tuple[float | None, ...], adapt: str) -> float:
        """GFLOPs of an image on average, as if merging left the similarities of later blocks as they are."""
        counts = self.counts(thresholds)
        return self._rest + self._gflops(counts if adapt == "image" else [r.mean().floor().item() for r in counts])

    def counts(self, thresholds: tuple[float | None, ...]) -> list[Tensor]:
        """Of each block that may merge the candidates of every image [n]."""
        tokens, counts = self.N, []
        for theta, found in zip(thresholds[: self.merging], self.similarities, strict=False):
            share = (found >= (FARTHEST if theta is None else theta)).double().mean(dim=1)
            counts.append(share * (tokens - self.prefix) / 2)
            tokens = tokens - counts[-1]
        return counts


class Drawer:
    """Random shapes, and random changes of them, for one goal in GFLOPs. ``most``: blocks that merge; None: any
    number."""

    def __init__(
        self,
        predictor: Predictor,
        adapt: str,
        proportional: bool,
        most: int | None,
        rng: random.Random,
        goal: float,
    ) -> None:
        self.predictor, self.adapt, self.rng, self.goal, self.proportional = predictor, adapt, rng, goal, proportional
        self.depth, self.merging = len(predictor.blocks), predictor.merging
        self.most = self.merging if most is None else min(most, self.merging)

    def draw(self, number: int) -> Shape:
        """Half of the shapes are curves of the paper, if all blocks may merge; others merge in a window of blocks."""
        split = self.rng.choice([None, self.depth])
        whole = number % 2 == 0 and self.most == self.merging
        for _ in range(TRIES):
            bend = 2 * self.rng.random() ** 2, math.exp(self.rng.uniform(math.log(0.5), math.log(2 * self.merging)))
            if whole:
                distances = self.curve((0, self.merging), *bend)
            else:
                distances = self.shares() if number % 4 == 3 else self.curve(self._window(), *bend)
            if max(distance or 0 for distance in distances) < 1:
                break
        shape = self.shaped(distances, split, "curve" if whole else "free")
        return replace(shape, bend=bend) if whole else shape

    def shaped(self, distances: list[float | None], split: int | None, family: str) -> Shape:
        weights = distances
        if self.adapt == "static":  # the r that these thresholds give on average
            thetas = tuple(None if w is None else 1 - min(w, FARTHEST) for w in distances)
            weights = [r.mean().item() or None for r in self.predictor.counts(thetas)]
        weights = (*weights, *[None] * (self.depth - len(weights)))
        return Shape(weights, self.adapt, split, self.proportional, family)

    def curve(self, window: tuple[int, int], spread: float, rise: float) -> list[float | None]:
        """Eq. 1 in a window of blocks, with the alpha that should meet the goal. 1 - theta_min is 10^spread times
        1 - alpha, and theta_min is reached after ``rise`` blocks."""

        def distances(d: float) -> list[float | None]:
            lowest = max(1 - 10**spread * d, -1.0)
            beta = math.log1p(1 - d - lowest) / rise if lowest < 1 - d else 0.0
            return self._within(window, lambda block: 1 - threshold(block + 1, 1 - d, beta, lowest))

        return self.meeting(distances)

    def shares(self) -> list[float | None]:
        """Thresholds that share out the candidates of the unmerged model among a window of blocks, more or less with
        depth."""
        window, slope = self._window(), self.rng.uniform(-0.4, 0.4)

        def distances(d: float) -> list[float | None]:
            share = {block: d * math.exp(slope * (block - window[0])) for block in range(*window)}
            return self._within(window, lambda block: max(1 - self._quantile(block, share[block]), 1e-7))

        return self.meeting(distances)

    def _window(self) -> tuple[int, int]:
        first = self.rng.randrange(max(1, self.merging // 2))
        return first, self.rng.randrange(first + 1, min(first + self.most, self.merging) + 1)

    def _within(self, window: tuple[int, int], of: Callable[[int], float]) -> list[float | None]:
        first, last = window
        return [of(block) if first <= block < last else None for block in range(self.merging)]

    def _quantile(self, block: int, share: float) -> float:
        """The similarity that this share of a block's candidates, at most all of them, has or exceeds."""
        values = self.predictor.similarities[block].flatten()
        kept = max(1, round(min(share, 1.0) * len(values)))
        return max(values.kthvalue(len(values) - kept + 1).values.item(), -1.0)

    def meeting(self, distances: Callable[[float], list[float | None]]) -> list[float | None]:
        """The distances whose foretold cost is the goal's, or the farthest where none costs as little."""
        low, high = -6.0, math.log10(FARTHEST)
        for _ in range(24):
            d = (low + high) / 2
            thetas = tuple(None if w is None else 1 - min(w, FARTHEST) for w in distances(10**d))
            dearer = self.predictor.of_thresholds(thetas, self.adapt) > self.goal
            low, high = (d, high) if dearer else (low, d)
        return distances(10**high)

    def changed(self, shape: Shape) -> Shape:
        """A shape with one or two blocks that merge more or less, or that begin or cease to merge; seldom with another
        grouping or attention."""
        kind, rng = self.rng.random(), self.rng
        if kind < 0.06:
            return replace(shape, split_depth=rng.choice([None, self.depth, self.merging // 2]))
        if kind < 0.1:
            return replace(shape, proportional_attention=not shape.proportional_attention)
        weights = list(shape.weights)
        for block in rng.sample(range(self.merging), min(rng.choice([1, 2]), self.merging)):
            if weights[block] is None:
                neighbours = [w for w in weights[max(0, block - 1) : block + 2] if w is not None]
                weights[block] = neighbours[0] if neighbours else None
            elif rng.random() < 0.15:
                weights[block] = None
            else:
                weights[block] *= 10 ** rng.gauss(0, 0.25)
        if not 0 < sum(w is not None for w in weights) <= self.most:
            return shape
        return replace(shape, weights=tuple(weights), family="free", bend=None)

    def bent(self, shape: Shape) -> Shape:
        """A curve near a curve over all blocks, seldom with another grouping."""
        spread, rise = shape.bend
        bend = min(max(spread + self.rng.gauss(0, 0.3), 0.0), 2.5), max(rise * math.exp(self.rng.gauss(0, 0.3)), 0.5)
        split = self.rng.choice([None, self.depth]) if self.rng.random() < 0.2 else shape.split_depth
        near = self.shaped(self.curve((0, self.merging), *bend), split, "curve")
        return replace(near, proportional_attention=shape.proportional_attention, bend=bend)
