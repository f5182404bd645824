"""IA-RED^2 (Pan et al., Interpretability-Aware Redundancy Reduction for Vision Transformers, NeurIPS 2021)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer

from atm_triton.packed import Packed
from atm_triton.record import Number
from atm_triton.reference import of_tokens
from atm_triton.training.method import Criterion
from atm_triton.training.recipe import Recipe
from benchmarks.baselines.base import (
    About,
    Baseline,
    EntryBlock,
    check_blocks,
    check_class_token,
    check_entry,
    is_number,
)
from benchmarks.baselines.training import (
    Learning,
    scaled_groups,
    softmax_of_kept,
    straight_through,
    through,
)

RATIO = 2.0  # weight of the loss on the share of tokens
EPS = 1e-6


@dataclass(frozen=True)
class IARED2(Baseline):
    """An interpreter before each group of blocks scores the patch tokens. Those that score above 1 / 2 stay, so that
    each image keeps its own number. The score is the sigmoid of the class token's query times a token's key, averaged
    over heads. Queries and keys come from one linear layer on a norm without weights.

    The interpreter and what it does after training follow the model file that its authors published. **The training is
    ours.** Theirs is not public: a reward for accuracy and few tokens, by REINFORCE, group by group in 90 epochs. Here
    the decisions have the gradient of their scores, and the loss adds to that of the labels the squared distance of
    each image's share of tokens from a target, weighted as in DynamicViT. The initialisation is ours too: scores differ
    and average about 0.7, so that most tokens stay at first. As in their file, values are computed although nothing
    reads them.

    Args:
        blocks: the blocks that have an interpreter before them; keep_rates: for each of these the target share of the
            image's patches (ours).
    """

    blocks: tuple[int, ...] = (0, 4, 8)
    keep_rates: tuple[float, ...] = (0.9, 0.7, 0.5)
    heads: int = 6
    about: ClassVar[About] = About(
        "IA-RED² (NeurIPS 2021)",
        "no code of the training found",
        training="yes, interpreters; by a loss of ours",
        own_count="yes",
    )

    def __post_init__(self) -> None:
        check_blocks("iared2", self.blocks)
        rates = self.keep_rates
        good = isinstance(rates, (tuple, list)) and len(rates) == len(self.blocks)
        if not good or not all(is_number(rate) and 0 < rate <= 1 for rate in rates):
            raise ValueError(f"iared2: keep_rates={rates!r}; want a share above 0, at most 1, for each of blocks")
        if type(self.heads) is not int or self.heads < 1:
            raise ValueError(f"iared2: heads={self.heads!r}; want a whole number, 1 or more")

    def check(self, model: VisionTransformer) -> None:
        check_class_token("iared2", model)
        check_entry("iared2", model, self.blocks)
        if model.embed_dim % self.heads:
            raise ValueError(f"iared2: heads={self.heads} do not divide the width {model.embed_dim} of the model")

    def prepare(self, model: VisionTransformer) -> None:
        for index in self.blocks:
            model.blocks[index].predictor = Interpreter(model.embed_dim, self.heads).to(model.cls_token)

    def block_class(self) -> type[EntryBlock]:
        return IARED2Block

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return IARED2Learning(self, model, seed)


class Interpreter(nn.Module):
    """Scores tokens from 0 to 1 by their products with the class token."""

    def __init__(self, C: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(C, 3 * C)
        nn.init.normal_(self.qkv.weight, std=C**-0.5)  # scores must differ: if alike, all tokens would go at once
        with torch.no_grad():
            self.qkv.bias.zero_()[: 2 * C] = (C // heads) ** -0.25  # q k d^-0.5 = 1

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [..., heads, d] of tokens [..., C]."""
        q, k, _ = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        return q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.heads, -1))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores [...] of keys with their queries, both [..., heads, d]."""
        return ((q * k).sum(dim=-1) * k.shape[-1] ** -0.5).sigmoid().mean(dim=-1)


class IARED2Block(EntryBlock):
    """timm's block with an interpreter before it."""

    def staying(self, tokens: Packed) -> tuple[Tensor, None]:
        images, T = tokens.images, len(tokens.x)
        q, k = self.predictor.products(tokens.x)
        stays = self.predictor(of_tokens(images.first(q, 1).squeeze(1), images, T), k) > 0.5
        for token in range(self.num_prefix_tokens):
            stays[images.cu_seqlens[:-1].long() + token] = True
        return stays, None

    def predictor_macs(self, N: Number) -> Number:
        """MACs of queries, keys and values, and of the products of keys with the class token's query."""
        C = self.predictor.qkv.in_features
        return N * (3 * C**2 + C)


class Answer(NamedTuple):
    """``masks``: for each group the patch tokens that stay, [B, N]."""

    logits: Tensor
    masks: list[Tensor]


class IARED2Learning(Learning):
    """Our training: interpreters learn at 1e-4, the model at a tenth of that, together. (With DynamicViT's 1e-3 and a
    hundredth all tokens may be dropped at once, because their scores are alike.)"""

    lr, min_lr, scaled, warmup, epochs, loops = 1e-4, 1e-6, False, 0.0, 90, True

    def optimizer(self, model: VisionTransformer, recipe: Recipe) -> Optimizer:
        self.check_recipe(recipe)
        own = scaled_groups(model, recipe.weight_decay, lambda name: 1.0 if "predictor" in name else 0.1)
        return recipe.optimizer(own)

    def answer(self, merging: VisionTransformer, images: Tensor) -> Answer:
        x, P = merging.stem(images), merging.num_prefix_tokens
        kept, masks = x.new_ones(x.shape[:2]), []
        for block in merging.blocks:
            if block.index in self.baseline.blocks:
                q, k = block.predictor.products(x * kept.unsqueeze(2))
                score = block.predictor(q[:, :1], k)
                stays = straight_through(score, score > 0.5) * kept
                kept = torch.cat([kept[:, :P], stays[:, P:]], dim=1)
                masks.append(kept[:, P:])
                x = x * kept.unsqueeze(2)
            x = through(block, x, lambda s, kept=kept: softmax_of_kept(s, kept, EPS, False))
        return Answer(merging.forward_head(merging.norm(x)), masks)

    def loss(self, answer: Answer, targets: Tensor, criterion: Criterion) -> Tensor:
        order = sorted(range(len(self.baseline.blocks)), key=lambda i: self.baseline.blocks[i])
        off = [
            (mask.mean(dim=1) - self.baseline.keep_rates[i]).square().mean()
            for i, mask in zip(order, answer.masks, strict=True)
        ]
        return criterion(answer.logits, targets) + RATIO * sum(off) / len(off)
