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
    DenseAssignment,
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

LEAST = 10  # tokens that always remain


@dataclass(frozen=True)
class MCTF(Baseline):
    """Fuses tokens at the start of a block that are similar, small and little attended to. Queries and keys are
    computed for all tokens and their attention map is fused too; values, projection and MLP see only the fused tokens.

    The authors' code protects the first and the third token of a distilled model; here all leading tokens are
    protected.

    Args:
        r: tokens that a block fuses, or below 1 their share; blocks: the blocks that fuse, None: all but the first.
            Published: r=16 in all but the first, and "Fast", r=0.35 in (3, 6, 9). tau_sim, tau_info, tau_size:
            temperatures of the three criteria; 0 leaves a criterion out.
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
        """Nothing to reduce after attention."""

    def count(self, block: ReducingBlock, N: int) -> int:
        """How many of N tokens a block fuses."""
        chosen = block.index > 0 if self.blocks is None else block.index in self.blocks
        if not chosen:
            return 0
        may = N - block.num_prefix_tokens
        r = int(may * self.r) if self.r < 1 else int(self.r)
        return max(min(r, N - LEAST, may // 2), 0)

    def scores(self, x: Tensor, attention: Tensor, sizes: Tensor | None, num_prefix: int) -> Tensor:
        """Score each pair of a token of A (even positions) and one of B (odd): [B, |A|, |B|], higher fuses first.
        ``attention`` [B, N]: the attention that each token receives."""
        a, b = groups(x.shape[1], num_prefix)
        metric = x / x.norm(dim=-1, keepdim=True)
        similar = (metric[:, a] @ metric[:, b].transpose(1, 2) + 1) / 2
        scores = similar ** (1 / self.tau_sim) if self.tau_sim else torch.ones_like(similar)
        for dear, tau in ((attention, self.tau_info), (sizes, self.tau_size)):
            if dear is not None and tau:
                cheap = (dear.amin(dim=1, keepdim=True) / dear).to(x.dtype)
                scores = scores * (cheap[:, a, None] * cheap[:, None, b]) ** (1 / tau)
        return scores

    def fused(self, scores: Tensor, N: int, r: int, num_prefix: int) -> DenseAssignment:
        """Fuse half of r from A into B, by the best score of each token of A, then the other half from B into what is
        left of A, by the same scores. The rest of A comes first, then the rest of B by its score."""
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
        return DenseAssignment(slots, N - r)

    def matching_macs(self, block: ReducingBlock, N: int) -> int:
        return (N + 1) // 2 * (N // 2) * block.attn.qkv.in_features


class MCTFBlock(ReducingBlock):
    """timm's block that fuses tokens before the values are computed. It does so even in a last block that computes
    only the leading tokens or does not merge, because the tokens that they attend to are fused there too."""

    baseline: MCTF

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        r = self.baseline.count(self, tokens.images.N)
        return self._fuse(tokens, r, step) if r else super().forward_packed(tokens, step)

    def _fuse(self, tokens: Packed, r: int, step: Step) -> Packed:
        """Run the block with r tokens fused. All remaining tokens leave it, or only the leading ones."""
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
        """The rest of timm's ``Attention`` on fused tokens with norm ``y`` [B, M, C], given the first rows of the fused
        attention map."""
        attn = self.attn
        (v,) = self.heads(_part(attn.qkv, slice(2 * attn.attn_dim, None), y))
        v = by_image(v, y)
        attended = attn.norm((attn.attn_drop(attention.to(v.dtype)) @ v).transpose(1, 2).flatten(2))
        if attn.gate is not None:
            attended = attended * attn.gate(y[:, : attended.shape[1]]).sigmoid()
        return attn.proj_drop(attn.proj(attended)), None

    def macs(self, N: int, queries: int, rows: int) -> int:
        """MACs: queries, keys and their products for the tokens that enter; values for the M fused tokens; everything
        else for the tokens that leave, all M or only the leading ones."""
        M = N - self.baseline.count(self, N)
        if M == N:
            return block_macs(self, N, queries, rows)
        leave = M if queries == N else queries
        A, D = self.attn.attn_dim, self.attn.qkv.in_features
        return block_macs(self, M, leave, leave) + (2 * N - M - leave) * D * A + (N**2 - leave * M) * A


def _part(qkv: nn.Linear, rows: slice, y: Tensor) -> Tensor:
    """Compute some of the outputs of ``qkv``."""
    if not is_matrix(qkv):  # an adapter, hooks
        return qkv(y)[..., rows]
    return F.linear(y, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])


def _fused_map(attention: Tensor, plan: DenseAssignment) -> Tensor:
    """The attention map of the slots [B, H, M, M]: sums over the keys of a slot, weighted means over its queries."""
    by_key = sums(attention.movedim(3, 1), plan)  # [B, M, H, N]
    by_query = sums((by_key * plan.weights[:, None, None]).movedim(3, 1), plan)  # [B, M query, M key, H]
    return by_query.movedim(3, 1)
