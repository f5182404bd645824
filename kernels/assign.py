"""assign: which token goes to which slot, and for each slot the list of its tokens.

The assignment is the map of the reference. Beside it stand what lets a merge gather instead of scatter: ``tokens``, all
tokens in the order of their slots (within a slot in the order in which they stood), and ``spans``, where in it the
tokens of a slot begin and end. Slots of all images are numbered through, as are tokens: the merge knows no images.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import tune
from atm_triton.kernels.images import image_bounds

NO_SLOT = tl.constexpr(2**30)  # sorts behind every slot
ONE_PROGRAM = 2048  # tokens of an image that one program sorts; a longer image takes three launches
JOINED = 1024  # tokens for a program of join_kernel


@triton.jit
def _ordered(similarity):
    """float32 as uint32 in the same order."""
    bits = (similarity + 0.0).to(tl.uint32, bitcast=True)  # + 0.0: -0.0 is 0.0
    sign = tl.full([], 0x80000000, tl.uint32)
    return tl.where(bits >= sign, bits ^ tl.full([], 0xFFFFFFFF, tl.uint32), bits | sign)


@triton.jit
def _bound(key, in_a, r):
    """The r-th largest key, by bisection over its bits; how many of the keys equal to it are among the ``r``."""
    bound = tl.full([], 0, tl.uint32)
    for bit in tl.static_range(32):
        higher = bound | tl.full([], 1 << (31 - bit), tl.uint32)
        enough = tl.sum((in_a & (key >= higher)).to(tl.int32)) >= r
        bound = tl.where(enough, higher, bound)
    return bound, r - tl.sum((in_a & (key > bound)).to(tl.int32))


@triton.jit
def _up_to(chosen):
    """How many elements are chosen, up to each."""
    return tl.cumsum(chosen.to(tl.int32))


@triton.jit
def _removed_before(counts, image, CHUNK: tl.constexpr):
    """The tokens that merge away in all images before this one."""
    removed = tl.zeros([], tl.int64)
    first = 0
    while first < image:
        other = first + tl.arange(0, CHUNK)
        removed += tl.sum(tl.load(counts + other, mask=other < image, other=0), axis=0)
        first += CHUNK
    return removed


@triton.jit
def _slots_of_image(counts, image, images, start, length, M, new_cu_seqlens, PER_IMAGE: tl.constexpr):
    """The first slot of the image (int64), and how many it has; an image with its own count notes where they begin."""
    if PER_IMAGE:
        slots = start - _removed_before(counts, image, 1024)
        M = length - tl.load(counts + image).to(tl.int32)
        tl.store(new_cu_seqlens + image, slots.to(tl.int32))
        if image == images - 1:
            tl.store(new_cu_seqlens + images, (slots + M).to(tl.int32))
    else:
        slots = image.to(tl.int64) * M
    return slots, M


@triton.jit
def _sorted_by_slot(slot, i, valid, BLOCK: tl.constexpr):
    """The tokens of an image by slot, then by position; their slots; whether a list begins or ends there; whether a
    token is there at all."""
    key = tl.sort(tl.where(valid, slot * BLOCK + i, NO_SLOT))
    at = key // BLOCK
    last = BLOCK - 1
    before = tl.gather(at, tl.maximum(i - 1, 0), 0)
    after = tl.gather(at, tl.minimum(i + 1, last), 0)
    filled = key < NO_SLOT
    return key % BLOCK, at, filled & ((i == 0) | (before != at)), filled & ((i == last) | (after != at)), filled


@triton.jit
def assign_kernel(
    similarity,
    partner,
    counts,
    cu_seqlens,
    assignment,
    tokens,
    spans,
    new_cu_seqlens,
    N,
    M,
    images,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """One program an image, which makes its lists too."""
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image, N, PACKED)
    i = tl.arange(0, BLOCK)
    valid = i < length
    mate = tl.load(partner + start + i, mask=valid, other=-1)
    s = tl.load(similarity + start + i, mask=valid, other=float("-inf"))
    slots, M = _slots_of_image(counts, image, images, start, length, M, new_cu_seqlens, PER_IMAGE)
    r = length - M
    in_a, key = mate >= 0, _ordered(s)
    bound, room = _bound(key, in_a, r)
    level = in_a & (key == bound)
    joins = ((in_a & (key > bound)) | (level & (_up_to(level) <= room))) & (r > 0)
    stays = in_a & ~joins
    in_b = valid & ~in_a & (i >= P)
    kept = tl.sum(stays.to(tl.int32))
    slot = tl.where(stays, P + _up_to(stays) - 1, tl.where(in_b, P + kept + _up_to(in_b) - 1, i))
    slot = tl.where(joins, tl.gather(slot, tl.maximum(mate, 0), 0), slot)
    slot = tl.where(r == 0, i, slot)
    tl.store(assignment + start + i, slot, mask=valid)
    token, at, begins, ends, filled = _sorted_by_slot(slot, i, valid, BLOCK)
    here = (start + i).to(tl.int32)
    tl.store(tokens + start + i, (start + token).to(tl.int32), mask=filled)
    tl.store(spans + 2 * (slots + at), here, mask=begins)
    tl.store(spans + 2 * (slots + at) + 1, here + 1, mask=ends)


@triton.jit
def _search(similarity, partner, length, r, BLOCK: tl.constexpr):
    """:func:`_bound` of a whole image, and how many tokens of A stay."""
    i = tl.arange(0, BLOCK)
    in_a = tl.load(partner + i, mask=i < length, other=-1) >= 0
    s = tl.load(similarity + i, mask=i < length, other=float("-inf"))
    bound, room = _bound(_ordered(s), in_a, r)
    return bound, room, tl.maximum(tl.sum(in_a.to(tl.int32)) - r, 0)


@triton.jit
def assign_long_kernel(
    similarity,
    partner,
    counts,
    cu_seqlens,
    assignment,
    new_cu_seqlens,
    N,
    M,
    images,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """One program a long image: only the search for the r-th largest holds it whole. A token that joins gets
    -1 - its partner, which ``join_kernel`` turns into that one's slot."""
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image, N, PACKED)
    _, M = _slots_of_image(counts, image, images, start, length, M, new_cu_seqlens, PER_IMAGE)
    r = length - M
    bound, room, kept = _search(similarity + start, partner + start, length, r, BLOCK)
    stayed = 0  # so far, of A
    passed = 0  # of B
    first = 0
    while first < length:
        i = first + tl.arange(0, CHUNK)
        mate = tl.load(partner + start + i, mask=i < length, other=-1)
        key = _ordered(tl.load(similarity + start + i, mask=i < length, other=float("-inf")))
        in_a = mate >= 0
        level = in_a & (key == bound)
        joins = ((in_a & (key > bound)) | (level & (_up_to(level) <= room))) & (r > 0)
        stays = in_a & ~joins
        in_b = (i < length) & (i >= P) & (mate < 0)
        slot = tl.where(in_b, P + kept + passed + _up_to(in_b) - 1, i)
        slot = tl.where(stays, P + stayed + _up_to(stays) - 1, slot)
        slot = tl.where(r == 0, i, tl.where(joins, -1 - mate, slot))
        tl.store(assignment + start + i, slot, mask=i < length)
        room -= tl.sum(level.to(tl.int32))
        stayed += tl.sum(stays.to(tl.int32))
        passed += tl.sum(in_b.to(tl.int32))
        first += CHUNK


