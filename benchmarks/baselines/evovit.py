"""Evo-ViT (Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, AAAI 2022)."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from atm_triton.block import Step
from atm_triton.packed import Packed
from atm_triton.record import Number
from benchmarks.baselines.base import (
    About,
    Baseline,
    ReducingBlock,
    by_value,
    check_blocks,
    check_class_token,
    check_flag,
    check_share,
    places,
)
from benchmarks.baselines.training import Learning

LAYER_WISE = 200 / 300  # share of the training


@dataclass(frozen=True)
class EvoViT(Baseline):
    """Only the patch tokens with the highest global class attention go through a block. The others skip it unchanged
    and may be chosen again later.

    Global class attention is the class token's attention, summed over heads. Before ``blocks[0]`` each block replaces
    it; from there on tokens that went through take the mean of the old and the new value, and the others keep the old
    one. Each of ``blocks`` chooses the tokens that go through until the next; in the first two thirds of the training
    every block from the first of them does. As in the authors' code for DeiT, nothing updates the tokens that skip.

    The authors train from scratch and classify from the mean of all patch tokens, with a second loss for the class
    token. Here a model keeps its own head, so that all methods begin with the same weights, and the second loss is left
    out. In the record all tokens are rows of every block, but only the chosen ones are in the cost.

    Args:
        keep_rate: the share of the patch tokens that is chosen, rounded down.
    """

    keep_rate: float = 0.5
    blocks: tuple[int, ...] = (4, 8)
    layer_wise: bool = False
    about: ClassVar[About] = About(
        "Evo-ViT (AAAI 2022)", "MIT", training="yes, by its authors from scratch", fused="yes, the class row beside it"
    )

    def __post_init__(self) -> None:
        check_share("evovit", "keep_rate", self.keep_rate)
        check_flag("evovit", "layer_wise", self.layer_wise)
        check_blocks("evovit", self.blocks)
        if not self.blocks or min(self.blocks) == 0:
            raise ValueError(
                f"evovit: blocks={self.blocks!r}; want blocks after the first, whose attention ranks tokens"
            )

    def check(self, model: VisionTransformer) -> None:
        if not model.has_class_token:
            check_class_token("evovit", model)

    def block_class(self) -> type[ReducingBlock]:
        return EvoBlock

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return EvoViTLearning(self, model, seed)

    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Packed) -> Tensor:
        """The class token's attention to the given patch tokens, summed over heads: [B, n]."""
        scores = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2) * k.shape[-1] ** -0.5
        return scores.softmax(dim=-1).sum(dim=1)[:, block.num_prefix_tokens :].detach()


class Ranked(Packed):
    """Tokens between blocks. ``attention`` [B, N - P]: global class attention; ``chosen`` [B, n]: positions of the
    tokens that go through blocks at present, leading tokens first."""

    @classmethod
    def on(cls, tokens: Packed, attention: Tensor, chosen: Tensor | None) -> Self:
        made = cls(tokens.x, None, tokens.images)
        made.attention, made.chosen = attention, chosen
        return made

    def with_x(self, x: Tensor) -> Packed:
        return Ranked.on(Packed(x=x, sizes=None, images=self.images), self.attention, self.chosen)


class EvoBlock(ReducingBlock):
    """timm's block, applied to the chosen tokens."""

    baseline: EvoViT

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        x, P, method = tokens.images.shaped(tokens.x), self.num_prefix_tokens, self.baseline
        first = min(method.blocks)
        if self.index < first:
            done, attention = self._whole(Packed.of(x))
            return Ranked.on(done, attention, None)
        chosen = tokens.chosen
        if self.index in method.blocks or method.layer_wise:
            kept = places(by_value(tokens.attention)) < self._patches(x.shape[1])
            patches = kept.nonzero()[:, 1].view(len(x), -1) + P
            chosen = torch.cat([torch.arange(P, device=x.device).expand(len(x), P), patches], dim=1)
        index = chosen.unsqueeze(2).expand(-1, -1, x.shape[2])
        slow = Packed.of(x.gather(1, index))
        if step.leading is not None:
            return self.forward_leading(slow, step.leading)
        done, new = self._whole(slow)
        old, of_patch = tokens.attention, chosen[:, P:] - P
        attention = old.scatter(1, of_patch, (old.gather(1, of_patch) + new) / 2)
        x = x.scatter(1, index, done.images.shaped(done.x))
        return Ranked.on(tokens.with_x(x.flatten(0, 1)), attention, chosen)

    def _whole(self, tokens: Packed) -> tuple[Packed, Tensor]:
        """Run the block on all given tokens; also returns the class token's attention."""
        x = tokens.images.shaped(tokens.x)
        attended, attention = self.called_attn(self.norm1(x), self.attend, tokens, True)
        x = x + self.drop_path1(self.ls1(attended))
        return self.fed_forward(tokens.with_x(x.flatten(0, 1))), attention

    def _patches(self, N: int) -> int:
        return int(self.baseline.keep_rate * (N - self.num_prefix_tokens))

    def computed(self, N: Number, queries: Number, rows: Number) -> tuple[Number, Number, Number]:
        if self.index < min(self.baseline.blocks):
            return N, queries, rows
        n = self.num_prefix_tokens + self._patches(N)
        return (n, n, n) if queries is N else (n, queries, rows)


class EvoViTLearning(Learning):
    """The authors' training; their rates are for training from scratch."""

    def begin_step(self, merging: VisionTransformer, optimizer: Optimizer, done: float) -> None:
        self.set(merging, layer_wise=done < LAYER_WISE)
