"""How LTMP's thresholds are learned: decisions are masks with the gradient of a sigmoid."""

from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from atm_triton.training.method import Criterion
from atm_triton.training.recipe import Recipe
from benchmarks.baselines.base import Baseline, groups
from benchmarks.baselines.training import (
    Learning,
    attended,
    fed,
    scaled_groups,
    softmax_of_kept,
    straight_through,
)

TAU, EPS, WEIGHT = 0.5, 1e-5, 10.0


def alike(keys: Tensor, live: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Match each token of A to the most similar token of B. ``keys`` [B, N, d]; ``live`` [B, N] bool: the tokens that
    are left, first in each image. Returns the similarity [B, N] (-inf for other tokens and without a partner) and the
    position of the partner [B, N]."""
    a, b = groups(keys.shape[1], P)
    k = F.normalize(keys, dim=-1)
    similar = k[:, a] @ k[:, b].transpose(1, 2)
    similar = similar.masked_fill(~(live[:, a, None] & live[:, None, b]), -torch.inf)
    best, partner = similar.new_full(live.shape, -torch.inf), torch.zeros_like(live, dtype=torch.long)
    if similar.shape[2]:
        best[:, a], at = similar.max(dim=2)
        partner[:, a] = at * 2 + b.start
    return best, partner


def importance(weights: Tensor, live: Tensor) -> Tensor:
    """The attention that each token receives, averaged over heads and live queries: [B, H, N, N] to [B, N]."""
    of_head = (weights * live[:, None, :, None]).sum(dim=2) / live.sum(dim=1)[:, None, None]
    return of_head.mean(dim=1)


def of_parts(important: Tensor, partner: Tensor, joins: Tensor) -> Tensor:
    """Give each merged token the largest importance of its parts."""
    return important.scatter_reduce(1, partner, important.masked_fill(~joins, -torch.inf), "amax")


class Answer(NamedTuple):
    """``there``: the mean share of tokens that enter each block, then of those that leave the last one."""

    logits: Tensor
    there: list[Tensor]


class LTMPLearning(Learning):
    """Plain gradient descent on the thresholds, at a constant rate of 5e-3 for merging and 5e-6 for dropping. The
    authors train for one epoch of ImageNet, 9809 steps; in fewer, the thresholds for dropping hardly move from 0."""

    lr, min_lr, scaled, warmup, weight_decay, epochs, loops = 5e-3, 5e-3, False, 0.0, 0.0, 1, True
    more: ClassVar = {"mixup": 0.0, "cutmix": 0.0, "opt": "sgd"}

    def __init__(self, baseline: Baseline, model: VisionTransformer, seed: int = 0) -> None:
        super().__init__(baseline, model, seed)
        self.N, self.d = model.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_theta"))

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        if recipe.opt != "sgd":
            raise ValueError(f"LTMP is trained by plain SGD, not by {recipe.opt}: take the recipe that it gives")

    def optimizer(self, model: VisionTransformer, recipe: Recipe) -> Optimizer:
        self.check_recipe(recipe)
        own = scaled_groups(model, 0.0, lambda name: 1.0 if name.endswith("merge_theta") else 1e-3)
        return torch.optim.SGD(own, lr=recipe.lr)

    @torch.no_grad()
    def begin_step(self, merging: VisionTransformer, optimizer: Optimizer, done: float) -> None:
        for group in optimizer.param_groups:
            for theta in group["params"]:
                theta.clamp_(0, 1)

    def answer(self, merging: VisionTransformer, images: Tensor) -> Answer:
        x, P = merging.stem(images), merging.num_prefix_tokens
        mask, sizes = x.new_ones(x.shape[:2]), x.new_ones(x.shape[:2])
        there = [mask.mean()]
        for block in merging.blocks:
            order = (mask < 0.5).to(torch.uint8).argsort(dim=1, stable=True)
            x = x.gather(1, order.unsqueeze(2).expand_as(x))
            mask, sizes = mask.gather(1, order), sizes.gather(1, order)
            live = mask > 0.5

            def weigh(scores: Tensor, mask: Tensor = mask, sizes: Tensor = sizes) -> Tensor:
                return softmax_of_kept(scores + sizes.log()[:, None, None], mask, EPS, False)

            added, k, weights = attended(block, x, weigh)
            best, partner = alike(k.mean(dim=1), live, P)
            joins = straight_through(((best - block.merge_theta) / TAU).sigmoid(), best > block.merge_theta) * mask
            x, sizes = merged(x + added, sizes, joins, partner)
            important = of_parts(importance(weights, live), partner, joins > 0.5)
            stays = straight_through(((important - block.prune_theta) / TAU).sigmoid(), important > block.prune_theta)
            mask = mask * (1 - joins) * torch.cat([torch.ones_like(stays[:, :P]), stays[:, P:]], dim=1)
            x = x + fed(block, x)
            there.append(mask.mean())
        return Answer(merging.forward_head(merging.norm(x)), there)

    def loss(self, answer: Answer, targets: Tensor, criterion: Criterion) -> Tensor:
        return criterion(answer.logits, targets) + WEIGHT * (self.flops(answer.there) - self.baseline.target) ** 2

    def flops(self, there: list[Tensor]) -> Tensor:
        """The share of the FLOPs, as the authors count them."""
        n, d = self.N, self.d
        each = [2 * m * n * d**2 + (m * n) ** 2 * d + 4 * left * n * d**2 for m, left in pairwise(there)]
        return sum(each) / len(each) / (6 * n * d**2 + n**2 * d)


def merged(x: Tensor, sizes: Tensor, joins: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens [B, N, C] and sizes [B, N] into their partners where ``joins`` is 1. The places of the tokens that
    joined keep their values."""
    share = joins * sizes
    total = sizes.scatter_add(1, partner, share)
    moved = torch.zeros_like(x).scatter_add(1, partner.unsqueeze(2).expand_as(x), share.unsqueeze(2) * x)
    return (sizes.unsqueeze(2) * x + moved) / total.unsqueeze(2), total
