"""ATMBlock: timm's transformer block with a merge between attention and MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerScale
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from atm_triton import ops
from atm_triton.config import ATMConfig
from atm_triton.packed import Assignment, Images, Packed, check_plan
from atm_triton.reference import largest_r, of_tokens


class Step:
    """What a block needs to know about a pass and what it reports back, apart from the values of its tokens.

    Only the values pass through the block's call, so that hooks see tensors and a wrapper forwards a single keyword. A
    call does not change its inputs, so it can be repeated, as checkpointing does.

    Inputs: ``before``: the tokens that enter; ``merges``: if False, every token stays as it is; ``leading``: how many
    leading tokens the last block computes (None: all). Outputs: ``after``: the tokens that leave; ``slots`` [T]: where
    each token that entered went (None: nothing merged, the order is unchanged); ``counts`` [B]: the number of
    candidates per image (None: no threshold is used).

    This is neither a tuple nor a dataclass because module wrappers search those for tensors, cast them, and forward a
    copy.
    """

    def __init__(self, before: Packed, merges: bool = True, leading: int | None = None) -> None:
        self.before, self.merges, self.leading = before, merges, leading
        self.after: Packed | None = None
        self.slots: Tensor | None = None
        self.counts: Tensor | None = None


class AwaitingCounts(NamedTuple):
    """The ``pairs`` that a block matched and, if it has to wait for their counts, the copy of these to the host.
    :meth:`ATMBlock.assign` turns it into an assignment after attention has run."""

    pairs: ops.Match
    copy: ops.HostCopy | None


class ATMAttention(Attention):
    """timm's ``Attention`` inside an :class:`ATMBlock`.

    The block calls it as a module, so that hooks and wrappers work, and passes the function ``by`` that computes the
    projection from the normalised tokens. Without ``by`` it behaves as timm's."""

    def forward(self, x: Tensor, *args: Any, by: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Tensor:
        return super().forward(x, *args, **options) if by is None else by(x)


class ATMBlock(Block):
    """timm's ``Block`` that merges tokens after attention: ``block(x, sizes) -> (x, sizes)``.

    With ``adapt="image"`` each image merges by its own count, and images of different lengths are stored one after the
    other. The call is then ``block(x, sizes) -> packed`` or ``block(packed) -> packed``, where ``packed`` is a
    :class:`~atm_triton.packed.Packed`. A block accepts what another block returns, so blocks can be chained with
    ``h = block(h)``.

    A patched model calls ``block(x, step=step) -> x``, and this is what hooks see: x [B, N, C], or rows [T, C] of all
    images once their lengths differ.

    To use another method of token reduction, subclass this block, override :meth:`plan`, and call
    ``apply_patch(model, block_class=...)``.

    Args:
        dim: C.
        num_heads: H.
        **block_kwargs: further arguments of timm's ``Block``.
        block_index: position of this block in its model, from 0.
        depth: number of blocks in the model.
        config: which tokens merge, and how many.
        num_prefix_tokens: the protected tokens (class, distillation, registers) at the start of the sequence.

    Raises:
        ValueError: ``block_index`` outside the depth, or a ``config`` for another depth or without thresholds;
            TypeError: an ``attn_layer`` other than timm's ``Attention``.

    Examples:
        >>> block = ATMBlock(384, 6, block_index=0, depth=12, config=ATMConfig(thresholds=(0.5,) * 12))
        >>> x, sizes = block(torch.randn(8, 197, 384))
    """

    config: ATMConfig
    block_index: int
    num_prefix_tokens: int
    by_size: bool
    r: int | None
    theta: float | None

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
        self.of(self, config or ATMConfig(), block_index, depth, num_prefix_tokens)

    @classmethod
    def of(cls, block: Block, config: ATMConfig, block_index: int, depth: int, num_prefix_tokens: int) -> Self:
        """Make ``block`` merge, in place, and return it: the same object, with its hooks."""
        cls._set_merging(block, config, block_index, depth, num_prefix_tokens)
        block.__class__, block.attn.__class__ = cls, ATMAttention
        return block

    def _set_merging(self, config: ATMConfig, block_index: int, depth: int, num_prefix_tokens: int) -> None:
        if not 0 <= block_index < depth:
            raise ValueError(f"block_index={block_index} is outside 0 .. {depth - 1}")
        config.check_depth(depth)
        theta = None if config.adapt == "static" else config.theta(block_index + 1, depth)  # it may refuse
        self.config, self.block_index, self.theta = config, block_index, theta
        self.num_prefix_tokens = num_prefix_tokens
        self.by_size = config.groups_by_size(block_index + 1, depth)
        self.r = None if config.schedule is None else config.schedule[block_index]

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None] | Packed,
        sizes: Tensor | None = None,
        *,
        step: Step | None = None,
    ) -> tuple[Tensor, Tensor | None] | Packed | Tensor:
        """Attention, merge and MLP.

        Args:
            x: tokens [B, N, C], or what a block returned.
            sizes: [B, N] float32, the number of patches that each token stands for. None: one each.
            step: passed by the model, in which case x may be rows [T, C] and only x is returned.

        Returns:
            x [B, M, C] with M <= N and its sizes [B, M] (None as long as nothing has merged). With ``adapt="image"``
            both in a Packed.

        Raises:
            ValueError: images differ in length, but one r must hold for the batch.
            TypeError: ``attn`` was replaced by a module that does not compute what the block passes to it.
        """
        if step is None or not isinstance(x, Tensor):
            return self._alone(x, sizes)
        step.after = tokens = self.forward_packed(handed_on(step.before, x), step)
        return tokens.images.shaped(tokens.x)

    def _alone(
        self, x: Tensor | tuple[Tensor, Tensor | None] | Packed, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | Packed:
        """:meth:`forward` of a block that is called on its own, without a model."""
        if not isinstance(x, Packed):
            x = Packed.of(*x) if isinstance(x, tuple) else Packed.of(x, sizes)
        if not x.images.equal and self.config.adapt != "image":
            raise ValueError(f'packed images in a block with adapt={self.config.adapt!r}; want adapt="image"')
        tokens = self.forward_packed(x, Step(x))
        if self.config.adapt == "image":
            return tokens
        sizes = None if tokens.sizes is None else tokens.images.shaped(tokens.sizes)
        return tokens.images.shaped(tokens.x), sizes

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        """:meth:`forward` on rows; notes slots and counts in ``step``."""
        if step.leading is not None:
            return self.forward_leading(tokens, step.leading)
        images = tokens.images
        x = images.shaped(tokens.x)
        attended, plan = self.called_attn(self.norm1(x), self.attend, tokens, step.merges)
        if isinstance(plan, AwaitingCounts):
            assignment, counts = self.assign(plan.pairs, plan.copy, images), plan.pairs.counts
        else:
            assignment, counts = plan, None
            if plan is not None:
                check_plan(plan, tokens, self.num_prefix_tokens)
        if assignment is None:
            x = x + self.drop_images(self.drop_path1, self.ls1(attended), images)
            del attended  # frees its memory for what follows
            y = self.norm2(x)
        else:
            tokens, y = self.merge(tokens, attended, assignment)
            del attended
            images = tokens.images
            x = images.shaped(tokens.x)
        x = x + self.drop_images(self.drop_path2, self.ls2(self.mlp(y)), images)
        step.counts = counts
        step.slots = None if assignment is None else assignment.slots
        return tokens.with_x(rows(x))

    def forward_leading(self, tokens: Packed, n: int, y: Tensor | None = None) -> Packed:
        """The last block of a model that classifies from its first ``n`` tokens (Appendix A). It computes only these:
        one query, one projection and one MLP row each. ``y``: the norm of all tokens, if already computed."""
        images = tokens.images
        y = self.norm1(images.shaped(tokens.x)) if y is None else y
        sizes = None if tokens.sizes is None else images.first(tokens.sizes, n).flatten()
        x = images.first(tokens.x, n)
        attended, _ = self.called_attn(y, self._attend_leading, tokens, n)
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return Packed.of(x, sizes)

    def called_attn(self, y: Tensor, by: Callable[..., tuple[Tensor, Any]], *given: Any) -> tuple[Tensor, Any]:
        """Call ``attn`` as a module on the normalised tokens ``y``. It computes ``by(y, *given)``, where ``by`` is a
        method of this block with two results. Both are returned: the projection, which passes through the module, and
        what comes with it."""
        attn, noted = self.attn, []
        if type(attn) is Attention:  # it was put there after patching
            attn.__class__ = ATMAttention
        if inside(attn, ATMAttention) is None:
            raise TypeError(_no_attention(attn))

        def noting(y: Tensor) -> Tensor:
            out, beside = by(y, *given)
            noted.append(beside)
            return out

        out = attn(y, by=noting)
        if not noted:
            raise TypeError(_no_attention(attn))
        return out, noted[0]

    @property
    def attention(self) -> Attention:
        """``attn``, even if a wrapper has taken its place."""
        return inside(self.attn, Attention)

    def attend(self, y: Tensor, tokens: Packed, merges: bool) -> tuple[Tensor, Assignment | AwaitingCounts | None]:
        """Run attention on the norm ``y`` [..., C] of the tokens. Returns what it adds to the tokens, and the
        :meth:`plan` of what merges afterwards (None unless ``merges``)."""
        attn = self.attention
        q, k, v = self.heads(attn.qkv(y))
        q, k = attn.q_norm(q), attn.k_norm(k)
        plan = self.plan(q, k, tokens) if merges else None
        return self.attended(y, q, k, v, tokens), plan

    def plan(self, q: Tensor, k: Tensor, tokens: Packed) -> Assignment | AwaitingCounts | None:
        """Decide which tokens merge, or are dropped, between attention and MLP. Override this for another method.

        Args:
            q: queries [H, T, d] as attention uses them, after ``q_norm``.
            k: keys [H, T, d], after ``k_norm``.
            tokens: the tokens that enter the block, T rows of all images. ``self.block_index`` says which block this
                is, ``self.num_prefix_tokens`` how many tokens at the start of each image must stay as they are.

        Returns:
            The assignment of every row. None: all tokens stay. (:class:`AwaitingCounts` is ATM's own.)
        """
        pairs = self.match(k, tokens)
        if pairs is None:
            return None
        return AwaitingCounts(pairs, None if pairs.counts is None else ops.to_host(pairs.counts))

    def _attend_leading(self, y: Tensor, tokens: Packed, n: int) -> tuple[Tensor, None]:
        """Attention with one query per leading token and the keys and values of all tokens. If qkv is more than a
        matrix (an adapter, a quantised or pruned layer, one with hooks), it is called as a module and the other
        queries are discarded."""
        attn, images = self.attention, tokens.images
        A, qkv = attn.num_heads * attn.head_dim, attn.qkv
        asking = images.first(rows(y), n)
        if is_matrix(qkv):
            bias_q, bias_kv = (None, None) if qkv.bias is None else (qkv.bias[:A], qkv.bias[A:])
            (q,) = self.heads(F.linear(asking, qkv.weight[:A], bias_q))
            k, v = self.heads(F.linear(y, qkv.weight[A:], bias_kv))
        else:
            q, k, v = self.heads(qkv(y))
            q = images.first(q.transpose(0, 1), n).flatten(0, 1).transpose(0, 1)
        queries = Images.of(asking.shape[0], n, y.device)
        return self.attended(asking, attn.q_norm(q), attn.k_norm(k), v, tokens, queries), None

    def heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Split [..., n H d] into n tensors [H, T, d] that share its memory."""
        attn = self.attention
        each = projected.view(
            -1, projected.shape[-1] // (attn.num_heads * attn.head_dim), attn.num_heads, attn.head_dim
        )
        return each.permute(1, 2, 0, 3).unbind(0)

    def drop_images(self, drop_path: nn.Module, x: Tensor, images: Images) -> Tensor:
        """Drop whole images, even if their lengths differ."""
        if images.equal or not self.training or isinstance(drop_path, nn.Identity):
            return drop_path(x)
        return x * of_tokens(drop_path(x.new_ones(images.B, 1)), images, x.shape[0])

    def given_r(self, images: Images) -> int | None:
        """The r of each image if it is given. None: counts decide."""
        if self.r is None:
            return 0 if self.theta is None else None
        return min(self.r, largest_r(images.N, self.num_prefix_tokens))

    def r_of(self, images: Images) -> int | str:
        """The r of each image as :func:`ops.assign` takes it: a number if given, else "image" or "batch". The three
        ways to adapt differ only here."""
        given = self.given_r(images)
        return self.config.adapt if given is None else given

    def match(self, keys: Tensor, tokens: Packed) -> ops.Match | None:
        """Find partners by the keys that attention uses (after ``k_norm``). None: r is known to be 0."""
        if self.given_r(tokens.images) == 0:
            return None
        options = (self.num_prefix_tokens, self.by_size, self.theta, self.config.backend)
        return ops.match(keys, tokens.sizes, tokens.images, *options)

    def assign(self, pairs: ops.Match, copy: ops.HostCopy | None, images: Images) -> Assignment | None:
        """Decide which tokens merge; None if none do. If r depends on counts, the host waits for them here: they had
        time to arrive while attention ran."""
        _check_exporter(None if copy is None else self.config.adapt)
        T, one_r, given = pairs.partner.shape[0], self.config.adapt != "image", self.given_r(images)
        left: int | None = None  # a compiled graph reads it from the device
        if given is not None:
            left = T - images.B * given
        elif copy is not None and (one_r or not torch.compiler.is_compiling()):
            removed = int(ops.read(copy).sum())
            if one_r and images.B:
                removed -= removed % images.B  # each image removes the mean, rounded down
            if removed == 0:
                return None
            left = T - removed
        options = (self.num_prefix_tokens, left, one_r, self.config.backend)
        return ops.assign(pairs, self.r_of(images), images, *options)

    def merge(self, tokens: Packed, attended: Tensor, assignment: Assignment) -> tuple[Packed, Tensor]:
        """Add ``attended`` to x and merge; returns the merged tokens and their norm for the MLP."""
        images = tokens.images
        if assignment.order is not None and self._fuses(tokens.x, attended):
            gamma = scale_of(self.ls1, tokens.x)
            merged, y = ops.add_merge_norm(tokens, rows(attended), gamma, assignment, self.norm2)
            return merged, merged.images.shaped(y)
        x = images.shaped(tokens.x) + self.drop_images(self.drop_path1, self.ls1(attended), images)
        merged = ops.merge(tokens.with_x(rows(x)), assignment, self.config.backend)
        return merged, self.norm2(merged.images.shaped(merged.x))

    def _fuses(self, x: Tensor, attended: Tensor) -> bool:
        """Whether one kernel can compute residual sum, merge and norm: no gradient is needed, and the modules are
        plain."""
        if torch.is_grad_enabled():
            parameters = (*self.norm2.parameters(), *self.ls1.parameters())
            if any(tensor.requires_grad for tensor in (x, attended, *parameters)):
                return False
        if every_module._has_any_global_hook():
            return False
        drops = self.training and not isinstance(self.drop_path1, nn.Identity)
        return is_plain(self.norm2, self.ls1) and is_own(self.drop_path1, nn.Identity, DropPath) and not drops

    def attended(
        self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Packed, queries: Images | None = None
    ) -> Tensor:
        """The rest of timm's ``Attention``, once q, k and v are known. ``y`` [..., C]: the normalised tokens that the
        queries come from; ``queries``: where the queries of each image lie (None: where its tokens do)."""
        attn = self.attention
        return attn.proj_drop(attn.proj(self.mix(y, q, k, v, tokens, queries)))

    def mix(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Packed, queries: Images | None = None) -> Tensor:
        """Attention before the projection."""
        attn, images = self.attention, tokens.images
        n = None if self.config.proportional_attention is False else tokens.sizes
        dropout_p = attn.attn_drop.p if attn.fused_attn and attn.training else 0.0
        drop = None if attn.fused_attn or is_idle(attn.attn_drop) else attn.attn_drop
        if not attn.fused_attn and attn.scale != attn.head_dim**-0.5:  # timm's fused attention reads no scale
            q = q * (attn.scale * attn.head_dim**0.5)
        options = (dropout_p, attn.fused_attn, self.config.backend, tokens.log2_sizes, drop)
        mixed = ops.attention(q, k, v, n, images, queries, *options).transpose(0, 1).flatten(1)
        x = attn.norm((images if queries is None else queries).shaped(mixed))
        return x if attn.gate is None else x * attn.gate(y).sigmoid()


def inside(module: nn.Module, cls: type[nn.Module]) -> Any:
    """Return ``module`` if it is of class ``cls``, else the first such module inside it, or None if there is none."""
    return module if isinstance(module, cls) else next((m for m in module.modules() if isinstance(m, cls)), None)


def handed_on(tokens: Packed, x: Tensor) -> Packed:
    """The tokens with the values x, [B, N, C] or [T, C], that hooks and wrappers may have changed."""
    x = rows(x)
    if not torch.compiler.is_compiling() and x.shape != tokens.x.shape:
        raise ValueError(f"hooks or wrappers left tokens [T, C] of {list(x.shape)}; want {list(tokens.x.shape)}")
    return tokens.with_x(x)


@torch.compiler.assume_constant_result  # a compiler evaluates this once, and so assumes that no ONNX export is running
def _check_exporter(adapt: str | None) -> None:
    """Refuse tracers and exporters that would fix how many tokens merge. ``adapt``: the way to adapt; None: r is given,
    so that no count decides."""
    traced, exported = torch.jit.is_tracing(), torch.compiler.is_exporting()
    if not (traced or exported):
        return
    onnx = torch.onnx.is_in_onnx_export()
    if traced and onnx:
        raise ValueError("torch.onnx.export with dynamo=False has no stable sort: leave dynamo at True")
    if adapt == "batch" or (adapt == "image" and (traced or onnx)):
        what = "torch.jit.trace" if traced else "torch.onnx.export" if onnx else "torch.export"
        how = f'how many tokens merge with adapt="{adapt}"'
        raise ValueError(f'{what} cannot leave open {how}: patch with adapt="static"')


def _no_attention(module: nn.Module) -> str:
    return (
        f"attn is {type(module).__name__}, which a block of a patched model cannot run; want Attention of timm, or a "
        f"wrapper around it that passes keyword arguments on"
    )


def is_plain(norm: nn.Module, scale: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether one kernel can compute the residual sum through ``scale`` and its ``norm``."""
    scales = is_own(scale, nn.Identity, LayerScale) or (hasattr(scale, "gamma_like") and not is_changed(scale))
    return scales and is_own(norm, nn.LayerNorm, LayerNorm)


def is_own(module: nn.Module, *classes: type) -> bool:
    """Whether a module is exactly of one of these classes and does nothing else."""
    return type(module) in classes and not is_changed(module)


def is_matrix(linear: nn.Module) -> bool:
    """Whether a linear layer is only a weight and a bias, so that a slice of both computes a slice of the output."""
    return is_own(linear, nn.Linear) and type(linear.weight) in (Tensor, nn.Parameter)


def is_idle(dropout: nn.Module) -> bool:
    """Whether a dropout drops nothing and has no hooks."""
    return is_own(dropout, nn.Dropout, nn.Identity) and not (dropout.training and getattr(dropout, "p", 0.0) > 0)


_CALLED_AROUND = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_changed(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own make this module do something other than its class."""
    own = module.__dict__
    return "forward" in own or any(own.get(hooks) for hooks in _CALLED_AROUND)


def scale_of(scale: nn.Module, x: Tensor) -> Tensor | None:
    """The factor [C] of a plain LayerScale; None if there is no factor."""
    gamma_like = getattr(scale, "gamma_like", None)
    return getattr(scale, "gamma", None) if gamma_like is None else gamma_like(x)


def rows(x: Tensor) -> Tensor:
    """View [B, N, C] or [T, C] as [T, C]."""
    return x.flatten(0, -2)
