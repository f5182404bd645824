"""assign: which token goes to which slot, and for each slot the list of its tokens.

``slots`` is the map of the reference. Beside it stands what lets a merge gather instead of scatter: ``tokens``, all
tokens in the order of their slots (within a slot in the order in which they stood), and ``spans``, where in it the
tokens of a slot begin and end. Slots of all images are numbered through, as are tokens: the merge knows no images.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import tune
from atm_triton.kernels.images import aligned, block_for, image_bounds

NO_SLOT = tl.constexpr(2**30)  # sorts behind every slot
ONE_PROGRAM = 2048  # tokens of an image that one program sorts; a longer image takes two launches and a sort
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
def _slots_of_image(r, image, start, length, new_cu_seqlens, CHUNK: tl.constexpr):
    """The first slot of the image, and how many of its tokens join others; notes where its slots begin."""
    removed = tl.zeros([], tl.int64)  # in all images before this one
    for first in tl.range(0, image, CHUNK):
        other = first + tl.arange(0, CHUNK)
        removed += tl.sum(tl.load(r + other, mask=other < image, other=0), axis=0)
    slot, joining = (start - removed).to(tl.int32), tl.load(r + image).to(tl.int32)
    tl.store(new_cu_seqlens + image, slot)
    if image == tl.num_programs(0) - 1:
        tl.store(new_cu_seqlens + image + 1, slot + length - joining)
    return slot, joining


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
    r,
    cu_seqlens,
    slots,
    tokens,
    spans,
    new_cu_seqlens,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program an image, which makes its lists too."""
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image)
    i = tl.arange(0, BLOCK)
    valid = i < length
    mate = tl.load(partner + start + i, mask=valid, other=-1)
    s = tl.load(similarity + start + i, mask=valid, other=float("-inf"))
    first_slot, joining = _slots_of_image(r, image, start, length, new_cu_seqlens, 1024)
    in_a, key = mate >= 0, _ordered(s)
    bound, room = _bound(key, in_a, joining)
    level = in_a & (key == bound)
    joins = ((in_a & (key > bound)) | (level & (_up_to(level) <= room))) & (joining > 0)
    stays = in_a & ~joins
    in_b = valid & ~in_a & (i >= P)
    kept = tl.sum(stays.to(tl.int32))
    slot = tl.where(stays, P + _up_to(stays) - 1, tl.where(in_b, P + kept + _up_to(in_b) - 1, i))
    slot = tl.where(joins, tl.gather(slot, tl.maximum(mate, 0), 0), slot)
    slot = tl.where(joining == 0, i, slot)
    tl.store(slots + start + i, first_slot + slot, mask=valid)
    token, at, begins, ends, filled = _sorted_by_slot(slot, i, valid, BLOCK)
    here = (start + i).to(tl.int32)
    tl.store(tokens + start + i, (start + token).to(tl.int32), mask=filled)
    span = spans + 2 * (first_slot.to(tl.int64) + at)
    tl.store(span, here, mask=begins)
    tl.store(span + 1, here + 1, mask=ends)


@triton.jit
def _search(similarity, partner, length, joining, BLOCK: tl.constexpr):
    """:func:`_bound` of a whole image, and how many tokens of A stay."""
    i = tl.arange(0, BLOCK)
    in_a = tl.load(partner + i, mask=i < length, other=-1) >= 0
    s = tl.load(similarity + i, mask=i < length, other=float("-inf"))
    bound, room = _bound(_ordered(s), in_a, joining)
    return bound, room, tl.maximum(tl.sum(in_a.to(tl.int32)) - joining, 0)


