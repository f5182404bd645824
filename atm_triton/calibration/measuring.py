"""Measures configurations against the unmerged model on parts of the images.

A configuration has a cost in GFLOPs, a divergence (:mod:`atm_triton.measure.comparison`) and a *change*: the mean over
images of a power of their divergence. About one image in hundreds dominates the mean divergence itself, so a small
sample says little about it. A lower power needs fewer images, but too low a power ignores the hard ones. Nothing is
measured twice, not even by a later run that finds the notes of this one.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
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

POWER = 2 / 3  # exponent of an image's divergence


@dataclass(frozen=True)
class Measured:
    """What n images cost and changed, float64 [n]: GFLOPs, divergence and agreement (None for features); and how many
    tokens each block merged [n, L]."""

    gflops: Tensor
    divergence: Tensor
    agree: Tensor | None
    merged: Tensor


COLUMNS = [field.name for field in fields(Measured)]


@dataclass(frozen=True)
class Mean:
    """Means of a :class:`Measured` of n ``images``, agreement in [0, 1]; ``divergence_se``: standard error of the
    divergence; ``p99``: its 99th percentile; ``change``: the mean of the divergence to the power :data:`POWER`."""

    images: int
    gflops: float
    divergence: float
    divergence_se: float
    agreement: float | None
    p99: float
    change: float
    merged: tuple[float, ...]

    @classmethod
    def of(cls, measured: Measured) -> "Mean":
        divergence = measured.divergence
        return cls(
            images=len(divergence),
            gflops=measured.gflops.mean().item(),
            divergence=divergence.mean().item(),
            divergence_se=(divergence.std() / len(divergence) ** 0.5).item(),
            agreement=None if measured.agree is None else measured.agree.mean().item(),
            p99=percentile(divergence),
            change=(divergence.clamp(min=0) ** POWER).mean().item(),
            merged=tuple(measured.merged.mean(0).tolist()),
        )

    def to_list(self) -> list[Any]:
        return [*(getattr(self, name) for name in NUMBERS), *self.merged]

    @classmethod
    def from_list(cls, values: list[Any]) -> "Mean":
        numbers = dict(zip(NUMBERS, values, strict=False))
        return cls(**numbers, merged=tuple(values[len(NUMBERS) :]))


NUMBERS = [field.name for field in fields(Mean) if field.name != "merged"]


class Meter:
    """Measures configurations against the unmerged model on parts of the images.

    Args:
        model: unpatched, in eval mode.
        parts: the batches [B, C, H, W] of each part by its name, the same on every process.
        fields: fields that all configurations have in common (``cls_only_last``, ``backend``).
        by: how answers are compared; None: as fits the model.
        saw: called after each pass with the number of images that went through the model; a pass through some of the
            blocks counts for that share.
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
        self.warns = False  # whether to warn if most tokens are gone early; a search tries such plans too
        self._patched = share(model)
        self.base: dict[str, list[Tensor]] = {}  # the unmerged model's answers to the batches of this process
        for name, batches in parts.items():
            self.base[name] = unpatched_answers(model, [(images, None) for images in own(batches)], None, self.by)
            self.count(sum(map(len, batches)))
        self.notes = Notes()

    def count(self, images: float) -> None:
        """Count images that went through the model."""
        self.images += images
        self._saw(images)

    def remember(self, notes: Notes) -> None:
        """Keep measurements in these notes, and take those that an interrupted run has left there."""
        batch_size = max(len(batches[0]) for batches in self.parts.values())
        answers = [in_order([x.double().abs().mean().item() for x in batches]) for batches in self.base.values()]
        settings = [len(NUMBERS), list(MEASURES).index(self.by.name), POWER, batch_size]
        notes.belong(settings + [mean for means in answers for mean in means])
        self.notes = notes

    def spread(self) -> float:
        """The largest difference between two images in one compared value of the unmerged model's answers: in nats, or
        in a coordinate of a unit vector."""
        parts = self.base.values()
        ends = [in_order([torch.stack(self.by.coordinates(x).aminmax(dim=0)) for x in of_part]) for of_part in parts]
        low, high = torch.stack([of_batch for of_part in ends for of_batch in of_part]).unbind(1)
        return (high.amax(0) - low.amin(0)).max().item()

    def apart(self) -> float:
        """The largest divergence between the unmerged model's answers to an image and to the first one of its part. It
        is 0 for a saturated head, whose logits may still differ."""
        pairs = [(x, of_part[0][:1]) for of_part in self.base.values() for x in of_part]
        most = max((self.by.compared(x, first.expand_as(x))[0].max().item() for x, first in pairs), default=0.0)
        return max(in_order([most]))

    def normalised(self) -> bool:
        """Whether the unmerged model answers with probabilities: all in [0, 1], and for classes summing to 1."""
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
        """Means over all images of the given parts."""
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
    """Make a :class:`Measured` of columns by name. Features have no "agree"."""
    return Measured(
        gflops=columns["gflops"], divergence=columns["divergence"], agree=columns.get("agree"), merged=columns["merged"]
    )
