"""Small models for the tests."""

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import atm_triton.models  # noqa: F401 (registers them)

SHAPE = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def vit(cls=VisionTransformer, dtype=torch.float32, **changes):
    """A ViT of 25 patch tokens with random weights, in eval mode."""
    return spread(cls(**{**SHAPE, **changes})).to(dtype)


def small(name, dtype=torch.float32, **changes):
    """A small model of the named family for 64 x 64 images, 16 patch tokens, with random weights, in eval mode."""
    shape = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return spread(timm.create_model(name, **{**shape, **changes})).to(dtype)


def spread(model):
    """Draw weights wide enough that blocks differ, and biases, which timm initialises to 0. Returns it in eval mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif name in ("cls_token", "dist_token", "reg_token", "pos_embed") and parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model.eval()


class LoRA(nn.Module):
    """A linear layer with an adapter of rank 2 beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_lora(linear):
    torch.manual_seed(1)
    return LoRA(linear).to(linear.weight.dtype)


def distilled(dtype=torch.float32, **changes):
    return vit(VisionTransformerDistilled, dtype, **changes)


def images_for(model, batch=3, dtype=torch.float32):
    """Random images of the size that ``model`` takes."""
    return images(batch, side=model.patch_embed.img_size[0], dtype=dtype)


def images(batch=3, channels=3, side=40, dtype=torch.float32):
    return torch.randn(batch, channels, side, side, dtype=dtype)
