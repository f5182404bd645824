"""ATMBlock: timm's transformer block with a merge between attention and MLP."""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerScale
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from atm_triton import ops
from atm_triton.config import ATMConfig
from atm_triton.reference import largest_r, of_tokens


class Tokens(NamedTuple):
    """The tokens between two blocks: ``x`` [B, N, C], their ``size`` [B, N] (None: all ones) and its ``log2_size``,
    where the kernels made it; or ``x`` [T, C] and ``size`` [T] of images that lie as ``packing`` says."""

    x: Tensor
    size: Tensor | None = None
    log2_size: Tensor | None = None
    packing: ops.Packing | None = None


class Step(NamedTuple):
    """What a block did: the ``tokens`` that leave it, the ``assignment`` [B, N], packed [T], of those that entered
    (None: nothing merged, the order is as before), and ``counts`` [B], each image's own number of candidates (None
    where no threshold is at work)."""

    tokens: Tokens
    assignment: Tensor | None = None
    counts: Tensor | None = None


def first_tokens(x: Tensor, rows: int, packing: ops.Packing | None) -> Tensor:
    """The first ``rows`` tokens of every image, dense [B, rows, ...], of [B, N, ...] or packed [T, ...]."""
    if packing is None:
        return x[:, :rows]
    return x[packing.cu_seqlens[:-1].unsqueeze(1) + torch.arange(rows, device=x.device)]


