"""assign: which token goes to which slot, and for each slot the list of its tokens.

``slots`` is the map of the reference. Beside it stands what lets a merge gather instead of scatter: ``order``, all
tokens in the order of their slots (within a slot in the order in which they stood), and ``spans``, where in it the
tokens of a slot begin and end. Slots of all images are numbered through, as are tokens: the merge knows no images.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels.common import aligned, block_for, image_bounds

NO_SLOT = tl.constexpr(2**30)  # after every slot
IMAGES = tl.constexpr(256)  # whose r a program reads at once
TOGETHER = tl.constexpr(8)  # tokens that join and are compared with at once
ONE_PROGRAM = 2046  # tokens of an image that one program takes, so at most 1023 of A; a longer image takes the long way
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
def _note_slots(merged_cu_seqlens, image, first_slot, length, joining):
    """Where the slots of an image begin; after the last image also where they end."""
    tl.store(merged_cu_seqlens + image, first_slot.to(tl.int32))
    if image == tl.num_programs(0) - 1:
        tl.store(merged_cu_seqlens + image + 1, (first_slot + length - joining).to(tl.int32))


@triton.jit
def _width(x):
    """How many low bits of a uint32 may be set: exact, or one too many."""
    exponent = (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.where(x == 0, 0, tl.minimum(exponent, 32))


@triton.jit
def _bound_of_few(key, in_a, r):
    """The r-th largest of up to 1023 keys of A, all others 0: two bits a step, below those that all of A share. A step
    counts three ways at once, ten bits each."""
    most = tl.max(key, axis=0)
    least = tl.min(tl.where(in_a, key, most), axis=0)
    bits = (_width(least ^ most) + 1) // 2 * 2
    shared = tl.minimum(bits, 31).to(tl.uint32)
    bound = tl.where(bits < 32, (most >> shared) << shared, tl.full([], 0, tl.uint32))
    for step in tl.range(0, bits // 2):
        unit = tl.full([], 1, tl.uint32) << (bits - 2 - 2 * step).to(tl.uint32)
        enough = (key >= bound + unit).to(tl.int32)
        enough += (key >= bound + 2 * unit).to(tl.int32) << 10
        enough += (key >= bound + 3 * unit).to(tl.int32) << 20
        enough = tl.sum(enough, axis=0)
        steps = ((enough & 1023) >= r).to(tl.uint32) + (((enough >> 10) & 1023) >= r).to(tl.uint32)
        bound += (steps + ((enough >> 20) >= r).to(tl.uint32)) * unit
    return bound


@triton.jit
def _most_similar(s, in_a, r):
    """Whether each token is of the ``r`` of A that are most similar, of equally similar ones the first."""
    key = tl.where(in_a, _ordered(s), tl.full([], 0, tl.uint32))
    bound = _bound_of_few(key, in_a, r)
    more, level = in_a & (key > bound), in_a & (key == bound)
    number = tl.sum(more.to(tl.int32) + (level.to(tl.int32) << 16), axis=0)
    room = r - (number & 0xFFFF)
    if (number >> 16) > room:
        level = level & (_up_to(level) <= room)
    return (more | level) & (r > 0)


@triton.jit
def _sum_of_first(r, images):
    """r of the first ``images`` images, added up."""
    total = tl.zeros([IMAGES], tl.int64)
    for first in tl.range(0, images, IMAGES):
        other = first + tl.arange(0, IMAGES)
        total += tl.load(r + other, mask=other < images, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _removed(r, given, image, MEAN: tl.constexpr):
    """How many tokens of the image join others, and how many of all images before it: ``given`` of each image where r
    is None; r of each; or the mean of all r, rounded down."""
    images = tl.num_programs(0)
    if r is None:
        joining = given
    elif MEAN:
        joining = (_sum_of_first(r, images) // images).to(tl.int32)
    else:
        joining = tl.load(r + image).to(tl.int32)
    if r is None or MEAN:
        before = image.to(tl.int64) * joining
    else:
        before = _sum_of_first(r, image)
    return joining, before


@triton.jit
def _compared(joiners, number, mine, past):
    """How many of the ``number`` joiners are below ``mine``, and how many up to ``past``."""
    both = tl.zeros(mine.shape, tl.int32)
    for first in tl.range(0, number, TOGETHER):
        for j in tl.static_range(TOGETHER):
            other = tl.load(joiners + first + j, mask=first + j < number, other=NO_SLOT)
            both += (other < mine).to(tl.int32) + ((other <= past).to(tl.int32) << 16)
    return both & 0xFFFF, both >> 16


@triton.jit(do_not_specialize=["given"])
def assign_kernel(
    similarity,
    partner,
    r,
    given,
    theta,
    cu_seqlens,
    slots,
    order,
    spans,
    merged_cu_seqlens,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program an image, which makes its lists too. With ``theta`` those join that are at least as similar, which r
    must count; a NaN does not, and match makes none. Without it the r most similar ones join.

    A token's place in the lists follows from a comparison with those that join, which are few: their numbers pass from
    thread to thread through ``order``.
    """
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image)
    i = tl.arange(0, BLOCK)
    valid = i < length
    mate = tl.load(partner + start + i, mask=valid, other=-1)
    s = tl.load(similarity + start + i, mask=valid, other=float("-inf"))
    joining, before = _removed(r, given, image, MEAN)
    first_slot = start - before
    in_a = mate >= 0
    in_b = valid & ~in_a & (i >= P)
    up_to = tl.cumsum(in_a.to(tl.int32) + (in_b.to(tl.int32) << 16))  # before any search: it need not wait for that
    rank_a, rank_b = up_to & 0xFFFF, up_to >> 16
    mates_rank = tl.gather(rank_b, tl.maximum(mate, 0), 0)
    if theta is None:
        joins = _most_similar(s, in_a, joining)
    else:
        joins = in_a & (s >= theta)
    stays = in_a & ~joins
    rank_stays = _up_to(stays)
    na = tl.sum(in_a.to(tl.int32), axis=0)
    kept = tl.maximum(na - joining, 0)
    slot = tl.where(stays, P + rank_stays - 1, i)
    slot = tl.where(in_b | joins, P + kept + tl.where(in_b, rank_b, mates_rank) - 1, slot)
    slot = tl.where(joining == 0, i, slot)
    tl.store(slots + start + i, (first_slot + slot).to(tl.int32), mask=valid)
    _note_slots(merged_cu_seqlens, image, first_slot, length, joining)

    order += start
    target = tl.where(joins, mate, i)
    mine = target * BLOCK + i
    tl.store(order + rank_a - rank_stays - 1, mine, mask=joins)
    tl.debug_barrier()
    ahead, through = _compared(order, na - kept, mine, target * BLOCK + BLOCK - 1)
    tl.debug_barrier()
    joined = in_b & (joining > 0)  # B, where tokens may join it
    place = tl.where(joined | joins, slot + ahead + (joins & (mate < i)).to(tl.int32), slot)
    tl.store(order + place, (start + i).to(tl.int32), mask=valid)
    begin = (start + slot).to(tl.int32)
    end = begin + 1 + tl.where(joined, through, 0)
    alone = valid & ~joined & ~joins
    span = spans + 2 * (first_slot + slot)
    tl.store(span, begin, mask=alone | (joined & (rank_b == 1)))
    tl.store(span + 1, end, mask=alone | joined)
    tl.store(span + 2, end, mask=joined & (slot + 1 < length - joining))  # where the next one begins


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
    merged_cu_seqlens,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a long image: only the search for the r-th largest holds it whole. A token that joins gets
    -1 - its partner, which ``join_kernel`` turns into that one's slot."""
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image)
    joining = tl.load(r + image).to(tl.int32)
    first_slot = (start - _sum_of_first(r, image)).to(tl.int32)
    _note_slots(merged_cu_seqlens, image, first_slot, length, joining)
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


def assign_table(block: int, search: bool) -> dict[str, int]:
    """``block``: tokens of an image, rounded up to a power of two; ``search``: for the most similar ones. Measured on
    an H200, triton 3.6.0: 197 and 101 tokens, in batches of 1, 8, 64 and 256."""
    return {"num_warps": max(1, min(16, block // (64 if search else 32)))}  # two tokens a thread, or one


LONG_CONFIG = {"CHUNK": 1024, "num_warps": 16}  # of assign_long: what is larger spills on sm_100


def assign(
    similarity: Tensor,
    partner: Tensor,
    r: int | Tensor,
    cu_seqlens: Tensor,
    num_prefix: int,
    N: int,
    rows: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    theta: float | None = None,
    mean: bool = False,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The merge step in which the most similar tokens of each image join their partners, and its lists.

    Args:
        similarity: float32 [T]; partner: int32 [T]; both from match.
        r: how many tokens of each image join, not above the number of tokens in its A: of all images, or int64 [B].
        cu_seqlens: int32 [B + 1], where each image begins; N: upper bound on the tokens of an image.
        rows: how many rows of spans to make: T', the tokens that remain in all, or more.
        out: what is returned, to be written to.
        theta: r counts the tokens that are at least as similar, so that nothing need be searched for.
        mean: of every image as many tokens join as the mean of r says, rounded down.
        config: instead of the table's.

    Returns:
        slots int32 [T]; order int32 [T]; spans int32 [rows, 2]; cu_seqlens int32 [B + 1] of the merged images. What
        belongs to no image, or to no slot, means nothing.
    """
    T, B, device = len(partner), len(cu_seqlens) - 1, partner.device
    if out is None:
        empty = partial(torch.empty, dtype=torch.int32, device=device)
        out = empty(T), empty(T), empty((rows, 2)), empty(B + 1)
    slots, order, spans, merged_cu_seqlens = out
    if not (B and T):
        merged_cu_seqlens.zero_()  # every image begins and ends at 0
        return out
    similarity, partner, cu_seqlens = map(aligned, (similarity, partner, cu_seqlens))
    block = block_for(N)
    if N > ONE_PROGRAM:
        r = aligned(_of_each(r, B, mean, device))
        inputs = (similarity, partner, r, cu_seqlens)
        options = config or LONG_CONFIG
        assign_long_kernel[(B,)](*inputs, slots.fill_(-1), merged_cu_seqlens, P=num_prefix, BLOCK=block, **options)
        join_kernel[(B, -(-N // JOINED))](slots, cu_seqlens, JOINED)
        for one, made in zip((order, spans), _lists(slots, rows), strict=True):
            one.copy_(made)
    else:
        of_each, given = (None, r) if isinstance(r, int) else (aligned(r), 0)
        tensors = (similarity, partner, of_each, given, theta, cu_seqlens, *out)
        config = config or assign_table(block, search=theta is None)
        assign_kernel[(B,)](*tensors, P=num_prefix, MEAN=mean, BLOCK=block, **config)
    return out


def _of_each(r: int | Tensor, B: int, mean: bool, device: torch.device) -> Tensor:
    """r int64 [B]."""
    if isinstance(r, int):
        return torch.full((B,), r, dtype=torch.int64, device=device)
    return (r.sum() // B).expand(B) if mean else r


def _lists(slots: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """order and spans by a sort of ``slots``, which is -1 for rows of no image; ``rows``: T'."""
    slot = slots.masked_fill(slots < 0, rows)
    order = slot.argsort(stable=True)
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
    first = torch.searchsorted(slot[order], numbers)
    return order.int(), torch.stack([first[:-1], first[1:]], dim=1).int()
