"""PiToMe (Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atm_triton.packed import Packed
from benchmarks.baselines.base import About, Baseline, DenseAssignment, ReducingBlock, by_value, is_number, places


@dataclass(frozen=True)
class PiToMe(Baseline):
    """Merges the tokens that are similar to the most others, as the authors' code does on DeiT.

    The first half of the blocks sorts all tokens by energy, splits them alternately and merges the most similar pairs.
    The second half of the blocks merges half of the 2 r tokens of highest energy into the other half. As in their code,
    attention does not use sizes, although a flag there says that it does. All leading tokens are kept; the authors'
    code keeps only the class token.

    Args:
        ratio: the share of the patch tokens that every block keeps, 0.5 to 1.
    """

    ratio: float = 0.9125
    about: ClassVar[About] = About("PiToMe (NeurIPS 2024)", "CC-BY-NC in the files, MIT beside them")

    def __post_init__(self) -> None:
        if not (is_number(self.ratio) and 0.5 <= self.ratio <= 1):
            raise ValueError(f"pitome: ratio={self.ratio!r}; want a share from 0.5 to 1")

    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Packed) -> DenseAssignment | None:
        B, _, N, _ = k.shape
        P = block.num_prefix_tokens
        r = math.floor((N - P) - (N - P) * self.ratio)
        if r < 1:
            return None
        metric = F.normalize(k.mean(dim=1)[:, P:], dim=-1)
        similarity = metric @ metric.transpose(1, 2)
        margin = 0.75 - 0.75 * block.index / block.depth
        order = by_value(F.elu(similarity - margin).mean(dim=-1))
        fill = self._alternate if block.index < math.ceil(block.depth / 2) else self._highest
        slot = fill(similarity, order, r)
        prefix = torch.arange(P, device=k.device).expand(B, P)
        return DenseAssignment(torch.cat([prefix, slot + P], dim=1), N - r)

    @staticmethod
    def _alternate(similarity: Tensor, order: Tensor, r: int) -> Tensor:
        """Take every second token by energy as ``a``, the others as ``b``, and merge the r most similar of ``a`` into
        ``b``. The rest of ``a`` comes first, the most similar first, then ``b`` by energy."""
        a, b = order[:, ::2], order[:, 1::2]
        best, partner = _between(similarity, a, b).max(dim=-1)
        rank = places(by_value(best))
        kept = a.shape[1] - r
        return _slots(a, torch.where(rank < r, kept + partner, rank - r), b, kept)

    @staticmethod
    def _highest(similarity: Tensor, order: Tensor, r: int) -> Tensor:
        """Merge every second one of the 2 r tokens of highest energy into one of the others. The rest of the tokens
        comes first, then these others, each by energy."""
        rest, a, b = order[:, 2 * r :], order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
        partner = _between(similarity, a, b).argmax(dim=-1)
        kept = rest.shape[1]
        stays = torch.arange(kept, device=order.device).expand_as(rest)
        return _slots(torch.cat([rest, a], dim=1), torch.cat([stays, kept + partner], dim=1), b, kept)

    def matching_macs(self, block: ReducingBlock, N: int) -> int:
        return (N - block.num_prefix_tokens) ** 2 * block.attn.head_dim


def _between(similarity: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The similarities [B, |a|, |b|] of two lists of tokens."""
    rows = similarity.gather(1, a.unsqueeze(2).expand(-1, -1, similarity.shape[2]))
    return rows.gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1))


def _slots(tokens: Tensor, slots: Tensor, b: Tensor, kept: int) -> Tensor:
    """The slot of every token: ``tokens`` get ``slots``, and ``b`` the slots from ``kept`` on, in its order."""
    own = kept + torch.arange(b.shape[1], device=b.device).expand_as(b)
    every, where = torch.cat([tokens, b], dim=1), torch.cat([slots, own], dim=1)
    return torch.empty_like(every).scatter_(1, every, where)
