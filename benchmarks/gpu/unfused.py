"""Token merging as it is commonly written, to compare with: one torch operation after another.

Softmax of the written-out scores plus log n, the whole similarity matrix, a sort, gathers, and scattered sums with the
sizes as weights. Merged tokens stand as in the reference: what did not join first, then those that others may join.
"""

import torch
from torch import Tensor

from atm_triton.block import ATMBlock, Step, Tokens


class UnfusedBlock(ATMBlock):
    """A block that merges as ToMe does (even tokens into odd ones), by a given r; sizes [B, N] in the dtype of x."""

    def step(self, tokens: Tokens, merges: bool = True) -> Step:
        x, size = tokens.x, tokens.size
        y = self.norm1(x)
        q, k, v = self._heads(self.attn.qkv(y))
        x = x + self.drop_path1(self.ls1(self._attend(y, q, k, v, tokens)))
        r = self._r(x.shape[1]) if merges else 0
        if r:
            x, size = merged(x, size, k.mean(1), r, self.num_prefix_tokens)
        return Step(Tokens(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), size))

    def _attend(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        scores = (q * self.attn.scale) @ k.transpose(-2, -1)
        if tokens.size is not None:
            scores = scores + tokens.size.log()[:, None, None, :]
        x = scores.softmax(dim=-1) @ v
        return self.attn.proj(x.transpose(1, 2).reshape(y.shape[0], y.shape[1], self.attn.attn_dim))


def merged(x: Tensor, size: Tensor | None, keys: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """x [B, N, C] to [B, N - r, C] and its sizes, by the cosines of ``keys`` [B, N, d]."""
    B, N, _ = x.shape
    size = x.new_ones(B, N) if size is None else size
    keys = keys / keys.norm(dim=-1, keepdim=True)
    a, b = slice(num_prefix + num_prefix % 2, N, 2), slice(num_prefix | 1, N, 2)  # even and odd positions
    best, partner = (keys[:, a] @ keys[:, b].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    joins, stays = order[:, :r], order[:, r:].sort(dim=1).values
    target = partner.gather(1, joins)

    def summed(tokens: Tensor) -> Tensor:
        """[B, N, channels] to sums over the slots [B, N - r, channels]."""
        channels = tokens.shape[-1]
        of_a, of_b = tokens[:, a], tokens[:, b]
        kept, moved = (of_a.gather(1, rows.unsqueeze(-1).expand(-1, -1, channels)) for rows in (stays, joins))
        of_b = of_b.scatter_reduce(1, target.unsqueeze(-1).expand(-1, -1, channels), moved, reduce="sum")
        return torch.cat([tokens[:, :num_prefix], kept, of_b], dim=1)

    sums, size = summed(x * size.unsqueeze(-1)), summed(size.unsqueeze(-1))
    return sums / size, size.squeeze(-1)
