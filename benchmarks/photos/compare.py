"""Compare a model's outputs on photographs with and without merging, and count what it costs.

Distances are 1 - cosine between outputs of the merged and the unmerged model: of the class token, and of the patch
tokens after unmerging (the mean over an image). The decoder computes saliency from the patch tokens; its error is the
mean absolute difference of two maps. The last block computes all tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.flops import cost, cost_of_each, unmerged
from atm_triton.measure.comparison import Measure
from atm_triton.measure.evaluate import share
from benchmarks.paper.methods import Way
from benchmarks.photos.weights import Decoder, read

TO_SCALE = 32  # images on which the cost of thresholds is measured
MEASURES = ("class_token", "patch_tokens", "saliency")


@dataclass(frozen=True)
class Outcome:
    """GFLOPs, distances and saliency error of n images, float64 [n]; ``tokens``: the mean number that enter each block.
    ``patch_tokens`` and ``saliency`` are None if some patches have no token any more."""

    gflops: Tensor
    tokens: list[float]
    class_token: Tensor
    patch_tokens: Tensor | None
    saliency: Tensor | None

    def to_dict(self, photos: Tensor) -> dict[str, Any]:
        """Means, standard errors and the worst image. ``photos`` [n]: the photograph that each image is cut from."""
        figures = {"images": len(photos), "gflops": self.gflops.mean().item(), "tokens": self.tokens}
        for name in MEASURES:
            values = getattr(self, name)
            figures[name] = None if values is None else told(values, photos)
        return figures


def told(values: Tensor, photos: Tensor) -> dict[str, Any]:
    """Mean, worst, and the standard error of the mean. The error comes from the means of the photographs, since crops
    of one photograph are alike; None for a single photograph. If photographs have several images, also the mean of
    each."""
    of_each = torch.stack([values[photos == photo].mean() for photo in photos.unique()])
    error = (of_each.std() / len(of_each) ** 0.5).item() if len(of_each) > 1 else None
    figures = {"mean": values.mean().item(), "se": error, "worst": values.max().item()}
    return figures if len(of_each) == len(values) else {**figures, "of_photos": of_each.tolist()}


class Photos:
    """A model with its decoder, images [n, C, H, W] to choose settings by and others to judge by. ``photos`` [n]: the
    photograph that each image to judge by is cut from."""

    def __init__(
        self, model: VisionTransformer, decoder: Decoder, chosen_by: Tensor, test: Tensor, photos: Tensor, batch: int
    ) -> None:
        self.model, self.decoder, self.batch = model, decoder, batch
        self.chosen_by, self.test, self.photos = chosen_by, test, photos
        record = unmerged(model, tuple(test.shape[1:]))
        self.whole, self.N, self.depth = cost(model, record).paper_gflops, record.tokens[0], len(model.blocks)
        self.costs: dict[Any, float] = {}  # measured GFLOPs of thresholds

    def image(self) -> Tensor:
        """One image [1, C, H, W], to count FLOPs with."""
        return self.chosen_by[:1]

    def goal(self, saved: float) -> float:
        """The GFLOPs at which this share is saved."""
        return (1 - saved) * self.whole

    @cached_property
    def base(self) -> list[tuple[Tensor, ...]]:
        return [read(self.model, self.decoder, images) for images in self.test.split(self.batch)]

    @torch.inference_mode()
    def gflops(self, way: Way) -> float:
        """GFLOPs per image, the mean over the first images to choose by."""
        model = way.patch(share(self.model))
        return torch.cat([_cost(model, images) for images in self.chosen_by[:TO_SCALE].split(self.batch)]).mean().item()

    def outcome(self, way: Way, has_patches: bool = True) -> Outcome:
        """Measure on the images to judge by. ``has_patches``: whether the method leaves a token for every patch."""
        return self.outcome_of(way.patch(share(self.model)), has_patches)

    @torch.inference_mode()
    def outcome_of(self, model: VisionTransformer, has_patches: bool = True) -> Outcome:
        """Measure a patched model on the images to judge by.

        Raises:
            ValueError: the model drops tokens although ``has_patches`` is true.
        """
        trace = model.traces(self.image())[-1]
        if has_patches and trace is not None and (trace < 0).any():
            raise ValueError(f"{model.blocks.config.source} drops tokens: those patches have no features to compare")
        rows, numbers = [], []
        for images, before in zip(self.test.split(self.batch), self.base, strict=True):
            rows.append((*_compared(before, read(model, self.decoder, images)), _cost_of_last(model, len(images))))
            numbers.append([_each(n, len(images)) for n in model.blocks.last.tokens])
        of_class, of_patches, of_saliency, gflops = (torch.cat(column) for column in zip(*rows, strict=True))
        means = [torch.cat(column).mean().item() for column in zip(*numbers, strict=True)]
        return Outcome(
            gflops=gflops,
            tokens=means,
            class_token=of_class,
            patch_tokens=of_patches if has_patches else None,
            saliency=of_saliency if has_patches else None,
        )


def _compared(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    of_class, _ = Measure("pooled").compared(before[0], after[0])
    of_patches, _ = Measure("dense").compared(before[1], after[1])
    return of_class, of_patches, (before[2] - after[2]).double().abs().mean((1, 2))


def _cost(model: VisionTransformer, images: Tensor) -> Tensor:
    model.forward_features(images)
    return _cost_of_last(model, len(images))


def _cost_of_last(model: VisionTransformer, images: int) -> Tensor:
    """GFLOPs of each image in the last pass."""
    return _each(cost_of_each(model, model.blocks.last).paper_gflops, images)


def _each(number: Any, images: int) -> Tensor:
    return torch.as_tensor(number).double().expand(images)
