"""assign: decides which token goes to which slot, and lists the tokens of each slot.

``slots`` is the map of the reference. Two lists let a merge gather instead of scatter: ``order`` holds all tokens
sorted by slot (within a slot in their previous order), and ``spans`` says where in it the tokens of each slot begin and
end. Slots, like tokens, are numbered consecutively over all images, so the merge needs no images.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels.common import aligned, block_for, image_bounds

NO_SLOT = tl.constexpr(2**30)  # sorts after every slot
IMAGES = tl.constexpr(256)  # a program reads the r of so many images at once
TOGETHER = tl.constexpr(8)  # how many joining tokens to compare with at once
ONE_PROGRAM = 2046  # most tokens of an image for assign_kernel, so at most 1023 of A; see assign_long_kernel
JOINED = 1024  # tokens per program of join_kernel


@triton.jit
def _ordered(similarity):
    """Map float32 to uint32, keeping the order."""
    bits = (similarity + 0.0).to(tl.uint32, bitcast=True)  # + 0.0 turns -0.0 into 0.0
    sign = tl.full([], 0x80000000, tl.uint32)
    return tl.where(bits >= sign, bits ^ tl.full([], 0xFFFFFFFF, tl.uint32), bits | sign)


@triton.jit
def _bound(key, in_a, r):
    """Find the r-th largest key by bisection over its bits. Also returns how many keys equal to it are among the r."""
    bound = tl.full([], 0, tl.uint32)
    for bit in tl.static_range(32):
        higher = bound | tl.full([], 1 << (31 - bit), tl.uint32)
        enough = tl.sum((in_a & (key >= higher)).to(tl.int32)) >= r
        bound = tl.where(enough, higher, bound)
    return bound, r - tl.sum((in_a & (key > bound)).to(tl.int32))


@triton.jit
def _up_to(chosen):
    """The number of chosen elements up to and including each."""
    return tl.cumsum(chosen.to(tl.int32))


@triton.jit
def _note_slots(merged_cu_seqlens, image, first_slot, length, joining):
    """Store where the slots of an image begin; for the last image also where they end."""
    tl.store(merged_cu_seqlens + image, first_slot.to(tl.int32))
    if image == tl.num_programs(0) - 1:
        tl.store(merged_cu_seqlens + image + 1, (first_slot + length - joining).to(tl.int32))


@triton.jit
def _width(x):
    """How many low bits of a uint32 may be set; the result is exact or one too large."""
    exponent = (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.where(x == 0, 0, tl.minimum(exponent, 32))


@triton.jit
def _bound_of_few(key, in_a, r):
    """The r-th largest of up to 1023 keys of A; all other keys must be 0. Every step finds two bits, starting below the
    bits that all keys of A share. A step makes three counts at once, packed into ten bits each."""
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
    """Whether each token is among the ``r`` most similar of A. Among equally similar tokens the first are taken."""
    key = tl.where(in_a, _ordered(s), tl.full([], 0, tl.uint32))
    bound = _bound_of_few(key, in_a, r)
    more, level = in_a & (key > bound), in_a & (key == bound)
    number = tl.sum(more.to(tl.int32) + (level.to(tl.int32) << 16), axis=0)
    room = r - (number & 0xFFFF)
    if (number >> 16) > room:
        level = level & (_up_to(level) <= room)
    return tl.where(r > 0, more | level, False)  # not &, here and below: Triton 3.9's interpreter refuses int32 masks


@triton.jit
def _sum_of_first(r, images):
    """The sum of r over the first ``images`` images."""
    total = tl.zeros([IMAGES], tl.int64)
    for first in tl.range(0, images, IMAGES):
        other = first + tl.arange(0, IMAGES)
        total += tl.load(r + other, mask=other < images, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _removed(r, given, image, MEAN: tl.constexpr):
    """How many tokens of this image join others, and how many of all earlier images. If r is None, it is ``given`` for
    every image; otherwise the r of each image, or the mean of all r, rounded down."""
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
    """How many of the ``number`` joiners are below ``mine``, and how many are at most ``past``."""
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
    """One program per image, which also makes the image's lists. With ``theta``, tokens at least that similar join, and
    r must be their number. (A NaN would not join; match produces none.) Without it the r most similar tokens join.

    A token finds its place in the lists by comparing with the joining tokens, which are few. Their numbers pass from
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
    up_to = tl.cumsum(in_a.to(tl.int32) + (in_b.to(tl.int32) << 16))  # before the search, which need not wait for it
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
    joined = tl.where(joining > 0, in_b, False)  # tokens of B, if any token joins
    place = tl.where(joined | joins, slot + ahead + (joins & (mate < i)).to(tl.int32), slot)
    tl.store(order + place, (start + i).to(tl.int32), mask=valid)
    begin = (start + slot).to(tl.int32)
    end = begin + 1 + tl.where(joined, through, 0)
    alone = valid & ~joined & ~joins
    span = spans + 2 * (first_slot + slot)
    tl.store(span, begin, mask=alone | (joined & (rank_b == 1)))
    tl.store(span + 1, end, mask=alone | joined)
    tl.store(span + 2, end, mask=joined & (slot + 1 < length - joining))  # the next span begins here