@triton.jit
def assign_long_kernel(
    similarity,
    partner,
    r,
    cu_seqlens,
    slots,
    new_cu_seqlens,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a long image: only the search for the r-th largest holds it whole. A token that joins gets
    -1 - its partner, which ``join_kernel`` turns into that one's slot."""
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image)
    first_slot, joining = _slots_of_image(r, image, start, length, new_cu_seqlens, CHUNK)
    bound, room, kept = _search(similarity + start, partner + start, length, joining, BLOCK)
    stayed = tl.zeros([], tl.int32)  # so far, of A
    passed = tl.zeros([], tl.int32)  # of B
    for first in tl.range(0, length, CHUNK):
        i = first + tl.arange(0, CHUNK)
        mate = tl.load(partner + start + i, mask=i < length, other=-1)
        key = _ordered(tl.load(similarity + start + i, mask=i < length, other=float("-inf")))
        in_a = mate >= 0
        level = in_a & (key == bound)
        joins = ((in_a & (key > bound)) | (level & (_up_to(level) <= room))) & (joining > 0)
        stays = in_a & ~joins
        in_b = (i < length) & (i >= P) & (mate < 0)
        slot = tl.where(in_b, P + kept + passed + _up_to(in_b) - 1, i)
        slot = tl.where(stays, P + stayed + _up_to(stays) - 1, slot)
        slot = first_slot + tl.where(joining == 0, i, slot)
        tl.store(slots + start + i, tl.where(joins, -1 - mate, slot), mask=i < length)
        room -= tl.sum(level.to(tl.int32))
        stayed += tl.sum(stays.to(tl.int32))
        passed += tl.sum(in_b.to(tl.int32))


@triton.jit
def join_kernel(slots, cu_seqlens, TOKENS: tl.constexpr):
    """One program for some tokens: those that join take the slots of their partners, which no program changes."""
    image, tile = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image)
    i = tile * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + start + i, mask=i < length, other=0)
    joins = slot < 0
    tl.store(slots + start + i, tl.load(slots + start - 1 - slot, mask=joins), mask=joins)


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


def assign(
    similarity: Tensor,
    partner: Tensor,
    r: Tensor,
    cu_seqlens: Tensor,
    num_prefix: int,
    longest: int,
    slots: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The merge step in which the most similar tokens of each image join their partners, and its lists.

    Args:
        similarity: float32 [T]; partner: int32 [T]; both from match.
        r: int64 [B], how many tokens of each image join; not above the number of tokens in its A.
        cu_seqlens: int32 [B + 1], where each image begins; longest: no image has more tokens.
        slots: how many rows of spans to make: T', the tokens that remain in all, or more.
        out: what is returned, to be written to.

    Returns:
        slots int32 [T]; tokens int32 [T]; spans int32 [slots, 2]; cu_seqlens int32 [B + 1] of the merged images. What
        belongs to no image, or to no slot, means nothing.
    """
    T, B, device = len(partner), len(cu_seqlens) - 1, partner.device
    if out is None:
        shapes = ((T,), (T,), (slots, 2), (B + 1,))
        out = tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
    to, tokens, spans, new_cu_seqlens = out
    if not (B and T):
        new_cu_seqlens.zero_()  # every image begins and ends at 0
        return out
    inputs = tuple(map(aligned, (similarity, partner, r, cu_seqlens)))
    block = block_for(longest)
    constants, key = {"P": num_prefix, "BLOCK": block}, {"block": block}
    if longest > ONE_PROGRAM:
        launch = partial(assign_long_kernel[(B,)], *inputs, to.fill_(-1), new_cu_seqlens, **constants)
        tune.run("assign_long", key, assign_long_table(block), assign_long_candidates, launch)
        join_kernel[(B, -(-longest // JOINED))](to, inputs[3], JOINED)
        for one, made in zip((tokens, spans), _lists(to, slots), strict=True):
            one.copy_(made)
    else:
        launch = partial(assign_kernel[(B,)], *inputs, *out, **constants)
        tune.run("assign", key, assign_table(block), partial(assign_candidates, block), launch)
    return out


def _lists(to: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """tokens and spans of the slots ``to`` which tokens go, -1 for those that are of no image, by a sort."""
    slot = to.masked_fill(to < 0, slots)
    tokens = slot.argsort(stable=True)
    numbers = torch.arange(slots + 1, dtype=torch.int32, device=to.device)
    first = torch.searchsorted(slot[tokens], numbers)
    return tokens.int(), torch.stack([first[:-1], first[1:]], dim=1).int()
