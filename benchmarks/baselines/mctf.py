"""MCTF (Lee et al., Multi-criteria Token Fusion with One-step-ahead Attention, CVPR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton.block import Step, is_matrix
from atm_triton.flops import block_macs
from atm_triton.packed import Packed
from benchmarks.baselines.base import (
    About,
    Baseline,
    Plan,
    ReducingBlock,
    by_image,
    by_value,
    check_blocks,
    groups,
    is_number,
    places,
    sums,
)
from benchmarks.baselines.mctf_learning import MCTFLearning
from benchmarks.baselines.training import Learning

LEAST = 10  # tokens that are always left


@dataclass(frozen=True)
class MCTF(Baseline):
    """Fuses tokens that are alike, small and little attended to, at the start of a block: queries and keys are those of
    all tokens, their attention map is fused with them, and values, projection and MLP see the fused tokens alone.

    Its authors' code protects the first and the third token of a distilled model; here the leading tokens are.

    Args:
        r: tokens that a block fuses, or below 1 their share; blocks: which do, None: all but the first. Published:
            r=16 in all but the first, and "Fast", r=0.35 in (3, 6, 9). tau_sim, tau_info, tau_size: temperatures of
            the three criteria; 0 leaves one out.
    """

    r: float = 16
    blocks: tuple[int, ...] | None = None
    tau_sim: float = 1
    tau_info: float = 20
    tau_size: float = 40
    proportional_attention: ClassVar[bool | None] = True
    about: ClassVar[About] = About(
        "MCTF (CVPR 2024)",
        "MIT, its core from ToMe's",
        training="no, or trained so",
        fused="no, the map is fused itself",
    )

    def __post_init__(self) -> None:
        if not is_number(self.r) or self.r < 0 or (self.r >= 1 and self.r != int(self.r)):
            raise ValueError(f"mctf: r={self.r!r}; want a whole number of tokens, or a share below 1")
        for name in ("tau_sim", "tau_info", "tau_size"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ValueError(f"mctf: {name}={value!r}; want a number, 0 or more")
        if self.blocks is not None:
            check_blocks("mctf", self.blocks)

    def block_class(self) -> type[ReducingBlock]:
        return MCTFBlock

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        return MCTFLearning(self, model, seed)

    def plan(self, *_: object) -> None:
        """After attention nothing is left to do."""

    def count(self, block: ReducingBlock, N: int) -> int:
        """How many of N tokens a block fuses."""
        chosen = block.index > 0 if self.blocks is None else block.index in self.blocks
        if not chosen:
            return 0
        may = N - block.num_prefix_tokens
        r = int(may * self.r) if self.r < 1 else int(self.r)
        return max(min(r, N - LEAST, may // 2), 0)

    def scores(self, x: Tensor, attention: Tensor, sizes: Tensor | None, num_prefix: int) -> Tensor:
        """[B, |A|, |B|]: how much tokens at even positions want to fuse with those at odd ones. ``attention`` [B, N]:
        how much each receives."""
        a, b = groups(x.shape[1], num_prefix)
        metric = x / x.norm(dim=-1, keepdim=True)
        similar = (metric[:, a] @ metric[:, b].transpose(1, 2) + 1) / 2
        scores = similar ** (1 / self.tau_sim) if self.tau_sim else torch.ones_like(similar)
        for dear, tau in ((attention, self.tau_info), (sizes, self.tau_size)):
            if dear is not None and tau:
                cheap = (dear.amin(dim=1, keepdim=True) / dear).to(x.dtype)
                scores = scores * (cheap[:, a, None] * cheap[:, None, b]) ** (1 / tau)
        return scores

    def fused(self, scores: Tensor, N: int, r: int, num_prefix: int) -> Plan:
        """Half of r from A to B, by the best score of each token of A; then the other half from B to what is left of A,
        by the same scores. What is left of A stands first, then what is left of B by its score."""
        a, b = groups(N, num_prefix)
        best, partner = scores.max(dim=2)
        gone = places(by_value(best)) < r // 2
        left = num_prefix + scores.shape[1] - r // 2
        back, to = scores.masked_fill(gone.unsqueeze(2), -torch.inf).max(dim=1)
        rank, second = places(by_value(back)), r - r // 2
        a_slot = num_prefix + (~gone).cumsum(dim=1) - 1
        b_slot = torch.where(rank < second, a_slot.gather(1, to), left + rank - second)
        slots = torch.arange(N, device=scores.device).repeat(len(scores), 1)
        slots[:, a], slots[:, b] = torch.where(gone, b_slot.gather(1, partner), a_slot), b_slot
        return Plan(slots, N - r)

    def matching_macs(self, block: ReducingBlock, N: int) -> int:
        return (N + 1) // 2 * (N // 2) * block.attn.qkv.in_features


class MCTFBlock(ReducingBlock):
    """timm's block with tokens fused before the values are made; also in a last block that serves the leading tokens
    alone, or is not to merge: what those attend to is fused."""

    baseline: MCTF

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        r = self.baseline.count(self, tokens.images.N)
        return self._fuse(tokens, r, step) if r else super().forward_packed(tokens, step)

    def _fuse(self, tokens: Packed, r: int, step: Step) -> Packed:
        """r tokens are fused; the leading ones of those that are left leave, or all."""
        n = step.leading
        images = tokens.images
        x, sizes = images.shaped(tokens.x), None if tokens.sizes is None else images.shaped(tokens.sizes)
        attention = self._map(x, sizes)
        received = attention.mean(dim=(1, 2))
        scores = self.baseline.scores(x, received, sizes, self.num_prefix_tokens)
        plan = self.baseline.fused(scores, images.N, r, self.num_prefix_tokens)
        weight = received if sizes is None else received * sizes
        plan = plan._replace(weights=weight / sums(weight, plan).gather(1, plan.slots))
        tokens, step.slots = self.reduced(tokens, plan)
        x, sizes = (tokens.images.shaped(rows) for rows in (tokens.x, tokens.sizes))
        attended, _ = self.called_attn(self.norm1(x), self._attend_by, _fused_map(attention, plan)[:, :, :n])
        x = x[:, :n] + self.drop_path1(self.ls1(attended))
        return self.fed_forward(Packed.of(x, sizes[:, :n]))

    def _map(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        """The attention map [B, H, N, N] of all tokens [B, N, C], from queries and keys alone."""
        attn = self.attn
        heads = self.heads(_part(attn.qkv, slice(None, 2 * attn.attn_dim), self.norm1(x)))
        q, k = (by_image(rows, x) for rows in heads)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.head_dim**-0.5
        if sizes is not None:
            sizes = sizes.to(torch.promote_types(scores.dtype, torch.float32))
            scores = scores + sizes.log()[:, None, None].to(scores.dtype)
        return scores.softmax(dim=-1)

    def _attend_by(self, y: Tensor, attention: Tensor) -> tuple[Tensor, None]:
        """The rest of timm's ``Attention`` on fused tokens of norm ``y`` [B, M, C], given the first rows of their
        map."""
        attn = self.attn
        (v,) = self.heads(_part(attn.qkv, slice(2 * attn.attn_dim, None), y))
        v = by_image(v, y)
        attended = attn.norm((attn.attn_drop(attention.to(v.dtype)) @ v).transpose(1, 2).flatten(2))
        if attn.gate is not None:
            attended = attended * attn.gate(y[:, : attended.shape[1]]).sigmoid()
        return attn.proj_drop(attn.proj(attended)), None

    def macs(self, N: int, queries: int, rows: int) -> int:
        """Queries, keys and their products of the tokens that enter, values of the M that are left, everything else of
        those that leave: the M, or the leading ones."""
        M = N - self.baseline.count(self, N)
        if M == N:
            return block_macs(self, N, queries, rows)
        leave = M if queries == N else queries
        A, D = self.attn.attn_dim, self.attn.qkv.in_features
        return block_macs(self, M, leave, leave) + (2 * N - M - leave) * D * A + (N**2 - leave * M) * A


def _part(qkv: nn.Linear, rows: slice, y: Tensor) -> Tensor:
    """``qkv`` for some of its outputs."""
    if not is_matrix(qkv):  # an adapter, hooks
        return qkv(y)[..., rows]
    return F.linear(y, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])


def _fused_map(attention: Tensor, plan: Plan) -> Tensor:
    """[B, H, M, M]: summed over the keys of a slot, averaged over its queries with the weights of its tokens."""
    by_key = sums(attention.movedim(3, 1), plan)  # [B, M, H, N]
    by_query = sums((by_key * plan.weights[:, None, None]).movedim(3, 1), plan)  # [B, M query, M key, H]
    return by_query.movedim(3, 1)
