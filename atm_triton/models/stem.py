"""What the stems of LV-ViT and T2T-ViT share."""

from timm.layers import PatchEmbed
from torch import Tensor


class Stem(PatchEmbed):
    """timm's ``PatchEmbed`` with layers of its own: images [B, C, H, W] to tokens [B, N, D]."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.img_size:
            want, got = (" x ".join(map(str, shape)) for shape in (self.img_size, x.shape[-2:]))
            raise ValueError(f"images of {got}; the model takes {want}")
        return self.embed(x)

    def embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError
