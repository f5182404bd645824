"""The operations as torch sees them, ``torch.ops.atm_triton``: what tracing, compiling and autograd go through.

One function an operation, for both devices: the Triton kernels on CUDA; on the CPU the reference, or the kernels where
Triton's interpreter is on. Arguments are taken as they come: ``ops.py`` has checked them.
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
        for device in ("CUDA", "CPU"):
            _library.impl(run.__name__, run, device)
        return run

    return register


def fake(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function the shapes-only form of the operation of its name, less a leading ``fake_``."""
    return register_fake(f"atm_triton::{run.__name__.removeprefix('fake_')}", run, lib=_library)


@operation("(Tensor keys, Tensor? sizes, int num_prefix, bool by_size, float theta) -> (Tensor, Tensor, Tensor)")
def match(
    keys: Tensor, sizes: Tensor | None, num_prefix: int, by_size: bool, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """similarity float32 and partner int32 [B, N], counts int64 [B]."""
    if _on_kernels(keys):
        with _device_of(keys):
            return _kernels().match(keys, sizes, num_prefix, by_size, theta)
    B, _, N, _ = keys.shape
    groups = reference.group(sizes, B, N, num_prefix, by_size, keys.device)
    similarity, partner = reference.match(keys, *groups)
    return similarity, partner, reference.count(similarity, theta)


@fake
def fake_match(
    keys: Tensor, sizes: Tensor | None, num_prefix: int, by_size: bool, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, N, _ = keys.shape
    similarity = keys.new_empty((B, N), dtype=torch.promote_types(keys.dtype, torch.float32))
    return similarity, keys.new_empty((B, N), dtype=torch.int32), keys.new_empty(B, dtype=torch.int64)


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


@operation("(Tensor assignment, SymInt M) -> (Tensor, Tensor)")
def lists(assignment: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """tokens int32 [B N] and spans int32 [B M, 2] of any assignment."""
    if _on_kernels(assignment):
        with _device_of(assignment):
            return _kernels().lists(assignment, M)
    return reference.lists(assignment, M)


@fake
def fake_lists(assignment: Tensor, M: int) -> tuple[Tensor, Tensor]:
    B, N = assignment.shape
    return assignment.new_empty(B * N), assignment.new_empty((B * M, 2))


@operation(
    "(Tensor x, Tensor? sizes, Tensor assignment, Tensor tokens, Tensor spans, SymInt M) -> (Tensor, Tensor, Tensor)"
)
def merge(
    x: Tensor, sizes: Tensor | None, assignment: Tensor, tokens: Tensor, spans: Tensor, M: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged x [B, M, C], its sizes float32 [B, M] and their log2."""
    B, N, C = x.shape
    if _on_kernels(x):
        with _device_of(x):
            merged, _, new_sizes, log2_sizes = _kernels().merge(x.reshape(B * N, C), sizes, tokens, spans)
        return merged.view(B, M, C), new_sizes.view(B, M), log2_sizes.view(B, M)
    merged, new_sizes = reference.merge(x, sizes, assignment, M)
    return merged, new_sizes, new_sizes.log2()


@fake
def fake_merge(
    x: Tensor, sizes: Tensor | None, assignment: Tensor, tokens: Tensor, spans: Tensor, M: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, C = x.shape
    merged_sizes = x.new_empty((B, M), dtype=torch.float32)
    return x.new_empty((B, M, C)), merged_sizes, torch.empty_like(merged_sizes)


def _keep_for_merge(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, sizes, assignment, *_ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(sizes, assignment, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _merge_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    """d x'[slot] / d x_i = n_i / n'[slot]: a gather."""
    sizes, assignment, merged_sizes = ctx.saved_tensors
    of_token = torch.ops.atm_triton.unmerge(grad / merged_sizes.unsqueeze(-1), assignment)
    if sizes is not None:
        of_token = of_token * sizes.unsqueeze(-1)
    return of_token.to(ctx.dtype), None, None, None, None, None


register_autograd("atm_triton::merge", _merge_backward, setup_context=_keep_for_merge, lib=_library)


@operation(
    "(Tensor x, Tensor attended, Tensor? gamma, Tensor? sizes, Tensor assignment, Tensor tokens, Tensor spans, "
    "Tensor? weight, Tensor? bias, float eps, SymInt M) -> (Tensor, Tensor, Tensor, Tensor)"
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + gamma * attended, merged [B, M, C]; its LayerNorm; its sizes float32 [B, M]; their log2."""
    B, N, C = x.shape
    if _on_kernels(x):
        rows, update = x.reshape(B * N, C), attended.reshape(B * N, C)
        with _device_of(x):
            out = _kernels().merge(rows, sizes, tokens, spans, update, gamma, (weight, bias, eps))
        return tuple(tensor.view(B, M, *tensor.shape[1:]) for tensor in out)
    update = attended.float() if gamma is None else attended.float() * gamma.float()
    merged, new_sizes = reference.merge(x.float() + update, sizes, assignment, M)
    merged = merged.to(x.dtype)
    affine = (None if parameter is None else parameter.float() for parameter in (weight, bias))
    normed = F.layer_norm(merged.float(), (C,), *affine, eps)
    return merged, normed.to(x.dtype), new_sizes, new_sizes.log2()


@fake
def fake_add_merge_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, C = x.shape
    M = arguments[-1]
    merged, merged_sizes = x.new_empty((B, M, C)), x.new_empty((B, M), dtype=torch.float32)
    return merged, torch.empty_like(merged), merged_sizes, torch.empty_like(merged_sizes)


@operation("(Tensor x, Tensor assignment) -> Tensor")
def unmerge(x: Tensor, assignment: Tensor) -> Tensor:
    """x [B, M, C] and assignment int32 [B, N] to [B, N, C]."""
    if _on_kernels(x):
        with _device_of(x):
            return _kernels().unmerge(x, assignment)
    return reference.unmerge(x, assignment)


@fake
def fake_unmerge(x: Tensor, assignment: Tensor) -> Tensor:
    return x.new_empty((*assignment.shape, x.shape[2]))


def _keep_for_unmerge(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.M = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple:
    """A slot sums what its tokens got: the mean over its tokens, times their number."""
    (assignment,) = ctx.saved_tensors
    tokens, spans = torch.ops.atm_triton.lists(assignment, ctx.M)
    mean, number, _ = torch.ops.atm_triton.merge(grad.contiguous(), None, assignment, tokens, spans, ctx.M)
    return (mean * number.unsqueeze(-1)).to(grad.dtype), None


register_autograd("atm_triton::unmerge", _unmerge_backward, setup_context=_keep_for_unmerge, lib=_library)


@operation("(Tensor q, Tensor k, Tensor v, Tensor? log2_sizes) -> Tensor")
def attention(q: Tensor, k: Tensor, v: Tensor, log2_sizes: Tensor | None) -> Tensor:
    """[B, H, Nq, d], in memory [B, Nq, H, d]; without a derivative."""
    scale = q.shape[-1] ** -0.5
    if _on_kernels(q):
        with _device_of(q):
            return _kernels().attention(q, k, v, log2_sizes, scale)
    sizes = None if log2_sizes is None else log2_sizes.exp2()
    return reference.attention(q, k, v, sizes, scale).transpose(1, 2).contiguous().transpose(1, 2)


@fake
def fake_attention(q: Tensor, k: Tensor, v: Tensor, log2_sizes: Tensor | None) -> Tensor:
    B, H, Nq, d = q.shape
    return q.new_empty((B, Nq, H, d)).transpose(1, 2)
