"""A-ViT (Yin et al., A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.block import ATMBlock, Step
from atm_triton.packed import Packed
from atm_triton.reference import of_tokens
from benchmarks.baselines.avit_learning import EPS, AViTLearning
from benchmarks.baselines.base import About, Baseline, ReducingBlock, check_class_token, is_number, left
from benchmarks.baselines.training import Learning


@dataclass(frozen=True)
class AViT(Baseline):
    """Each token gets a score after each block, sigmoid(gate_scale x - gate_center) of its first channel x, and halts
    once its scores sum to 1; each image keeps its own number of tokens. The head reads the mean of the class token over
    all blocks, weighted by its scores. Nothing is added to the model.

    In training halted tokens are masked. The loss is the sum of three: that of the labels, the mean depth of the tokens
    (its gradient is that of the remainder), and the KL between the distribution of scores over the blocks and a bell
    around two thirds of the depth.

    The authors' code computes that KL from all images of a batch except the first, class token included; here it is
    computed from the patch tokens of all images; halted ones count, as in their code. Their code never removes a token;
    here halted tokens are removed, which gives the same answers. An image whose class token has halted keeps no other
    token, because none can change its answer any more; the authors still count the FLOPs of its patches. After the last
    block the score is set to 1, but the KL takes the computed score.

    Args:
        gate_scale, gate_center: parameters of the score. The published ones are for DeiT-S; :meth:`fitted` finds the
            centre for another model.
    """

    gate_scale: float = 10.0
    gate_center: float = 75.0
    after_mlp: ClassVar[bool] = True
    about: ClassVar[About] = About(
        "A-ViT (CVPR 2022)", "NVIDIA's, non-commercial, by its files", training="yes", own_count="yes"
    )

    def __post_init__(self) -> None:
        for name in ("gate_scale", "gate_center"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"avit: {name}={getattr(self, name)!r}; want a number")

    def check(self, model: VisionTransformer) -> None:
        check_class_token("avit", model)
        if model.num_prefix_tokens != 1:
            raise ValueError(
                f"avit: the model has {model.num_prefix_tokens} leading tokens; it wants the class token alone"
            )

    def block_class(self) -> type[ReducingBlock]:
        return AViTBlock

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return AViTLearning(self, model, seed)

    def score(self, x: Tensor, last: bool) -> Tensor:
        """The scores [...] of tokens [..., C]; 1 after the last block."""
        h = (self.gate_scale * x[..., 0] - self.gate_center).sigmoid()
        return torch.ones_like(h) if last else h

    @classmethod
    @torch.inference_mode()
    def fitted(cls, model: VisionTransformer, batches: Iterable[Any], gate_scale: float = 10.0, **more: Any) -> Self:
        """Choose the centre such that, over all blocks of the unpatched model, one token in a hundred scores 1/2 or
        more. So hardly any token halts before training. ``batches`` as for ``DToMe.fitted``."""
        first: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda _, args, out: first.append(out[..., 0].flatten()))
            for block in model.blocks
        ]
        try:
            for batch in batches:
                model((batch if isinstance(batch, Tensor) else batch[0]).to(next(model.parameters())))
        finally:
            for handle in handles:
                handle.remove()
        if not first:
            raise ValueError("avit: no images to fit the gate by; give batches of them")
        every = torch.cat(first).sort().values
        center = gate_scale * every[int(0.99 * (len(every) - 1))].item()
        return cls(gate_scale=gate_scale, gate_center=center, **more)


class Halting(Packed):
    """Tokens between blocks. ``c`` [T]: the sum of each token's scores so far. For the class tokens ``rest`` [B]: 1
    minus that sum; ``out`` [B, C]: the weighted sum so far; ``runs`` [B]: those that have not halted."""

    @classmethod
    def on(cls, tokens: Packed, c: Tensor, rest: Tensor, out: Tensor, runs: Tensor) -> Self:
        made = cls(tokens.x, None, tokens.images)
        made.c, made.rest, made.out, made.runs = c, rest, out, runs
        return made

    @classmethod
    def begun(cls, tokens: Packed) -> Self:
        x, B = tokens.x, tokens.images.B
        one = x.new_ones(B)
        return cls.on(tokens, x.new_zeros(len(x)), one, x.new_zeros(B, x.shape[1]), one > 0)

    def with_x(self, x: Tensor) -> Packed:
        return Halting.on(Packed(x=x, sizes=None, images=self.images), self.c, self.rest, self.out, self.runs)


class AViTBlock(ReducingBlock):
    """timm's block, after which tokens halt."""

    baseline: AViT

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        now = tokens if isinstance(tokens, Halting) else Halting.begun(tokens)
        last = self.index == self.depth - 1
        after = ATMBlock.forward_packed(self, tokens, step)
        token = after.images.first(after.x, 1).squeeze(1)
        h = self.baseline.score(token, last)
        c = now.images.first(now.c, 1).squeeze(1) + h
        reached = now.runs & (c > 1 - EPS)
        runs = now.runs & (c < 1 - EPS)
        weight = torch.where(reached, now.rest, torch.where(runs, h, 0))
        out = now.out + token * weight.unsqueeze(1)
        if last:
            x = after.x.index_copy(0, after.images.cu_seqlens[:-1].long(), out)
            return after.with_x(x)
        sums = now.c + self.baseline.score(after.x, last)
        stays = (sums < 1 - EPS) & of_tokens(runs, now.images, len(sums))
        stays[now.images.cu_seqlens[:-1].long()] = True
        rest, step.slots = left(after, stays)
        return Halting.on(rest, sums[stays], now.rest - torch.where(runs, h, 0), out, runs)

    def plan(self, *_: object) -> None:
        """Nothing to reduce after attention."""
