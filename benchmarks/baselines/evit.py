"""EViT (Liang et al., Not All Patches Are What You Need, ICLR 2022)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from atm_triton.packed import Packed
from benchmarks.baselines.base import (
    About,
    Baseline,
    DenseAssignment,
    ReducingBlock,
    by_value,
    check_blocks,
    check_class_token,
    check_flag,
    check_share,
    places,
)
from benchmarks.baselines.training import Learning


@dataclass(frozen=True)
class EViT(Baseline):
    """Keeps the tokens that the class token attends to most. The others are fused into one token, or dropped.

    Kept tokens are ordered by attention. The fused token comes last: a sum weighted by attention, not normalised, which
    later blocks treat as an ordinary token. Attention does not use sizes. The authors' code counts distillation and
    register tokens among the patches; here they are always kept.

    Args:
        keep_rate: the share of the patch tokens that a block keeps, rounded up; blocks: the blocks that reduce;
            fuse_token: whether the other tokens become one token; falls: whether the rate falls from 1 in training, as
            when its authors train from scratch; otherwise it is constant, as when they fine-tune.
    """

    keep_rate: float = 0.7
    blocks: tuple[int, ...] = (3, 6, 9)
    fuse_token: bool = True
    falls: bool = False
    about: ClassVar[About] = About(
        "EViT (ICLR 2022)", "Apache-2.0", training="no, or trained so", fused="yes, the class row beside it"
    )

    def __post_init__(self) -> None:
        check_share("evit", "keep_rate", self.keep_rate)
        check_flag("evit", "fuse_token", self.fuse_token)
        check_flag("evit", "falls", self.falls)
        check_blocks("evit", self.blocks)

    def check(self, model: VisionTransformer) -> None:
        check_class_token("evit", model)

    def learning(self, model: VisionTransformer, seed: int = 0) -> "EViTLearning":
        return EViTLearning(self, model, seed)

    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Packed) -> DenseAssignment | None:
        B, _, N, d = k.shape
        P = block.num_prefix_tokens
        left = math.ceil(self.keep_rate * (N - P))
        if block.index not in self.blocks or left == N - P:
            return None
        scores = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2) * d**-0.5
        attention = scores.softmax(dim=-1).mean(dim=1)[:, P:]
        rank = places(by_value(attention))
        kept = rank < left
        slot = torch.where(kept, rank + P, P + left if self.fuse_token else -1)
        prefix = torch.arange(P, device=k.device).expand(B, P)
        slots = torch.cat([prefix, slot], dim=1)
        if not self.fuse_token:
            return DenseAssignment(slots, P + left)
        weights = torch.cat([attention.new_ones(B, P), torch.where(kept, 1, attention)], dim=1)
        return DenseAssignment(slots=slots, M=P + left + 1, weights=weights)


class EViTLearning(Learning):
    """The authors' fine-tuning, without drop path. A falling keep rate follows a cosine over the 100 epochs after the
    10th of 300."""

    lr, min_lr, warmup, weight_decay, epochs, drop_path = 2e-5, 2e-6, 0.0, 1e-6, 30, False
    begins, lasts = 10 / 300, 100 / 300  # shares of the training

    def begin_step(self, merging: VisionTransformer, optimizer: Optimizer, done: float) -> None:
        if self.baseline.falls:
            self.set(merging, keep_rate=self.rate(done))

    def rate(self, done: float) -> float:
        low, t = self.baseline.keep_rate, min(max((done - self.begins) / self.lasts, 0.0), 1.0)
        return low + (1 - low) * (math.cos(math.pi * t) + 1) / 2
