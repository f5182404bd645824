"""The specification: every operation of adaptive token merging in plain torch, close to the formulas.

The T tokens of B images are packed, one image after the other: tokens [T, C] with C channels, keys [H, T, d] of H heads
with d channels. ``images`` says where each image begins. The first P tokens of an image (``num_prefix``: class,
distillation and register tokens) are protected: they never merge and stay first. ``sizes`` n_i, float32 [T], says how
many patches each token stands for. A merge step is one map, ``slots`` int32 [T]: the row of the merged tokens that each
token goes to. A slot of -1, or any other number that is not a row, drops the token.

Operations on pairs of tokens (group, match, assign) see the images as a matrix [B, N]. It is a view if all images have
N tokens; otherwise it is padded with absent tokens, whose keys are NaN and whose sizes are infinite. Other operations
need no images: tokens and slots are numbered consecutively over the whole batch.

Equations and sections are those of Lee and Choi, "Lossless Token Merging Even Without Fine-Tuning in Vision
Transformers", ECAI 2025 (arXiv 2505.15160). "Restored" marks a formula taken from a review of the paper, "derived" one
that we derived from its text and checked against its examples, "ours" a choice that the paper leaves open.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atm_triton.packed import Images

EPS = 1e-12  # a key of at most this length has no direction
NOT_ALIKE = -2.0  # below every cosine: the similarity of a token that is similar to nothing


def threshold(block: int, alpha: float, beta: float, theta_min: float) -> float:
    """Eq. 1 (restored): theta_l = max(alpha - (exp(beta (l - 1)) - 1), theta_min), for block l = 1, 2, ...

    Examples:
        >>> [round(threshold(block, 0.99, 0.04, 0.88), 4) for block in (1, 2, 3, 4)]
        [0.99, 0.9492, 0.9067, 0.88]
    """
    return max(alpha - (math.exp(beta * (block - 1)) - 1), theta_min)


def group_alternate(B: int, N: int, num_prefix: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Alternate grouping (Section 3.3, blocks up to the splitting depth; ToMe, Section 3): tokens at even positions of
    the sequence form A, those at odd positions B; protected tokens are in neither.

    Returns:
        The positions of A [B, Na] and of B [B, Nb], int64, ascending; Na + Nb = N - P.
    """
    free = torch.arange(min(num_prefix, N), N, device=device).expand(B, -1)
    odd = num_prefix % 2  # whether the first free token has an odd position
    return free[:, odd::2], free[:, 1 - odd :: 2]


def group_by_size(sizes: Tensor, num_prefix: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Size-distinctive grouping (Section 3.3, blocks after the splitting depth): sort tokens by merging size; the
    smaller half (rounded down) forms A, the larger half B. Tokens of equal size keep their order (ours).

    Args:
        sizes: n_i [B, N] float32.
        lengths: int64 [B], the number of tokens of each image; None: N. Positions beyond are absent: their sizes are
            infinite, and the last position is absent in every image.

    Returns:
        The positions of A [B, Na] and of B [B, Nb], int64, each ascending; Na = (N - P) // 2. With ``lengths``, rows of
        images with fewer tokens are filled up with the last position.
    """
    order = _rising(sizes[:, num_prefix:]) + num_prefix
    half = order.shape[1] // 2
    a, b = order[:, :half], order[:, half:]
    if lengths is not None:
        last = sizes.shape[1] - 1
        own = (lengths - num_prefix).clamp(min=0).unsqueeze(1) // 2
        column = torch.arange(order.shape[1] - half, device=order.device).expand(len(order), -1)
        a = a.masked_fill(column[:, :half] >= own, last)
        b = order.gather(1, (column + own).clamp(max=order.shape[1] - 1))  # past the end: the last, which is absent
    return a.sort(dim=1).values, b.sort(dim=1).values


def match(keys: Tensor, sizes: Tensor | None, num_prefix: int, by_size: bool, images: Images) -> tuple[Tensor, Tensor]:
    """Find for each token of A the most similar token of B: s_i = max_j k_i . k_j / (|k_i| |k_j|), where k is the mean
    of the keys over the heads (Section 3.1; Appendix A). Among equally similar tokens of B the first is taken (ours).

    A key that is zero or has a NaN or an infinity is similar to nothing (ours): its token reaches no threshold, and if
    r is given, it is merged last.

    Args:
        keys: [H, T, d], any floating dtype; computed in float32 or above.
        sizes: float32 [T]; None for all ones.
        by_size: size-distinctive instead of alternate grouping.

    Returns:
        similarity [T], float32 or above: s_i for tokens of A, ``NOT_ALIKE`` for those that are similar to nothing, -inf
        for tokens outside A; partner [T] int32: the position, within the image, of the most similar token of B; -1 for
        tokens outside A.
    """
    lengths = None if images.equal else images.lengths
    k = padded(unit_keys(keys), images, math.nan)
    B, N, _ = k.shape
    if by_size:
        n = padded(k.new_ones(keys.shape[1]) if sizes is None else sizes, images, math.inf)
        a, b = group_by_size(n, num_prefix, lengths)
    else:
        a, b = group_alternate(B, N, num_prefix, keys.device)
    similarity = k.new_full((B, N), -math.inf)
    partner = torch.full((B, N), -1, dtype=torch.int32, device=k.device)
    if b.shape[1]:  # otherwise there is a single token, with nothing to merge with
        cosine = _members(k, a) @ _members(k, b).transpose(1, 2)  # [B, Na, Nb]
        best, column = cosine.nan_to_num_(nan=NOT_ALIKE).max(dim=2)
        mate = b.gather(1, column)
        if lengths is not None:  # ties go to the first: it is absent only if all are
            absent = torch.maximum(a, mate) >= lengths.unsqueeze(1)
            best, mate = best.masked_fill(absent, -math.inf), mate.masked_fill(absent, -1)
        similarity, partner = similarity.scatter(1, a, best), partner.scatter(1, a, mate.int())
    T = keys.shape[1]
    return packed(similarity, images, T), packed(partner, images, T)


def unit_keys(keys: Tensor) -> Tensor:
    """The mean of keys [H, T, d] over the heads, at length 1: [T, d], in float32 or above. NaN if it has no direction.
    Adding one head after the other is faster than torch's mean."""
    heads = keys.to(torch.promote_types(keys.dtype, torch.float32)).unbind(dim=0)
    k = sum(heads[1:], start=heads[0]) / len(heads)
    norm = k.norm(dim=-1, keepdim=True)
    return k / norm.masked_fill((norm <= EPS) | (norm == math.inf), math.nan)


def padded(rows: Tensor, images: Images, absent: float) -> Tensor:
    """Rows [T, ...] as images [B, N, ...]. If lengths differ, images are filled up with ``absent`` to one more than the
    longest, so that the last position is absent in every image."""
    if images.equal:
        return rows.unflatten(0, (images.B, images.N))
    N = _padded_length(images)
    out = rows.new_full((images.B * N, *rows.shape[1:]), absent)
    return out.index_copy(0, _places_in_padded(images, N, rows.shape[0]), rows).unflatten(0, (images.B, N))


def packed(x: Tensor, images: Images, T: int) -> Tensor:
    """The inverse of :func:`padded`: [B, N, ...] to rows [T, ...]."""
    rows = x.flatten(0, 1)
    return rows if images.equal else rows.index_select(0, _places_in_padded(images, x.shape[1], T))


def _padded_length(images: Images) -> int:
    if torch.compiler.is_compiling():
        return 1 + images.N  # a compiled graph does not know the longest length
    return 1 + int(images.lengths.max()) if images.B else 1


def _places_in_padded(images: Images, N: int, T: int) -> Tensor:
    shift = N * torch.arange(images.B, device=images.cu_seqlens.device) - images.cu_seqlens[:-1]
    return torch.arange(T, device=shift.device) + of_tokens(shift, images, T)


def of_tokens(values: Tensor, images: Images, T: int) -> Tensor:
    """Repeat the value of each image [B, ...] for all its tokens: [T, ...]."""
    if images.equal:
        return values.unsqueeze(1).expand(-1, images.N, *values.shape[1:]).flatten(0, 1)
    return values.repeat_interleave(images.lengths, dim=0, output_size=T)


def _members(x: Tensor, positions: Tensor) -> Tensor:
    """The rows [B, n, d] at ``positions`` [B, n] of x [B, N, d]."""
    B, N, d = x.shape
    if B and positions.stride(0) == 0:  # the same in every image
        return x.index_select(1, positions[0])
    first = N * torch.arange(B, device=x.device).unsqueeze(1)
    return x.reshape(B * N, d).index_select(0, (positions + first).flatten()).view(B, positions.shape[1], d)


def count(similarity: Tensor, theta: float, images: Images) -> Tensor:
    """Section 3.2: the number of candidates of each image, #{i in A : s_i >= theta}, int64 [B], given similarities [T].
    If r is this number, every image merges by its own count."""
    candidates = similarity >= theta
    if images.equal:
        return candidates.unflatten(0, (images.B, images.N)).sum(dim=1)
    return F.pad(candidates.cumsum(0), (1, 0))[images.cu_seqlens.long()].diff()


def batch_r(counts: Tensor) -> Tensor:
    """Section 3.4: one r for all images of a batch, the mean of their counts rounded down: int64 [B]."""
    return (counts.sum() // max(counts.shape[0], 1)).expand(counts.shape[0])


def largest_r(N: int, num_prefix: int) -> int:
    """The upper limit of a given r: half of the tokens that may merge, rounded down (as in ToMe)."""
    return max(N - num_prefix, 0) // 2


def assign(similarity: Tensor, partner: Tensor, r: Tensor, num_prefix: int, images: Images) -> tuple[Tensor, Tensor]:
    """The merge step: in each image the r most similar tokens of A join their partners. Among equally similar tokens
    the first ones join (ours).

    A merged image holds the protected tokens, then the tokens of A that did not join, then the tokens of B, each group
    in its previous order (ToMe's order). An image with r = 0 keeps its order.

    Args:
        similarity: [T], from :func:`match`.
        partner: [T], from :func:`match`.
        r: int64 [B]; an r above the number of tokens in A means all of A.

    Returns:
        slots int32 [T]; cu_seqlens int32 [B + 1] of the merged images.
    """
    s, mate = padded(similarity, images, -math.inf), padded(partner, images, -1)
    position = torch.arange(s.shape[1], device=s.device)
    rank = _places(_rising(-s))
    joins = (mate >= 0) & (rank < r.unsqueeze(1))
    removed = joins.sum(dim=1)
    behind = (mate < 0) & (position >= num_prefix) & (removed > 0).unsqueeze(1)  # B
    ahead = ~(joins | behind)
    slot = torch.where(behind, ahead.sum(dim=1, keepdim=True) + behind.cumsum(dim=1), ahead.cumsum(dim=1)) - 1
    slot = torch.where(joins, slot.gather(1, mate.clamp(min=0).long()), slot)
    merged_cu_seqlens = F.pad((images.lengths - removed).cumsum(0), (1, 0)).int()
    return packed((slot + merged_cu_seqlens[:-1].unsqueeze(1)).int(), images, similarity.shape[0]), merged_cu_seqlens


def _rising(values: Tensor) -> Tensor:
    """The order [B, N] that sorts ``values`` in ascending order; equal values keep their order."""
    if not torch.compiler.is_exporting():
        return values.argsort(dim=1, stable=True)
    one, other = values.unsqueeze(2), values.unsqueeze(1)  # ONNX has no stable sort
    earlier = values.new_ones(values.shape[1], values.shape[1], dtype=torch.bool).tril(-1)
    return _places(((other < one) | ((other == one) & earlier)).sum(dim=2))


def _places(order: Tensor) -> Tensor:
    """The place of each element in an ``order`` [B, N]: the inverse permutation."""
    position = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter(1, order, position)


def merge(x: Tensor, sizes: Tensor | None, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Definition 2: a slot becomes the size-weighted mean of its tokens, x' = sum(n_i x_i) / sum(n_i), n' = sum(n_i).

    Computed as x' = sum_i (n_i / n') x_i: a token that merges with nothing has a share of exactly 1, so it passes
    through unchanged. Sums are taken in float32 or above, in the order of the tokens.

    Args:
        x: [T, C]; sizes: float32 [T], or None for all ones; slots: int32 [T]; num_slots: T'.

    Returns:
        merged x [T', C] in the dtype of x, and merged sizes [T'] float32; a slot without tokens is 0 and has size 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sizes = torch.ones(slots.shape, dtype=torch.float32, device=x.device) if sizes is None else sizes
    n, slot = sizes.to(dtype), _or_last(slots, num_slots)
    merged_n = n.new_zeros(num_slots + 1).index_add(0, slot, n)  # the last entry takes the dropped tokens
    share = n / merged_n.index_select(0, slot)
    if torch.compiler.is_exporting():  # ONNX has no searchsorted, and runs bags in a loop
        merged = x.new_zeros(num_slots + 1, x.shape[1], dtype=dtype).index_add(0, slot, share.unsqueeze(1) * x)
    else:
        order, first = _by_slot(slot, num_slots)
        weights = share.index_select(0, order)
        merged = F.embedding_bag(order, x.to(dtype), first, mode="sum", per_sample_weights=weights)
    return merged[:-1].to(x.dtype), merged_n[:-1].to(sizes.dtype)


def lists(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The inverse of an assignment: the tokens of each slot, in their order. Arguments as in :func:`merge`.

    Returns:
        order int32 [T]: the tokens sorted by slot, dropped ones last; spans int32 [T', 2]: where in ``order`` the
        tokens of each slot begin and end.
    """
    order, first = _by_slot(_or_last(slots, num_slots), num_slots)
    return order.int(), torch.stack([first[:-1], first[1:]], dim=1).int()


def _or_last(slots: Tensor, num_slots: int) -> Tensor:
    """Slots as int64, with ``num_slots`` for dropped tokens."""
    return slots.long().masked_fill((slots < 0) | (slots >= num_slots), num_slots)


def _by_slot(slot: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by slot, dropped ones last; and where the tokens of each of the slots begin."""
    order = slot.argsort(stable=True)
    return order, torch.searchsorted(slot.index_select(0, order), torch.arange(num_slots + 1, device=slot.device))


def unmerge(x: Tensor, slots: Tensor) -> Tensor:
    """Undo a merge: every token gets the value of its slot, x_i = x'[slots_i]; a dropped token gets 0.

    Args:
        x: [T', C]; slots: int32 [T].

    Returns:
        [T, C] in the dtype of x.
    """
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return rows[_or_last(slots, x.shape[0])]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Compose two merge steps: where tokens [T] end up after slots ``first`` [T] and then ``second`` [T'], int32; -1 if
    either drops the token. Composed over all blocks, this tells which patches a final token stands for."""
    return torch.where(first >= 0, second[first.long().clamp(min=0)], -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    images: Images,
    queries: Images | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    fused: bool = True,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Proportional attention (Appendix A; derived, from ToMe, Section 3): softmax(q k^T * scale + log n) v. The log n
    of a key is added to its column, for all heads and queries. Each image attends only to itself.

    Args:
        q: [H, Tq, d].
        k: [H, T, d].
        v: [H, T, d].
        sizes: float32 [T]; None for all ones.
        images: where the keys of each image lie.
        queries: where the queries of each image lie; None: where the keys do.
        scale: d^-0.5 by default.
        dropout_p: dropout probability of the softmax.
        fused: use torch's scaled_dot_product_attention; otherwise the scores are written out.
        drop: a function of the softmax [B, H, Nq, N] that replaces this dropout. If lengths differ, it is called for
            one image after the other, [1, H, Nq, N].

    Returns:
        [H, Tq, d] in the dtype of q, a view of [Tq, H, d].
    """
    queries = images if queries is None else queries
    options = (q.shape[-1] ** -0.5 if scale is None else scale, dropout_p, fused, drop)
    bias = None if sizes is None else log_sizes(sizes, q.dtype)
    if images.equal and queries.equal:
        q, k, v = (x.unflatten(1, (i.B, i.N)).transpose(0, 1) for x, i in ((q, queries), (k, images), (v, images)))
        bias = None if bias is None else bias.unflatten(0, (images.B, images.N))
        return _attend(q, k, v, bias, *options).transpose(1, 2).flatten(0, 1).transpose(0, 1)
    if torch.compiler.is_compiling() and drop is None:  # one graph for all lengths
        Tq, bias = q.shape[1], q.new_zeros(k.shape[1]) if bias is None else bias
        each = ((q, queries), (k, images), (v, images))
        q, k, v = (padded(x.transpose(0, 1), i, 0.0).transpose(1, 2) for x, i in each)
        rows = _attend(q, k, v, padded(bias, images, -math.inf), *options).transpose(1, 2)
        return packed(rows, queries, Tq).transpose(0, 1)
    asking, lengths = queries.lengths.tolist(), images.lengths.tolist()
    if not lengths:
        return q
    biases: list[Tensor | None] = [None] * len(lengths)
    if bias is not None:  # CUDA's kernels misread a mask that is a slice of another tensor
        biases = [part.clone() for part in bias.unsqueeze(0).split(lengths, dim=1)]
    of_q = q.unsqueeze(0).split(asking, dim=2)
    of_k, of_v = (x.unsqueeze(0).split(lengths, dim=2) for x in (k, v))
    parts = zip(of_q, of_k, of_v, biases, strict=True)
    by_image = [_attend(*part, *options).transpose(1, 2) for part in parts]  # as they lie in memory
    return torch.cat(by_image, dim=1)[0].transpose(0, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    fused: bool,
    drop: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Attention for images of one length: q [B, H, Nq, d]; k, v [B, H, N, d]; bias [B, N], log n."""
    bias = None if bias is None else bias[:, None, None, :]
    if fused and (bias is None or bias.dtype == q.dtype or q.device.type == "cpu"):  # CUDA misreads other dtypes
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(dim=-1).to(v.dtype)
    probabilities = F.dropout(probabilities, dropout_p) if drop is None else drop(probabilities)
    return probabilities @ v


def log_sizes(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """log n, in float32 even if queries have 16 bits: rounding it to 16 bits would change the result noticeably."""
    return sizes.to(torch.promote_types(dtype, torch.float32)).log()


def merging_error(x_i: Tensor, x_j: Tensor, n_i: Tensor, n_j: Tensor) -> Tensor:
    """Definition 2 (restored in part, derived): E(i, j) = n_i delta(x_i, x*) + n_j delta(x_j, x*), where delta is the
    cosine distance and x* the size-weighted mean of two unit vectors [..., C] with sizes [...].

    Theorem 1: with h = n_i n_j / (n_i + n_j) and x_i . x_j >= 0, h delta(x_i, x_j) <= E(i, j) <= 2 h delta(x_i, x_j).
    """
    mean = (n_i.unsqueeze(-1) * x_i + n_j.unsqueeze(-1) * x_j) / (n_i + n_j).unsqueeze(-1)
    distance_i = 1 - F.cosine_similarity(x_i, mean, dim=-1)
    distance_j = 1 - F.cosine_similarity(x_j, mean, dim=-1)
    return n_i * distance_i + n_j * distance_j
