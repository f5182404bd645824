"""ToFu (Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton import ops
from atm_triton.packed import Assignment, Packed
from atm_triton.reference import largest_r
from benchmarks.baselines.base import About, Baseline, ReducingBlock, check_drops, check_flag


@dataclass(frozen=True)
class ToFu(Baseline):
    """Drops r tokens in each early block and merges r in each later one: the most similar tokens, which ToMe would
    merge.

    A merged token (MLERP) has the direction of the mean, weighted by size, and the largest norm of its tokens. A mean
    of 0, by whose norm the formula would divide, stays 0. From the first merge on sizes count in the means and in
    attention. No code of the authors was found. This follows other people's code, which agrees on three points:
    dropping comes first, matching is ToMe's, and the largest norm is taken. Some of it never sets sizes (``sizes``).

    Args:
        r: tokens per block. switch: the first block that merges, None: the one after half of the depth, as in other
            people's code (7 of 12; the paper's was not found). sizes: whether tokens count by the patches they stand
            for.
    """

    r: int = 8
    switch: int | None = None
    sizes: bool = True
    about: ClassVar[About] = About("ToFu (WACV 2024)", "no code of its authors found")

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 0:
            raise ValueError(f"tofu: r={self.r!r}; want a whole number of tokens")
        if self.switch is not None and (type(self.switch) is not int or self.switch < 0):
            raise ValueError(f"tofu: switch={self.switch!r}; want the first block that merges, counted from 0, or None")
        check_flag("tofu", "sizes", self.sizes)

    @property
    def proportional_attention(self) -> bool:
        return self.sizes

    def check(self, model: VisionTransformer) -> None:
        if self.first_merge(len(model.blocks)) > 0:
            check_drops("tofu", model)

    def block_class(self) -> type[ReducingBlock]:
        return ToFuBlock

    def first_merge(self, depth: int) -> int:
        return depth // 2 + 1 if self.switch is None else self.switch

    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Packed) -> Assignment | None:
        images, P, backend = tokens.images, block.num_prefix_tokens, block.config.backend
        r = min(self.r, largest_r(images.N, P))
        if r == 0:
            return None
        keys = k.transpose(0, 1).flatten(1, 2)
        pairs = ops.match(keys, tokens.sizes, images, P, False, None, backend)
        merging = ops.assign(pairs, r, images, P, images.B * (images.N - r), True, backend)
        if block.index >= self.first_merge(block.depth):
            return merging
        slots, partner = (images.shaped(of_token) for of_token in (merging.slots, pairs.partner))
        joins = (partner >= 0) & (slots == slots.gather(1, partner.clamp(min=0).long()))
        return Assignment(
            slots=torch.where(joins, -1, slots).flatten(), num_slots=merging.num_slots, images=merging.images
        )

    def matching_macs(self, block: ReducingBlock, N: int) -> int:
        free = N - block.num_prefix_tokens
        return (free // 2) * (free - free // 2) * block.attention.head_dim


class ToFuBlock(ReducingBlock):
    """timm's block that drops the chosen tokens, or merges them and gives the mean the largest norm."""

    baseline: ToFu

    def reduced(self, tokens: Packed, plan: Assignment | None) -> tuple[Packed, Tensor | None]:
        if plan is None or self.index < self.baseline.first_merge(self.depth):
            return super().reduced(tokens, plan)
        merged = ops.merge(tokens, plan, self.config.backend)
        slots, mean = plan.slots.long(), merged.x.to(torch.promote_types(merged.x.dtype, torch.float32))
        norms = tokens.x.to(mean.dtype).norm(dim=1)
        largest = norms.new_zeros(plan.num_slots).scatter_reduce(0, slots, norms, "amax", include_self=False)
        norm = mean.norm(dim=1)
        scale = largest / norm.masked_fill(norm == 0, 1)
        alone = torch.bincount(slots, minlength=plan.num_slots) == 1
        x = torch.where(alone, 1, scale).unsqueeze(1) * mean
        return Packed(
            x=x.to(tokens.x.dtype), sizes=merged.sizes if self.baseline.sizes else None, images=merged.images
        ), plan.slots
