"""DynamicViT (Rao et al., Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer

from atm_triton.packed import Packed
from atm_triton.training.method import Criterion
from atm_triton.training.recipe import Recipe
from benchmarks.baselines.base import (
    About,
    Baseline,
    EntryBlock,
    by_value,
    check_blocks,
    check_class_token,
    check_entry,
    is_number,
    places,
)
from benchmarks.baselines.training import Learning, frozen, scaled_groups, softmax_of_kept, through

EPS = 1e-6
RATIO, DISTILLED, TOKENS = 2.0, 0.5, 0.5  # weights of the losses
FROZEN = 5 / 30  # share of the training in which only the predictors learn


@dataclass(frozen=True)
class DynamicViT(Baseline):
    """Small networks at the entry of some blocks, trained with the model, decide which patch tokens stay.

    In training they sample for each token (Gumbel-softmax with a straight-through gradient). A dropped token is masked
    as a key for all others and never comes back. The loss is the sum of four: that of the labels, the squared distance
    of each image's share of kept tokens from its target, the KL to a frozen copy of the model, and the distance of the
    kept tokens from those of the copy. After training a fixed number of tokens stays, those with the highest scores. As
    in the authors' current code, the networks learn 100 times as fast as the model. Its class token and positions are
    not trained, and its other weights stay fixed for the first sixth of the training. Tokens that stay keep their
    order, which changes nothing.

    Args:
        keep_rate: rho; after s of ``blocks`` int(rho^s x patches) patch tokens are left.
    """

    keep_rate: float = 0.7
    blocks: tuple[int, ...] = (3, 6, 9)
    about: ClassVar[About] = About("DynamicViT (NeurIPS 2021)", "MIT", training="yes, with predictors and a teacher")

    def __post_init__(self) -> None:
        if not (is_number(self.keep_rate) and 0 < self.keep_rate < 1):
            raise ValueError(f"dynamicvit: keep_rate={self.keep_rate!r}; want a share above 0, below 1")
        check_blocks("dynamicvit", self.blocks)

    def check(self, model: VisionTransformer) -> None:
        check_class_token("dynamicvit", model)
        check_entry("dynamicvit", model, self.blocks)

    def prepare(self, model: VisionTransformer) -> None:
        like = model.cls_token
        for index in self.blocks:
            model.blocks[index].predictor = Predictor(model.embed_dim).to(like)

    def block_class(self) -> type[EntryBlock]:
        return DynamicViTBlock

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return DynamicViTLearning(self, model, seed)

    def share(self, stage: int) -> float:
        """The share of the patches that is left after a stage; stages count from 1."""
        return self.keep_rate**stage


class Predictor(nn.Module):
    """Predicts from patch tokens [B, N, C] and the policy [B, N, 1] (1: the token is still there) the log probabilities
    [B, N, 2] of keeping and of dropping each token."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU())
        layers = [nn.Linear(C, C // 2), nn.GELU(), nn.Linear(C // 2, C // 4), nn.GELU(), nn.Linear(C // 4, 2)]
        self.out = nn.Sequential(*layers, nn.LogSoftmax(dim=-1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        local, whole = self.local(x).chunk(2, dim=-1)
        whole = (whole * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)
        return self.out(torch.cat([local, whole.expand_as(local)], dim=-1))


class DynamicViTBlock(EntryBlock):
    """timm's block with a predictor at its entry."""

    def staying(self, tokens: Packed) -> tuple[Tensor, int]:
        x, P = tokens.images.shaped(tokens.x), self.num_prefix_tokens
        stage = sorted(self.baseline.blocks).index(self.index) + 1
        left = int(self.baseline.share(stage) * self.patches)
        scores = self.predictor(x[:, P:], x.new_ones(len(x), x.shape[1] - P, 1))[..., 0]
        kept = places(by_value(scores)) < left
        return torch.cat([kept.new_ones(len(x), P), kept], dim=1).flatten(), P + left


class Answer(NamedTuple):
    """``features`` and ``teacher_features``: normalised patch tokens [B, N, C]; ``masks``: for each stage the patch
    tokens that stay, [B, N]."""

    logits: Tensor
    features: Tensor
    masks: list[Tensor]
    teacher_logits: Tensor
    teacher_features: Tensor


class DynamicViTLearning(Learning):
    """The rates are not scaled by the batch; no drop path."""

    lr, min_lr, scaled, warmup, epochs, loops, drop_path = 1e-3, 1e-6, False, FROZEN, 30, True, False

    def __init__(self, baseline: DynamicViT, model: VisionTransformer, seed: int = 0) -> None:
        self.teacher = frozen(model)
        super().__init__(baseline, model, seed)
        model.cls_token.requires_grad_(False)
        model.pos_embed.requires_grad_(False)

    def optimizer(self, model: VisionTransformer, recipe: Recipe) -> Optimizer:
        self.check_recipe(recipe)
        own = scaled_groups(model, recipe.weight_decay, lambda name: 1.0 if "predictor" in name else 0.01)
        return recipe.optimizer(own)

    def begin_step(self, merging: VisionTransformer, optimizer: Optimizer, done: float) -> None:
        for group in optimizer.param_groups:
            waits = group["full_scale"] < 1 and done < FROZEN
            group["lr_scale"] = 0.0 if waits else group["full_scale"]

    def answer(self, merging: VisionTransformer, images: Tensor) -> Answer:
        x, P = merging.stem(images), merging.num_prefix_tokens
        policy, masks = x.new_ones(*x.shape[:2], 1), []
        for block in merging.blocks:
            if block.index in self.baseline.blocks:
                log_p = block.predictor(x[:, P:], policy[:, P:])
                stays = F.gumbel_softmax(log_p, hard=True)[..., :1] * policy[:, P:]
                masks.append(stays.squeeze(2))
                policy = torch.cat([policy[:, :P], stays], dim=1)
            kept = policy.squeeze(2)
            x = through(block, x, lambda s, kept=kept: softmax_of_kept(s, kept, EPS, True) if masks else s.softmax(-1))
        x = merging.norm(x)
        with torch.no_grad():
            features = self.teacher.forward_features(images)
            logits = self.teacher.forward_head(features)
        return Answer(
            logits=merging.forward_head(x),
            features=x[:, P:],
            masks=masks,
            teacher_logits=logits,
            teacher_features=features[:, P:],
        )

    def loss(self, answer: Answer, targets: Tensor, criterion: Criterion) -> Tensor:
        logits, features, masks = answer.logits, answer.features, answer.masks
        teacher_logits, teacher_features = answer.teacher_logits, answer.teacher_features
        off = [
            (mask.mean(dim=1) - self.baseline.share(stage)).square().mean() for stage, mask in enumerate(masks, start=1)
        ]
        logs = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
        distilled = F.kl_div(*logs, reduction="batchmean", log_target=True)
        kept = masks[-1].detach() > 0.5
        far = (features - teacher_features)[kept].square()
        of_tokens = far.mean() if kept.any() else far.sum()
        ratio = sum(off) / len(off)
        return criterion(logits, targets) + RATIO * ratio + DISTILLED * distilled + TOKENS * of_tokens
