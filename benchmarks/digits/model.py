"""``vit_digits_patch8_112``: a small ViT with trained weights, registered with timm when this module is imported.

Pre-norm, depth 12, width 96, 3 heads of 32 channels, patch 8 on one-channel 112 x 112 images: 196 patch tokens and a
class token as in DeiT, 0.35 GMACs. ``timm.create_model("vit_digits_patch8_112", pretrained=True)`` reads the weights
that lie beside this file (float16 on disk, float32 in memory); ``train.py`` makes them.
"""

from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

NAME = "vit_digits_patch8_112"
CHECKPOINT = Path(__file__).parent / f"{NAME}.safetensors"
CONFIG = Path(__file__).parent / f"{NAME}.atm.json"  # thresholds calibrated for these weights on the calibration split
IMAGE_CONFIG = Path(__file__).parent / f"{NAME}.image.atm.json"  # the same for adapt="image"

default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "file": str(CHECKPOINT),
            "custom_load": False,
            "num_classes": 10,
            "input_size": (1, 112, 112),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5,),
            "std": (0.25,),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_digits_patch8_112(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The digits model: float32 images [B, 1, 112, 112], normalised by its mean and std, to logits [B, 10]."""
    shape = {"img_size": 112, "patch_size": 8, "in_chans": 1, "embed_dim": 96, "depth": 12, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, NAME, pretrained, **{**shape, **kwargs})