@triton.jit
def _search(similarity, partner, length, joining, BLOCK: tl.constexpr):
    """:func:`_bound` for a whole image, and how many tokens of A stay."""
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
    """One program per long image. Only the search for the r-th largest similarity holds the whole image at once. A
    token that joins gets -1 - partner, which ``join_kernel`` then replaces by the partner's slot."""
    image = tl.program_id(0)
    start, length = image_bounds(cu_seqlens, image)
    joining = tl.load(r + image).to(tl.int32)
    first_slot = (start - _sum_of_first(r, image)).to(tl.int32)
    _note_slots(merged_cu_seqlens, image, first_slot, length, joining)
    bound, room, kept = _search(similarity + start, partner + start, length, joining, BLOCK)
    stayed = tl.zeros([], tl.int32)  # tokens of A that stayed so far
    passed = tl.zeros([], tl.int32)  # tokens of B so far
    for first in tl.range(0, length, CHUNK):
        i = first + tl.arange(0, CHUNK)
        mate = tl.load(partner + start + i, mask=i < length, other=-1)
        key = _ordered(tl.load(similarity + start + i, mask=i < length, other=float("-inf")))
        in_a = mate >= 0
        level = in_a & (key == bound)
        joins = (in_a & (key > bound)) | (level & (_up_to(level) <= room))
        joins = tl.where(joining > 0, joins, False)
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
    """Joining tokens take the slots of their partners, which no program changes. Each program handles ``TOKENS``."""
    image, tile = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image)
    i = tile * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + start + i, mask=i < length, other=0)
    joins = slot < 0
    tl.store(slots + start + i, tl.load(slots + start - 1 - slot, mask=joins), mask=joins)


def assign_table(block: int, search: bool) -> dict[str, int]:
    """Warps of assign_kernel. ``block``: tokens of an image, rounded up to a power of two; ``search``: whether the
    kernel searches for the most similar tokens. Measured on an H200, triton 3.6.0: 197 and 101 tokens, in batches of 1,
    8, 64 and 256."""
    return {"num_warps": max(1, min(16, block // (64 if search else 32)))}  # two tokens per thread, or one


LONG_CONFIG = {"CHUNK": 1024, "num_warps": 16}  # of assign_long_kernel; larger values spill on sm_100


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
    """Let the most similar tokens of each image join their partners, and list the tokens of each slot.

    Args:
        similarity: float32 [T]; partner: int32 [T]; both from match.
        r: how many tokens of each image join, at most the tokens in its A: one number for all images, or int64 [B].
        cu_seqlens: int32 [B + 1], where each image begins; N: upper bound on the tokens of an image.
        rows: number of rows of spans: T', the tokens that remain in all images, or more.
        out: the four results, to be written to.
        theta: r is the number of tokens at least this similar, so these join and no search is needed.
        mean: use the mean of r, rounded down, for every image.
        config: replaces the table's.

    Returns:
        slots int32 [T]; order int32 [T]; spans int32 [rows, 2]; cu_seqlens int32 [B + 1] of the merged images. Entries
        that belong to no image or no slot are undefined.
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
    """The r of each image, int64 [B]."""
    if isinstance(r, int):
        return torch.full((B,), r, dtype=torch.int64, device=device)
    return (r.sum() // B).expand(B) if mean else r


def _lists(slots: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Compute order and spans by sorting ``slots``, which is -1 for rows of no image; ``rows``: T'."""
    slot = slots.masked_fill(slots < 0, rows)
    order = slot.argsort(stable=True)
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
    first = torch.searchsorted(slot[order], numbers)
    return order.int(), torch.stack([first[:-1], first[1:]], dim=1).int()
