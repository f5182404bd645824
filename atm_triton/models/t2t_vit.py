"""T2T-ViT (Yuan et al., Tokens-to-Token ViT, ICCV 2021): overlapping patches that a small Transformer or Performer
turns into fewer tokens, twice, with the parameter names of the published checkpoints.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton.models.stem import Stem, published_cfg

STEM_WIDTH = 64


class Attention(nn.Module):
    """Attention with one head of :data:`STEM_WIDTH` channels over tokens [B, N, dim]. Its scale is that of ``dim``
    channels, and its residual branch adds to the values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * STEM_WIDTH, bias=False)
        self.proj = nn.Linear(STEM_WIDTH, STEM_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return (v + self.proj(attended)).squeeze(1)


class TokenTransformer(nn.Module):
    """Tokens [B, N, dim] to [B, N, 64]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(STEM_WIDTH)
        self.mlp = Mlp(STEM_WIDTH, STEM_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """:class:`TokenTransformer` with attention of linear cost, by 32 positive random features (Choromanski et al.,
    Rethinking Attention with Performers, ICLR 2021)."""

    FEATURES = 32
    EPS = 1e-8

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.kqv = nn.Linear(dim, 3 * STEM_WIDTH)
        self.proj = nn.Linear(STEM_WIDTH, STEM_WIDTH)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(STEM_WIDTH)
        self.mlp = nn.Sequential(nn.Linear(STEM_WIDTH, STEM_WIDTH), nn.GELU(), nn.Linear(STEM_WIDTH, STEM_WIDTH))
        w = nn.init.orthogonal_(torch.empty(self.FEATURES, STEM_WIDTH)) * math.sqrt(self.FEATURES)
        self.w = nn.Parameter(w, requires_grad=False)

    def features(self, x: Tensor) -> Tensor:
        """phi(x) = exp(w x - |x|^2 / 2) / sqrt(32), [B, N, 32]."""
        return torch.exp(F.linear(x, self.w) - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(self.FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.features(k), self.features(q)
        norm = q @ k.sum(1).unsqueeze(-1) + self.EPS
        x = v + self.proj(q @ (k.transpose(1, 2) @ v) / norm)
        return x + self.mlp(self.norm2(x))


class TokensToToken(Stem):
    """Turns images [B, 3, 224, 224] into tokens [B, 196, D]. Each soft split turns overlapping windows into tokens."""

    def __init__(
        self, *args: Any, in_chans: int = 3, embed_dim: int = 768, attention: type = TokenTransformer, **kwargs: Any
    ) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        del self.proj
        self.attention1 = attention(49 * in_chans)
        self.attention2 = attention(9 * STEM_WIDTH)
        self.project = nn.Linear(9 * STEM_WIDTH, embed_dim)

    def embed(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = self.attention1(_windows(x, kernel_size=7, stride=4, padding=2))
        x = self.attention2(_windows(_picture(x, height // 4, width // 4), kernel_size=3, stride=2, padding=1))
        return self.project(_windows(_picture(x, height // 8, width // 8), kernel_size=3, stride=2, padding=1))


def _windows(x: Tensor, **window: int) -> Tensor:
    return F.unfold(x, **window).transpose(1, 2)


def _picture(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (height, width))


class T2TViT(VisionTransformer):
    """T2T-ViT, images [B, 3, 224, 224] to logits [B, classes]; its position embedding is fixed.

    Args:
        attention: attention of the stem, :class:`TokenTransformer` or :class:`TokenPerformer`.
        kwargs: arguments of timm's ``VisionTransformer``.
    """

    pos_embed: nn.Parameter

    def __init__(self, *args: Any, attention: type = TokenTransformer, **kwargs: Any) -> None:
        if kwargs.get("pos_embed", "learn") != "learn":
            raise ValueError(f"pos_embed={kwargs['pos_embed']!r}: T2T-ViT has sinusoids; leave it out")
        super().__init__(*args, embed_layer=partial(TokensToToken, attention=attention), **kwargs)
        self.tokens_to_token = self._modules.pop("patch_embed")
        _, N, D = self.pos_embed.shape
        self.pos_embed = nn.Parameter(sinusoids(N, D).unsqueeze(0), requires_grad=False)
        self.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    @property
    def patch_embed(self) -> TokensToToken:
        """The stem under timm's name; the checkpoints use another name."""
        return self._modules.get("tokens_to_token") or self._modules["patch_embed"]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        return {**groups, "stem": groups["stem"].replace("patch_embed", "tokens_to_token")}


def sinusoids(N: int, D: int) -> Tensor:
    """[N, D]: sines of p / 10000^(2 j / D) in the even channels 2 j of position p, cosines in the odd ones 2 j + 1."""
    position, channel = torch.arange(N, dtype=torch.float64).unsqueeze(1), torch.arange(D, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / D)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


_CFG = published_cfg(first_conv="tokens_to_token.attention1.attn.qkv", classifier="head")
_PERFORMER = {**_CFG, "first_conv": "tokens_to_token.attention1.kqv"}

default_cfgs = generate_default_cfgs(
    {"t2t_vit_t_14": _CFG, "t2t_vit_t_19": _CFG, "t2t_vit_14": _PERFORMER, "t2t_vit_19": _PERFORMER}
)


def _create(name: str, pretrained: bool, **shape: Any) -> T2TViT:
    common = {"patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(T2TViT, name, pretrained, feature_cfg=features, **{**common, **shape})


SHAPE_14 = {"embed_dim": 384, "depth": 14, "num_heads": 6}
SHAPE_19 = {"embed_dim": 448, "depth": 19, "num_heads": 7}


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-14: 21.54 M parameters, 6.09 GFLOPs."""
    return _create("t2t_vit_t_14", pretrained, **{**SHAPE_14, **kwargs})


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-19: 39.17 M parameters, 9.79 GFLOPs."""
    return _create("t2t_vit_t_19", pretrained, **{**SHAPE_19, **kwargs})


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14, with the Performer: 21.55 M parameters, 4.78 GMACs."""
    return _create("t2t_vit_14", pretrained, **{**SHAPE_14, "attention": TokenPerformer, **kwargs})


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-19, with the Performer: 39.18 M parameters, 8.48 GMACs."""
    return _create("t2t_vit_19", pretrained, **{**SHAPE_19, "attention": TokenPerformer, **kwargs})
