"""The operations of a merge step, each computed by the backend that the configuration asks for.

This file checks and dispatches; the formulas are in ``reference.py``. Tokens are rows [T, C] of images that lie as
``images`` says, keys are [H, T, d]. ``sizes`` float32 [T] may be None as long as every token stands for one patch.

Compilers and autograd see the operations ``torch.ops.atm_triton`` at the end of this file, one function each for both
devices: on CUDA they run the Triton kernels; on the CPU the reference, or the kernels if Triton's interpreter is on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library, infer_schema, register_autograd, register_fake

from atm_triton import reference
from atm_triton.packed import Assignment, Images, Packed

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_PREFIX, KERNEL_CHANNELS = 16, 128  # the most protected tokens, and channels per head, for the kernels


class Match(NamedTuple):
    """``similarity`` [T] (float32 or wider) and ``partner`` [T] int32, as :func:`reference.match` returns them.
    ``counts`` [B] int64: the number of candidates, pairs at or above ``theta``. Both are None if no theta was given."""

    similarity: Tensor
    partner: Tensor
    counts: Tensor | None
    theta: float | None = None


@cache
def explain(backend: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Which backend, "reference" or "triton", computes tensors of a dtype on a device ("cpu", "cuda"), and why.

    Raises:
        ValueError: "triton" was requested and cannot run.
    """
    if backend == "reference":
        return "reference", "asked for"
    obstacle = _obstacle(device, dtype)
    if backend == "triton":
        if obstacle is not None:
            raise ValueError(f'backend="triton" cannot run: {obstacle}; or use "auto" or "reference"')
        return "triton", "asked for"
    if device == "cpu":
        return "reference", "tensors are on the CPU"
    return ("triton", "CUDA tensors, and Triton is installed") if obstacle is None else ("reference", obstacle)


def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, and what would help."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 or float32, not {str(dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "Triton is not installed; install triton (Linux)"
    if device == "cpu" and not interpreting():
        return "tensors are on the CPU; move them to a GPU, or set TRITON_INTERPRET=1 before Python starts"
    if device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; take float16 or float32"
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for {device}; move the tensors to a CUDA device"
    return None


def runs_kernels(backend: str, x: Tensor) -> bool:
    """Whether the Triton kernels compute on ``x``."""
    if not _takes_kernels(backend, x.device.type, x.dtype):
        return False
    follower = None if torch.compiler.is_compiling() else _follower()
    if follower is not None and backend == "triton":
        raise ValueError(f'backend="triton" cannot run: {follower} cannot follow kernels; use "auto" or "reference"')
    return follower is None


def _follower() -> str | None:
    """The tracer or transform that follows every operation of a pass but cannot see into a kernel, or None."""
    if torch.jit.is_tracing():  # it would record the sizes of this launch as constants
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return "forward-mode differentiation" if torch.autograd.forward_ad._current_level >= 0 else None


