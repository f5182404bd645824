"""The operations of a merge step, each computed by the backend that the configuration asks for.

Checks and dispatch only: the formulas are in ``reference.py``. Shapes are dense, [B, N, C] for tokens; ``sizes``
[B, N] float32 may be None wherever every token still stands for one patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atm_triton import reference

_NOT_YET = "the operations do not call the Triton kernels yet"  # which are there, with tests of their own


class Match(NamedTuple):
    """``similarity`` [B, N] float32 or above and ``partner`` [B, N] int32 as :func:`reference.match` gives them;
    ``counts`` [B] int64: the candidates at or above theta, None where no theta was given."""

    similarity: Tensor
    partner: Tensor
    counts: Tensor | None


def explain(backend: str, device: torch.device | str) -> tuple[str, str]:
    """Which backend computes on a device, and why: the reference, for now.

    Raises:
        ValueError: "triton" was asked for and cannot run.
    """
    if backend == "triton":
        raise ValueError(
            f'backend="triton" cannot run on {torch.device(device).type}: {_NOT_YET}; use "auto" or "reference"'
        )
    return "reference", "asked for" if backend == "reference" else _NOT_YET


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
    """
    _check(keys.dim() == 4, "keys", keys, "[B, H, N, d]")
    explain(backend, keys.device)
    B, _, N, _ = keys.shape
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):  # 16-bit cosines would flip decisions
        if by_size and sizes is not None:
            a, b = reference.group_by_size(sizes, num_prefix)
        elif by_size:
            a, b = reference.group_by_size(keys.new_ones(B, N), num_prefix)
        else:
            a, b = reference.group_alternate(B, N, num_prefix, keys.device)
        similarity, partner = reference.match(keys.detach(), a, b)
        return Match(similarity, partner, None if theta is None else reference.count(similarity, theta))


def assign(
    similarity: Tensor, partner: Tensor, r: int, num_prefix: int, by_size: bool, backend: str = "auto"
) -> Tensor:
    """The assignment [B, N] int32 in which the ``r`` most similar tokens of each image join their partners.

    Args:
        similarity, partner: [B, N], from :func:`match` with the same ``num_prefix`` and ``by_size``.
        r: 0 .. the number of tokens in A.
    """
    _check(similarity.shape == partner.shape and partner.dim() == 2, "partner", partner, "[B, N], as similarity")
    N = partner.shape[1]
    most = reference.group_a_size(N, num_prefix, by_size)
    if not 0 <= r <= most:
        raise ValueError(f"r={r} is outside 0 .. {most}, the tokens in A: {N} tokens, {num_prefix} of them protected")
    explain(backend, similarity.device)
    return reference.assign(similarity, partner, r, num_prefix)


def merge(x: Tensor, sizes: Tensor | None, assignment: Tensor, M: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Size-weighted means of the tokens of each slot (Definition 2): x [B, N, C] to [B, M, C] and sizes [B, M] float32.

    Args:
        assignment: [B, N] int32, slots 0 .. M - 1, -1 for a dropped token.
    """
    _check(x.dim() == 3, "x", x, "[B, N, C]")
    _check(assignment.shape == x.shape[:2], "assignment", assignment, f"{list(x.shape[:2])}, as x")
    explain(backend, x.device)
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    _check(sizes.shape == x.shape[:2], "sizes", sizes, f"{list(x.shape[:2])}, as x")
    return reference.merge(x, sizes, assignment, M)


def unmerge(x: Tensor, assignment: Tensor, backend: str = "auto") -> Tensor:
    """Give every token the value of its slot: x [B, M, C] and assignment [B, N] int32 to [B, N, C]."""
    _check(x.dim() == 3, "x", x, "[B, M, C]")
    _check(assignment.dim() == 2 and len(assignment) == len(x), "assignment", assignment, "[B, N], B as in x")
    explain(backend, x.device)
    return reference.unmerge(x, assignment)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    dropout_p: float = 0.0,
    fused: bool = True,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T d^-0.5 + log sizes) v (Appendix A): q [B, H, Nq, d], k and v [B, H, N, d], sizes [B, N] float32.

    Under autocast q, k and v take its dtype, as in torch's own attention; log n stays in float32.
    """
    _check(k.dim() == 4 and v.shape == k.shape, "v", v, "[B, H, N, d], as k")
    explain(backend, q.device)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if sizes is not None and device == "cuda" and q.element_size() < 4:
        fused = False  # torch's CUDA kernels want a bias in the dtype of q, which would round log n
    with torch.autocast(device, enabled=False):
        return reference.attention(q, k, v, sizes, dropout_p=dropout_p, fused=fused)


def _check(holds: bool, name: str, tensor: Tensor, want: str) -> None:
    if not holds:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; want {want}")
