"""Small models for the tests."""

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

SHAPE = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def vit(cls=VisionTransformer, dtype=torch.float32, **changes):
    """A ViT of 25 patch tokens with random weights, in eval mode; wide enough weights that blocks differ."""
    model = cls(**{**SHAPE, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif "token" in name or name == "pos_embed":
                parameter.normal_(std=0.5)
    return model.to(dtype).eval()


def distilled(dtype=torch.float32, **changes):
    return vit(VisionTransformerDistilled, dtype, **changes)


def images(batch=3, channels=3, side=40, dtype=torch.float32):
    return torch.randn(batch, channels, side, side, dtype=dtype)
