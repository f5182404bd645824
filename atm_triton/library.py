"""The operations as torch sees them, ``torch.ops.atm_triton``: what tracing, compiling and autograd go through.

One function an operation, for both devices: the Triton kernels on CUDA; on the CPU the reference, or the kernels where
Triton's interpreter is on. Arguments are taken as they come: ``ops.py`` has checked them. With ``cu_seqlens`` int32
[B + 1] images are packed, [T, C] in the place of [B, N, C], and none has more than ``longest`` tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from atm_triton import reference

_library = Library("atm_triton", "DEF")  # the operations live as long as it does


@cache
def interpreting() -> bool:
    """Whether Triton runs its kernels by its interpreter (TRITON_INTERPRET=1 before Python starts)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@cache
def _kernels() -> SimpleNamespace:
    from atm_triton.kernels import assign, attention, match, merge, unmerge  # where they run, Triton is there

    launchers = (match.match, assign.assign, assign.lists, merge.merge, unmerge.unmerge, attention.attention)
    return SimpleNamespace(**{launcher.__name__: launcher for launcher in launchers})


def _on_kernels(x: Tensor) -> bool:
    return x.is_cuda or interpreting()


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def operation(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the implementation of ``torch.ops.atm_triton.<its name>`` on CUDA and on the CPU."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(run.__name__ + signature)
        for device in ("CUDA", "CPU"):  # a compiler that meets an operation outside a graph must not look into it
            _library.impl(run.__name__, torch.compiler.disable(run), device)
        return run

    return register


def fake(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function the shapes-only form of the operation of its name, less a leading ``fake_``."""
    return register_fake(f"atm_triton::{run.__name__.removeprefix('fake_')}", run, lib=_library)


@operation(
    "(Tensor keys, Tensor? sizes, int num_prefix, bool by_size, float theta, Tensor? cu_seqlens=None, "
    "SymInt longest=0) -> (Tensor, Tensor, Tensor)"
)
def match(
    keys: Tensor,
    sizes: Tensor | None,
    num_prefix: int,
    by_size: bool,
    theta: float,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """similarity float32 and partner int32 [B, N], counts int64 [B]."""
    packed = cu_seqlens is not None
    if _on_kernels(keys):
        keys, sizes = _one_batch(packed, keys, sizes)
        with _device_of(keys):
            found = _kernels().match(keys, sizes, num_prefix, by_size, theta, cu_seqlens, longest)
        return (found[0][0], found[1][0], found[2]) if packed else found
    if packed:
        similarity, partner = reference.match_packed(keys, sizes, num_prefix, by_size, cu_seqlens)
        return similarity, partner, reference.count(similarity, theta, cu_seqlens)
    B, _, N, _ = keys.shape
    groups = reference.group(sizes, B, N, num_prefix, by_size, keys.device)
    similarity, partner = reference.match(keys, *groups)
    return similarity, partner, reference.count(similarity, theta)


def _one_batch(packed: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the launchers want: packed images as a batch of one."""
    return tuple(tensor.unsqueeze(0) if packed and tensor is not None else tensor for tensor in tensors)


def _images(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many images the tokens, dense [B, N, ...] or packed [T, ...], are of."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@fake
def fake_match(
    keys: Tensor,
    sizes: Tensor | None,
    num_prefix: int,
    by_size: bool,
    theta: float,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    *images, _, N, _ = keys.shape
    B = _images(keys, cu_seqlens)
    similarity = keys.new_empty((*images, N), dtype=torch.promote_types(keys.dtype, torch.float32))
    return similarity, keys.new_empty((*images, N), dtype=torch.int32), keys.new_empty(B, dtype=torch.int64)


@operation("(Tensor similarity, Tensor partner, SymInt r, int num_prefix) -> (Tensor, Tensor, Tensor)")
def assign(similarity: Tensor, partner: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """assignment int32 [B, N], and its lists: tokens int32 [B N], spans int32 [B (N - r), 2]."""
    if _on_kernels(partner):
        with _device_of(partner):
            return _kernels().assign(similarity, partner, r, num_prefix)[:3]
    assignment = reference.assign(similarity, partner, r, num_prefix)
    return assignment, *reference.lists(assignment, partner.shape[1] - r)


@fake
def fake_assign(similarity: Tensor, partner: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    B, N = partner.shape
    return torch.empty_like(partner), partner.new_empty(B * N), partner.new_empty((B * (N - r), 2))


@operation(
    "(Tensor similarity, Tensor partner, Tensor counts, float theta, int num_prefix, Tensor? cu_seqlens=None, "
    "SymInt longest=0, SymInt slots=-1) -> (Tensor, Tensor, Tensor, Tensor)"
)
def assign_each(
    similarity: Tensor,
    partner: Tensor,
    counts: Tensor,
    theta: float,
    num_prefix: int,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
    slots: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each image merges its candidates, ``counts`` int64 [B]: assignment int32 as ``partner``, tokens, spans, and int32
    [B + 1]: where each image then begins. ``slots``: of all images; -1: read it here, from the device."""
    packed = cu_seqlens is not None
    slots = partner.numel() - int(counts.sum()) if slots < 0 else slots
    if _on_kernels(partner):
        similarity, partner = _one_batch(packed, similarity, partner)
        with _device_of(partner):
            assignment, *others = _kernels().assign(similarity, partner, counts, num_prefix, cu_seqlens, longest, slots)
        return assignment[0] if packed else assignment, *others
    assignment = reference.assign_each(similarity, partner, theta, num_prefix, cu_seqlens)
    begin = reference.new_cu_seqlens(counts, cu_seqlens.diff() if packed else partner.shape[1])
    return assignment, *reference.lists(assignment, begin, cu_seqlens), begin


@fake
def fake_assign_each(
    similarity: Tensor,
    partner: Tensor,
    counts: Tensor,
    theta: float,
    num_prefix: int,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
    slots: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = torch.library.get_ctx().new_dynamic_size() if slots < 0 else slots
    begin, tokens = partner.new_empty(counts.shape[0] + 1), partner.new_empty(partner.numel())
    return torch.empty_like(partner), tokens, partner.new_empty((slots, 2)), begin


@operation(
    "(Tensor assignment, SymInt M, Tensor? cu_seqlens=None, Tensor? new_cu_seqlens=None, SymInt longest=0) -> "
    "(Tensor, Tensor)"
)
def lists(
    assignment: Tensor,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """tokens int32 [all tokens] and spans int32 [all slots, 2] of any assignment. ``M``: the slots of each image, or of
    all images where ``new_cu_seqlens`` tells where those of each begin."""
    if _on_kernels(assignment):
        (assignment,) = _one_batch(cu_seqlens is not None, assignment)
        with _device_of(assignment):
            return _kernels().lists(assignment, M, cu_seqlens, new_cu_seqlens, longest)
    return reference.lists(assignment, M if new_cu_seqlens is None else new_cu_seqlens, cu_seqlens)


@fake
def fake_lists(
    assignment: Tensor,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    slots = M if new_cu_seqlens is not None else _images(assignment, cu_seqlens) * M
    return assignment.new_empty(assignment.numel()), assignment.new_empty((slots, 2))


@operation(
    "(Tensor x, Tensor? sizes, Tensor assignment, Tensor tokens, Tensor spans, SymInt M, Tensor? cu_seqlens=None, "
    "Tensor? new_cu_seqlens=None, SymInt longest=0) -> (Tensor, Tensor, Tensor)"
)
def merge(
    x: Tensor,
    sizes: Tensor | None,
    assignment: Tensor,
    tokens: Tensor,
    spans: Tensor,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged x [B, M, C], its sizes float32 [B, M] and their log2; packed [slots, C] with ``new_cu_seqlens``."""
    if _on_kernels(x):
        with _device_of(x):
            merged, _, *of_sizes = _kernels().merge(x.reshape(-1, x.shape[-1]), sizes, tokens, spans)
        return _shaped((merged, *of_sizes), _images(x, cu_seqlens), M, new_cu_seqlens)
    merged, new_sizes = reference.merge(
        x, sizes, assignment, M if new_cu_seqlens is None else new_cu_seqlens, cu_seqlens
    )
    return merged, new_sizes, new_sizes.log2()


def _shaped(rows: tuple[Tensor, ...], B: int, M: int, new_cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Rows of all slots as images of M, unless they are packed."""
    return rows if new_cu_seqlens is not None else tuple(row.view(B, M, *row.shape[1:]) for row in rows)


@fake
def fake_merge(
    x: Tensor,
    sizes: Tensor | None,
    assignment: Tensor,
    tokens: Tensor,
    spans: Tensor,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    slots = (_images(x, cu_seqlens), M) if new_cu_seqlens is None else (spans.shape[0],)
    merged_sizes = x.new_empty(slots, dtype=torch.float32)
    return x.new_empty((*slots, x.shape[-1])), merged_sizes, torch.empty_like(merged_sizes)


def _keep_for_merge(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, sizes, assignment, _, _, _, cu_seqlens, new_cu_seqlens, longest = inputs
    ctx.dtype, ctx.longest = x.dtype, longest
    ctx.save_for_backward(sizes, assignment, output[1], cu_seqlens, new_cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])


def _merge_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    """d x'[slot] / d x_i = n_i / n'[slot]: a gather."""
    sizes, assignment, merged_sizes, *images = ctx.saved_tensors
    share = grad / merged_sizes.unsqueeze(-1)
    of_token = torch.ops.atm_triton.unmerge(share, assignment, *images, ctx.longest)
    if sizes is not None:
        of_token = of_token * sizes.unsqueeze(-1)
    return of_token.to(ctx.dtype), *[None] * 8


register_autograd("atm_triton::merge", _merge_backward, setup_context=_keep_for_merge, lib=_library)


@operation(
    "(Tensor x, Tensor attended, Tensor? gamma, Tensor? sizes, Tensor assignment, Tensor tokens, Tensor spans, "
    "Tensor? weight, Tensor? bias, float eps, SymInt M, Tensor? cu_seqlens=None, Tensor? new_cu_seqlens=None) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
def add_merge_norm(
    x: Tensor,
    attended: Tensor,
    gamma: Tensor | None,
    sizes: Tensor | None,
    assignment: Tensor,
    tokens: Tensor,
    spans: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + gamma * attended, merged as by :func:`merge`; its LayerNorm; its sizes float32; their log2."""
    C = x.shape[-1]
    if _on_kernels(x):
        rows, update = x.reshape(-1, C), attended.reshape(-1, C)
        with _device_of(x):
            out = _kernels().merge(rows, sizes, tokens, spans, update, gamma, (weight, bias, eps))
        return _shaped(out, _images(x, cu_seqlens), M, new_cu_seqlens)
    update = attended.float() if gamma is None else attended.float() * gamma.float()
    slots = M if new_cu_seqlens is None else new_cu_seqlens
    merged, new_sizes = reference.merge(x.float() + update, sizes, assignment, slots, cu_seqlens)
    merged = merged.to(x.dtype)
    affine = (None if parameter is None else parameter.float() for parameter in (weight, bias))
    normed = F.layer_norm(merged.float(), (C,), *affine, eps)
    return merged, normed.to(x.dtype), new_sizes, new_sizes.log2()


@fake
def fake_add_merge_norm(
    x: Tensor,
    attended: Tensor,
    gamma: Tensor | None,
    sizes: Tensor | None,
    assignment: Tensor,
    tokens: Tensor,
    spans: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    merged, *of_sizes = fake_merge(x, sizes, assignment, tokens, spans, M, cu_seqlens, new_cu_seqlens)
    return merged, torch.empty_like(merged), *of_sizes


@operation(
    "(Tensor x, Tensor assignment, Tensor? cu_seqlens=None, Tensor? x_cu_seqlens=None, SymInt longest=0) -> Tensor"
)
def unmerge(
    x: Tensor,
    assignment: Tensor,
    cu_seqlens: Tensor | None = None,
    x_cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """x [B, M, C] and assignment int32 [B, N] to [B, N, C]; x packed [slots, C] with ``x_cu_seqlens``, assignment and
    result packed with ``cu_seqlens``."""
    if _on_kernels(x):
        (rows,), (slot,) = _one_batch(x_cu_seqlens is not None, x), _one_batch(cu_seqlens is not None, assignment)
        with _device_of(x):
            out = _kernels().unmerge(rows, slot, cu_seqlens, x_cu_seqlens, longest)
        return out if cu_seqlens is None else out[0]
    return reference.unmerge(x, assignment, cu_seqlens, x_cu_seqlens)


@fake
def fake_unmerge(
    x: Tensor,
    assignment: Tensor,
    cu_seqlens: Tensor | None = None,
    x_cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    return x.new_empty((*assignment.shape, x.shape[-1]))


def _keep_for_unmerge(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, assignment, cu_seqlens, x_cu_seqlens, longest = inputs
    ctx.M, ctx.longest = x.shape[-2], longest  # packed: of all images
    ctx.save_for_backward(assignment, cu_seqlens, x_cu_seqlens)


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple:
    """A slot sums what its tokens got: the mean over its tokens, times their number."""
    assignment, *images = ctx.saved_tensors
    tokens, spans = torch.ops.atm_triton.lists(assignment, ctx.M, *images, ctx.longest)
    arguments = (grad.contiguous(), None, assignment, tokens, spans, ctx.M, *images, ctx.longest)
    mean, number, _ = torch.ops.atm_triton.merge(*arguments)
    return (mean * number.unsqueeze(-1)).to(grad.dtype), *[None] * 4


register_autograd("atm_triton::unmerge", _unmerge_backward, setup_context=_keep_for_unmerge, lib=_library)


@operation("(Tensor q, Tensor k, Tensor v, Tensor? log2_sizes, Tensor? cu_seqlens=None, SymInt longest=0) -> Tensor")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """As q [B, H, Nq, d], in memory [B, Nq, H, d]; without a derivative. Where k and v are packed [H, T, d], q may be
    so too, or dense: the first Nq tokens of each image."""
    scale = q.shape[-1] ** -0.5
    if _on_kernels(q):
        k, v, log2_sizes = _one_batch(cu_seqlens is not None, k, v, log2_sizes)
        (query,) = _one_batch(q.dim() == 3, q)
        with _device_of(q):
            out = _kernels().attention(query, k, v, log2_sizes, scale, cu_seqlens, longest)
        return out[0] if q.dim() == 3 else out
    sizes = None if log2_sizes is None else log2_sizes.exp2()
    if cu_seqlens is None:
        out = reference.attention(q, k, v, sizes, scale)
    else:
        out = reference.attention_packed(q, k, v, sizes, cu_seqlens, scale=scale)
    return out.transpose(-3, -2).contiguous().transpose(-3, -2)


@fake
def fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    *images, H, Nq, d = q.shape
    return q.new_empty((*images, Nq, H, d)).transpose(-3, -2)
