"""ATS (Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.block import ATMBlock, Step, is_matrix, rows
from atm_triton.flops import block_macs, linear_macs
from atm_triton.packed import Assignment, Images, Packed
from atm_triton.record import Number
from atm_triton.reference import lists, of_tokens, packed, padded
from benchmarks.baselines.base import About, Baseline, ReducingBlock, check_blocks, check_class_token


@dataclass(frozen=True)
class ATS(Baseline):
    """Samples tokens M times by their scores, with repeats, so that each image keeps its own number of tokens.

    The score of a token is the class token's attention to it, summed over the heads, times the norm of its value over
    all heads. The cumulative sum of the sorted scores rises from 0 to 1, and each of M evenly spaced points picks the
    token with the nearest sum. Only picked tokens have queries in this block, but all tokens have keys and values. The
    picked tokens leave the block in rising order of their scores, after the leading tokens.

    As in the authors' code, the grid is fixed, not random, the token with the lowest score is never picked, and if
    there are two patch tokens, neither stays (their code compares with the constant 1). This differs from their code:

    - M is free, as in the paper; theirs always has M = 196, and crashes with a smaller one.
    - Each image is sampled from its own tokens alone, with a plain softmax; theirs pads images to the longest of the
      batch, which moves the grid, so that a result depends on the other images.
    - All leading tokens stay; theirs keeps only the class token.
    - If no score except the lowest is above 0, all tokens stay; theirs divides by 0.

    Costs are those of their code, which computes the queries of all tokens and their products with all keys.

    Args:
        M: points of the grid, 2 or more; blocks: the blocks that sample.
    """

    M: int = 196
    blocks: tuple[int, ...] = tuple(range(3, 12))
    about: ClassVar[About] = About(
        "ATS (ECCV 2022)", "Apache-2.0", own_count="yes", fused="yes, the class row beside it"
    )

    def __post_init__(self) -> None:
        if type(self.M) is not int or self.M < 2:
            raise ValueError(f"ats: M={self.M!r}; want a whole number of points, 2 or more")
        check_blocks("ats", self.blocks)

    def check(self, model: VisionTransformer) -> None:
        check_class_token("ats", model)

    def block_class(self) -> type[ReducingBlock]:
        return ATSBlock

    def sampled(self, scores: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Sample by the scores [B, n]; ``there`` [B, n]: the tokens that exist. Returns the order [B, n] of rising
        scores, with absent tokens last, and which of the ordered tokens stay."""
        order = scores.masked_fill(~there, torch.inf).argsort(dim=1, stable=True)
        rising = scores.gather(1, order).masked_fill(~there, 0)  # absent tokens are last in both
        cdf = (rising / rising.sum(dim=1, keepdim=True)).cumsum(dim=1)
        low, high = cdf[:, :1], cdf[:, -1:]
        cdf = (cdf - low) / (high - low)
        first = cdf.masked_fill(~(there & (cdf > 0)), torch.inf).amin(dim=1, keepdim=True)
        points = first + (1 - first) * torch.arange(self.M, dtype=cdf.dtype, device=cdf.device) / (self.M - 1)
        pick = _nearest(cdf.masked_fill(~there, torch.inf), points)
        kept = torch.zeros_like(there).scatter(1, pick, True)
        largest = pick.amax(dim=1, keepdim=True)
        kept = kept & ~((largest == 1) & (torch.arange(kept.shape[1], device=kept.device) == 1))  # as their code does
        return order, torch.where(high > low, kept, there)


class ATSBlock(ReducingBlock):
    """timm's block in which only the queries of sampled tokens attend, so that only sampled tokens leave it."""

    baseline: ATS

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        images, P = tokens.images, self.num_prefix_tokens
        samples = step.merges and step.leading is None and self.index in self.baseline.blocks and images.N > P
        if not samples:
            return ATMBlock.forward_packed(self, tokens, step)
        y = self.norm1(images.shaped(tokens.x))
        attended, assignment = self.called_attn(y, self._sampled_attention, tokens)
        left, step.slots = assignment.images, assignment.slots
        x = tokens.x.index_select(0, _order(assignment)) + self.drop_images(self.drop_path1, self.ls1(attended), left)
        return self.fed_forward(Packed(x=x, sizes=None, images=left))

    def plan(self, *_: object) -> None:
        """Nothing to reduce after attention."""

    def _sampled_attention(self, y: Tensor, tokens: Packed) -> tuple[Tensor, Assignment]:
        attn, images = self.attention, tokens.images
        q, k, v = self.heads(attn.qkv(y))
        q, k = attn.q_norm(q), attn.k_norm(k)
        assignment = self.assignment(_scores(q, k, v, images), images)
        asking = _order(assignment)
        y = rows(y).index_select(0, asking)
        return self.attended(y, q.index_select(1, asking), k, v, tokens, assignment.images), assignment

    def assignment(self, scores: Tensor, images: Images) -> Assignment:
        """The assignment for scores [T]: leading tokens first, then sampled ones by rising score; others are
        dropped."""
        P = self.num_prefix_tokens
        by_image = padded(scores, images, 0)[:, P:]
        there = torch.arange(by_image.shape[1], device=scores.device) < (images.lengths - P).unsqueeze(1)
        order, kept = self.baseline.sampled(by_image, there)
        place = torch.where(kept, P - 1 + kept.cumsum(dim=1), -1)
        slots = torch.empty_like(place).scatter(1, order, place)
        slots = torch.cat([torch.arange(P, device=scores.device).expand(images.B, P), slots], dim=1)
        left = Images.of_lengths(P + kept.sum(dim=1), images.N)
        slots = torch.where(slots < 0, -1, slots + left.cu_seqlens[:-1].unsqueeze(1))
        return Assignment(
            slots=packed(slots.int(), images, len(scores)), num_slots=int(left.cu_seqlens[-1]), images=left
        )

    def macs(self, N: Number, queries: Number, rows: Number) -> Number:
        """The cost of the tokens that leave, plus the queries of the other tokens and their products with all keys."""
        if queries is not N:  # only the leading tokens have queries
            return block_macs(self, N, queries, rows)
        attn = self.attention
        query = linear_macs(attn.qkv) // 3 if is_matrix(attn.qkv) else 0  # otherwise all queries are counted already
        return block_macs(self, N, rows, rows) + (N - rows) * (query + N * attn.attn_dim)


def _order(assignment: Assignment) -> Tensor:
    """Row indices of the tokens that stay, in the order of their slots."""
    return lists(assignment.slots, assignment.num_slots)[0][: assignment.num_slots]


@torch.no_grad()
def _scores(q: Tensor, k: Tensor, v: Tensor, images: Images) -> Tensor:
    """The class token's attention to each token, times the norm of the token's value. Heads [H, T, d] give scores [T],
    float32 or above."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (heads.to(dtype).transpose(0, 1) for heads in (q, k, v))
    asking = of_tokens(images.first(q, 1).squeeze(1), images, len(k))
    products = padded((asking * k).sum(dim=-1) * k.shape[-1] ** -0.5, images, -torch.inf)
    attention = packed(products.softmax(dim=1).sum(dim=2), images, len(k))
    return attention * v.flatten(1).norm(dim=-1)


def _nearest(rising: Tensor, points: Tensor) -> Tensor:
    """Indices [B, M] of the values nearest to ``points`` [B, M] in each rising row [B, n]; ties take the lower one."""
    above = torch.searchsorted(rising, points.contiguous()).clamp(max=rising.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    low, high = rising.gather(1, below), rising.gather(1, above)
    return torch.where((points - low).abs() <= (high - points).abs(), below, above)