class ATMBlock(Block):
    """timm's ``Block`` that merges tokens after attention: ``block(x, size) -> (x, size)``.

    With ``adapt="image"`` it is ``block(x, size, packing) -> (x, size, packing)``: each image merges by its own count,
    and after the first merge images of different lengths lie one after the other, x [T, C], as ``packing`` tells.

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

    def forward(
        self, x: Tensor, size: Tensor | None = None, packing: ops.Packing | None = None
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, ops.Packing | None]:
        """Attention, merge and MLP.

        Args:
            x: tokens [B, N, C], or packed [T, C].
            size: [B, N] float32, packed [T], the patches that each token stands for; None: one each.
            packing: how packed images lie, from the block before; None: they are dense.

        Returns:
            x [B, M, C] with M <= N, and its sizes [B, M]; None while nothing has merged. With ``adapt="image"`` also
            the packing, None while nothing has merged.

        Raises:
            ValueError: packed images where one r is to hold for the batch.
        """
        if packing is not None and self.config.adapt != "image":
            raise ValueError(f'packed images in a block with adapt={self.config.adapt!r}; want adapt="image"')
        tokens = self.step(Tokens(x, size, None, packing)).tokens
        return (tokens.x, tokens.size, tokens.packing) if self.config.adapt == "image" else (tokens.x, tokens.size)

    def step(self, tokens: Tokens, merges: bool = True) -> Step:
        """:meth:`forward` with its assignment and counts; ``merges=False`` leaves every token as it is."""
        x, packing = tokens.x, tokens.packing
        y = self.norm1(x)
        q, k, v = self._heads(self.attn.qkv(y))
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        found = self._match(k, tokens) if merges else None
        read = None if found is None or found.counts is None else ops.CountRead(found.counts)
        attended = self._attend(y, q, k, v, tokens)
        del y, q, k, v  # their memory is wanted again
        counts = None if read is None else read.counts
        plan = None if found is None else self._plan(found, read, x.shape[-2], packing)
        if plan is None:
            x = x + self._drop_path(self.drop_path1, self.ls1(attended), packing)
            del attended
            return Step(tokens._replace(x=self._feed_forward(x, self.norm2(x), packing)), None, counts)
        tokens, y = self._merge(tokens, attended, *plan)
        del x, attended
        tokens = tokens._replace(x=self._feed_forward(tokens.x, y, tokens.packing))
        return Step(tokens, plan[0], counts)

    def step_leading(self, tokens: Tokens, rows: int) -> Step:
        """The last block of a model that classifies from its first ``rows`` tokens (Appendix A): those tokens alone,
        dense [B, rows, C], from one query, projection and MLP row each."""
        y = self.norm1(tokens.x)
        size = None if tokens.size is None else first_tokens(tokens.size, rows, tokens.packing)
        x = first_tokens(tokens.x, rows, tokens.packing)
        x = x + self.drop_path1(self.ls1(self._attend_leading(y, tokens, rows)))
        return Step(Tokens(self._feed_forward(x, self.norm2(x), None), size))

    def _attend_leading(self, y: Tensor, tokens: Tokens, rows: int) -> Tensor:
        A, qkv = self.attn.attn_dim, self.attn.qkv
        bias_q, bias_kv = (None, None) if qkv.bias is None else (qkv.bias[:A], qkv.bias[A:])
        asking = first_tokens(y, rows, tokens.packing)
        (q,) = self._heads(F.linear(asking, qkv.weight[:A], bias_q))
        k, v = self._heads(F.linear(y, qkv.weight[A:], bias_kv))
        return self._attend(asking, self.attn.q_norm(q), self.attn.k_norm(k), v, tokens)

    def _heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[B, N, n H d] to n tensors [B, H, N, d] that share its memory; [T, n H d] to [H, T, d]."""
        heads = projected.unflatten(-1, (-1, self.attn.num_heads, self.attn.head_dim))
        return heads.movedim(-3, 0).transpose(-3, -2).unbind(0)

    def _feed_forward(self, x: Tensor, y: Tensor, packing: ops.Packing | None) -> Tensor:
        """x and what the MLP makes of its norm ``y``."""
        return x + self._drop_path(self.drop_path2, self.ls2(self.mlp(y)), packing)

    def _drop_path(self, drop_path: nn.Module, x: Tensor, packing: ops.Packing | None) -> Tensor:
        """Drops whole images, also where they are packed."""
        if packing is None or not self.training or isinstance(drop_path, nn.Identity):
            return drop_path(x)
        of_images = drop_path(x.new_ones(len(packing.cu_seqlens) - 1, 1))
        return x * of_tokens(of_images, packing.cu_seqlens, len(x))

    def _r(self, N: int) -> int | None:
        """The r of N tokens, where no count is to say it; else None."""
        if self.r is None:
            return 0 if self.theta is None else None
        return min(self.r, largest_r(N, self.num_prefix_tokens))

    def _match(self, keys: Tensor, tokens: Tokens) -> ops.Match | None:
        """Partners by the keys that attention uses (after ``k_norm``); None where r is known to be 0."""
        if self._r(keys.shape[-2]) == 0:
            return None
        options = (self.num_prefix_tokens, self.by_size, self.theta, self.config.backend, tokens.packing)
        return ops.match(keys, tokens.size, *options)

    def _plan(
        self, found: ops.Match, read: ops.CountRead | None, N: int, packing: ops.Packing | None
    ) -> tuple[Tensor, ops.Lists | None, int | ops.Packing] | None:
        """Which tokens merge, as an assignment with its lists, and the length of the images after it; None if none do.
        Where r hangs on counts, they are waited for here: attention has given them time."""
        P, backend = self.num_prefix_tokens, self.config.backend
        if self.config.adapt == "image":
            if not torch.compiler.is_compiling() and not read.on_host().any():
                return None
            return ops.assign_each(found.similarity, found.partner, self.theta, read, P, backend, packing)
        r = self._r(N) if read is None else read.batch_r()
        if r == 0:
            return None
        return *ops.assign(found.similarity, found.partner, r, P, self.by_size, backend), N - r

    def _merge(
        self, tokens: Tokens, attended: Tensor, assignment: Tensor, lists: ops.Lists | None, M: int | ops.Packing
    ) -> tuple[Tokens, Tensor]:
        """The residual sum of x and ``attended``, merged, and its norm for the MLP."""
        x, size, _, packing = tokens
        after = M if isinstance(M, ops.Packing) else None
        if lists is not None and self._fuses(x, attended):
            scale = self.ls1
            gamma = scale.gamma_like(x) if hasattr(scale, "gamma_like") else getattr(scale, "gamma", None)
            merged, y = ops.add_merge_norm(x, attended, gamma, size, assignment, lists, M, self.norm2, packing)
            return Tokens(*merged, after), y
        x = x + self._drop_path(self.drop_path1, self.ls1(attended), packing)
        del attended
        merged = ops.merge(x, size, assignment, M, self.config.backend, lists, packing)
        return Tokens(*merged, after), self.norm2(merged.x)

    def _fuses(self, x: Tensor, attended: Tensor) -> bool:
        """Whether residual sum, merge and norm are what one kernel computes: no gradient, and plain modules."""
        if any(map(ops.needs_grad, (x, attended, *self.norm2.parameters(), *self.ls1.parameters()))):
            return False
        drops = self.training and not isinstance(self.drop_path1, nn.Identity)
        scales = type(self.ls1) in (nn.Identity, LayerScale) or hasattr(self.ls1, "gamma_like")
        plain = type(self.norm2) in (nn.LayerNorm, LayerNorm) and scales
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self.ls1, self.drop_path1, self.norm2))
        return plain and not drops and not hooked

    def _attend(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        """The rest of timm's ``Attention`` for the queries of the normalised tokens ``y`` [..., Nq, C]."""
        attn = self.attn
        n = None if self.config.proportional_attention is False else tokens.size
        dropout_p = attn.attn_drop.p if self.training else 0.0
        options = (dropout_p, attn.fused_attn, self.config.backend, tokens.log2_size, tokens.packing)
        x = attn.norm(ops.attention(q, k, v, n, *options).transpose(-3, -2).flatten(-2))
        if attn.gate is not None:
            x = x * attn.gate(y).sigmoid()
        return attn.proj_drop(attn.proj(x))
