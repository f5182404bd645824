"""The specification: every operation of adaptive token merging in plain torch, as the formulas say it.

B images of N tokens with C channels; keys have H heads of d channels; the first P tokens of an image (``num_prefix``:
class, distillation and register tokens) are protected: they never merge and stay first. ``sizes`` n_i [B, N] float32
counts the patches a token stands for. A merge step is one map, ``assignment`` [B, N] int32: the slot of the merged
sequence that a token goes to; -1, like any number that is no slot, drops the token.

Images of different lengths stand packed, one after the other: tokens [T, C], sizes [T], keys [H, T, d], with
``cu_seqlens`` int32 [B + 1], the rows where each image begins and, at the end, T. The same functions serve both forms:
what looks at pairs of tokens (group, match) sees packed images padded with absent tokens, whose keys are NaN and whose
sizes are infinite; all else numbers the tokens and slots of all images through.

Equations and sections are those of Lee and Choi, "Lossless Token Merging Even Without Fine-Tuning in Vision
Transformers", ECAI 2025 (arXiv 2505.15160). "Restored" marks a formula read in a review of the paper, "derived" one
derived from its text and checked against its examples, "ours" a choice that it leaves open.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # a key no longer than this has no direction
NOT_ALIKE = -2.0  # below every cosine: the similarity of a token that is similar to nothing


def threshold(block: int, alpha: float, beta: float, theta_min: float) -> float:
    """Eq. 1 (restored): theta_l = max(alpha - (exp(beta (l - 1)) - 1), theta_min), for block l = 1, 2, ...

    Example:
        >>> [round(threshold(block, 0.99, 0.04, 0.88), 4) for block in (1, 2, 3, 4)]
        [0.99, 0.9492, 0.9067, 0.88]
    """
    return max(alpha - (math.exp(beta * (block - 1)) - 1), theta_min)


def group_alternate(B: int, N: int, num_prefix: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Alternate grouping (Section 3.3, blocks up to the splitting depth; ToMe, Section 3): even positions of the
    sequence form A, odd positions B, protected tokens neither.

    Returns:
        The positions of A [B, Na] and of B [B, Nb], int64, ascending; Na + Nb = N - P.
    """
    free = torch.arange(min(num_prefix, N), N, device=device).expand(B, -1)
    odd = num_prefix % 2  # whether the first of them stands at an odd position
    return free[:, odd::2], free[:, 1 - odd :: 2]


