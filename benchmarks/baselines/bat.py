"""BAT (Long et al., Beyond Attentive Tokens: Incorporating Token Importance and Diversity, CVPR 2023)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.packed import Packed
from benchmarks.baselines.base import (
    About,
    Baseline,
    DenseAssignment,
    ReducingBlock,
    by_value,
    check_blocks,
    check_class_token,
    check_share,
    places,
    sums,
)
from benchmarks.baselines.training import Learning


@dataclass(frozen=True)
class BAT(Baseline):
    """Merges patch tokens between attention and MLP: pairs of those that the class token attends to most, and clusters
    of the others. Each pair and each cluster becomes one token, the mean weighted by the class token's attention.

    No code was found, only figures, logs and descriptions. The number of tokens follows from the costs in the logs for
    a keep rate of 0.7: as many as EViT keeps without its fused token, so there are as many clusters as pairs. **How
    many there are, and what follows, is our reading**:

    - Pairs go by the cosine of the tokens that enter the block, the most similar first; a token is in at most one pair.
    - Clusters go by density peaks, with all squared distances divided by C. The density of a token is exp(-mean squared
      distance to its ``neighbours`` nearest). Its peak is the density times the distance to the nearest denser token,
      or for the densest token to the farthest one. The tokens with the highest peaks are the centres; each other token
      goes to the nearest centre.
    - The class token leads, attentive tokens follow by attention (a pair at its more attentive token), then clusters.
      Attention does not use sizes.

    Args:
        keep_rate: the share of the patch tokens that leave a block, rounded up; blocks: the blocks that reduce; share:
            the number of clusters, as a share of the tokens that are not attentive, rounded down (at least one);
            neighbours: the neighbours in a density.
    """

    keep_rate: float = 0.7
    blocks: tuple[int, ...] = (3, 6, 9)
    share: float = 0.25
    neighbours: int = 5
    about: ClassVar[About] = About(
        "BAT (CVPR 2023)", "no code found", training="no, or trained so", fused="yes, the class row beside it"
    )

    def __post_init__(self) -> None:
        check_share("bat", "keep_rate", self.keep_rate)
        check_share("bat", "share", self.share)
        if type(self.neighbours) is not int or self.neighbours < 1:
            raise ValueError(f"bat: neighbours={self.neighbours!r}; want a whole number, 1 or more")
        check_blocks("bat", self.blocks)

    def check(self, model: VisionTransformer) -> None:
        check_class_token("bat", model)

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return BATLearning(self, model, seed)

    def counts(self, N: int) -> tuple[int, int]:
        """How many of N patch tokens are attentive, and how many pairs there are (and as many clusters)."""
        left = math.ceil(self.keep_rate * N)
        return left, min(max(int(self.share * (N - left)), 1), left // 2)

    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Packed) -> DenseAssignment | None:
        x, P = tokens.images.shaped(tokens.x).detach()[:, block.num_prefix_tokens :], block.num_prefix_tokens
        B, N, _ = x.shape
        left, m = self.counts(N)
        if block.index not in self.blocks or left == N or m == 0:
            return None
        scores = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2) * k.shape[-1] ** -0.5
        attention = scores.softmax(dim=-1).mean(dim=1)[:, P:]
        attention = attention.clamp_min(torch.finfo(attention.dtype).tiny)  # slots divide by sums of it
        order = by_value(attention)
        x = x.gather(1, order.unsqueeze(2).expand_as(x))
        of_attentive = pairs(x[:, :left], m)
        of_rest = clusters(x[:, left:], m, self.neighbours) + left - m
        slots = torch.cat([of_attentive, of_rest], dim=1).gather(1, places(order)) + P
        slots = torch.cat([torch.arange(P, device=x.device).expand(B, P), slots], dim=1)
        weights = torch.cat([attention.new_ones(B, P), attention], dim=1)
        whole = DenseAssignment(slots, P + left)
        return whole._replace(weights=weights / sums(weights, whole).gather(1, slots))

    def matching_macs(self, block: ReducingBlock, N: int) -> int:
        left, _ = self.counts(N - block.num_prefix_tokens)
        rest = N - block.num_prefix_tokens - left
        return (left**2 + rest**2) * block.attention.qkv.in_features


def pairs(x: Tensor, m: int) -> Tensor:
    """Slots [B, n] of tokens [B, n, C]. Each of the m most similar disjoint pairs shares the slot of its first token;
    slots are in the order of the tokens."""
    unit = F.normalize(x, dim=-1)
    B, n, _ = x.shape
    similar = (unit @ unit.transpose(1, 2)).masked_fill(
        torch.ones(n, n, dtype=torch.bool, device=x.device).tril(), -torch.inf
    )
    goes_to = torch.arange(n, device=x.device).repeat(B, 1)
    for _ in range(m):
        best = similar.flatten(1).argmax(dim=1, keepdim=True)
        first, second = best // n, best % n
        goes_to.scatter_(1, second, first)
        for taken in (first, second):
            at = taken.unsqueeze(2)
            similar = similar.scatter(1, at.expand(B, 1, n), -torch.inf).scatter(2, at.expand(B, n, 1), -torch.inf)
    own = goes_to == torch.arange(n, device=x.device)
    return (own.cumsum(dim=1) - 1).gather(1, goes_to)


def clusters(x: Tensor, m: int, neighbours: int) -> Tensor:
    """Cluster tokens [B, n, C] by density peaks. Slots [B, n] from 0 to m - 1 are in falling order of the peaks."""
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / x.shape[2]
    nearest = far.topk(min(neighbours + 1, x.shape[1]), dim=2, largest=False).values[:, :, 1:]
    density = (-nearest.mean(dim=2)).exp() if nearest.shape[2] else x.new_ones(x.shape[:2])
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    to_denser = far.masked_fill(~denser, torch.inf).amin(dim=2)
    to_denser = torch.where(denser.any(dim=2), to_denser, far.amax(dim=2)).sqrt()
    centres = by_value(density * to_denser)[:, :m]
    to_centres = far.gather(2, centres.unsqueeze(1).expand(-1, x.shape[1], -1))
    return to_centres.argmin(dim=2).scatter(1, centres, torch.arange(m, device=x.device).expand_as(centres))


class BATLearning(Learning):
    """The authors' fine-tuning for keep rates below 0.7, by their logs; for 0.7 they trained from scratch."""

    lr, min_lr, warmup, epochs = 2e-5, 2e-6, 0.0, 30