@triton.jit
def join_kernel(assignment, cu_seqlens, N, TOKENS: tl.constexpr, PACKED: tl.constexpr):
    """One program for some tokens: those that join take the slots of their partners, which no program changes."""
    image, tile = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image, N, PACKED)
    i = tile * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(assignment + start + i, mask=i < length, other=0)
    joins = slot < 0
    tl.store(assignment + start + i, tl.load(assignment + start - 1 - slot, mask=joins), mask=joins)


@triton.jit
def lists_kernel(
    assignment,
    cu_seqlens,
    new_cu_seqlens,
    tokens,
    spans,
    N,
    M,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    TO_PACKED: tl.constexpr,
):
    """The lists of any assignment: one program for some tokens and the slots of the same numbers, ranked by comparing
    with every token of the image."""
    image, tile = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image, N, PACKED)
    slots, M = image_bounds(new_cu_seqlens, image, M, TO_PACKED)
    i = tile * TILE + tl.arange(0, TILE)
    mine = tl.load(assignment + start + i, mask=i < length, other=-1)
    rank = tl.zeros([TILE], tl.int32)
    begin = tl.zeros([TILE], tl.int32)
    end = tl.zeros([TILE], tl.int32)
    first = 0
    while first < length:
        j = first + tl.arange(0, CHUNK)
        slot = tl.load(assignment + start + j, mask=j < length, other=-1)[None, :]
        there = slot >= 0
        ahead = (slot < mine[:, None]) | ((slot == mine[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum((there & ahead).to(tl.int32), axis=1)
        begin += tl.sum((there & (slot < i[:, None])).to(tl.int32), axis=1)
        end += tl.sum((there & (slot <= i[:, None])).to(tl.int32), axis=1)
        first += CHUNK
    tl.store(tokens + start + rank, (start + i).to(tl.int32), mask=mine >= 0)
    tl.store(spans + 2 * (slots + i), (start + begin).to(tl.int32), mask=i < M)
    tl.store(spans + 2 * (slots + i) + 1, (start + end).to(tl.int32), mask=i < M)


def assign_table(block: int) -> tune.Config:
    """``block``: tokens of an image, rounded up to a power of two."""
    return {"num_warps": max(1, min(8, block // 128))}  # with 16, 2048 tokens spill on sm_80


def assign_candidates(block: int) -> list[tune.Config]:
    """More tokens a warp take minutes to compile for some chips."""
    return tune.every(num_warps=[warps for warps in (1, 2, 4, 8, 16) if block <= 512 * warps])


def assign_long_table(block: int) -> tune.Config:
    return {"CHUNK": 1024, "num_warps": 16}  # what is larger spills on sm_100


def assign_long_candidates() -> list[tune.Config]:
    return tune.every(CHUNK=(1024, 2048, 4096), num_warps=(8, 16))


def lists_table(N: int) -> tune.Config:
    """``N``: tokens of an image, or its slots where they are more."""
    return {"TILE": 64, "CHUNK": 64, "num_warps": 4}


def lists_candidates() -> list[tune.Config]:
    return tune.every(TILE=(16, 32, 64, 128), CHUNK=(32, 64, 128), num_warps=(1, 2, 4, 8))


def assign(
    similarity: Tensor,
    partner: Tensor,
    r: int | Tensor,
    num_prefix: int,
    cu_seqlens: Tensor | None = None,
    max_tokens: int | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The assignment in which the most similar tokens of each image join their partners, and its lists.

    Args:
        similarity, partner: [B, N] (packed [1, T]), from match.
        r: one for all images, which stay dense; or int64 [B], each its own, and the merged images are packed.
        cu_seqlens: int32 [B + 1], where each packed image starts; max_tokens: no image is longer.
        slots: of a packed result in all, if they are known.

    Returns:
        assignment int32 as ``partner``; tokens int32 [B N]; spans int32 [slots, 2]; new_cu_seqlens int32 [B + 1], None
        for a dense result. Without ``slots`` as many spans as tokens are returned for a packed result: those from
        new_cu_seqlens[B] on mean nothing.

    Raises:
        ValueError: one r for images that are packed.
    """
    B, N = partner.shape
    packed, per_image = cu_seqlens is not None, isinstance(r, Tensor)
    if packed and not per_image:
        raise ValueError(f"r={r} for packed images; want a tensor with one for each")
    images, longest = (len(cu_seqlens) - 1, max_tokens) if packed else (B, N)
    counts, r = (r, 0) if per_image else (None, r)
    slots = (B * N if slots is None else slots) if per_image else B * (N - r)
    device = partner.device
    similarity, partner = similarity.contiguous(), partner.contiguous()
    assignment = torch.empty((B, N), dtype=torch.int32, device=device)
    new_cu_seqlens = _empty_bounds(images, device) if per_image else None
    choice = (similarity, partner, counts, cu_seqlens, assignment)
    numbers = (N, N - r, images)
    constants = {
        "P": num_prefix,
        "BLOCK": max(16, triton.next_power_of_2(longest)),
        "PACKED": packed,
        "PER_IMAGE": per_image,
    }
    if longest <= ONE_PROGRAM:
        tokens, spans = _empty_lists(B * N, slots, device)
        if images:
            _assign(images, (*choice, tokens, spans, new_cu_seqlens, *numbers), constants)
        return assignment, tokens, spans, new_cu_seqlens
    if images:
        _assign_long(images, (*choice, new_cu_seqlens, *numbers), constants)
        join_kernel[(images, triton.cdiv(longest, JOINED))](assignment, cu_seqlens, N, JOINED, packed)
    tokens, spans = lists(assignment, slots if per_image else N - r, cu_seqlens, new_cu_seqlens, longest)
    return assignment, tokens, spans, new_cu_seqlens


def _assign(images: int, arguments: tuple, constants: dict[str, Any]) -> None:
    block = constants["BLOCK"]
    launch = partial(assign_kernel[(images,)], *arguments, **constants)
    config = assign_table(block)
    if tune.SEARCH:
        config = tune.tuned("assign", {"block": block}, config, assign_candidates(block), launch)
    launch(**config)


def _assign_long(images: int, arguments: tuple, constants: dict[str, Any]) -> None:
    block = constants["BLOCK"]
    launch = partial(assign_long_kernel[(images,)], *arguments, **constants)
    config = assign_long_table(block)
    if tune.SEARCH:
        config = tune.tuned("assign_long", {"block": block}, config, assign_long_candidates(), launch)
    launch(**config)


def lists(
    assignment: Tensor,
    M: int,
    cu_seqlens: Tensor | None = None,
    new_cu_seqlens: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """tokens and spans of any assignment [B, N] (packed [1, T] with ``cu_seqlens``), where -1 drops a token.

    Args:
        M: the slots of every image; with ``new_cu_seqlens``, where those of each image begin, those of all images.
        max_tokens: no packed image has more tokens, or slots.
    """
    B, N = assignment.shape
    images, longest = (len(cu_seqlens) - 1, max_tokens) if cu_seqlens is not None else (B, N)
    assignment = assignment.contiguous()
    tokens, spans = _empty_lists(B * N, M if new_cu_seqlens is not None else images * M, assignment.device)
    if images:
        longest = max(longest, max_tokens or 0) if new_cu_seqlens is not None else max(longest, M)

        def grid(meta: dict[str, Any]) -> tuple[int, ...]:
            return images, triton.cdiv(longest, meta["TILE"])

        launch = partial(
            lists_kernel[grid],
            assignment,
            cu_seqlens,
            new_cu_seqlens,
            tokens,
            spans,
            N,
            M,
            PACKED=cu_seqlens is not None,
            TO_PACKED=new_cu_seqlens is not None,
        )
        config = lists_table(longest)
        if tune.SEARCH:
            config = tune.tuned("lists", {"N": tune.like(longest)}, config, lists_candidates(), launch)
        launch(**config)
    return tokens, spans


def _empty_bounds(images: int, device: torch.device) -> Tensor:
    """Where each image begins, for the kernel to fill: without images it fills nothing, and they begin and end at 0."""
    make = torch.empty if images else torch.zeros
    return make(images + 1, dtype=torch.int32, device=device)


def _empty_lists(tokens: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in ((tokens,), (slots, 2)))
