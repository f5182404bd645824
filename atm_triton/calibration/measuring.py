"""Measures configurations beside the unmerged model on parts of some images.

By their GFLOPs, their divergence (:mod:`atm_triton.measure.comparison`) and their *change*: the mean of a power of an
image's divergence. One image in hundreds decides the mean of the divergence itself, so few images tell little of it; a
lower power needs fewer images, but one too low does not see the hard ones at all. Nothing is measured twice, also not
by a later run that finds the notes of this one.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.calibration.resume import Notes
from atm_triton.config import ATMConfig
from atm_triton.measure.comparison import MEASURES, Measure, measure_of, percentile
from atm_triton.measure.distributed import in_order, own
from atm_triton.measure.evaluate import compare, share, unpatched_answers
from atm_triton.patch import apply_patch

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

    @classmethod
    def of(cls, measured: Measured) -> "Mean":
        agreement = None if measured.agree is None else measured.agree.mean().item()
        change = (measured.divergence.clamp(min=0) ** POWER).mean().item()
        gflops, divergence = measured.gflops.mean().item(), measured.divergence.mean().item()
        p99, merged = percentile(measured.divergence), tuple(measured.merged.mean(0).tolist())
        return cls(gflops=gflops, divergence=divergence, agreement=agreement, p99=p99, change=change, merged=merged)

    def to_list(self) -> list[Any]:
        return [self.gflops, self.divergence, self.agreement, self.p99, self.change, *self.merged]

    @classmethod
    def from_list(cls, values: list[Any]) -> "Mean":
        gflops, divergence, agreement, p99, change, *merged = values
        return cls(
            gflops=gflops, divergence=divergence, agreement=agreement, p99=p99, change=change, merged=tuple(merged)
        )


class Meter:
    """Measures configurations beside the unmerged model on parts of the images.

    Args:
        model: unpatched, in eval mode.
        parts: by name the batches [B, C, H, W] of a part, the same on every process.
        fields: of every configuration (``cls_only_last``, ``backend``).
        by: how answers are compared; None: as fits the model.
        saw: called after each pass with the number of images that went through the model, or their share of it.
    """

    def __init__(
        self,
        model: VisionTransformer,
        parts: dict[str, list[Tensor]],
        fields: dict[str, Any],
        by: Measure | None = None,
        saw: Callable[[float], None] = lambda images: None,
    ) -> None:
        self.model, self.parts, self.fields, self.images, self._saw = model, parts, fields, 0.0, saw
        self.by = measure_of(model) if by is None else by
        self.warns = False  # where most tokens are gone early: a search tries that too
        self._patched = share(model)
        self.base: dict[str, list[Tensor]] = {}  # the unmerged model's answers to the batches of this process
        for name, batches in parts.items():
            self.base[name] = unpatched_answers(model, [(images, None) for images in own(batches)], None, self.by)
            self.count(sum(map(len, batches)))
        self.remember(None)

    def count(self, images: float) -> None:
        """So many images went through the model."""
        self.images += images
        self._saw(images)

    def remember(self, path: Path | None) -> None:
        """Measure nothing twice: what was measured goes to the file, from which an interrupted run goes on."""
        batch_size = max(len(batches[0]) for batches in self.parts.values())
        answers = [in_order([x.double().abs().mean().item() for x in batches]) for batches in self.base.values()]
        settings = [list(MEASURES).index(self.by.name), POWER, batch_size]
        self.notes = Notes(path, settings + [mean for means in answers for mean in means])

    def spread(self) -> float:
        """By how much what is compared of the unmerged model's answers differs between two images, at most: in nats, or
        in a unit vector's coordinate."""
        parts = self.base.values()
        ends = [in_order([torch.stack(self.by.coordinates(x).aminmax(dim=0)) for x in of_part]) for of_part in parts]
        low, high = torch.stack([of_batch for of_part in ends for of_batch in of_part]).unbind(1)
        return (high.amax(0) - low.amin(0)).max().item()

    def normalised(self) -> bool:
        """Whether the unmerged model answers with probabilities: all from 0 to 1, of classes with a sum of 1."""
        if self.by.of_features:
            return False
        parts = self.base.values()
        ends = [in_order([torch.stack([*x.aminmax(), (x.sum(1) - 1).abs().max()]) for x in part]) for part in parts]
        low, high, off = torch.stack([of_batch for of_part in ends for of_batch in of_part]).unbind(1)
        return bool(low.min() >= 0 and high.max() <= 1 and (off.max() < 1e-3 or not self.by.has_classes))

    @torch.inference_mode()
    def measure(self, config: ATMConfig, part: str) -> Measured:
        patched = apply_patch(self._patched, config)
        patched.blocks.warns = self.warns
        pairs = zip(own(self.parts[part]), self.base[part], strict=True)
        every = in_order([compare(patched, *pair, number, self.by) for number, pair in enumerate(pairs)])
        measured = together([measured_of(row) for row in every])
        self.count(len(measured.gflops))
        return measured

    def mean(self, config: ATMConfig, parts: tuple[str, ...]) -> Mean:
        """On all images of some parts."""
        key = f"{' '.join(parts)} {config.to_json()}"
        known = self.notes.get(key)
        if known is None:
            known = Mean.of(together([self.measure(config, part) for part in parts])).to_list()
            self.notes.add(key, known)
        return Mean.from_list(known)


def together(parts: list[Measured]) -> Measured:
    columns = {name: [getattr(part, name) for part in parts] for name in COLUMNS}
    return measured_of({n: torch.cat(column).double() for n, column in columns.items() if column[0] is not None})


def measured_of(columns: dict[str, Tensor]) -> Measured:
    """From columns by name; of features "agree" is missing."""
    return Measured(
        gflops=columns["gflops"], divergence=columns["divergence"], agree=columns.get("agree"), merged=columns["merged"]
    )
