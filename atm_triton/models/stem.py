"""The base class of LV-ViT's and T2T-ViT's stems, and how images are prepared for both models."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from torch import Tensor

SIDE = 16  # a token stands for this many pixels of the image in each direction


def published_cfg(**changes: Any) -> dict[str, Any]:
    """timm's default_cfg of weights trained on ImageNet-1k at 224 pixels, evaluated at a crop of 0.9."""
    fixed = {"num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True}
    transform = {"interpolation": "bicubic", "crop_pct": 0.9}
    colours = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {**fixed, **transform, **colours, **changes}


class Stem(PatchEmbed):
    """timm's ``PatchEmbed`` with other layers: images [B, C, H, W] to tokens [B, N, D], one per 16 x 16 pixels.

    Raises:
        ValueError: patches are not 16 x 16, sides of the image are not multiples of 16, or an option is not supported.
    """

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, **kwargs: Any) -> None:
        unknown = kwargs.keys() - {"in_chans", "embed_dim", "bias", "dynamic_img_pad", "device", "dtype"}
        if unknown or kwargs.pop("dynamic_img_pad", False):
            raise ValueError("this stem takes images of one size, and has no norm: no dynamic_img_size or _pad")
        super().__init__(img_size, patch_size, **kwargs)
        self._check()

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and patch_size not in (SIDE, (SIDE, SIDE)):
            raise ValueError(f"patch_size={patch_size}: this stem has one token for {SIDE} x {SIDE} pixels")
        super().set_input_size(img_size)
        self._check()

    def _check(self) -> None:
        if self.patch_size != (SIDE, SIDE) or any(length % SIDE or length == 0 for length in self.img_size):
            raise ValueError(
                f"img_size={self.img_size}, patch_size={self.patch_size}: this stem has one token for {SIDE} x {SIDE} "
                f"pixels; want multiples of {SIDE}, and patch_size={SIDE}"
            )

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != tuple(self.img_size):
            want, got = (" x ".join(map(str, shape)) for shape in (self.img_size, x.shape[-2:]))
            raise ValueError(f"images of {got}; the model takes {want}")
        return self.embed(x)

    def embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError
