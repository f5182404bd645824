"""The operations of a merge step, each computed by the backend that the configuration asks for.

Checks and dispatch only: the formulas are in ``reference.py``. Tokens are dense, [B, N, C] with sizes [B, N] and keys
[B, H, N, d], or packed, [T, C] with sizes [T] and keys [H, T, d], and a :class:`Packing` that tells the images apart.
``sizes`` float32 may be None wherever every token still stands for one patch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from atm_triton import library, reference
from atm_triton.kernels.choice import KERNEL, attention_choice

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_PREFIX, KERNEL_CHANNELS = 16, 128  # protected tokens, and channels of a head, that the kernels can take


class Packing(NamedTuple):
    """Images of different lengths, one after the other. ``cu_seqlens`` int32 [B + 1], on the device: the row where each
    begins and, at the end, the number of rows; ``longest``: no image has more tokens (those of the dense batch that it
    comes from, lest what a kernel chooses by it hang on the other images); ``lengths`` int64 [B], on the host: the
    tokens of each, None where a graph was traced."""

    cu_seqlens: Tensor
    longest: int
    lengths: Tensor | None

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | None = None) -> Self:
        """Of images with these ``lengths``, int64 [B] on the host, on a device."""
        cu_seqlens = reference.new_cu_seqlens(torch.zeros_like(lengths), lengths)
        return cls(cu_seqlens.to(device), int(lengths.max()) if len(lengths) else 0, lengths)


class Match(NamedTuple):
    """``similarity`` [B, N] float32 or above and ``partner`` [B, N] int32 as :func:`reference.match` gives them, packed
    [T]; ``counts`` [B] int64: the candidates at or above theta, None where no theta was given."""

    similarity: Tensor
    partner: Tensor
    counts: Tensor | None


class Lists(NamedTuple):
    """An assignment the other way round, for the kernels: ``tokens`` and ``spans`` as :func:`reference.lists`."""

    tokens: Tensor
    spans: Tensor


class Merged(NamedTuple):
    """Merged tokens ``x`` [B, M, C], their ``sizes`` [B, M] float32, packed [T', C] and [T'], and the ``log2_sizes``
    that the attention kernel reads, None by the reference."""

    x: Tensor
    sizes: Tensor
    log2_sizes: Tensor | None


@cache
def explain(backend: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Which backend, "reference" or "triton", computes tensors of a dtype on a device ("cpu", "cuda"), and why.

    Raises:
        ValueError: "triton" was asked for and cannot run.
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
    if device == "cpu" and not library.interpreting():
        return "tensors are on the CPU; move them to a GPU, or set TRITON_INTERPRET=1 before Python starts"
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for {device}; move the tensors to a CUDA device"
    return None


def runs_kernels(backend: str, x: Tensor) -> bool:
    """Whether the Triton kernels compute on ``x``."""
    return _takes_kernels(backend, x.device.type, x.dtype)


def _traced(x: Tensor) -> bool:
    """Whether a compiler sees the CPU's tensors. Of packed images it is shown the operations, which are the reference
    there: shapes in that hang on numbers that only a run knows."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not library.interpreting()


def _fits_kernels(backend: str, x: Tensor, num_prefix: int = 0) -> bool:
    """Whether the kernels compute on ``x`` [..., d]: "auto" leaves them what they can take."""
    if not runs_kernels(backend, x):
        return False
    over = f"num_prefix={num_prefix} is above {KERNEL_PREFIX}" if num_prefix > KERNEL_PREFIX else ""
    over = over or (f"d={x.shape[-1]} is above {KERNEL_CHANNELS}" if x.shape[-1] > KERNEL_CHANNELS else "")
    if over and backend == "triton":
        raise ValueError(f'backend="triton" cannot run: {over}, the most that the kernels take; use "auto"')
    return not over


@torch.compiler.assume_constant_result  # a compiled graph is for one backend, device and dtype
def _takes_kernels(backend: str, device: str, dtype: torch.dtype) -> bool:
    return explain(backend, device, dtype)[0] == "triton"


def _call(name: str, *arguments: Any) -> Any:
    """The operation ``name`` of ``library.py``: in eager inference past torch's dispatcher, which costs as much as a
    launch; under tracing or autograd through it."""
    if torch.compiler.is_compiling() or any(map(_needs_dispatch, arguments)):
        return getattr(torch.ops.atm_triton, name).default(*arguments)
    return getattr(library, name)(*arguments)


def _needs_dispatch(argument: Any) -> bool:
    if not isinstance(argument, Tensor):
        return False
    return type(argument) not in (Tensor, nn.Parameter) or needs_grad(argument)


def needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def match(
    keys: Tensor,
    sizes: Tensor | None,
    num_prefix: int,
    by_size: bool,
    theta: float | None = None,
    backend: str = "auto",
    packing: Packing | None = None,
) -> Match:
    """Each token's most similar partner, and each image's number of candidates (Sections 3.1 to 3.3).

    Args:
        keys: [B, H, N, d], the keys of the block's attention, packed [H, T, d]; no gradient flows through the choice.
        num_prefix: the protected tokens at the start of the sequence.
        by_size: size-distinctive instead of alternate grouping.
        theta: count the candidates at or above this cosine similarity.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device; theta outside -1 .. 1; "triton" with more
            protected tokens (16) or channels a head (128) than the kernels take, where "auto" takes the reference.
    """
    _check_dims("keys", keys, packing, "[B, H, N, d]", "[H, T, d]")
    _check_sizes(sizes, _tokens_of(keys), keys)
    _check_prefix(num_prefix)
    if theta is not None and not -1 <= theta <= 1:
        raise ValueError(f"theta={theta} is outside -1 .. 1, the cosine similarities")
    keys = keys.detach()
    if _fits_kernels(backend, keys, num_prefix) or (packing is not None and _traced(keys)):
        bound = 2.0 if theta is None else theta  # nothing is as similar as that
        images = _cu_seqlens(packing), _longest(packing, 0)
        similarity, partner, counts = _call("match", keys, sizes, num_prefix, by_size, bound, *images)
        return Match(similarity, partner, None if theta is None else counts)
    with torch.no_grad(), _without_autocast(keys.device.type):  # 16-bit cosines would flip decisions
        if packing is not None:
            similarity, partner = reference.match_packed(keys, sizes, num_prefix, by_size, packing.cu_seqlens)
            counts = None if theta is None else reference.count(similarity, theta, packing.cu_seqlens)
            return Match(similarity, partner, counts)
        B, _, N, _ = keys.shape
        groups = reference.group(sizes, B, N, num_prefix, by_size, keys.device)
        similarity, partner = reference.match(keys, *groups)
        return Match(similarity, partner, None if theta is None else reference.count(similarity, theta))


