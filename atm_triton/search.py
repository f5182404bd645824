"""The search of a calibration: measure configurations on some images, choose on others, promise on a third part.

Only forward passes of whole configurations are compared, at one cost, by their *change*: the mean of a power of an
image's KL divergence from the unmerged model. The mean of the KL itself is decided by one image in hundreds and tells
little on so few; a lower power needs fewer, but one too low does not see those images at all. Which images these are
hangs little on how tokens merge: the best draws are measured on all images, and from then on the change on the hardest
alone, the cost on a few of chance. Labels are never used. A configuration that was measured is not measured again, also
not by a run that goes on where another was interrupted: the search is seeded, so it asks the same questions.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from atm_triton import ops
from atm_triton.block import ATMBlock, Tokens
from atm_triton.config import ATMConfig
from atm_triton.distributed import in_order, own
from atm_triton.evaluate import compare, share, unpatched_logits
from atm_triton.notes import Notes
from atm_triton.patch import apply_patch, install
from atm_triton.shapes import Drawer, Predictor, Shape

SEEN = ("fit", "choose")  # parts of the images
DRAWS, KEPT, STEPS, FINALISTS = 60, 8, 30, 4
CURVES, BENDS = 2, 12  # of the curves those that are kept and bent apart from the others, and how often
FEW, SOME = 128, 256  # images to fit on which a draw is measured first, and the cost of what is kept or changed
MANY = 1024  # images of a part for the cost of the last
PILOTS = 2  # draws that tell which images are hard
HARDEST, AT_LEAST = 8, 64  # one in so many images of a part, or as many as this
POWER = 2 / 3  # of the KL of an image
BEYOND = 0.96  # of the goal: how much more the pilots change there tells what a little cost is worth
CLOSE = 0.004  # of the unmerged model's cost: how near a measured cost must come to the goal; of a draw twice as far
CLOSER = 0.001  # in the end
COARSE = 4  # times that far is taken where nothing is nearer: one r for few small batches changes in steps
TIE = 0.03  # a rougher shape must be better by more than this share of the change


@dataclass(frozen=True)
class Measured:
    """Of a number of images, each float64 [n]: GFLOPs, KL in nats, and whether the predicted class is kept; and the
    tokens that each block merged [n, L]."""

    gflops: Tensor
    kl: Tensor
    agree: Tensor
    merged: Tensor


@dataclass(frozen=True)
class Mean:
    """The same on average, agreement in [0, 1]; ``change``: the KL to the power :data:`POWER`."""

    gflops: float
    kl: float
    agreement: float
    change: float
    merged: tuple[float, ...]


class Meter:
    """Measures configurations beside the unmerged model on parts of the images.

    Args:
        model: unpatched, in eval mode.
        parts: by name the batches [B, C, H, W] of a part, the same on every process.
        fields: of every configuration (``cls_only_last``, ``backend``).
        notes: where means are kept for a later run; None: nowhere.
    """

    def __init__(
        self,
        model: VisionTransformer,
        parts: dict[str, list[Tensor]],
        fields: dict[str, object],
        notes: Path | None = None,
    ) -> None:
        self.fields, self.images = fields, 0
        self._parts: dict[str, list[Tensor]] = {}
        self._base: dict[str, list[Tensor]] = {}  # of the batches of this process
        self._model, self._patched = model, share(model)
        for name, batches in parts.items():
            self._add(name, batches)
        size = max(len(batches[0]) for batches in parts.values())
        logits = [in_order([x.double().abs().mean().item() for x in batches]) for batches in self._base.values()]
        self._notes = Notes(notes, [POWER, size, *(mean for means in logits for mean in means)])

    def _add(self, part: str, batches: list[Tensor]) -> None:
        self._parts[part] = batches
        self._base[part] = unpatched_logits(self._model, [(images, None) for images in own(batches)], title=None)
        self.images += sum(map(len, batches))

    @torch.inference_mode()
    def measure(self, config: ATMConfig, part: str, limit: int | None = None) -> Measured:
        """On the first batches of a part, which hold ``limit`` images or a few more; None: on all."""
        batches = self._parts[part]
        counts = accumulate(map(len, batches), initial=0)
        first = len(batches) if limit is None else min(sum(images < limit for images in counts), len(batches))
        mine = own(batches[:first])
        patched = apply_patch(self._patched, config)
        pairs = zip(mine, self._base[part][: len(mine)], strict=True)
        every = in_order([compare(patched, *pair, number) for number, pair in enumerate(pairs)])
        columns = [torch.cat([row[name] for row in every]).double() for name in ("gflops", "kl", "agree", "merged")]
        self.images += len(columns[0])
        return Measured(*columns)

    def mean(self, config: ATMConfig, parts: tuple[str, ...], limit: int | None = None) -> Mean:
        key = f"{' '.join(parts)} {limit} {config.to_json()}"
        known = self._notes.get(key)
        if known is None:
            measured = [self.measure(config, part, limit) for part in parts]
            gflops, kl, agree, merged = (
                torch.cat([getattr(m, n) for m in measured]) for n in ("gflops", "kl", "agree", "merged")
            )
            known = [column.mean().item() for column in (gflops, kl, agree, kl.clamp(min=0) ** POWER)]
            known += merged.mean(0).tolist()
            self._notes.add(key, known)
        return Mean(*known[:4], tuple(known[4:]))

    def focus(self, configs: list[ATMConfig], parts: tuple[str, ...] = SEEN) -> None:
        """From now on there is a part of the :func:`hardest` images of each part: those that these change most."""
        for part in parts:
            batches, key = self._parts[part], f"{hardest(part)} {' '.join(config.to_json() for config in configs)}"
            chosen = self._notes.get(key)
            if chosen is None:
                roots = torch.stack([self.measure(config, part).kl.clamp(min=0).sqrt() for config in configs])
                number = min(roots.shape[1], max(AT_LEAST, roots.shape[1] // HARDEST))
                chosen = sorted(roots.mean(0).argsort(descending=True, stable=True)[:number].tolist())
                self._notes.add(key, chosen)
            size = len(batches[0])
            images = torch.stack([batches[int(i) // size][int(i) % size] for i in chosen])
            self._add(hardest(part), list(images.split(size)))


def hardest(part: str) -> str:
    return f"hardest to {part}"


class SimilarityBlock(ATMBlock):
    """A block that merges nothing and keeps the similarity of every candidate, by alternate grouping."""

    found: list[Tensor]

    def _match(self, keys: Tensor, tokens: Tokens) -> None:
        similarity, partner, _ = ops.match(keys, None, self.num_prefix_tokens, False, None, self.config.backend)
        self.found.append(similarity[partner >= 0].view(len(similarity), -1).float().cpu())


@torch.inference_mode()
def similarities(model: VisionTransformer, batches: list[Tensor], config: ATMConfig) -> list[Tensor]:
    """Of every block the best similarity of each candidate [n, Na] in the unmerged model, of all images."""
    depth = len(model.blocks)

    def collecting(block: torch.nn.Module, index: int) -> SimilarityBlock:
        made = SimilarityBlock.of(block, config, index, depth, model.num_prefix_tokens)
        made.found = []
        return made

    patched = install(share(model), collecting, config)
    parameter, rows = next(model.parameters()), []
    for images in own(batches):
        for block in patched.blocks:
            block.found.clear()
        patched.forward_features(images.to(parameter))
        rows.append([block.found[0] if block.found else None for block in patched.blocks])
    blocks = zip(*in_order(rows), strict=True)
    return [torch.cat(found) for found in blocks if found[0] is not None]


Found = tuple[Shape, float]  # a shape and the scale at which it meets the goal
Scored = tuple[float, Found]  # with its change


class Search:
    """The best shapes for one goal in GFLOPs. ``most``: blocks that merge; None: any number. ``bar`` counts the shapes
    and shows the least KL so far."""

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
        self._stage: tuple[float, bool] | None = None  # what the least KL is of
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
                self._show(goal, False, met[1].kl)
                drawn.append((met[1].change, (shape, met[0])))
            self.bar.update()
        if not drawn:
            raise ValueError(f"no draw costs {goal:.4g} GFLOPs; take another target, or more images")
        drawn = ranked(drawn)
        self._slope = 0.0
        pilots = [found for _, found in drawn[:PILOTS]]
        self.meter.focus([self.config(found) for found in pilots])
        slopes = [self._steepness(found, goal) for found in pilots]
        self._slope = sum(slopes) / len(slopes)
        return drawn

    def _steepness(self, found: Found, goal: float) -> float:
        """By which power of the cost the change of a shape falls."""
        changes = []
        for cost in (goal, BEYOND * goal):
            met = self.meet(found[0], cost, goal - self.cost(found), SOME)
            changes.append(None if met is None else self._change((found[0], met[0]), met[1], "fit", cost).change)
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
        mean = self._change(found, met[1], "fit", goal)
        self._show(goal, True, mean.kl)
        return mean.change, found

    def judged(self, found: Found, goal: float) -> float:
        """The change on the hardest images to choose by."""
        mean = self.meter.mean(self.config(found), ("choose",), MANY)
        self.bar.update()
        return self._change(found, mean, "choose", goal).change

    def _change(self, found: Found, mean: Mean, part: str, goal: float) -> Mean:
        """On the hardest images of a part, at the cost of ``goal``. ``mean``: of images of chance. With one r for a
        batch it is theirs that these merge by: in batches of hard images it would be another."""
        config = self.config(found)
        if self.adapt == "batch":
            totals = [round(total) for total in accumulate(mean.merged, initial=0)]
            schedule = tuple(after - before for before, after in pairwise(totals))
            config = replace(config, adapt="static", thresholds=None, schedule=schedule)
        mean_of_hardest = self.meter.mean(config, (hardest(part),))
        at_goal = (goal / mean.gflops) ** self._slope
        return replace(mean_of_hardest, change=at_goal * mean_of_hardest.change)

    def _show(self, goal: float, focused: bool, kl: float) -> None:
        if (goal, focused) != self._stage:
            self._stage, self.least = (goal, focused), math.inf
        self.least = min(self.least, kl)
        self.bar.set_postfix_str(f"best KL{' of the hardest' * focused} {self.least:.2g}")


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
