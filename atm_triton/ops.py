"""The operations of a merge step, each computed by the backend that the configuration asks for.

Checks and dispatch only: the formulas are in ``reference.py``. Shapes are dense, [B, N, C] for tokens; ``sizes``
[B, N] float32 may be None wherever every token still stands for one patch.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atm_triton import library, reference

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_PREFIX, KERNEL_CHANNELS = 16, 128  # protected tokens, and channels of a head, that the kernels can take


class Match(NamedTuple):
    """``similarity`` [B, N] float32 or above and ``partner`` [B, N] int32 as :func:`reference.match` gives them;
    ``counts`` [B] int64: the candidates at or above theta, None where no theta was given."""

    similarity: Tensor
    partner: Tensor
    counts: Tensor | None


class Lists(NamedTuple):
    """An assignment the other way round, for the kernels: ``tokens`` and ``spans`` as :func:`reference.lists`."""

    tokens: Tensor
    spans: Tensor


class Merged(NamedTuple):
    """Merged tokens ``x`` [B, M, C], their ``sizes`` [B, M] float32, and the ``log2_sizes`` that the attention kernel
    reads, None by the reference."""

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


def _fits_kernels(backend: str, x: Tensor, num_prefix: int = 0) -> bool:
    """Whether the kernels compute on ``x`` [B, H, N, d]: "auto" leaves them what they can take."""
    if not runs_kernels(backend, x):
        return False
    over = f"num_prefix={num_prefix} is above {KERNEL_PREFIX}" if num_prefix > KERNEL_PREFIX else ""
    over = over or (f"d={x.shape[3]} is above {KERNEL_CHANNELS}" if x.shape[3] > KERNEL_CHANNELS else "")
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
) -> Match:
    """Each token's most similar partner, and each image's number of candidates (Sections 3.1 to 3.3).

    Args:
        keys: [B, H, N, d], the keys of the block's attention; no gradient flows through the choice.
        num_prefix: the protected tokens at the start of the sequence.
        by_size: size-distinctive instead of alternate grouping.
        theta: count the candidates at or above this cosine similarity.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device; theta outside -1 .. 1; "triton" with more
            protected tokens (16) or channels a head (128) than the kernels take, where "auto" takes the reference.
    """
    _check(keys.dim() == 4, "keys", keys, "[B, H, N, d]")
    B, _, N, _ = keys.shape
    _check_sizes(sizes, (B, N), keys)
    if theta is not None and not -1 <= theta <= 1:
        raise ValueError(f"theta={theta} is outside -1 .. 1, the cosine similarities")
    keys = keys.detach()
    if _fits_kernels(backend, keys, num_prefix):
        bound = 2.0 if theta is None else theta  # nothing is as similar as that
        similarity, partner, counts = _call("match", keys, sizes, num_prefix, by_size, bound)
        return Match(similarity, partner, None if theta is None else counts)
    with torch.no_grad(), _without_autocast(keys.device.type):  # 16-bit cosines would flip decisions
        groups = reference.group(sizes, B, N, num_prefix, by_size, keys.device)
        similarity, partner = reference.match(keys, *groups)
        return Match(similarity, partner, None if theta is None else reference.count(similarity, theta))


class CountRead:
    """Each image's count on its way to the host. Queue other work, then ask for r: only the copy is waited for."""

    def __init__(self, counts: Tensor) -> None:
        self._counts, self._copied = counts, None
        if counts.is_cuda and not torch.compiler.is_compiling():
            self._counts = counts.to("cpu", non_blocking=True)  # to pinned memory
            self._copied = torch.cuda.current_stream(counts.device).record_event()

    def batch_r(self) -> int:
        """The one r of the batch (Section 3.4)."""
        if self._copied is not None:
            self._copied.synchronize()
        return reference.batch_r(self._counts)


def assign(
    similarity: Tensor, partner: Tensor, r: int, num_prefix: int, by_size: bool, backend: str = "auto"
) -> tuple[Tensor, Lists | None]:
    """The assignment [B, N] int32 in which the ``r`` most similar tokens of each image join their partners, and the
    lists that :func:`merge` by the kernels wants (None by the reference).

    Args:
        similarity, partner: [B, N], from :func:`match` with the same ``num_prefix`` and ``by_size``.
        r: 0 .. the number of tokens in A.

    Raises:
        ValueError: arguments of different shapes, or another r.
    """
    _check(similarity.shape == partner.shape and partner.dim() == 2, "partner", partner, "[B, N], as similarity")
    N = partner.shape[1]
    most = reference.group_a_size(N, num_prefix, by_size)
    if not 0 <= r <= most:
        raise ValueError(f"r={r} is outside 0 .. {most}, the tokens in A: {N} tokens, {num_prefix} of them protected")
    if runs_kernels(backend, similarity):
        assignment, *lists = _call("assign", similarity, partner, r, num_prefix)
        return assignment, Lists(*lists)
    return reference.assign(similarity, partner, r, num_prefix), None


def merge(
    x: Tensor, sizes: Tensor | None, assignment: Tensor, M: int, backend: str = "auto", lists: Lists | None = None
) -> Merged:
    """Size-weighted means of the tokens of each slot (Definition 2): x [B, N, C] to [B, M, C].

    Args:
        assignment: [B, N] int32, slots 0 .. M - 1; any other number drops the token.
        lists: those of ``assignment`` if they are at hand.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device.
    """
    _check(x.dim() == 3, "x", x, "[B, N, C]")
    _check_assignment(assignment, x.shape[:2], x)
    _check_sizes(sizes, x.shape[:2], x)
    if runs_kernels(backend, x):
        tokens, spans = _call("lists", assignment, M) if lists is None else lists
        return Merged(*_call("merge", x, sizes, assignment, tokens, spans, M))
    return Merged(*reference.merge(x, sizes, assignment, M), None)


def add_merge_norm(
    x: Tensor,
    attended: Tensor,
    gamma: Tensor | None,
    sizes: Tensor | None,
    assignment: Tensor,
    lists: Lists,
    M: int,
    norm: nn.LayerNorm,
) -> tuple[Merged, Tensor]:
    """What a block does between attention and MLP, in one pass over memory by the kernels: x + gamma * attended,
    merged, and the LayerNorm of that; shapes as :func:`merge`, without a derivative.

    Args:
        attended: [B, N, C], what attention adds to x; gamma: [C], the LayerScale, None for 1.
        lists: of ``assignment``, from :func:`assign` by the kernels.

    Raises:
        ValueError: ``attended`` of another shape than x.
    """
    _check(attended.shape == x.shape, "attended", attended, "the shape of x")
    arguments = (x, attended, gamma, sizes, assignment, *lists, norm.weight, norm.bias, norm.eps, M)
    with torch.no_grad():
        merged, normed, *of_sizes = _call("add_merge_norm", *arguments)
    return Merged(merged, *of_sizes), normed


def unmerge(x: Tensor, assignment: Tensor, backend: str = "auto") -> Tensor:
    """Give every token the value of its slot, 0 to a dropped one: x [B, M, C], assignment [B, N] int32 to [B, N, C].

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device.
    """
    _check(x.dim() == 3, "x", x, "[B, M, C]")
    _check_assignment(assignment, (len(x), assignment.shape[-1]), x)
    if runs_kernels(backend, x):
        return _call("unmerge", x, assignment)
    return reference.unmerge(x, assignment)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    dropout_p: float = 0.0,
    fused: bool = True,
    backend: str = "auto",
    log2_sizes: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T d^-0.5 + log sizes) v (Appendix A): q [B, H, Nq, d], k and v [B, H, N, d], sizes [B, N] float32.

    Under autocast q, k and v take its dtype, as in torch's own attention; log n stays in float32. The kernel computes
    inference with sizes; without sizes, or with a gradient or dropout, torch's own attention does.

    Args:
        fused: by torch's scaled_dot_product_attention, where the kernel does not compute it.
        log2_sizes: of ``sizes``, if they are at hand.

    Raises:
        ValueError, TypeError: arguments of another shape, dtype or device; "triton" with more channels a head than 128.
    """
    _check(k.dim() == 4 and v.shape == k.shape, "v", v, "[B, H, N, d], as k")
    _check_sizes(sizes, (k.shape[0], k.shape[2]), k)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    trains = dropout_p > 0 or any(map(needs_grad, (q, k, v)))
    if sizes is not None and not trains and _fits_kernels(backend, q):
        return _call("attention", q, k, v, sizes.log2() if log2_sizes is None else log2_sizes)
    if sizes is not None and device == "cuda" and q.element_size() < 4:
        fused = False  # torch's CUDA kernels want a bias in the dtype of q, which would round log n
    with _without_autocast(device):
        return reference.attention(q, k, v, sizes, dropout_p=dropout_p, fused=fused)


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _check(holds: bool, name: str, tensor: Tensor, want: str) -> None:
    if not holds:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; want {want}")


def _check_sizes(sizes: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if sizes is None:
        return
    _check(sizes.shape == shape, "sizes", sizes, "[B, N], one for each token")
    if sizes.dtype != torch.float32:
        raise TypeError(f"sizes are {sizes.dtype}; want torch.float32")
    _check_device("sizes", sizes, like)


def _check_assignment(assignment: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check(assignment.shape == shape, "assignment", assignment, "[B, N], one for each token")
    if assignment.dtype != torch.int32:
        raise TypeError(f"assignment is {assignment.dtype}; want torch.int32")
    _check_device("assignment", assignment, like)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the tokens on {like.device}; move one of them")
