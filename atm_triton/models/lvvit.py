"""LV-ViT (Jiang et al., All Tokens Matter, NeurIPS 2021): a convolutional stem, scaled residual branches and an
auxiliary head over the patch tokens, with the parameter names of the published checkpoints.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from atm_triton.models.stem import Stem, published_cfg

STEM_WIDTH = 64


class ConvStem(Stem):
    """Three convolutions at half the resolution, then patches of 8 x 8: a token stands for 16 x 16 pixels."""

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 768, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.conv2 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(STEM_WIDTH) for _ in range(3))
        self.proj = nn.Conv2d(STEM_WIDTH, embed_dim, 8, stride=8)

    def embed(self, x: Tensor) -> Tensor:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class SkipScale(nn.Module):
    """Divides a residual branch [..., D] by ``skip_lam``. It has no parameter and no entry in the state dict."""

    def __init__(self, skip_lam: float) -> None:
        super().__init__()
        self.skip_lam = skip_lam

    def forward(self, x: Tensor) -> Tensor:
        return x / self.skip_lam

    def gamma_like(self, x: Tensor) -> Tensor:
        """The scale as the [D] factors of a LayerScale."""
        return x.new_full(x.shape[-1:], 1 / self.skip_lam)


def scaled_block(skip_lam: float, **kwargs: Any) -> Block:
    """timm's ``Block`` with both branches divided by ``skip_lam``."""
    if kwargs.get("init_values"):
        raise ValueError(f"init_values={kwargs['init_values']}: LV-ViT has no LayerScale; leave it out")
    block = Block(**kwargs)
    if skip_lam != 1:
        block.ls1, block.ls2 = SkipScale(skip_lam), SkipScale(skip_lam)
    return block


class LVViT(VisionTransformer):
    """LV-ViT, images [B, 3, H, W] to logits [B, classes].

    With ``aux_eval`` the logits are those of the published evaluation: the class token's head plus half the maximum of
    the auxiliary head over the patch tokens. That head reads every token, so the last block of a patched model must
    compute them all. With ``aux_eval=False`` the logits come from the class token's head only, and the last block may
    compute only this token.

    Args:
        skip_lam: the divisor of the residual branches.
        aux_eval: as above; may be set later.
        kwargs: arguments of timm's ``VisionTransformer``.

    Raises:
        ValueError: patch tokens are to be pooled, or LayerScale is given; TypeError: ``aux_eval`` is not a bool.
    """

    evaluated_with_ema = False

    def __init__(self, *args: Any, skip_lam: float = 1.0, aux_eval: bool = True, **kwargs: Any) -> None:
        _check_pool(kwargs.get("global_pool", "token"))
        super().__init__(*args, block_fn=partial(scaled_block, skip_lam), embed_layer=ConvStem, **kwargs)
        self.aux_eval = aux_eval
        self.aux_head = self._new_aux_head()
        self.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    def _new_aux_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, self.num_classes)
        init_weights_vit_timm(head)
        return head

    @property
    def aux_eval(self) -> bool:
        return self._aux_eval

    @aux_eval.setter
    def aux_eval(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"aux_eval must be True or False, got {value!r}")
        self._aux_eval = value

    @property
    def leading_tokens(self) -> int | None:
        """How many leading tokens the logits depend on; None: all tokens."""
        return None if self.aux_eval and self.num_classes > 0 else 1

    @property
    def logits_are(self) -> str:
        """What the logits are, in words."""
        if self.aux_eval:
            return "class head and half the maximum of the auxiliary head over patch tokens (aux_eval=True)"
        return "class head alone (aux_eval=False)"

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = super().forward_head(x, pre_logits)
        if pre_logits or not self.aux_eval or self.num_classes == 0:
            return logits
        return logits + 0.5 * self.aux_head(x[:, self.num_prefix_tokens :]).amax(1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        _check_pool(global_pool or "token")
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_aux_head().to(self.cls_token).train(self.training)

    # The paper prints what the counter of LV-ViT's authors finds. It omits heads and the last norm, and counts per
    # element 1 for a bias, a residual or a scale, 4 for dropout, 5 for softmax or LayerNorm, and 8 for GELU.

    def paper_stem(self, image_shape: tuple[int, ...]) -> int:
        """Operations of the stem for an image [C, H, W]."""
        channels, height, width = image_shape
        pixel = 49 * channels * STEM_WIDTH + 2 * 9 * STEM_WIDTH**2 + STEM_WIDTH * self.embed_dim
        return (height // 2) * (width // 2) * pixel

    def paper_block(self, N: int | Tensor, queries: int | Tensor, rows: int | Tensor) -> int | Tensor:
        """Operations of a block, given its tokens, its queries and the rows of its MLP: numbers, or [B] per image."""
        C, H = self.embed_dim, self.blocks[0].attn.num_heads
        hidden = self.blocks[0].mlp.fc1.out_features
        keys = N * (2 * C * C + 5 * C)
        attention = queries * (2 * C * C + 2 * N * C + 10 * N * H + 6 * C)
        return keys + attention + rows * (2 * C * hidden + 9 * hidden + 11 * C)


def _check_pool(global_pool: str) -> None:
    if global_pool != "token":
        raise ValueError(f"global_pool={global_pool!r}: LV-ViT classifies from its class token; leave it out")


def _cfg(**changes: Any) -> dict[str, Any]:
    return published_cfg(first_conv="patch_embed.conv1", classifier=("head", "aux_head"), **changes)


default_cfgs = generate_default_cfgs({"lvvit_t": _cfg(), "lvvit_s": _cfg(), "lvvit_m": _cfg(crop_pct=1.0)})


def _create(name: str, pretrained: bool, **shape: Any) -> LVViT:
    common = {"patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(LVViT, name, pretrained, feature_cfg=features, **{**common, **shape})


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 8.53 M parameters, 2.87 GFLOPs."""
    return _create("lvvit_t", pretrained, **{"embed_dim": 240, "depth": 12, "num_heads": 4, **kwargs})


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 26.15 M parameters, 6.57 GFLOPs."""
    return _create("lvvit_s", pretrained, **{"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0, **kwargs})


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 55.83 M parameters, 12.74 GFLOPs."""
    return _create("lvvit_m", pretrained, **{"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0, **kwargs})
