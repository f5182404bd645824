"""DToMe, of DyMU (Wang et al., DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs, NeurIPS 2025)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from atm_triton import ATMConfig, apply_patch, ops
from atm_triton.block import ATMBlock
from atm_triton.measure.evaluate import share
from atm_triton.packed import Packed
from atm_triton.patch import check_model, install
from atm_triton.reference import count
from benchmarks.baselines.base import About, Baseline, is_number
from benchmarks.baselines.tome import ToMe


@dataclass(frozen=True)
class DToMe(Baseline):
    """Merges every token of A that is more similar to its partner than the block's threshold, so that each image merges
    its own number. Thresholds are fitted to images without labels. In this engine it is ``adapt="image"`` with
    alternate groups throughout.

    The authors' code merges at most half of the tokens that may merge, rounded down; here A may hold one more, in
    models with an even number of leading tokens, or none. Their published thresholds are for a language model's vision
    encoder.

    Args:
        thresholds: a cosine similarity for each block, as :meth:`fitted` finds them.
    """

    thresholds: tuple[float, ...] = ()
    about: ClassVar[About] = About(
        "DToMe, of DyMU (NeurIPS 2025)",
        "open_clip's, parts of ToMe's",
        training="no, images without labels",
        own_count="yes",
    )

    def __post_init__(self) -> None:
        given = self.thresholds
        if not isinstance(given, (tuple, list)) or not all(is_number(theta) and -1 <= theta <= 1 for theta in given):
            raise ValueError(f"dtome: thresholds={given!r}; want a cosine similarity, -1 to 1, for each block")

    def apply(self, model: VisionTransformer) -> VisionTransformer:
        return apply_patch(model, self.config(len(check_model(model))))

    def config(self, depth: int) -> ATMConfig:
        """The engine's configuration for a model of ``depth`` blocks."""
        if not self.thresholds:
            raise ValueError("dtome: no thresholds; DToMe.fitted(model, batches, r) finds those of a model")
        options = {"split_depth": depth, "cls_only_last": self.cls_only_last, "source": repr(self)}
        return ATMConfig(adapt="image", thresholds=tuple(map(_above, self.thresholds)), **options)

    @classmethod
    @torch.inference_mode()
    def fitted(cls, model: VisionTransformer, batches: Iterable[Any], r: Any = 8, **settings: Any) -> Self:
        """Fit the thresholds above which the images of a batch merge r tokens on average in each block.

        In every block a batch of B images merges its B r most similar pairs. The similarity of the next pair is the
        threshold of that batch, at least 0, and 0 where no pair is left; the mean over the batches is the block's.

        Args:
            model: unpatched, in eval mode; it stays so.
            batches: images [B, channels, H, W], or tuples that begin with them. Larger batches come closer to the
                quantile over all images.
            r: as for ToMe.
            settings: other settings of the method.

        Raises:
            ValueError: no images, r out of its range, or a model that is patched or in training mode; TypeError: a
                model that cannot be patched.
        """
        depth = len(check_model(model))
        schedule = ToMe(r=r).schedule(depth)
        config = ATMConfig(adapt="image", thresholds=(0.0,) * depth, cls_only_last=False)

        def fitting(block: Block, index: int) -> FittingBlock:
            made = FittingBlock.of(block, config, index, depth, model.num_prefix_tokens)
            made.of_image, made.thresholds = schedule[index], []
            return made

        patched, like = install(share(model), fitting, config), next(model.parameters())
        patched.blocks.warns = False  # no warning that most tokens are gone early: r asks for it
        for batch in batches:
            patched((batch if isinstance(batch, Tensor) else batch[0]).to(like))
        if not patched.blocks[0].thresholds:
            raise ValueError("dtome: no images to fit thresholds by; give batches of them")
        means = (sum(block.thresholds) / len(block.thresholds) for block in patched.blocks)
        return cls(thresholds=tuple(min(mean, 1.0) for mean in means), **settings)


class FittingBlock(ATMBlock):
    """timm's block that merges the most similar pairs of a batch and notes the similarity of the next pair.
    ``of_image``: pairs per image that it merges on average; ``thresholds``: the noted similarity of each batch."""

    of_image: int
    thresholds: list[float]

    def match(self, keys: Tensor, tokens: Packed) -> ops.Match:
        images, P, backend = tokens.images, self.num_prefix_tokens, self.config.backend
        pairs = ops.match(keys, tokens.sizes, images, P, False, None, backend)
        order = pairs.similarity.argsort(descending=True, stable=True)
        number = int((pairs.partner >= 0).sum())
        taken = min(images.B * self.of_image, number)
        next_one = pairs.similarity[order[taken]].item() if taken < number else 0.0
        self.thresholds.append(max(next_one, 0.0))
        joins = torch.zeros_like(pairs.partner).scatter(0, order[:taken], 1)
        return pairs._replace(counts=count(joins, 1, images))


def _above(theta: float) -> float | None:
    """The next float32 number above a threshold, because the engine merges at or above a threshold and DToMe only above
    it. Similarities are float32; in float64, values between the two numbers do not merge. None for a threshold of 1 or
    more, which no similarity exceeds."""
    if theta >= 1:
        return None
    near = np.float32(theta)
    return float(near) if float(near) > theta else float(np.nextafter(near, np.float32(2)))
