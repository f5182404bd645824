"""Measures configurations beside the unmerged model on parts of some images.

By their GFLOPs, their divergence (:mod:`atm_triton.measure.comparison`) and their *change*: the mean of a power of an
image's divergence. The mean of the divergence itself is decided by one image in hundreds and tells little on so few; a
lower power needs fewer, but one too low does not see those images at all. What was measured is not measured again, also
not by a later run that finds the notes of this one.
"""

import hashlib
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton import ops
from atm_triton.block import ATMBlock
from atm_triton.calibration.resume import Notes
from atm_triton.config import ATMConfig
from atm_triton.measure.comparison import MEASURES, Measure, measure_of, percentile
from atm_triton.measure.distributed import in_order, own
from atm_triton.measure.evaluate import compare, share, unpatched_answers
from atm_triton.packed import Packed
from atm_triton.patch import apply_patch, install

HARDEST, AT_LEAST = 8, 64  # one in so many images of a part, or as many as this
POWER = 2 / 3  # of the divergence of an image


@dataclass(frozen=True)
class Measured:
    """Of a number of images, each float64 [n]: GFLOPs, divergence and agreement, None of features; and the tokens that
    each block merged [n, L]."""

    gflops: Tensor
    divergence: Tensor
    agree: Tensor | None
    merged: Tensor


COLUMNS = [field.name for field in fields(Measured)]


@dataclass(frozen=True)
class Mean:
    """The same on average, agreement in [0, 1]; ``p99``: the 99th percentile of the divergence, ``change``: its mean to
    the power :data:`POWER`."""

    gflops: float
    divergence: float
    agreement: float | None
    p99: float
    change: float
    merged: tuple[float, ...]


