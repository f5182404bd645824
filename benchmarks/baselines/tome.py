"""ToMe (Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023)."""

from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer

from atm_triton import ATMConfig, apply_patch
from benchmarks.baselines.base import About, Baseline, is_number


@dataclass(frozen=True)
class ToMe(Baseline):
    """Merges r tokens in every block: the engine's static mode with alternate groups throughout.

    Training with merging follows DeiT's recipe, as its authors report; they published no code for it.

    Unlike the authors' code, register tokens are protected, and the rest of A is never ordered by similarity; their
    code does that in models without a class token.

    Args:
        r: tokens per block: one number; a list with one for each block, 0 beyond its end; or (r, inflect) with inflect
            from -1 (falling from 2 r to 0) to 1 (rising), at about the cost of a constant r.
    """

    r: int | list[int] | tuple[int, float] = 8
    about: ClassVar[About] = About("ToMe (ICLR 2023)", "CC-BY-NC 4.0", training="no, or trained so")

    def __post_init__(self) -> None:
        kind = "whole numbers from 0, or (r, inflect) with inflect from -1 to 1"
        if isinstance(self.r, tuple):
            good = len(self.r) == 2 and _whole(self.r[0]) and is_number(self.r[1]) and -1 <= self.r[1] <= 1
        else:
            good = all(map(_whole, self.r if isinstance(self.r, list) else [self.r]))
        if not good:
            raise ValueError(f"tome: r={self.r!r}; want {kind}")

    def schedule(self, depth: int) -> tuple[int, ...]:
        """The r of each block, read from the setting as ToMe's own code does."""
        if isinstance(self.r, list):
            return tuple((self.r + [0] * depth)[:depth])
        if isinstance(self.r, int):
            return (self.r,) * depth
        r, inflect = self.r
        if depth == 1:
            raise ValueError(f"tome: r={self.r!r} falls or rises over blocks, and the model has one; give a number")
        low = int(r * (1 - inflect))
        step = (2 * r - 2 * low) / (depth - 1)
        return tuple(int(low + step * block) for block in range(depth))

    def apply(self, model: VisionTransformer) -> VisionTransformer:
        depth = len(getattr(model, "blocks", [None]))
        schedule = self.schedule(depth)
        options = {"split_depth": depth, "cls_only_last": self.cls_only_last, "source": repr(self)}
        return apply_patch(model, ATMConfig(adapt="static", schedule=schedule, **options))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