def group_by_size(sizes: Tensor, num_prefix: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Size-distinctive grouping (Section 3.3, blocks after the splitting depth): tokens sorted by merging size, the
    small half (floor of half the tokens) forms A, the large half B. Tokens of equal size keep their order (ours).

    Args:
        sizes: n_i [B, N] float32.
        lengths: int64 [B], the tokens of each image, the others being absent (their sizes infinite, the last position
            absent in all); None for N.

    Returns:
        The positions of A [B, Na] and of B [B, Nb], int64, each ascending; Na = (N - P) // 2, and where there are
        ``lengths``, an image with fewer is filled up with the last position.
    """
    order = sizes[:, num_prefix:].argsort(dim=1, stable=True) + num_prefix
    half = order.shape[1] // 2
    a, b = order[:, :half], order[:, half:]
    if lengths is not None:
        last = sizes.shape[1] - 1
        own = (lengths - num_prefix).clamp(min=0).unsqueeze(1) // 2
        column = torch.arange(order.shape[1] - half, device=order.device).expand(len(order), -1)
        a = a.masked_fill(column[:, :half] >= own, last)
        b = order.gather(1, (column + own).clamp(max=order.shape[1] - 1))  # past the end: absent, as the last
    return a.sort(dim=1).values, b.sort(dim=1).values


def group(
    sizes: Tensor | None,
    B: int,
    N: int,
    num_prefix: int,
    by_size: bool,
    device: torch.device,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The grouping of a block: by size beyond the splitting depth, else alternate; ``sizes`` None: all ones."""
    if not by_size:
        return group_alternate(B, N, num_prefix, device)
    return group_by_size(torch.ones(B, N, device=device) if sizes is None else sizes, num_prefix, lengths)


def match(keys: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of A its most similar token of B: s_i = max_j k_i . k_j / (|k_i| |k_j|), k the mean of the keys
    over the heads (Section 3.1; Appendix A). Of equally similar tokens of B the first is taken (ours).

    A zero key, or one with a NaN or an infinity, is similar to nothing (ours): its token reaches no threshold, and of a
    given r it is merged last.

    Args:
        keys: [B, H, N, d], any floating dtype; computed in float32 or above.
        a, b: the positions of A [B, Na] and of B [B, Nb].

    Returns:
        similarity [B, N], float32 or above: s_i for tokens of A, ``NOT_ALIKE`` for one that is similar to nothing,
        -inf for every token outside A; partner [B, N] int32: the position of the most similar token of B, -1 outside A.
    """
    return _match(unit_keys(keys), a, b)


def _match(k: Tensor, a: Tensor, b: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of unit keys [B, N, d]. ``lengths``: int64 [B], the tokens of each image, the others being absent (their keys
    NaN); None for N."""
    B, N, _ = k.shape
    similarity = k.new_full((B, N), -math.inf)
    partner = torch.full((B, N), -1, dtype=torch.int32, device=k.device)
    if b.shape[1] == 0:  # a single token: nothing to merge with
        return similarity, partner
    cosine = _rows(k, a) @ _rows(k, b).transpose(1, 2)  # [B, Na, Nb]
    best, column = cosine.nan_to_num_(nan=NOT_ALIKE).max(dim=2)
    found = b.gather(1, column)
    if lengths is not None:  # the first of equals is absent only where all are
        absent = torch.maximum(a, found) >= lengths.unsqueeze(1)
        best, found = best.masked_fill(absent, -math.inf), found.masked_fill(absent, -1)
    return similarity.scatter_(1, a, best), partner.scatter_(1, a, found.int())


def unit_keys(keys: Tensor) -> Tensor:
    """[..., H, N, d] to the mean over the heads, of length 1, [..., N, d], in float32 or above; NaN where that has no
    direction. One head after the other is faster than a mean."""
    heads = keys.to(torch.promote_types(keys.dtype, torch.float32)).unbind(dim=-3)
    k = sum(heads[1:], start=heads[0]) / len(heads)
    norm = k.norm(dim=-1, keepdim=True)
    return k / norm.masked_fill((norm <= EPS) | (norm == math.inf), math.nan)


def match_packed(
    keys: Tensor, sizes: Tensor | None, num_prefix: int, by_size: bool, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`match` of packed images: keys [H, T, d], sizes [T] to similarity and partner [T], where a partner is a
    position in its own image."""
    T, B = keys.shape[1], len(cu_seqlens) - 1
    lengths = cu_seqlens.diff()
    N = 1 + int(lengths.max()) if B else 1  # the last position is absent in every image
    shift = N * torch.arange(B, device=keys.device) - cu_seqlens[:-1]
    rows = torch.arange(T, device=keys.device) + of_tokens(shift, cu_seqlens, T)

    def padded(x: Tensor, absent: float) -> Tensor:
        return x.new_full((B * N, *x.shape[1:]), absent).index_copy_(0, rows, x).view(B, N, *x.shape[1:])

    n = None
    if by_size:
        n = padded(torch.ones(T, device=keys.device) if sizes is None else sizes, math.inf)
    a, b = group(n, B, N, num_prefix, by_size, keys.device, lengths)
    found = _match(padded(unit_keys(keys), math.nan), a, b, lengths)
    return tuple(tensor.flatten().index_select(0, rows) for tensor in found)


def of_tokens(values: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    """What belongs to each image [B, ...], for each of its tokens [T, ...]."""
    return values.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=T)


def _rows(x: Tensor, positions: Tensor) -> Tensor:
    if len(x) and positions.stride(0) == 0:  # the same in every image
        return x.index_select(1, positions[0])
    B, N, d = x.shape
    first = N * torch.arange(B, device=x.device).unsqueeze(1)
    return x.reshape(B * N, d).index_select(0, (positions + first).flatten()).view(B, positions.shape[1], d)


def count(similarity: Tensor, theta: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """Section 3.2: the candidates of each image, #{i in A : s_i >= theta}: int64 [B], of similarities [B, N], or packed
    [T] with ``cu_seqlens``. With these as r every image merges by its own count."""
    found = similarity >= theta
    return found.sum(dim=1) if cu_seqlens is None else _numbers(found, cu_seqlens)


def batch_r(counts: Tensor) -> int:
    """Section 3.4: the one r of a batch, the mean of its images' counts, rounded down; 0 for an empty batch (ours)."""
    return int(counts.sum()) // max(len(counts), 1)


def group_a_size(N: int | Tensor, num_prefix: int, by_size: bool) -> int | Tensor:
    """The number of tokens in A, by either grouping, of N tokens or of images with N [B] tokens each; 0 where B is
    empty: a single token has none to merge with."""
    free = (N - num_prefix) * (N > num_prefix + 1)
    return free // 2 if by_size else (free + 1 - num_prefix % 2) // 2


def largest_r(N: int, num_prefix: int) -> int:
    """The most that a given r can take: half of the tokens that may merge, rounded down (as ToMe)."""
    return max(N - num_prefix, 0) // 2


def assign(similarity: Tensor, partner: Tensor, r: int | Tensor, num_prefix: int) -> Tensor:
    """The merge step: the r most similar tokens of A join their partners, of equally similar ones the first (ours).

    The merged sequence holds the protected tokens, then the tokens of A that did not join, then the tokens of B, each
    in the order in which they stood (ToMe's order). An image with r = 0 keeps its order as it is.

    Args:
        similarity, partner: [B, N], from :func:`match`.
        r: one for the batch, or int64 [B], each image its own; never above the number of tokens in A.

    Returns:
        assignment [B, N] int32; the slots of image b are 0 .. N - r_b - 1.
    """
    position = torch.arange(partner.shape[1], device=partner.device).expand(partner.shape)
    if isinstance(r, int) and r == 0:
        return position.int()
    rank = _places(similarity.argsort(dim=1, descending=True, stable=True))
    joins = (partner >= 0) & (rank < (r.unsqueeze(1) if isinstance(r, Tensor) else r))
    return _slots(partner, joins, num_prefix)


def assign_each(
    similarity: Tensor, partner: Tensor, theta: float, num_prefix: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Section 3.2: the merge step in which every token of A joins its partner that is a candidate, s_i >= theta.

    Returns:
        assignment as by :func:`assign`, with each image's :func:`count` for its r: int32 as ``partner``, [B, N], or
        packed [T] with ``cu_seqlens``.
    """
    return _slots(partner, similarity >= theta, num_prefix, cu_seqlens)


def _slots(partner: Tensor, joins: Tensor, num_prefix: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The assignment in which the tokens that ``joins`` marks, all of them in A, join their partners."""
    if cu_seqlens is None:
        first, position = 0, torch.arange(partner.shape[1], device=partner.device)
        merges = joins.any(dim=1, keepdim=True)
    else:
        image = of_tokens(torch.arange(len(cu_seqlens) - 1, device=partner.device), cu_seqlens, len(partner))
        first = cu_seqlens[:-1][image]
        position = torch.arange(len(partner), device=partner.device) - first
        merges = (_numbers(joins, cu_seqlens) > 0)[image]
    group = ((partner < 0) & (position >= num_prefix)).to(
        torch.uint8
    )  # protected tokens and A: 0, in this order as they stand
    group = group.masked_fill_(joins, 2).masked_fill_(~merges, 0)  # B: 1; those that join leave no gap: 2
    if cu_seqlens is not None:
        group = group + 3 * image.int()
    slot = _places(group.argsort(dim=-1, stable=True)) - first
    return torch.where(joins, slot.gather(-1, (partner + first).clamp(min=0).long()), slot).int()


def _places(order: Tensor) -> Tensor:
    """Where each element stands in an ``order`` [..., N]: the inverse permutation."""
    position = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, position)


def _numbers(chosen: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How many of each packed image's tokens are chosen: bool [T] to int64 [B]."""
    return F.pad(chosen.cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def new_cu_seqlens(r: Tensor, lengths: Tensor | int) -> Tensor:
    """Where each image begins, int32 [B + 1], once r [B] of its tokens have merged away; ``lengths``: before that."""
    return F.pad((lengths - r).cumsum(0), (1, 0)).int()


def merge(
    x: Tensor, sizes: Tensor | None, assignment: Tensor, M: int | Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Definition 2: a slot becomes the size-weighted mean of its tokens, x' = sum(n_i x_i) / sum(n_i), n' = sum(n_i).

    Written as x' = sum_i (n_i / n') x_i: the share of a token that merges with nothing is exactly 1, so it passes
    through unchanged. Sums are in float32 or above, in the order of the tokens.

    Args:
        x: [B, N, C], or packed [T, C] with ``cu_seqlens``; sizes: float32 [B, N] or [T], or None, which stands for all
        ones; assignment: int32 [B, N] or [T]; M: the length of every merged image, which stay dense, or int32 [B + 1]:
        where each begins, and they are packed.

    Returns:
        merged x [B, M, C], or packed [T', C], in the dtype of x, and merged sizes [B, M], or [T'], float32; a slot with
        no token is 0 with size 0.
    """
    C = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    sizes = torch.ones(assignment.shape, device=x.device) if sizes is None else sizes
    n = sizes.to(dtype).flatten()
    slot, slots = _flat_slots(assignment, M, cu_seqlens)
    tokens, first = _by_slot(slot, slots)
    merged_n = n.new_zeros(slots + 1).index_add_(0, slot, n)  # the last entry takes the dropped tokens
    share = n / merged_n.index_select(0, slot)
    rows = x.reshape(-1, C).to(dtype)
    merged = F.embedding_bag(tokens, rows, first, mode="sum", per_sample_weights=share.index_select(0, tokens))
    shape = (slots,) if isinstance(M, Tensor) else (_images(assignment, cu_seqlens), M)
    return merged[:-1].view(*shape, C).to(x.dtype), merged_n[:-1].view(shape).to(sizes.dtype)


def lists(assignment: Tensor, M: int | Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The assignment the other way round: the tokens of each slot, in the order in which they stand; arguments as in
    :func:`merge`.

    Returns:
        tokens int32 [all tokens]: those of all images, numbered through, in the order of their slots, dropped ones
        last; spans int32 [all slots, 2]: where in it the tokens of each slot, numbered through, begin and end.
    """
    slot, slots = _flat_slots(assignment, M, cu_seqlens)
    tokens, first = _by_slot(slot, slots)
    return tokens.int(), torch.stack([first[:slots], first[1:]], dim=1).int()


def _images(assignment: Tensor, cu_seqlens: Tensor | None) -> int:
    return assignment.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _flat_slots(assignment: Tensor, M: int | Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """Slots of all images in one row, int64 [all tokens], and their number, the slot of a dropped token."""
    if isinstance(M, Tensor):
        first, number, slots = M[:-1].long(), M.diff(), int(M[-1])
    else:
        B = _images(assignment, cu_seqlens)
        first, number, slots = M * torch.arange(B, device=assignment.device), None, B * M
    if cu_seqlens is None:
        first, number = first.unsqueeze(1), M if number is None else number.unsqueeze(1)
    else:
        first = of_tokens(first, cu_seqlens, len(assignment))
        number = M if number is None else of_tokens(number, cu_seqlens, len(assignment))
    dropped = (assignment < 0) | (assignment >= number)
    return (assignment + first).masked_fill_(dropped, slots).flatten(), slots


def _by_slot(slot: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their flat slots, the dropped last; where those of each of the ``slots`` slots begin."""
    tokens = slot.argsort(stable=True)
    return tokens, torch.searchsorted(slot.index_select(0, tokens), torch.arange(slots + 1, device=slot.device))


def unmerge(
    x: Tensor, assignment: Tensor, cu_seqlens: Tensor | None = None, x_cu_seqlens: Tensor | None = None
) -> Tensor:
    """The way back: every token gets the value of its slot, x_i = x'[assignment_i]; a dropped token gets 0.

    Args:
        x: [B, M, C], or packed [T', C] with ``x_cu_seqlens``; assignment: int32 [B, N], or packed [T] with
        ``cu_seqlens``.

    Returns:
        [B, N, C], or packed [T, C], in the dtype of x.
    """
    C = x.shape[-1]
    slots = torch.cat([x.reshape(-1, C), x.new_zeros(1, C)])
    slot, _ = _flat_slots(assignment, x.shape[1] if x_cu_seqlens is None else x_cu_seqlens, cu_seqlens)
    return slots[slot].view(*assignment.shape, C)


def compose(first: Tensor, second: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Two merge steps as one: where the tokens [B, N] end up after ``first`` [B, N] and then ``second`` [B, M] (packed
    [T] with ``cu_seqlens``), int32; a token dropped by either is -1. Composed over all blocks it tells which patches a
    final token stands for."""
    slot = first.long().clamp(min=0)
    if cu_seqlens is None:
        then = second.gather(1, slot)
    else:
        then = second[slot + cu_seqlens[:-1].unsqueeze(1)]
    return torch.where(first >= 0, then, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    fused: bool = True,
) -> Tensor:
    """Proportional attention (Appendix A; derived, from ToMe, Section 3): softmax(q k^T * scale + log n) v, with log n
    added to the column of every key, for all heads and queries.

    Args:
        q: [B, H, Nq, d]; k, v: [B, H, N, d]; sizes: [B, N] float32 or None, which stands for all ones; scale: d^-0.5 by
        default; fused: by torch's scaled_dot_product_attention, else with the scores written out.

    Returns:
        [B, H, Nq, d] in the dtype of q.
    """
    bias = None if sizes is None else log_sizes(sizes, q.dtype)[:, None, None, :]
    return _attend(q, k, v, bias, scale, dropout_p, fused)


def log_sizes(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """log n, in float32 also beside 16-bit queries, whose rounding of it would be felt."""
    return sizes.to(torch.promote_types(dtype, torch.float32)).log()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float, fused: bool
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    probabilities = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout_p)
    return probabilities @ v


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    cu_seqlens: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    fused: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """:func:`attention` of packed images, one after the other: an image sees itself alone.

    Args:
        q, k, v: [H, T, d], or q [B, H, Nq, d]; sizes: [T] or None; lengths: [B], what ``cu_seqlens`` says, where the
            host has it already; the others as in :func:`attention`.

    Returns:
        As q.
    """
    lengths = (cu_seqlens.diff() if lengths is None else lengths).tolist()
    if not lengths:
        return q
    bias = [None] * len(lengths)
    if sizes is not None:
        bias = log_sizes(sizes, q.dtype)[None, None, None, :].split(lengths, dim=3)
    queries = q.unsqueeze(0).split(lengths, dim=2) if q.dim() == 3 else q.split(1)
    keys, values = (x.unsqueeze(0).split(lengths, dim=2) for x in (k, v))
    images = zip(queries, keys, values, bias, strict=True)
    rows = [_attend(*image, scale, dropout_p, fused).transpose(1, 2) for image in images]  # as they lie in memory
    return torch.cat(rows, dim=1)[0].transpose(0, 1) if q.dim() == 3 else torch.cat(rows).transpose(1, 2)


def merging_error(x_i: Tensor, x_j: Tensor, n_i: Tensor, n_j: Tensor) -> Tensor:
    """Definition 2 (restored in part, derived): E(i, j) = n_i delta(x_i, x*) + n_j delta(x_j, x*), delta the cosine
    distance and x* the size-weighted mean of two unit vectors [..., C] of sizes [...].

    Theorem 1: with h = n_i n_j / (n_i + n_j) and x_i . x_j >= 0, h delta(x_i, x_j) <= E(i, j) <= 2 h delta(x_i, x_j).
    """
    mean = (n_i.unsqueeze(-1) * x_i + n_j.unsqueeze(-1) * x_j) / (n_i + n_j).unsqueeze(-1)
    distance_i = 1 - F.cosine_similarity(x_i, mean, dim=-1)
    distance_j = 1 - F.cosine_similarity(x_j, mean, dim=-1)
    return n_i * distance_i + n_j * distance_j