class Meter:
    """Measures configurations beside the unmerged model on parts of the images.

    Args:
        model: unpatched, in eval mode.
        parts: by name the batches [B, C, H, W] of a part, the same on every process.
        fields: of every configuration (``cls_only_last``, ``backend``).
        by: how answers are compared; None: as fits the model.
    """

    def __init__(
        self,
        model: VisionTransformer,
        parts: dict[str, list[Tensor]],
        fields: dict[str, object],
        by: Measure | None = None,
    ) -> None:
        self.fields, self.images = fields, 0
        self.by = measure_of(model) if by is None else by
        self.warns = False  # where most tokens are gone early: a search tries that too
        self._parts: dict[str, list[Tensor]] = {}
        self._marks: dict[str, str] = {}  # what tells parts of one name apart
        self._base: dict[str, list[Tensor]] = {}  # of the batches of this process
        self._model, self._patched = model, share(model)
        for name, batches in parts.items():
            self._add(name, batches)
        self.remember(None)

    def remember(self, path: Path | None) -> None:
        """Measure nothing twice: what was measured goes to the file, from which an interrupted run goes on."""
        size = max(len(batches[0]) for batches in self._parts.values())
        answers = [in_order([x.double().abs().mean().item() for x in batches]) for batches in self._base.values()]
        settings = [list(MEASURES).index(self.by.name), POWER, HARDEST, AT_LEAST, size]
        self._notes = Notes(path, settings + [mean for means in answers for mean in means])

    def _add(self, part: str, batches: list[Tensor]) -> None:
        self._parts[part] = batches
        self._base[part] = unpatched_answers(self._model, [(images, None) for images in own(batches)], None, self.by)
        self.images += sum(map(len, batches))

    def spread(self) -> float:
        """By how much what is compared of the unmerged model's answers differs between two images, at most: in nats, or
        in a unit vector's coordinate."""
        parts = self._base.values()
        ends = [in_order([torch.stack(self.by.coordinates(x).aminmax(dim=0)) for x in of_part]) for of_part in parts]
        low, high = torch.stack([of_batch for of_part in ends for of_batch in of_part]).unbind(1)
        return (high.amax(0) - low.amin(0)).max().item()

    def normalised(self) -> bool:
        """Whether the unmerged model answers with probabilities: all from 0 to 1, of classes with a sum of 1."""
        if self.by.of_features:
            return False
        parts = self._base.values()
        ends = [in_order([torch.stack([*x.aminmax(), (x.sum(1) - 1).abs().max()]) for x in part]) for part in parts]
        low, high, off = torch.stack([of_batch for of_part in ends for of_batch in of_part]).unbind(1)
        return bool(low.min() >= 0 and high.max() <= 1 and (off.max() < 1e-3 or not self.by.has_classes))

    @torch.inference_mode()
    def measure(self, config: ATMConfig, part: str, limit: int | None = None) -> Measured:
        """On the first batches of a part, which hold ``limit`` images or a few more; None: on all."""
        batches = self._parts[part]
        counts = accumulate(map(len, batches), initial=0)
        first = len(batches) if limit is None else min(sum(images < limit for images in counts), len(batches))
        mine = own(batches[:first])
        patched = apply_patch(self._patched, config)
        patched.blocks.warns = self.warns
        pairs = zip(mine, self._base[part][: len(mine)], strict=True)
        every = in_order([compare(patched, *pair, number, self.by) for number, pair in enumerate(pairs)])
        columns = [_together([row.get(name) for row in every]) for name in COLUMNS]
        self.images += len(columns[0])
        return Measured(*columns)

    def mean(self, config: ATMConfig, parts: tuple[str, ...], limit: int | None = None) -> Mean:
        marks = " ".join(part + self._marks.get(part, "") for part in parts)
        key = f"{marks} {limit} {config.to_json()}"
        known = self._notes.get(key)
        if known is None:
            measured = [self.measure(config, part, limit) for part in parts]
            gflops, divergence, agree, merged = (_together([getattr(m, name) for m in measured]) for name in COLUMNS)
            known = [gflops.mean().item(), divergence.mean().item(), None if agree is None else agree.mean().item()]
            known += [percentile(divergence), (divergence.clamp(min=0) ** POWER).mean().item()]
            known += merged.mean(0).tolist()
            self._notes.add(key, known)
        return Mean(*known[:5], tuple(known[5:]))

    def focus(self, configs: list[ATMConfig], part: str) -> None:
        """From now on there is a part of the :func:`hardest` images of a part: those that these configurations change
        most."""
        batches, name = self._parts[part], hardest(part)
        mark = hashlib.sha256("".join(config.to_json() for config in configs).encode()).hexdigest()
        chosen = self._notes.get(f"{name} {mark}")
        if chosen is None:
            roots = torch.stack([self.measure(config, part).divergence.clamp(min=0).sqrt() for config in configs])
            number = min(roots.shape[1], max(AT_LEAST, roots.shape[1] // HARDEST))
            chosen = sorted(roots.mean(0).argsort(descending=True, stable=True)[:number].tolist())
            self._notes.add(f"{name} {mark}", chosen)
        size = len(batches[0])
        images = torch.stack([batches[int(i) // size][int(i) % size] for i in chosen])
        self._add(name, list(images.split(size)))
        self._marks[name] = f" {mark}"


def _together(columns: list[Tensor | None]) -> Tensor | None:
    return None if columns[0] is None else torch.cat(columns).double()


def hardest(part: str) -> str:
    return f"hardest to {part}"


class SimilarityBlock(ATMBlock):
    """A block that merges nothing and keeps the similarity of every candidate, by alternate grouping."""

    found: list[Tensor]

    def match(self, keys: Tensor, tokens: Packed) -> None:
        options = (self.num_prefix_tokens, False, None, self.config.backend)
        similarity, partner, *_ = ops.match(keys, None, tokens.images, *options)
        self.found.append(similarity[partner >= 0].view(tokens.images.B, -1).float().cpu())


@torch.inference_mode()
def similarities(model: VisionTransformer, batches: list[Tensor], **fields: object) -> list[Tensor]:
    """Of every block the best similarity of each candidate [n, Na] in the unmerged model, of all images; ``fields``: of
    :class:`ATMConfig`."""
    depth = len(model.blocks)
    config = ATMConfig(thresholds=(None,) * depth, **fields)

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
