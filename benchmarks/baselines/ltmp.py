"""LTMP (Bonnaerens and Dambre, Learned Thresholds Token Merging and Pruning for Vision Transformers, TMLR 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton.packed import Assignment, Images, Packed
from atm_triton.record import Number
from atm_triton.reference import packed, padded
from benchmarks.baselines.base import About, Baseline, ReducingBlock, check_class_token, check_share
from benchmarks.baselines.ltmp_learning import LTMPLearning, alike, importance, of_parts
from benchmarks.baselines.training import Learning


@dataclass(frozen=True)
class LTMP(Baseline):
    """Merges tokens that are more similar than one threshold, then drops those that receive less attention than
    another. The two thresholds of each block are learned; weights are not. Each image keeps its own number of tokens.

    A token of A joins its partner in B, which becomes the size-weighted mean. Importance is the attention that a token
    receives, averaged over heads and queries; a merged token has the importance of its most important part. In training
    both decisions are masks with the gradient of a sigmoid, and the loss pulls the FLOPs of a batch to ``target``.

    The authors' training also counts masked tokens when it splits tokens into A and B and when it averages importance,
    and so differs from what they run later. Here both count only the tokens that are left, in their order, so that
    training and inference compute the same. Their code leaves one thing open: here the merging mask also gets a
    gradient through the sizes. A loss that is not a number ends training here; there that step is skipped. Images are
    augmented as for the other methods, whereas the authors use no RandAugment.

    Args:
        target: the share of the unmerged model's FLOPs, as the authors count them.
    """

    target: float = 0.75
    proportional_attention: ClassVar[bool | None] = True
    about: ClassVar[About] = About(
        "LTMP (TMLR 2023)",
        "none",
        training="yes, two thresholds for each block",
        own_count="yes",
        fused="no, the map of every head is needed",
    )

    def __post_init__(self) -> None:
        check_share("ltmp", "target", self.target)

    def check(self, model: VisionTransformer) -> None:
        check_class_token("ltmp", model)

    def prepare(self, model: VisionTransformer) -> None:
        for block in model.blocks:
            for name, value in (("merge_theta", 0.9), ("prune_theta", 0.0)):
                block.register_parameter(name, nn.Parameter(torch.full_like(model.cls_token[0, 0, 0], value)))

    def block_class(self) -> type[ReducingBlock]:
        return LTMPBlock

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return LTMPLearning(self, model, seed)


class LTMPBlock(ReducingBlock):
    """timm's block that merges and drops by its thresholds ``merge_theta`` and ``prune_theta``."""

    needs = "merge_theta"

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, tokens: Packed) -> Assignment:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
        images, P, T = tokens.images, self.num_prefix_tokens, len(q)
        sizes = q.new_ones(T) if tokens.sizes is None else tokens.sizes.to(q.dtype)
        live = padded(torch.ones_like(sizes, dtype=torch.bool), images, False)
        scores = torch.einsum("bqhd,bkhd->bhqk", padded(q, images, 0), padded(k, images, 0)) * q.shape[-1] ** -0.5
        scores = scores + padded(sizes, images, 1).log()[:, None, None]
        weights = scores.masked_fill(~live[:, None, None], -torch.inf).softmax(dim=-1)
        best, partner = alike(padded(k.mean(dim=1), images, 0), live, P)
        joins = best > self.merge_theta.clamp(0, 1)
        important = of_parts(importance(weights, live), partner, joins)
        stays = live & ~joins & (important > self.prune_theta.clamp(0, 1))
        stays[:, :P] = True
        left = Images.of_lengths(stays.sum(dim=1), images.N)
        place = stays.cumsum(dim=1) - 1 + left.cu_seqlens[:-1].unsqueeze(1)
        place = torch.where(stays, place, -1)
        slots = torch.where(joins, place.gather(1, partner), place)
        return Assignment(slots=packed(slots.int(), images, T), num_slots=int(left.cu_seqlens[-1]), images=left)

    def matching_macs(self, N: Number) -> Number:
        """MACs of the attention map, which fused attention does not return, and of the similarities."""
        P, attn = self.num_prefix_tokens, self.attention
        even = (N + 1) // 2 - (P + 1) // 2
        return N**2 * attn.attn_dim + even * (N - P - even) * attn.head_dim