class CountRead:
    """Each image's ``counts``, int64 [B], on their way to the host. Queue other work, then ask: only the copy is waited
    for."""

    def __init__(self, counts: Tensor) -> None:
        self.counts, self._on_host, self._copied = counts, counts, None
        if counts.is_cuda and not torch.compiler.is_compiling():
            self._on_host = counts.to("cpu", non_blocking=True)  # to pinned memory
            self._copied = torch.cuda.current_stream(counts.device).record_event()

    def on_host(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._on_host

    def batch_r(self) -> int:
        """The one r of the batch (Section 3.4)."""
        return reference.batch_r(self.on_host())


def assign(
    similarity: Tensor, partner: Tensor, r: int, num_prefix: int, by_size: bool, backend: str = "auto"
) -> tuple[Tensor, Lists | None]:
    """The assignment [B, N] int32 in which the ``r`` most similar tokens of each image join their partners, and the
    lists that :func:`merge` by the kernels wants (None by the reference).

    Args:
        similarity, partner: [B, N], from :func:`match` with the same ``num_prefix`` and ``by_size``.
        r: 0 .. the number of tokens in A; 0 where there is one token for both groups.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device; another r.
    """
    _check(similarity.shape == partner.shape and partner.dim() == 2, "partner", partner, "[B, N], as similarity")
    _check_match(similarity, partner, num_prefix)
    N = partner.shape[1]
    most = reference.group_a_size(N, num_prefix, by_size)
    if not 0 <= r <= most:
        raise ValueError(f"r={r} is outside 0 .. {most}, the tokens in A: {N} tokens, {num_prefix} of them protected")
    if runs_kernels(backend, similarity):
        assignment, *lists = _call("assign", similarity, partner, r, num_prefix)
        return assignment, Lists(*lists)
    return reference.assign(similarity, partner, r, num_prefix), None


def assign_each(
    similarity: Tensor,
    partner: Tensor,
    theta: float,
    read: CountRead,
    num_prefix: int,
    backend: str = "auto",
    packing: Packing | None = None,
) -> tuple[Tensor, Lists | None, Packing]:
    """:func:`assign` where every image merges all its candidates (Section 3.2); with how the merged images lie.

    Args:
        similarity, partner: [B, N], packed [T], from :func:`match` with the same arguments.
        read: of the counts of that match.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device.
    """
    _check_dims("partner", partner, packing, "[B, N]", "[T]")
    _check(similarity.shape == partner.shape, "similarity", similarity, "the shape of partner")
    _check_match(similarity, partner, num_prefix)
    counts, cu_seqlens, most = read.counts, _cu_seqlens(packing), _longest(packing, partner.shape[-1])
    _check(counts.shape == (len(partner) if packing is None else len(cu_seqlens) - 1,), "counts", counts, "[B]")
    operates = runs_kernels(backend, similarity) or _traced(partner)
    lengths, slots = None, -1  # traced: the operation reads how many tokens are left
    if not (operates and torch.compiler.is_compiling()):
        lengths = (most if packing is None else packing.lengths) - read.on_host()
        slots = int(lengths.sum())
    if operates:
        arguments = (similarity, partner, counts, theta, num_prefix, cu_seqlens, most, slots)
        assignment, *lists, begin = _call("assign_each", *arguments)
        return assignment, Lists(*lists), Packing(begin, most, lengths)
    assignment = reference.assign_each(similarity, partner, theta, num_prefix, cu_seqlens)
    begin = reference.new_cu_seqlens(counts, most if packing is None else cu_seqlens.diff())
    return assignment, None, Packing(begin, most, lengths)


def merge(
    x: Tensor,
    sizes: Tensor | None,
    assignment: Tensor,
    M: int | Packing,
    backend: str = "auto",
    lists: Lists | None = None,
    packing: Packing | None = None,
) -> Merged:
    """Size-weighted means of the tokens of each slot (Definition 2): x [B, N, C] to [B, M, C].

    Args:
        x: or packed [T, C], by ``packing``.
        assignment: int32, a slot for each token, 0 .. M - 1 in its image; any other number drops the token.
        M: the tokens of a merged image, and the result is [B, M, C], or a Packing, and it is [T', C].
        lists: those of ``assignment`` if they are at hand.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device.
    """
    _check_dims("x", x, packing, "[B, N, C]", "[T, C]")
    _check_assignment(assignment, x.shape[:-1], x)
    _check_sizes(sizes, x.shape[:-1], x)
    _check_slots(M, lists, _images(x, packing))
    if lists is None and not runs_kernels(backend, x):
        slots = M.cu_seqlens if isinstance(M, Packing) else M
        return Merged(*reference.merge(x, sizes, assignment, slots, _cu_seqlens(packing)), None)
    images = _cu_seqlens(packing), _cu_seqlens(M), max(_longest(packing, x.shape[-2]), _longest(M, 0))
    slots = M if not isinstance(M, Packing) else int(M.lengths.sum()) if lists is None else lists.spans.shape[0]
    tokens, spans = _call("lists", assignment, slots, *images) if lists is None else lists
    return Merged(*_call("merge", x, sizes, assignment, tokens, spans, slots, *images))


def add_merge_norm(
    x: Tensor,
    attended: Tensor,
    gamma: Tensor | None,
    sizes: Tensor | None,
    assignment: Tensor,
    lists: Lists,
    M: int | Packing,
    norm: nn.LayerNorm,
    packing: Packing | None = None,
) -> tuple[Merged, Tensor]:
    """What a block does between attention and MLP, in one pass over memory by the kernels: x + gamma * attended,
    merged, and the LayerNorm of that; shapes as :func:`merge`, without a derivative.

    Args:
        attended: as x, what attention adds to it; gamma: [C], the LayerScale, None for 1; norm: over C channels.
        lists: of ``assignment``, from :func:`assign` by the kernels.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device.
    """
    C = x.shape[-1]
    _check_dims("x", x, packing, "[B, N, C]", "[T, C]")
    _check(attended.shape == x.shape, "attended", attended, "the shape of x")
    _check_device("attended", attended, x)
    _check_assignment(assignment, x.shape[:-1], x)
    _check_sizes(sizes, x.shape[:-1], x)
    _check_slots(M, lists, _images(x, packing))
    for name, vector in (("gamma", gamma), ("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if vector is not None:
            _check(vector.shape == (C,), name, vector, lambda: f"[{C}], one for each channel of x")
            _check_device(name, vector, x)
    if norm.normalized_shape != (C,):
        raise ValueError(f"norm is over {list(norm.normalized_shape)}; want [{C}], the channels of x")
    slots = lists.spans.shape[0] if isinstance(M, Packing) else M
    arguments = (x, attended, gamma, sizes, assignment, *lists, norm.weight, norm.bias, norm.eps, slots)
    with torch.no_grad():
        merged, normed, *of_sizes = _call("add_merge_norm", *arguments, _cu_seqlens(packing), _cu_seqlens(M))
    return Merged(merged, *of_sizes), normed


def unmerge(
    x: Tensor,
    assignment: Tensor,
    backend: str = "auto",
    x_packing: Packing | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Give every token the value of its slot, 0 to a dropped one: x [B, M, C], assignment [B, N] int32 to [B, N, C].

    Args:
        x_packing: of x, if that is packed [T', C]; packing: of the assignment and the result, if they are packed.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device.
    """
    _check_dims("x", x, x_packing, "[B, M, C]", "[T, C]")
    tokens = (_images(x, x_packing), assignment.shape[-1])
    _check_assignment(assignment, tokens[packing is not None :], x)
    _check_images("x", tokens[0], _images(assignment, packing))
    images = _cu_seqlens(packing), _cu_seqlens(x_packing)
    if runs_kernels(backend, x) or (x_packing is not None and _traced(x)):
        longest = max(_longest(packing, assignment.shape[-1]), _longest(x_packing, 0))
        return _call("unmerge", x, assignment, *images, longest)
    return reference.unmerge(x, assignment, *images)


def compose(first: Tensor, second: Tensor, packing: Packing | None = None) -> Tensor:
    """Two merge steps as one (:func:`reference.compose`); ``packing``: of the images after the first."""
    return reference.compose(first, second, _cu_seqlens(packing))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    dropout_p: float = 0.0,
    fused: bool = True,
    backend: str = "auto",
    log2_sizes: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """softmax(q k^T d^-0.5 + log sizes) v (Appendix A): q [B, H, Nq, d], k and v [B, H, N, d], sizes [B, N] float32.

    Under autocast q, k and v take its dtype, as in torch's own attention; log n stays in float32. In inference the
    kernel computes what :func:`atm_triton.kernels.choice.attention_choice` leaves it; torch's own attention the rest,
    and all with a gradient or dropout.

    Args:
        k, v: or packed [H, T, d], and so is q, or that of the first Nq tokens of each image, [B, H, Nq, d].
        fused: by torch's scaled_dot_product_attention, where the kernel does not compute it.
        log2_sizes: of ``sizes``, if they are at hand.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device; "triton" with more channels a head than 128.
    """
    _check_dims("k", k, packing, "[B, H, N, d]", "[H, T, d]")
    _check_queries(q, k, packing)
    _check(v.shape == k.shape, "v", v, "the shape of k")
    _check_device("k", k, q, "q")
    _check_device("v", v, q, "q")
    _check_sizes(sizes, _tokens_of(k), k)
    _check_sizes(log2_sizes, _tokens_of(k), k, "log2_sizes")
    device = q.device.type
    if _autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_dtype("k", k, q.dtype)
    _check_dtype("v", v, q.dtype)
    trains = dropout_p > 0 or any(map(needs_grad, (q, k, v)))
    kind = (q.dtype, q.shape[-1], _longest(packing, k.shape[-2]), packing is not None, sizes is not None)
    fitting = not trains and attention_choice(*kind) == KERNEL
    if fitting and (_fits_kernels(backend, q) or (packing is not None and _traced(q))):
        log2_sizes = None if sizes is None else sizes.log2() if log2_sizes is None else log2_sizes
        return _call("attention", q, k, v, log2_sizes, _cu_seqlens(packing), _longest(packing, 0))
    if sizes is not None and device == "cuda" and q.element_size() < 4:
        fused = False  # torch's CUDA kernels want a bias in the dtype of q, which would round log n
    with _without_autocast(device):
        if packing is None:
            return reference.attention(q, k, v, sizes, dropout_p=dropout_p, fused=fused)
        where = {"cu_seqlens": packing.cu_seqlens, "lengths": packing.lengths}
        return reference.attention_packed(q, k, v, sizes, dropout_p=dropout_p, fused=fused, **where)


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _cu_seqlens(images: Packing | int | None) -> Tensor | None:
    return images.cu_seqlens if isinstance(images, Packing) else None


def _longest(images: Packing | int | None, dense: int) -> int:
    return images.longest if isinstance(images, Packing) else dense


def _tokens_of(heads: Tensor) -> tuple[int, ...]:
    """[B, H, N, d] to (B, N), packed [H, T, d] to (T,)."""
    return (*heads.shape[:-3], heads.shape[-2])


def _check_dims(name: str, tensor: Tensor, packing: Packing | None, dense: str, packed: str) -> None:
    want = dense if packing is None else packed
    _check(tensor.dim() == want.count(",") + 1, name, tensor, want)


def _check(holds: bool, name: str, tensor: Tensor, want: str | Callable[[], str]) -> None:
    """``want``: a function where it tells sizes: to write them out takes time, and fixes them in a compiled graph."""
    if not holds:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; want {want if isinstance(want, str) else want()}")


def _check_dtype(name: str, tensor: Tensor, want: torch.dtype) -> None:
    if tensor.dtype != want:
        raise TypeError(f"{name} has dtype {tensor.dtype}; want {want}: {name}.to({want})")


def _check_prefix(num_prefix: int) -> None:
    if num_prefix < 0:
        raise ValueError(f"num_prefix={num_prefix} is below 0; want the number of protected tokens, 0 or more")


def _check_match(similarity: Tensor, partner: Tensor, num_prefix: int) -> None:
    _check_prefix(num_prefix)
    if similarity.dtype != torch.float64:  # which the reference makes of float64 keys
        _check_dtype("similarity", similarity, torch.float32)
    _check_dtype("partner", partner, torch.int32)
    _check_device("partner", partner, similarity, "similarity")


def _check_queries(q: Tensor, k: Tensor, packing: Packing | None) -> None:
    """``q`` as ``k`` but for the number of tokens; where k is packed, as k in all, or dense."""
    *images, H, N, d = k.shape
    if packing is not None and q.dim() == 3:
        return _check(q.shape == k.shape, "q", q, lambda: f"{[H, N, d]}, the shape of k")
    B = images[0] if packing is None else packing.cu_seqlens.shape[0] - 1
    fits = q.dim() == 4 and (q.shape[0], q.shape[1], q.shape[3]) == (B, H, d)
    return _check(fits, "q", q, lambda: f"[{B}, {H}, Nq, {d}], to go with k")


def _check_slots(M: int | Packing, lists: Lists | None, images: int) -> None:
    """``M`` and the ``lists`` that are to have as many slots."""
    if isinstance(M, Packing):
        return _check_images("M", M.cu_seqlens.shape[0] - 1, images)
    if M < 0:
        raise ValueError(f"M={M} is below 0; want the number of slots of an image")
    if lists is not None:
        slots = lists.spans
        _check(len(slots) == images * M, "lists.spans", slots, lambda: f"[{images * M}, 2]: M={M} of each image")


def _check_images(name: str, images: int, want: int) -> None:
    if images != want:
        raise ValueError(f"{name} is of {images} images, the tokens of {want}; want the same number")


def _images(tokens: Tensor, packing: Packing | None) -> int:
    return tokens.shape[0] if packing is None else packing.cu_seqlens.shape[0] - 1


def _check_sizes(sizes: Tensor | None, shape: tuple[int, ...], like: Tensor, name: str = "sizes") -> None:
    if sizes is None:
        return
    _check(sizes.shape == shape, name, sizes, lambda: f"{list(shape)}, one for each token")
    _check_dtype(name, sizes, torch.float32)
    _check_device(name, sizes, like)


def _check_assignment(assignment: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check(assignment.shape == shape, "assignment", assignment, lambda: f"{list(shape)}, one for each token")
    _check_dtype("assignment", assignment, torch.int32)
    _check_device("assignment", assignment, like)


def _check_device(name: str, tensor: Tensor, like: Tensor, others: str = "the tokens") -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, {others} on {like.device}; move one of them")
