"""ATMBlock: timm's transformer block with a merge between attention and MLP."""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerScale
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from atm_triton import ops
from atm_triton.config import ATMConfig
from atm_triton.packed import Assignment, Images, Packed
from atm_triton.reference import largest_r, of_tokens


class Step(NamedTuple):
    """What a block did: the ``tokens`` that leave it, the ``slots`` [T] that those that entered went to (None: nothing
    merged, the order is as before), and ``counts`` [B], each image's own number of candidates (None where no threshold
    is at work)."""

    tokens: Packed
    slots: Tensor | None = None
    counts: Tensor | None = None


class ATMBlock(Block):
    """timm's ``Block`` that merges tokens after attention: ``block(x, size) -> (x, size)``.

    With ``adapt="image"`` each image merges by its own count, images of different lengths lie one after the other, and
    it is ``block(x, size)`` or ``block(packed) -> packed``, a :class:`~atm_triton.packed.Packed`.

    Args:
        dim, num_heads, **block_kwargs: as timm's ``Block``.
        block_index: the position of this block in its model, from 0.
        depth: the number of blocks of the model.
        config: what merges, and how much.
        num_prefix_tokens: the protected tokens (class, distillation, registers) at the start of the sequence.

    Raises:
        ValueError: ``block_index`` outside the depth, or a ``config`` for another depth or without thresholds;
            TypeError: an ``attn_layer`` other than timm's ``Attention``.

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
        for name, child in block._modules.items():  # of two names for one module named_children leaves one out
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

    def forward(self, x: Tensor | Packed, size: Tensor | None = None) -> tuple[Tensor, Tensor | None] | Packed:
        """Attention, merge and MLP.

        Args:
            x: tokens [B, N, C], or what a block with ``adapt="image"`` returned.
            size: [B, N] float32, the patches that each token stands for; None: one each.

        Returns:
            x [B, M, C] with M <= N, and its sizes [B, M]; None while nothing has merged. With ``adapt="image"`` all of
            it as Packed.

        Raises:
            ValueError: images of different lengths where one r is to hold for the batch.
        """
        packed = x if isinstance(x, Packed) else Packed.of(x, size)
        if not packed.images.equal and self.config.adapt != "image":
            raise ValueError(f'packed images in a block with adapt={self.config.adapt!r}; want adapt="image"')
        tokens = self.step(packed).tokens
        if self.config.adapt == "image":
            return tokens
        size = None if tokens.sizes is None else tokens.images.shaped(tokens.sizes)
        return tokens.images.shaped(tokens.x), size

    def step(self, tokens: Packed, merges: bool = True) -> Step:
        """:meth:`forward` with its slots and counts; ``merges=False`` leaves every token as it is."""
        images = tokens.images
        y = self.norm1(images.shaped(tokens.x))
        q, k, v = self.heads(self.attn.qkv(y))
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        found = self.match(k, tokens) if merges else None
        copy = None if found is None or self.given_r(images) is not None else ops.to_host(found.counts)
        attended = self._attend(y, q, k, v, tokens)
        del y, q, k, v  # their memory is wanted again
        assignment = None if found is None else self.assign(found, copy, images)
        if assignment is None:
            x = images.shaped(tokens.x) + self._drop_path(self.drop_path1, self.ls1(attended), images)
            del attended
            y = self.norm2(x)
        else:
            tokens, y = self.merge(tokens, attended, assignment)
            del attended
            images = tokens.images
            x = images.shaped(tokens.x)
        x = x + self._drop_path(self.drop_path2, self.ls2(self.mlp(y)), images)
        counts, slots = None if found is None else found.counts, None if assignment is None else assignment.slots
        return Step(tokens.with_x(rows(x)), slots, counts)

    def step_leading(self, tokens: Packed, n: int, y: Tensor | None = None) -> Step:
        """The last block of a model that classifies from its first ``n`` tokens (Appendix A): those tokens alone, from
        one query, projection and MLP row each. ``y``: the norm of all tokens, if it is at hand."""
        images = tokens.images
        y = self.norm1(images.shaped(tokens.x)) if y is None else y
        size = None if tokens.sizes is None else images.first(tokens.sizes, n).flatten()
        x = images.first(tokens.x, n)
        x = x + self.drop_path1(self.ls1(self._attend_leading(y, tokens, n)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return Step(Packed.of(x, size))

    def _attend_leading(self, y: Tensor, tokens: Packed, n: int) -> Tensor:
        """One query for each leading token; keys and values of all. A qkv that is more than its matrix (an adapter, a
        quantised or pruned layer, one with hooks) is called as it is, and its other queries are left out."""
        A, qkv, images = self.attn.num_heads * self.attn.head_dim, self.attn.qkv, tokens.images
        asking = images.first(rows(y), n)
        if is_own(qkv, nn.Linear) and type(qkv.weight) in (Tensor, nn.Parameter):
            bias_q, bias_kv = (None, None) if qkv.bias is None else (qkv.bias[:A], qkv.bias[A:])
            (q,) = self.heads(F.linear(asking, qkv.weight[:A], bias_q))
            k, v = self.heads(F.linear(y, qkv.weight[A:], bias_kv))
        else:
            q, k, v = self.heads(qkv(y))
            q = images.first(q.transpose(0, 1), n).flatten(0, 1).transpose(0, 1)
        queries = Images.of(len(asking), n, y.device)
        return self._attend(asking, self.attn.q_norm(q), self.attn.k_norm(k), v, tokens, queries)

    def heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[..., n H d] to n tensors [H, T, d] that share its memory."""
        attn = self.attn
        each = projected.view(
            -1, projected.shape[-1] // (attn.num_heads * attn.head_dim), attn.num_heads, attn.head_dim
        )
        return each.permute(1, 2, 0, 3).unbind(0)

    def _drop_path(self, drop_path: nn.Module, x: Tensor, images: Images) -> Tensor:
        """Drops whole images, also where their lengths differ."""
        if images.equal or not self.training or isinstance(drop_path, nn.Identity):
            return drop_path(x)
        return x * of_tokens(drop_path(x.new_ones(images.B, 1)), images, len(x))

    def given_r(self, images: Images) -> int | None:
        """The r of each image, where no count is to say it; else None."""
        if self.r is None:
            return 0 if self.theta is None else None
        return min(self.r, largest_r(images.N, self.num_prefix_tokens))

    def r_of(self, images: Images) -> int | str:
        """What says the r of each image, for :func:`ops.assign`: where the three ways to adapt differ."""
        given = self.given_r(images)
        return self.config.adapt if given is None else given

    def match(self, keys: Tensor, tokens: Packed) -> ops.Match | None:
        """Partners by the keys that attention uses (after ``k_norm``); None where r is known to be 0."""
        if self.given_r(tokens.images) == 0:
            return None
        options = (self.num_prefix_tokens, self.by_size, self.theta, self.config.backend)
        return ops.match(keys, tokens.sizes, tokens.images, *options)

    def assign(self, found: ops.Match, copy: ops.HostCopy | None, images: Images) -> Assignment | None:
        """Which tokens merge; None if none do. Where r depends on counts, the host waits for them here: attention has
        given them time."""
        T, one_r = found.partner.shape[0], self.config.adapt != "image"
        if copy is None:
            T -= images.B * self.given_r(images)
        elif one_r or not torch.compiler.is_compiling():
            removed = int(ops.read(copy).sum())
            if one_r and images.B:
                removed -= removed % images.B  # the mean, rounded down, of each
            if removed == 0:
                return None
            T -= removed
        else:
            T = None
        options = (self.num_prefix_tokens, T, one_r, self.config.backend)
        return ops.assign(found, self.r_of(images), images, *options)

    def merge(self, tokens: Packed, attended: Tensor, assignment: Assignment) -> tuple[Packed, Tensor]:
        """The residual sum of x and ``attended``, merged, and its norm for the MLP."""
        images = tokens.images
        if assignment.tokens is not None and self._fuses(tokens.x, attended):
            gamma = scale_of(self.ls1, tokens.x)
            merged, y = ops.add_merge_norm(tokens, rows(attended), gamma, assignment, self.norm2)
            return merged, merged.images.shaped(y)
        x = images.shaped(tokens.x) + self._drop_path(self.drop_path1, self.ls1(attended), images)
        merged = ops.merge(tokens.with_x(rows(x)), assignment, self.config.backend)
        return merged, self.norm2(merged.images.shaped(merged.x))

    def _fuses(self, x: Tensor, attended: Tensor) -> bool:
        """Whether residual sum, merge and norm are what one kernel computes: no gradient, and plain modules."""
        if torch.is_grad_enabled():
            parameters = (*self.norm2.parameters(), *self.ls1.parameters())
            if any(tensor.requires_grad for tensor in (x, attended, *parameters)):
                return False
        drops = self.training and not isinstance(self.drop_path1, nn.Identity)
        return is_plain(self.ls1, self.norm2) and is_own(self.drop_path1, nn.Identity, DropPath) and not drops

    def _attend(
        self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Packed, queries: Images | None = None
    ) -> Tensor:
        """The rest of timm's ``Attention`` for the queries of the normalised tokens ``y`` [..., C]; ``queries``: where
        they lie, None: as the tokens."""
        return self.attn.proj_drop(self.attn.proj(self.mix(y, q, k, v, tokens, queries)))

    def mix(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Packed, queries: Images | None = None) -> Tensor:
        """What comes before the projection."""
        attn, images = self.attn, tokens.images
        n = None if self.config.proportional_attention is False else tokens.sizes
        dropout_p = attn.attn_drop.p if self.training else 0.0
        if not attn.fused_attn and attn.scale != attn.head_dim**-0.5:  # timm's fused attention reads no scale
            q = q * (attn.scale * attn.head_dim**0.5)
        options = (dropout_p, attn.fused_attn, self.config.backend, tokens.log2_sizes)
        mixed = ops.attention(q, k, v, n, images, queries, *options).transpose(0, 1).flatten(1)
        x = attn.norm((images if queries is None else queries).shaped(mixed))
        return x if attn.gate is None else x * attn.gate(y).sigmoid()


def is_plain(scale: nn.Module, norm: nn.Module) -> bool:
    """Whether the residual sum through ``scale`` and its ``norm`` are what one kernel computes."""
    scales = is_own(scale, nn.Identity, LayerScale) or (hasattr(scale, "gamma_like") and not is_changed(scale))
    return scales and is_own(norm, nn.LayerNorm, LayerNorm)


def is_own(module: nn.Module, *classes: type) -> bool:
    """Whether a module is of one of these very classes and does what they do."""
    return type(module) in classes and not is_changed(module)


_CALLED_AROUND = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_changed(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class: by hooks, or a forward of its own."""
    own = module.__dict__
    return "forward" in own or any(own.get(hooks) for hooks in _CALLED_AROUND)


def scale_of(scale: nn.Module, x: Tensor) -> Tensor | None:
    """The factor [C] of a plain LayerScale; None: there is none."""
    return scale.gamma_like(x) if hasattr(scale, "gamma_like") else getattr(scale, "gamma", None)


def rows(x: Tensor) -> Tensor:
    """[B, N, C] or [T, C] to [T, C]."""
    return x.flatten(0, -2)