def _traced(x: Tensor) -> bool:
    """Whether a compiler traces tensors on the CPU. If images differ in length, it is shown the operations and
    not the reference, which they run there, because its inner shapes depend on numbers known only at run time."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not interpreting()


def _fits_kernels(backend: str, x: Tensor, num_prefix: int = 0) -> bool:
    """Whether the kernels run on ``x`` [..., d] with this backend. "auto" takes them wherever they support the shape.

    Raises:
        ValueError: backend="triton", and they do not support it.
    """
    if not runs_kernels(backend, x):
        return False
    over = f"num_prefix={num_prefix} is above {KERNEL_PREFIX}" if num_prefix > KERNEL_PREFIX else ""
    over = over or (f"d={x.shape[-1]} is above {KERNEL_CHANNELS}" if x.shape[-1] > KERNEL_CHANNELS else "")
    if over and backend == "triton":
        raise ValueError(f'backend="triton" cannot run: {over}, the most that the kernels take; use "auto"')
    return not over


@torch.compiler.assume_constant_result  # a compiled graph is for one backend, device and dtype
def _takes_kernels(backend: str, device: str, dtype: torch.dtype) -> bool:
    if explain(backend, device, dtype)[0] == "reference":
        return False
    onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    if onnx and backend == "triton":
        raise ValueError('backend="triton" cannot run: ONNX has no Triton kernels; use "auto" or "reference"')
    return not onnx


Result = TypeVar("Result")
_PLAIN = frozenset((Tensor, nn.Parameter, int, float, bool, type(None)))


def _call(run: Callable[..., Result], *arguments: Any) -> Result:
    """Call an operation. Eager inference goes past torch's dispatcher, which costs as much as a launch; tracing,
    autograd and tensor subclasses go through it."""
    return run(*arguments) if _plain(arguments) else getattr(torch.ops.atm_triton, _name(run)).default(*arguments)


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing needs to observe what happens to the arguments."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and _PLAIN.issuperset(map(type, arguments)) and not _any_needs_grad(arguments)


def _any_needs_grad(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def match(
    keys: Tensor,
    sizes: Tensor | None,
    images: Images,
    num_prefix: int,
    by_size: bool,
    theta: float | None = None,
    backend: str = "auto",
) -> Match:
    """Find each token's most similar partner, and count each image's candidates (Sections 3.1 to 3.3).

    Args:
        keys: [H, T, d], the keys of the block's attention. No gradient flows through the choice.
        num_prefix: number of protected tokens at the start of each image.
        by_size: size-distinctive instead of alternate grouping.
        theta: pairs at or above this cosine similarity are candidates, and are counted.

    Raises:
        ValueError, TypeError: arguments have another shape, dtype or device; theta is outside -1 .. 1; "triton" was
            requested for more protected tokens (16) or channels per head (128) than the kernels take ("auto" uses the
            reference then).
    """
    _check(keys.dim() == 3, "keys", keys, "[H, T, d]")
    _check_images("keys", keys, images)
    _check_sizes(sizes, keys.shape[1], keys)
    _check_prefix(num_prefix)
    if theta is not None and not -1 <= theta <= 1:
        raise ValueError(f"theta={theta} is outside -1 .. 1, the cosine similarities")
    keys = keys.detach()
    bound = 2.0 if theta is None else theta  # no similarity reaches 2
    if _fits_kernels(backend, keys, num_prefix) or (_traced(keys) and not images.equal):
        arguments = (keys, sizes, images.cu_seqlens, num_prefix, by_size, bound, images.N)
        similarity, partner, counts = _call(_match, *arguments)
        return Match(similarity=similarity, partner=partner, counts=None if theta is None else counts, theta=theta)
    with torch.no_grad(), _without_autocast(keys.device.type):  # 16-bit cosines would flip decisions
        similarity, partner = reference.match(keys, sizes, num_prefix, by_size, images)
        return Match(
            similarity=similarity,
            partner=partner,
            counts=None if theta is None else reference.count(similarity, theta, images),
            theta=theta,
        )


HostCopy = tuple[Tensor, torch.cuda.Event | None]


def to_host(r: Tensor) -> HostCopy:
    """Start copying ``r`` to the host. Queue other work, then :func:`read` it: only the copy is waited for."""
    if not r.is_cuda or torch.compiler.is_compiling():
        return r, None
    on_host = r.to("cpu", non_blocking=True)  # to pinned memory
    return on_host, torch.cuda.current_stream(r.device).record_event()


def read(copy: HostCopy) -> Tensor:
    on_host, copied = copy
    if copied is not None:
        copied.synchronize()
    return on_host


def assign(
    pairs: Match,
    r: int | Tensor | str,
    images: Images,
    num_prefix: int,
    num_slots: int | None,
    one_r: bool,
    backend: str = "auto",
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Assignment:
    """Let the ``r`` most similar tokens of each image join their partners.

    Args:
        pairs: from :func:`match` with the same ``images`` and ``num_prefix``.
        r: one number for all images, from 0 to the tokens in A; or int64 [B]; or the source: "image" for each image's
            own count in ``pairs``, "batch" for the mean of all counts, rounded down.
        num_slots: how many rows are left. None under a compiler, whose graph reads it from the device.
        one_r: r is the same for all images, so that images of equal length stay equally long.
        out: slots, order, spans and cu_seqlens of the merged images, for the kernels to write to.

    Raises:
        ValueError, TypeError: arguments have another shape, dtype or device; or r refers to counts and there are none.
    """
    _check_pairs(pairs, images, num_prefix, num_slots)
    r, mean, theta = _source_of_r(pairs, r, images)
    similarity, partner, cu_seqlens = pairs.similarity, pairs.partner, images.cu_seqlens
    equal = one_r and images.equal
    if not (runs_kernels(backend, similarity) or (_traced(partner) and not equal)):
        if num_slots is None:
            raise ValueError(
                'adapt="image" compiles where the kernels run, or on a CPU without them; use backend="auto"'
            )
        of_each = _of_each(r, mean, images, partner.device)
        slots, merged_cu_seqlens = reference.assign(similarity, partner, of_each, num_prefix, images)
        order = spans = None
    elif num_slots is not None and (out is not None or _plain((similarity, partner, r, cu_seqlens))):
        with device_of(partner):
            options = (num_prefix, images.N, num_slots, out, theta, mean)
            slots, order, spans, merged_cu_seqlens = _kernels().assign(similarity, partner, r, cu_seqlens, *options)
    else:
        of_each = _of_each(r, mean, images, partner.device)
        arguments = (
            similarity,
            partner,
            of_each,
            cu_seqlens,
            num_prefix,
            images.N,
            -1 if num_slots is None else num_slots,
        )
        slots, order, spans, merged_cu_seqlens = _call(_assign, *arguments)
        num_slots = spans.shape[0]
    N = num_slots // images.B if equal and images.B else images.N
    return Assignment(
        slots=slots,
        num_slots=num_slots,
        images=Images(cu_seqlens=merged_cu_seqlens, N=N, equal=equal),
        order=order,
        spans=spans,
    )


def _source_of_r(pairs: Match, r: int | Tensor | str, images: Images) -> tuple[int | Tensor, bool, float | None]:
    """Return r, or the counts to take it from; whether to take their mean; and, if a threshold amounts to the same,
    the similarity at or above which tokens join."""
    if isinstance(r, str):
        if r not in ("image", "batch"):
            raise ValueError(f'r={r!r} is unknown; want "image", "batch", a number or a tensor')
        if pairs.counts is None:
            raise ValueError(f"r={r!r} asks for counts, and nothing was counted; give match a theta")
        return pairs.counts, r == "batch", pairs.theta if r == "image" else None
    if isinstance(r, Tensor):
        _check(r.shape == (images.B,), "r", r, lambda: f"[{images.B}], one for each image")
        _check_dtype("r", r, torch.int64)
        _check_device("r", r, pairs.similarity, "similarity")
    return r, False, None


def _of_each(r: int | Tensor, mean: bool, images: Images, device: torch.device) -> Tensor:
    """The r of each image, int64 [B]."""
    if not isinstance(r, Tensor):
        return torch.full((images.B,), r, dtype=torch.int64, device=device)
    return reference.batch_r(r) if mean else r


def lists(assignment: Assignment) -> tuple[Tensor, Tensor]:
    """``order`` and ``spans`` of an assignment, computed if the reference left them out."""
    if assignment.order is None or assignment.spans is None:
        return reference.lists(assignment.slots, assignment.num_slots)
    return assignment.order, assignment.spans


def merge(tokens: Packed, assignment: Assignment, backend: str = "auto") -> Packed:
    """The size-weighted mean of the tokens in each slot (Definition 2).

    Raises:
        ValueError, TypeError: arguments have another shape, dtype or device.
    """
    x, sizes, slots, images = tokens.x, tokens.sizes, assignment.slots, assignment.images
    _check_tokens(tokens, assignment)
    if assignment.order is None and not runs_kernels(backend, x):
        merged, merged_sizes = reference.merge(x, sizes, slots, assignment.num_slots)
        return Packed(x=merged, sizes=merged_sizes, images=images)
    order, spans = lists(assignment)
    merged, merged_sizes, log2_sizes = _call(_merge, x, sizes, slots, order, spans, images.cu_seqlens)
    return Packed(x=merged, sizes=merged_sizes, images=images, log2_sizes=log2_sizes)


def add_merge_norm(
    tokens: Packed, attended: Tensor, gamma: Tensor | None, assignment: Assignment, norm: nn.LayerNorm
) -> tuple[Packed, Tensor]:
    """Merge x + gamma * attended, and compute the LayerNorm of the result [T', C], in one pass over memory. This is all
    that a block does between attention and MLP. Only the kernels do this, without a derivative.

    Args:
        attended: [T, C], what attention adds to x.
        gamma: [C], the LayerScale; None: 1.
        norm: the LayerNorm over C channels.

    Raises:
        ValueError, TypeError: arguments have another shape, dtype or device.
    """
    _check_tokens(tokens, assignment)
    _check_residual(tokens.x, attended, gamma, norm)
    images, merging = assignment.images, (assignment.slots, *lists(assignment), assignment.images.cu_seqlens)
    arguments = (tokens.x, attended, gamma, tokens.sizes, *merging, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        merged, normed, merged_sizes, log2_sizes = _call(_add_merge_norm, *arguments)
    return Packed(x=merged, sizes=merged_sizes, images=images, log2_sizes=log2_sizes), normed


def add_norm(
    x: Tensor, attended: Tensor, gamma: Tensor | None, norm: nn.LayerNorm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute x + gamma * attended [T, C] and its LayerNorm by the kernels, in one pass over memory. The sum is written
    to ``out`` if given. Other arguments as in :func:`add_merge_norm`."""
    _check_residual(x, attended, gamma, norm)
    with device_of(x):
        return _kernels().add_norm(x, attended, gamma, (norm.weight, norm.bias, norm.eps), out)


def stem(images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn images into tokens by the kernels: cut them into patches that do not overlap, embed these and add positions.
    Under autocast the embedding is computed in autocast's dtype.

    Args:
        images: [B, channels, H, W].
        weight: [C, channels, height, width] of the convolution that embeds a patch.
        bias: [C] or None.
        position: [N, C]: the prefix tokens, then what is added to each patch.
        out: rows [B N, C]; the tokens are written there if the dtypes agree.

    Returns:
        [B, N, C] in the dtype of ``position``.

    Raises:
        ValueError: images or positions have another shape.
    """
    channels, height, width = weight.shape[1:]
    patches = (images.shape[-2] // height) * (images.shape[-1] // width)
    _check(images.dim() == 4 and images.shape[1] == channels, "images", images, lambda: f"[B, {channels}, H, W]")
    fits = position.dim() == 2 and position.shape[0] >= patches and position.shape[1] == weight.shape[0]
    _check(fits, "position", position, lambda: f"[{patches} patches and the prefix tokens, {weight.shape[0]}]")
    dtype = autocast_dtype(images.device.type) or weight.dtype
    with device_of(images):
        bias = None if bias is None else bias.to(dtype)
        out = None if out is None or out.dtype != position.dtype else out.unflatten(0, (len(images), -1))
        return _kernels().stem(images, weight.to(dtype), bias, position, out)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute gelu(x weight^T + bias), under autocast in its dtype; by one kernel if that is faster than torch's two.
    The kernel rounds once, to the dtype of the result; before that it is within 2e-6 of the exact GELU.

    Args:
        x: rows [T, C].
        weight: [hidden, C].
        bias: [hidden] or None.

    Raises:
        ValueError: arguments have another shape or device.
    """
    _check(x.dim() == 2, "x", x, "[T, C]")
    _check(weight.dim() == 2 and weight.shape[1] == x.shape[1], "weight", weight, lambda: f"[hidden, {x.shape[1]}]")
    _check_device("weight", weight, x)
    if bias is not None:
        _check(bias.shape == weight.shape[:1], "bias", bias, lambda: f"[{len(weight)}]")
        _check_device("bias", bias, x)
    dtype = autocast_dtype(x.device.type)
    same = dtype is not None or weight.dtype == x.dtype
    if not same or not _kernels().pays(len(x), *weight.shape, dtype or x.dtype, x.device):
        return F.gelu(F.linear(x, weight, bias))
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with device_of(x):
        return _kernels().linear_gelu(x, weight, bias)


def unmerge(x: Tensor, slots: Tensor, backend: str = "auto") -> Tensor:
    """Give every token the value of its slot, or 0 if it was dropped: x [T', C] and slots [T] int32 to [T, C].

    Raises:
        ValueError, TypeError: arguments have another shape, dtype or device.
    """
    _check(x.dim() == 2, "x", x, "[T, C]")
    _check_slots(slots, slots.shape[:1], x)
    if runs_kernels(backend, x):
        return _call(_unmerge, x, slots)
    return reference.unmerge(x, slots)


compose = reference.compose


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    images: Images,
    queries: Images | None = None,
    dropout_p: float = 0.0,
    fused: bool = True,
    backend: str = "auto",
    log2_sizes: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T d^-0.5 + log sizes) v (Appendix A): q [H, Tq, d], k and v [H, T, d], sizes [T] float32.

    Under autocast q, k and v take its dtype, as in torch's own attention, while log n stays in float32. The kernel
    computes, with its derivative if one is needed, wherever log n is added or images differ in length. Torch's own
    attention computes the rest, and everything with dropout.

    Args:
        queries: where the queries of the images lie. None: where the keys lie.
        fused: use torch's scaled_dot_product_attention where the kernel does not compute.
        log2_sizes: log2 of ``sizes``, if already computed.
        drop: dropout for the written-out softmax, as in :func:`reference.attention`.

    Raises:
        ValueError, TypeError: arguments have another shape, dtype or device; "triton" was requested for more than 128
            channels per head.
    """
    queries = images if queries is None else queries
    _check(k.dim() == 3, "k", k, "[H, T, d]")
    H, T, d = k.shape
    _check(q.dim() == 3 and (q.shape[0], q.shape[2]) == (H, d), "q", q, lambda: f"[{H}, Tq, {d}], to go with k")
    _check(v.shape == k.shape, "v", v, "the shape of k")
    _check_images("k", k, images)
    _check_images("q", q, queries)
    _check_device("k", k, q, "q")
    _check_device("v", v, q, "q")
    _check_sizes(sizes, T, k)
    _check_sizes(log2_sizes, T, k, "log2_sizes")
    device = q.device.type
    if (dtype := autocast_dtype(device)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_dtype("k", k, q.dtype)
    _check_dtype("v", v, q.dtype)
    trains, drops = any(map(needs_grad, (q, k, v))), dropout_p > 0 or drop is not None
    equal = images.equal and queries.equal
    fixed = sizes is None or not needs_grad(sizes)  # the kernels have no derivative by sizes
    fitting = fixed and not drops and (sizes is not None or not equal)
    if fitting and (_fits_kernels(backend, q) or (_traced(q) and not equal and not trains)):
        log2_sizes = None if sizes is None else sizes.log2() if log2_sizes is None else log2_sizes
        arguments = (q, k, v, log2_sizes, queries.cu_seqlens, images.cu_seqlens, queries.N, images.N)
        return _call(_attention_forward, *arguments)[0] if trains else _call(_attention, *arguments)
    with _without_autocast(device):
        return reference.attention(q, k, v, sizes, images, queries, dropout_p=dropout_p, fused=fused, drop=drop)


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext()


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a kind of device. None: it is off."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def _check(holds: bool, name: str, tensor: Tensor, want: str | Callable[[], str]) -> None:
    """Raise ValueError unless ``holds``. ``want`` is a function if it names sizes: writing them out takes time, and
    makes them constants of a compiled graph."""
    if not holds:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; want {want if isinstance(want, str) else want()}")


def _check_dtype(name: str, tensor: Tensor, want: torch.dtype) -> None:
    if tensor.dtype != want:
        raise TypeError(f"{name} has dtype {tensor.dtype}; want {want}: {name}.to({want})")


def _check_images(name: str, heads: Tensor, images: Images) -> None:
    """Check the number of tokens if images have equal length. Otherwise only the device knows it."""
    B, N, T = images.B, images.N, heads.shape[1]
    if images.equal and B * N != T:
        raise ValueError(f"{name} has {T} tokens, {B} images of {N} tokens have {B * N}; want the same number")


def _check_prefix(num_prefix: int) -> None:
    if num_prefix < 0:
        raise ValueError(f"num_prefix={num_prefix} is below 0; want the number of protected tokens, 0 or more")


def _check_pairs(pairs: Match, images: Images, num_prefix: int, num_slots: int | None) -> None:
    similarity, partner = pairs.similarity, pairs.partner
    _check(similarity.dim() == 1 and similarity.shape == partner.shape, "partner", partner, "[T], as similarity")
    _check_prefix(num_prefix)
    if similarity.dtype != torch.float64:  # which the reference makes of float64 keys
        _check_dtype("similarity", similarity, torch.float32)
    _check_dtype("partner", partner, torch.int32)
    _check_device("partner", partner, similarity, "similarity")
    if num_slots is not None and not 0 <= num_slots <= partner.shape[0]:
        raise ValueError(f"num_slots={num_slots} is outside 0 .. {partner.shape[0]}, the rows that there are")


def _check_tokens(tokens: Packed, assignment: Assignment) -> None:
    x = tokens.x
    _check(x.dim() == 2, "x", x, "[T, C]")
    _check_slots(assignment.slots, x.shape[:1], x)
    _check_sizes(tokens.sizes, x.shape[0], x)
    if assignment.num_slots < 0:
        raise ValueError(f"num_slots={assignment.num_slots} is below 0; want the number of slots")


def _check_residual(x: Tensor, attended: Tensor, gamma: Tensor | None, norm: nn.LayerNorm) -> None:
    C = x.shape[-1]
    _check(attended.shape == x.shape, "attended", attended, "the shape of x")
    _check_device("attended", attended, x)
    for name, vector in (("gamma", gamma), ("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if vector is not None:
            _check(vector.shape == (C,), name, vector, lambda: f"[{C}], one for each channel of x")
            _check_device(name, vector, x)
    if norm.normalized_shape != (C,):
        raise ValueError(f"norm is over {list(norm.normalized_shape)}; want [{C}], the channels of x")


def _check_sizes(sizes: Tensor | None, T: int, like: Tensor, name: str = "sizes") -> None:
    if sizes is None:
        return
    _check(sizes.shape == (T,), name, sizes, lambda: f"[{T}], one for each token")
    _check_dtype(name, sizes, torch.float32)
    _check_device(name, sizes, like)


def _check_slots(slots: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check(slots.shape == shape, "slots", slots, lambda: f"{list(shape)}, one for each token")
    _check_dtype("slots", slots, torch.int32)
    _check_device("slots", slots, like)


def _check_device(name: str, tensor: Tensor, like: Tensor, others: str = "the tokens") -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, {others} on {like.device}; move one of them")


# The operations as torch sees them. Arguments are taken as they come: the functions above have checked them.

_library = Library("atm_triton", "DEF")  # the operations live as long as it does


@torch.compiler.assume_constant_result  # a compiler would trace what @cache wraps, and cannot
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 before Python starts)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@cache
def _kernels() -> SimpleNamespace:
    from atm_triton.kernels import assign, attention, attention_backward, linear_gelu, match, merge, stem, unmerge

    launchers = (match.match, assign.assign, merge.merge, merge.add_norm, unmerge.unmerge, attention.attention)
    others = (attention_backward.attention_backward, stem.stem, linear_gelu.linear_gelu, linear_gelu.pays)
    return SimpleNamespace(**{launcher.__name__: launcher for launcher in (*launchers, *others)})


def _on_kernels(x: Tensor) -> bool:
    return x.is_cuda or interpreting()


def device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may differ from that of the tensors."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _images(cu_seqlens: Tensor, N: int) -> Images:
    """Images for the reference. On the CPU it costs nothing to check whether all images have N tokens."""
    return Images(cu_seqlens=cu_seqlens, N=N, equal=bool((cu_seqlens.diff() == N).all()))


Run = TypeVar("Run", bound=Callable[..., Any])


def _name(run: Callable[..., Any]) -> str:
    return run.__name__.removeprefix("_")


def operation(run: Run) -> Run:
    """Register ``_<name>`` as the operation ``torch.ops.atm_triton.<name>`` on CUDA and on the CPU."""
    _library.define(_name(run) + infer_schema(run, mutates_args=()))
    for device in ("CUDA", "CPU"):  # a compiler that meets an operation outside a graph must not look into it
        _library.impl(_name(run), torch.compiler.disable(run), device)
    return run


def fake(run: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the fake implementation of the operation ``run``: shapes and dtypes only."""
    return register_fake(f"atm_triton::{_name(run)}", lib=_library)


@operation
def _match(
    keys: Tensor, sizes: Tensor | None, cu_seqlens: Tensor, num_prefix: int, by_size: bool, theta: float, N: int
) -> tuple[Tensor, Tensor, Tensor]:
    """similarity float32 and partner int32 [T], counts int64 [B]."""
    if _on_kernels(keys):
        with device_of(keys):
            return _kernels().match(keys, sizes, cu_seqlens, num_prefix, by_size, theta, N)
    images = _images(cu_seqlens, N)
    similarity, partner = reference.match(keys, sizes, num_prefix, by_size, images)
    return similarity, partner, reference.count(similarity, theta, images)


@fake(_match)
def _(keys: Tensor, sizes: Any, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, B = keys.shape[1], cu_seqlens.shape[0] - 1
    similarity = keys.new_empty(T, dtype=torch.promote_types(keys.dtype, torch.float32))
    return similarity, keys.new_empty(T, dtype=torch.int32), keys.new_empty(B, dtype=torch.int64)


@operation
def _assign(
    similarity: Tensor, partner: Tensor, r: Tensor, cu_seqlens: Tensor, num_prefix: int, N: int, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots and order int32 [T], spans int32 [T', 2], cu_seqlens int32 [B + 1] of the merged images. ``T``: T'; -1:
    read it here, from the device."""
    T = partner.shape[0] - int(r.sum()) if T < 0 else T
    if _on_kernels(partner):
        with device_of(partner):
            return _kernels().assign(similarity, partner, r, cu_seqlens, num_prefix, N, T)
    slots, merged_cu_seqlens = reference.assign(similarity, partner, r, num_prefix, _images(cu_seqlens, N))
    return slots, *reference.lists(slots, T), merged_cu_seqlens


@fake(_assign)
def _(
    similarity: Tensor, partner: Tensor, r: Tensor, cu_seqlens: Tensor, num_prefix: int, N: int, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    merged = torch.library.get_ctx().new_dynamic_size() if T < 0 else T
    slots, order, spans = torch.empty_like(partner), torch.empty_like(partner), partner.new_empty((merged, 2))
    return slots, order, spans, torch.empty_like(cu_seqlens)


@operation
def _merge(
    x: Tensor, sizes: Tensor | None, slots: Tensor, order: Tensor, spans: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged x [T', C], its sizes float32 [T'] and their log2; ``cu_seqlens``: of the merged images."""
    if _on_kernels(x):
        with device_of(x):
            merged, _, merged_sizes, log2_sizes = _kernels().merge(x, sizes, order, spans, cu_seqlens)
        return merged, merged_sizes, log2_sizes
    merged, merged_sizes = reference.merge(x, sizes, slots, spans.shape[0])
    return merged, merged_sizes, merged_sizes.log2()


@fake(_merge)
def _(x: Tensor, sizes: Any, slots: Any, order: Any, spans: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    merged_sizes = x.new_empty(spans.shape[0], dtype=torch.float32)
    return x.new_empty((spans.shape[0], x.shape[1])), merged_sizes, torch.empty_like(merged_sizes)


def _keep_for_merge(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, sizes, slots, *_ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(sizes, slots, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _merge_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    """d x'[slot] / d x_i = n_i / n'[slot]: a gather."""
    sizes, slots, merged_sizes = ctx.saved_tensors
    of_token = torch.ops.atm_triton.unmerge(grad / merged_sizes.unsqueeze(-1), slots)
    if sizes is not None:
        of_token = of_token * sizes.unsqueeze(-1)
    return of_token.to(ctx.dtype), *[None] * 5


register_autograd("atm_triton::merge", _merge_backward, setup_context=_keep_for_merge, lib=_library)


@operation
def _add_merge_norm(
    x: Tensor,
    attended: Tensor,
    gamma: Tensor | None,
    sizes: Tensor | None,
    slots: Tensor,
    order: Tensor,
    spans: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + gamma * attended, merged as by :func:`_merge`; its LayerNorm; its sizes float32; their log2."""
    if _on_kernels(x):
        with device_of(x):
            return _kernels().merge(x, sizes, order, spans, cu_seqlens, attended, gamma, (weight, bias, eps))
    update = attended.float() if gamma is None else attended.float() * gamma.float()
    merged, merged_sizes = reference.merge(x.float() + update, sizes, slots, spans.shape[0])
    merged = merged.to(x.dtype)
    weight, bias = (None if parameter is None else parameter.float() for parameter in (weight, bias))
    normed = F.layer_norm(merged.float(), x.shape[1:], weight, bias, eps)
    return merged, normed.to(x.dtype), merged_sizes, merged_sizes.log2()


@fake(_add_merge_norm)
def _(
    x: Tensor, attended: Any, gamma: Any, sizes: Any, slots: Any, order: Any, spans: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    merged = x.new_empty((spans.shape[0], x.shape[1]))
    merged_sizes = x.new_empty(spans.shape[0], dtype=torch.float32)
    return merged, torch.empty_like(merged), merged_sizes, torch.empty_like(merged_sizes)


@operation
def _unmerge(x: Tensor, slots: Tensor) -> Tensor:
    """x [T', C] and slots int32 [T] to [T, C]."""
    if _on_kernels(x):
        with device_of(x):
            return _kernels().unmerge(x, slots)
    return reference.unmerge(x, slots)


@fake(_unmerge)
def _(x: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty((slots.shape[0], x.shape[1]))


def _keep_for_unmerge(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, slots = inputs
    ctx.T = x.shape[0]
    ctx.save_for_backward(slots)


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple:
    """A slot receives the sum over its tokens: their mean times their number."""
    (slots,) = ctx.saved_tensors
    end = slots.new_full((1,), ctx.T)  # of all slots as one image
    mean, number, _ = torch.ops.atm_triton.merge(grad.contiguous(), None, slots, *reference.lists(slots, ctx.T), end)
    return (mean * number.unsqueeze(-1)).to(grad.dtype), None


register_autograd("atm_triton::unmerge", _unmerge_backward, setup_context=_keep_for_unmerge, lib=_library)


@operation
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    q_cu_seqlens: Tensor,
    cu_seqlens: Tensor,
    Nq: int,
    N: int,
) -> Tensor:
    """[H, Tq, d], in memory [Tq, H, d]; without a derivative."""
    scale = q.shape[-1] ** -0.5
    if _on_kernels(q):
        with device_of(q):
            return _kernels().attention(q, k, v, log2_sizes, q_cu_seqlens, cu_seqlens, Nq, N, scale)
    sizes = None if log2_sizes is None else log2_sizes.exp2()
    out = reference.attention(q, k, v, sizes, _images(cu_seqlens, N), _images(q_cu_seqlens, Nq), scale)
    return out.transpose(0, 1).contiguous().transpose(0, 1)


@fake(_attention)
def _(q: Tensor, *_: Any) -> Tensor:
    H, Tq, d = q.shape
    return q.new_empty((Tq, H, d)).transpose(0, 1)


@operation
def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    q_cu_seqlens: Tensor,
    cu_seqlens: Tensor,
    Nq: int,
    N: int,
) -> tuple[Tensor, Tensor]:
    """:func:`_attention` with a derivative, for the kernels only. Also returns lse, float32 [Tq, H]."""
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    with device_of(q):
        arguments = (q, k, v, log2_sizes, q_cu_seqlens, cu_seqlens, Nq, N, q.shape[-1] ** -0.5)
        return _kernels().attention(*arguments, lse), lse


@fake(_attention_forward)
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    H, Tq, d = q.shape
    return q.new_empty((Tq, H, d)).transpose(0, 1), q.new_empty((Tq, H), dtype=torch.float32)


@operation
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log2_sizes: Tensor | None,
    q_cu_seqlens: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    Nq: int,
    N: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in memory [Tq, H, d] and [T, H, d]."""
    with device_of(q):
        arguments = (grad, q, k, v, log2_sizes, q_cu_seqlens, cu_seqlens, out, lse, Nq, N, q.shape[-1] ** -0.5)
        return _kernels().attention_backward(*arguments)


@fake(_attention_backward)
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty((x.shape[1], x.shape[0], x.shape[2])).transpose(0, 1) for x in (q, k, v))
    return dq, dk, dv


def _keep_for_attention(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.Nq, ctx.N = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_derivative(ctx: Any, grad: Tensor, _: Any) -> tuple:
    arguments = (grad, *ctx.saved_tensors, ctx.Nq, ctx.N)
    return *torch.ops.atm_triton.attention_backward(*arguments), *[None] * 5


register_autograd(
    "atm_triton::attention_forward", _attention_derivative, setup_context=_keep_for_attention, lib=_library
)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "attention by the kernels has no second derivative; patch the model with ATMConfig(backend='reference')"
    )


register_autograd("atm_triton::attention_backward", _no_second_derivative, lib=_library)
