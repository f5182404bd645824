"""Merging above one threshold, the same in every block: ATM without thresholds that fall with depth (Figure 5)."""

from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer

from atm_triton import ATMConfig, apply_patch
from benchmarks.baselines.base import About, Baseline, is_number


@dataclass(frozen=True)
class Threshold(Baseline):
    """Every token of A joins its partner if their similarity is ``theta`` or more; alternate groups throughout.

    Args:
        theta: cosine similarity, -1 to 1; adapt: "batch", one r per batch, or "image".
    """

    theta: float = 0.9
    adapt: str = "batch"
    about: ClassVar[About] = About(
        "one threshold (ECAI 2025, ATM's Figure 5)", "no code found", own_count='with adapt="image"'
    )

    def __post_init__(self) -> None:
        if self.adapt not in ("batch", "image"):
            raise ValueError(f"threshold: adapt={self.adapt!r}; want batch or image")
        if not (is_number(self.theta) and -1 <= self.theta <= 1):
            raise ValueError(f"threshold: theta={self.theta!r}; want a cosine similarity, -1 to 1")

    def apply(self, model: VisionTransformer) -> VisionTransformer:
        depth = len(getattr(model, "blocks", [None]))
        options = {"split_depth": depth, "cls_only_last": self.cls_only_last, "source": repr(self)}
        curve = {"alpha": self.theta, "beta": 0.0, "theta_min": self.theta}
        return apply_patch(model, ATMConfig(**curve, adapt=self.adapt, **options))
