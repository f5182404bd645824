"""Zero-TPrune (Wang et al., Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph, CVPR
2024)."""

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
    check_drops,
    check_share,
    is_number,
    places,
)

CHOICES = {"start": ("class", "uniform"), "keys": ("mean", "concatenated"), "mass": ("tokens", "one")}


@dataclass(frozen=True)
class ZeroTPrune(Baseline):
    """Drops patch tokens after a block: first r that are similar to more important ones, then the least important ones.

    Importance is a PageRank on the attention map of each head (s <- A^T s), combined as the root mean square over the
    heads whose variance lies within bounds. First one vote ranks the tokens (I'). Each token of the less important half
    is compared with those of the other half by the cosine of their keys, and the r most similar ones are dropped (S).
    Then several votes among the remaining tokens decide which of them stay (I).

    No code of the authors was found; this follows descriptions of the paper. What they leave open is chosen here:

    - how keys of several heads are compared: ``keys``;
    - the scale of s whose variance is bounded: ``mass``; with a sum of 1 no head reaches the lower bound among 197
      tokens;
    - what happens if no head is within the bounds: all heads count;
    - whether the variance is divided by the number of tokens: it is;
    - whether the map of the remaining tokens is normalised anew: it is not;
    - which blocks prune how much: the blocks are from memory, the rate is ours.

    The iterations are the upper ends of published ranges. The leading tokens stay and vote. Tokens that stay keep their
    order.

    Args:
        r: tokens that a block drops as similar; keep_rate: the share of the other patch tokens that stays, rounded up;
        blocks: the blocks that prune. iterations: votes in the first three blocks, in those between and in the last
        three. start: "class", whose token begins with sqrt(N) times the share of others, or "uniform". keys: the "mean"
        of all heads or "concatenated". mass: what s sums to, the number of "tokens" or "one". variance: the bounds.
    """

    r: int = 10
    keep_rate: float = 0.9
    blocks: tuple[int, ...] = (0, 2, 5, 8, 10)
    iterations: tuple[int, int, int] = (50, 10, 1)
    start: str = "class"
    keys: str = "mean"
    mass: str = "tokens"
    variance: tuple[float, float] = (0.01, 0.7)
    after_mlp: ClassVar[bool] = True
    about: ClassVar[About] = About(
        "Zero-TPrune (CVPR 2024)", "no code found", fused="no, the map of every head is needed"
    )

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 0:
            raise ValueError(f"zero_tprune: r={self.r!r}; want a whole number of tokens")
        check_share("zero_tprune", "keep_rate", self.keep_rate)
        check_blocks("zero_tprune", self.blocks)
        times, bounds = self.iterations, self.variance
        if not (isinstance(times, (tuple, list)) and len(times) == 3 and all(type(n) is int and n > 0 for n in times)):
            raise ValueError(f"zero_tprune: iterations={times!r}; want three whole numbers, 1 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"zero_tprune: {name}={getattr(self, name)!r}; want {' or '.join(choices)}")
        pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(map(is_number, bounds))
        if not pair or not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"zero_tprune: variance={bounds!r}; want two numbers, 0 or more, that rise")

    def check(self, model: VisionTransformer) -> None:
        check_drops("zero_tprune", model)

    def counts(self, block: ReducingBlock, N: int) -> tuple[int, int]:
        """How many of N tokens a block drops as similar, and how many patch tokens it keeps after that."""
        patches = N - block.num_prefix_tokens
        r = min(self.r, patches // 2)
        return r, math.ceil(self.keep_rate * (patches - r))

    def votes(self, block: ReducingBlock) -> int:
        first, between, last = self.iterations
        return first if block.index < 3 else last if block.index >= block.depth - 3 else between

    @torch.no_grad()
    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Packed) -> DenseAssignment | None:
        B, _, N, d = k.shape
        P = block.num_prefix_tokens
        r, left = self.counts(block, N)
        if block.index not in self.blocks or P + left == N:
            return None
        dtype = torch.promote_types(k.dtype, torch.float32)
        graph = (q.to(dtype) @ k.to(dtype).transpose(-2, -1) * d**-0.5).softmax(dim=-1)
        rank = by_value(self.importance(graph, 1)[:, P:]) + P
        dear, cheap = rank.tensor_split([(N - P + 1) // 2], dim=1)
        alike = by_value(self.likeness(k.to(dtype), cheap, dear))[:, :r]
        stays = torch.ones(B, N, dtype=torch.bool, device=k.device).scatter(1, cheap.gather(1, alike), False)
        rest = stays.nonzero()[:, 1].unflatten(0, (B, N - r))
        rows = graph.gather(2, rest[:, None, :, None].expand(-1, graph.shape[1], -1, N))
        among = rows.gather(3, rest[:, None, None].expand(-1, graph.shape[1], N - r, -1))
        important = places(by_value(self.importance(among, self.votes(block))[:, P:])) < left
        stays = stays.scatter(1, rest[:, P:], important)
        return DenseAssignment(torch.where(stays, stays.cumsum(dim=1) - 1, -1), P + left)

    def importance(self, graph: Tensor, votes: int) -> Tensor:
        """The importance [B, N] of the nodes of the graphs [B, H, N, N], one graph per head."""
        N = graph.shape[-1]
        s = graph.new_ones(*graph.shape[:2], 1, N)
        if self.start == "class":
            s[..., 0] = math.sqrt(N)
        for _ in range(votes):
            s = s @ graph
        s = s.squeeze(2)
        s = s / s.sum(dim=-1, keepdim=True) * (N if self.mass == "tokens" else 1)
        variance, (low, high) = s.var(dim=-1, correction=0), self.variance
        accepted = (variance >= low) & (variance <= high)
        accepted = (accepted | ~accepted.any(dim=1, keepdim=True)).unsqueeze(2)
        return ((s**2 * accepted).sum(dim=1) / accepted.sum(dim=1)).sqrt()

    def likeness(self, k: Tensor, cheap: Tensor, dear: Tensor) -> Tensor:
        """The cosine of each token in ``cheap`` [B, a] with the most similar token in ``dear`` [B, b]."""
        keys = k.mean(dim=1) if self.keys == "mean" else k.transpose(1, 2).flatten(2)
        a, b = (
            F.normalize(keys.gather(1, of.unsqueeze(2).expand(-1, -1, keys.shape[2])), dim=-1) for of in (cheap, dear)
        )
        return (a @ b.transpose(1, 2)).amax(dim=-1)

    def matching_macs(self, block: ReducingBlock, N: int) -> int:
        """MACs of the attention map, which fused attention does not return, of the votes and of the similarities."""
        r, attn = self.counts(block, N)[0], block.attention
        patches, H = N - block.num_prefix_tokens, attn.num_heads
        votes = H * N**2 + self.votes(block) * H * (N - r) ** 2
        width = attn.head_dim * (1 if self.keys == "mean" else H)
        return N**2 * attn.attn_dim + votes + (patches // 2) * (patches - patches // 2) * width
