"""Token merging as it is commonly written, one torch operation after another, as a baseline.

It writes out the scores plus log n for a softmax and the whole similarity matrix, sorts, gathers, and scatters sums
weighted by sizes. Merged tokens have the order of the reference: leading tokens, the rest of A, then B.
"""

from functools import cache

import torch
from torch import Tensor

from atm_triton.block import ATMBlock, Step
from atm_triton.packed import Images, Packed

images_of = cache(Images.of)  # cached, because making the offsets of equal images is not part of what is timed


class UnfusedBlock(ATMBlock):
    """A block that merges a given r as ToMe does (even tokens into odd ones), with sizes in the dtype of x."""

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        if step.leading is not None:
            return self.forward_leading(tokens, step.leading)
        images = tokens.images
        x, sizes = images.shaped(tokens.x), None if tokens.sizes is None else images.shaped(tokens.sizes)
        attended, k = self.called_attn(self.norm1(x), self.with_keys, tokens)
        x = x + self.drop_path1(self.ls1(attended))
        r = self.given_r(images) if step.merges else 0
        if r:
            x, sizes = merged(x, sizes, images.shaped(k.mean(0)), r, self.num_prefix_tokens)
            images = images_of(images.B, images.N - r, x.device)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return Packed(x=x.flatten(0, 1), sizes=None if sizes is None else sizes.flatten(), images=images)

    def with_keys(self, y: Tensor, tokens: Packed) -> tuple[Tensor, Tensor]:
        """Attention on the norm ``y`` [B, N, C] of the tokens: what it adds to them, and their keys."""
        q, k, v = self.heads(self.attn.qkv(y))
        return self.attended(y, q, k, v, tokens), k

    def attended(
        self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Packed, queries: Images | None = None
    ) -> Tensor:
        images = tokens.images
        q, k, v = (part.unflatten(1, (images.B, -1)).transpose(0, 1) for part in (q, k, v))
        scores = (q * self.attn.scale) @ k.transpose(-2, -1)
        if tokens.sizes is not None:
            scores = scores + images.shaped(tokens.sizes).log()[:, None, None, :]
        x = scores.softmax(dim=-1) @ v
        return self.attn.proj(x.transpose(1, 2).reshape(y.shape[0], y.shape[1], self.attn.attn_dim))


def merged(x: Tensor, sizes: Tensor | None, keys: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Merge x [B, N, C] to [B, N - r, C] by the cosines of ``keys`` [B, N, d]; also returns the new sizes."""
    B, N, _ = x.shape
    sizes = x.new_ones(B, N) if sizes is None else sizes
    keys = keys / keys.norm(dim=-1, keepdim=True)
    a, b = slice(num_prefix + num_prefix % 2, N, 2), slice(num_prefix | 1, N, 2)  # even and odd positions
    best, partner = (keys[:, a] @ keys[:, b].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    joins, stays = order[:, :r], order[:, r:].sort(dim=1).values
    target = partner.gather(1, joins)

    def summed(values: Tensor) -> Tensor:
        """Sum values [B, N, channels] over slots: [B, N - r, channels]."""
        channels = values.shape[-1]
        of_a, of_b = values[:, a], values[:, b]
        kept, moved = (of_a.gather(1, rows.unsqueeze(-1).expand(-1, -1, channels)) for rows in (stays, joins))
        of_b = of_b.scatter_reduce(1, target.unsqueeze(-1).expand(-1, -1, channels), moved, reduce="sum")
        return torch.cat([values[:, :num_prefix], kept, of_b], dim=1)

    sums, sizes = summed(x * sizes.unsqueeze(-1)), summed(sizes.unsqueeze(-1))
    return sums / sizes, sizes.squeeze(-1)
