"""ATMBlock: timm's transformer block with a merge between attention and MLP."""

from typing import Any, NamedTuple, Self

import torch.nn.functional as F
from timm.layers import LayerNorm, LayerScale
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from atm_triton import ops
from atm_triton.config import ATMConfig
from atm_triton.reference import largest_r


class Step(NamedTuple):
    """What a block did: tokens ``x`` [B, M, C], their ``size`` [B, M] (None: all ones) and its ``log2_size`` where the
    kernels made it, the ``assignment`` [B, N] of the N tokens that entered (None: nothing merged, the order is as
    before), and ``counts`` [B], each image's own number of candidates (None where no threshold is at work)."""

    x: Tensor
    size: Tensor | None
    log2_size: Tensor | None = None
    assignment: Tensor | None = None
    counts: Tensor | None = None


class ATMBlock(Block):
    """timm's ``Block`` that merges tokens after attention: ``block(x, size) -> (x, size)``.

    Args:
        dim, num_heads, **block_kwargs: as timm's ``Block``.
        block_index: the position of this block in its model, from 0.
        depth: the number of blocks of the model.
        config: what merges, and how much.
        num_prefix_tokens: the protected tokens (class, distillation, registers) at the start of the sequence.

    Raises:
        ValueError: ``block_index`` outside the depth, or a ``config`` for another depth; TypeError: an ``attn_layer``
            other than timm's ``Attention``.

    Example:
        >>> block = ATMBlock(384, 6, block_index=0, depth=12, config=ATMConfig(theta_min=0.5, alpha=0.5))
        >>> x, size = block(torch.randn(8, 197, 384))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block_index: int,
        depth: int,
        config: ATMConfig | None = None,
        num_prefix_tokens: int = 1,
        **block_kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, depth=block_index, **block_kwargs)
        if type(self.attn) is not Attention:
            raise TypeError(f"attn_layer makes {type(self.attn).__name__}: only Attention of timm is supported")
        self._set_merging(config or ATMConfig(), block_index, depth, num_prefix_tokens)

    @classmethod
    def of(cls, block: Block, config: ATMConfig, block_index: int, depth: int, num_prefix_tokens: int) -> Self:
        """The merging form of ``block``, on the very same parameters and submodules."""
        merging = cls.__new__(cls)
        nn.Module.__init__(merging)
        for name, child in block.named_children():
            merging.add_module(name, child)
        merging.training = block.training
        merging._set_merging(config, block_index, depth, num_prefix_tokens)
        return merging

    def _set_merging(self, config: ATMConfig, block_index: int, depth: int, num_prefix_tokens: int) -> None:
        if not 0 <= block_index < depth:
            raise ValueError(f"block_index={block_index} is outside 0 .. {depth - 1}")
        config.check_depth(depth)
        self.config = config
        self.num_prefix_tokens = num_prefix_tokens
        self.by_size = config.groups_by_size(block_index + 1, depth)
        self.r = None if config.schedule is None else config.schedule[block_index]
        self.theta = None if config.adapt == "static" else config.theta(block_index + 1, depth)

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attention, merge and MLP.

        Args:
            x: tokens [B, N, C].
            size: [B, N] float32, the patches that each token stands for; None: one each.

        Returns:
            x [B, M, C] with M <= N, and its sizes [B, M]; None while nothing has merged.
        """
        step = self.step(x, size)
        return step.x, step.size

    def step(self, x: Tensor, size: Tensor | None, log2_size: Tensor | None = None, merges: bool = True) -> Step:
        """:meth:`forward` with its assignment and counts; ``merges=False`` leaves every token as it is."""
        y = self.norm1(x)
        q, k, v = self._heads(self.attn.qkv(y))
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        found, count = self._match(k, size) if merges else (None, None)
        attended = self._attend(y, q, k, v, size, log2_size)
        del y, q, k, v  # their memory is wanted again
        r = 0 if found is None else self._r(x.shape[1]) if count is None else count.batch_r()
        counts = None if found is None else found.counts
        if r == 0:
            x = x + self.drop_path1(self.ls1(attended))
            del attended
            return Step(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), size, log2_size, None, counts)
        assignment, lists = ops.assign(
            found.similarity, found.partner, r, self.num_prefix_tokens, self.by_size, self.config.backend
        )
        merged, y = self._merge(x, attended, size, assignment, lists, x.shape[1] - r)
        del x, attended
        x = merged.x + self.drop_path2(self.ls2(self.mlp(y)))
        return Step(x, merged.sizes, merged.log2_sizes, assignment, counts)

    def step_leading(self, x: Tensor, size: Tensor | None, log2_size: Tensor | None, rows: int) -> Step:
        """The last block of a model that classifies from its first ``rows`` tokens (Appendix A): those tokens alone
        [B, rows, C], from one query, projection and MLP row each."""
        x = x[:, :rows] + self.drop_path1(self.ls1(self._attend_leading(self.norm1(x), size, log2_size, rows)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return Step(x, None if size is None else size[:, :rows])

    def _attend_leading(self, y: Tensor, size: Tensor | None, log2_size: Tensor | None, rows: int) -> Tensor:
        A, qkv = self.attn.attn_dim, self.attn.qkv
        bias_q, bias_kv = (None, None) if qkv.bias is None else (qkv.bias[:A], qkv.bias[A:])
        (q,) = self._heads(F.linear(y[:, :rows], qkv.weight[:A], bias_q))
        k, v = self._heads(F.linear(y, qkv.weight[A:], bias_kv))
        return self._attend(y[:, :rows], self.attn.q_norm(q), self.attn.k_norm(k), v, size, log2_size)

    def _heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[B, N, n H d] to n tensors [B, H, N, d] that share its memory."""
        B, N, width = projected.shape
        shape = (B, N, width // self.attn.attn_dim, self.attn.num_heads, self.attn.head_dim)
        return projected.view(shape).permute(2, 0, 3, 1, 4).unbind(0)

    def _r(self, N: int) -> int | None:
        """The r of N tokens that the schedule gives; None where the counts of the batch are to say it."""
        return None if self.r is None else min(self.r, largest_r(N, self.num_prefix_tokens))

    def _match(self, keys: Tensor, size: Tensor | None) -> tuple[ops.Match | None, ops.CountRead | None]:
        """Partners by the keys that attention uses (after ``k_norm``), None where r is known to be 0; and where r
        hangs on the counts, these on their way to the host, which attention gives the time for."""
        if self._r(keys.shape[2]) == 0:
            return None, None
        found = ops.match(keys, size, self.num_prefix_tokens, self.by_size, self.theta, self.config.backend)
        return found, ops.CountRead(found.counts) if self.r is None else None

    def _merge(
        self,
        x: Tensor,
        attended: Tensor,
        size: Tensor | None,
        assignment: Tensor,
        lists: ops.Lists | None,
        M: int,
    ) -> tuple[ops.Merged, Tensor]:
        """The residual sum x + ``attended``, merged, and its norm for the MLP."""
        if lists is not None and self._fuses(x, attended):
            gamma = getattr(self.ls1, "gamma", None)
            return ops.add_merge_norm(x, attended, gamma, size, assignment, lists, M, self.norm2)
        x = x + self.drop_path1(self.ls1(attended))
        del attended
        merged = ops.merge(x, size, assignment, M, self.config.backend, lists)
        return merged, self.norm2(merged.x)

    def _fuses(self, x: Tensor, attended: Tensor) -> bool:
        """Whether residual sum, merge and norm are what one kernel computes: no gradient, and plain modules."""
        if any(map(ops.needs_grad, (x, attended, *self.norm2.parameters(), *self.ls1.parameters()))):
            return False
        drops = self.training and not isinstance(self.drop_path1, nn.Identity)
        plain = type(self.norm2) in (nn.LayerNorm, LayerNorm) and type(self.ls1) in (nn.Identity, LayerScale)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self.ls1, self.drop_path1, self.norm2))
        return plain and not drops and not hooked

    def _attend(
        self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, log2_size: Tensor | None
    ) -> Tensor:
        """The rest of timm's ``Attention`` for the queries of the normalised tokens ``y`` [B, Nq, C]."""
        attn = self.attn
        n = size if self.config.proportional_attention else None
        dropout_p = attn.attn_drop.p if self.training else 0.0
        x = ops.attention(q, k, v, n, dropout_p, attn.fused_attn, self.config.backend, log2_size)
        x = attn.norm(x.transpose(1, 2).reshape(y.shape[0], y.shape[1], attn.attn_dim))
        if attn.gate is not None:
            x = x * attn.gate(y).sigmoid()
        return attn.proj_drop(attn.proj(x))
