"""match: finds each token's most similar partner, and each image's number of candidates (Sections 3.1 to 3.3).

If both groups of an image fit a tile, one launch reads keys in place, averages them over the heads, normalises and
multiplies them; N x N similarities are never in memory. Longer images, or more than 64 channels per head, take two
launches: the first writes unit vectors [N, d], the second runs tiles of A against tiles of B.

Products are as accurate as in float32: each factor is split into two float16 halves (scaled by 64, which keeps the low
half out of the subnormals), and three of the four half products are summed. Plain tf32 or bfloat16 would flip decisions
near the threshold.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atm_triton.kernels import attention
from atm_triton.kernels.common import aligned, block_for, check_strides, image_bounds, multiprocessors

EPS_SQUARED = tl.constexpr(1e-24)
NOT_ALIKE = tl.constexpr(-2.0)
SCALE = tl.constexpr(64.0)
LAST = tl.constexpr(2**31 - 1)
ALTERNATE, BY_SIZE, HALVES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # HALVES: by size, all sizes equal
PREFIX = tl.constexpr(16)  # side of the tile for protected tokens

WHOLE_IMAGE = 256  # up to so many free tokens and 64 channels per head, each group of an image fits one tile


@triton.jit
def _group_sizes(length, P: tl.constexpr, GROUP: tl.constexpr):
    """The number of tokens in A and in B."""
    free = tl.maximum(length - P, 0)
    if GROUP == ALTERNATE:
        na = (free + 1 - P % 2) // 2
    else:
        na = free // 2
    return na, free - na


@triton.jit
def _bits(sizes, token, free):
    """Sizes as integers. These have the same order, because sizes are positive floats. Missing tokens sort last."""
    bits = tl.load(sizes + token, mask=token < free, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(token < free, bits, LAST)


@triton.jit
def _rank(sizes, token, free, CHUNK: tl.constexpr):
    """The place of each token in a stable sort of the ``free`` tokens by size."""
    n = _bits(sizes, token, free)
    rank = tl.zeros([n.shape[0]], tl.int32)
    for first in tl.range(0, free, CHUNK):
        other = first + tl.arange(0, CHUNK)
        m = _bits(sizes, other, free)
        before = (m[None, :] < n[:, None]) | ((m[None, :] == n[:, None]) & (other[None, :] < token[:, None]))
        rank += tl.sum(before.to(tl.int32), axis=1)
    return rank


@triton.jit
def _sorted(sizes, free, TOKENS: tl.constexpr):
    """The tokens of an image, stably sorted by size [TOKENS]; missing ones last."""
    token = tl.arange(0, TOKENS)
    key = _bits(sizes, token, free).to(tl.int64) * TOKENS + token
    return (tl.sort(key) & (TOKENS - 1)).to(tl.int32)


@triton.jit
def _positions(order, na, first, IN_B: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The positions [BLOCK] of the members of A or of B from number ``first`` on; undefined past the end of the group.
    ``order``: the tokens sorted by size, if groups go by size."""
    member = first + tl.arange(0, BLOCK)
    if GROUP == ALTERNATE:
        return P + (P + IN_B) % 2 + 2 * member
    if IN_B:
        member += na
    if GROUP == BY_SIZE:
        return P + tl.gather(order, member, 0)
    return P + member


@triton.jit
def _head(at, h, stride_h, inside, d: tl.constexpr):
    """Load the keys of one head [BLOCK, D]. ``stride_h``: None if heads are contiguous."""
    if stride_h is None:  # the compiler knows this stride, so loads are wide even for odd d
        offset = h * d
    else:
        offset = h * tl.cast(stride_h, tl.int64)
    return tl.load(at + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _mean_keys(
    keys, position, valid, stride_h, stride_n, H: tl.constexpr, d: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr
):
    """Keys averaged over the heads [BLOCK, D]. The loads of up to ``HEADS`` heads are in one basic block, so that none
    waits for another. More heads would take too many registers; they are loaded ``HEADS // 2`` at a time."""
    TOGETHER: tl.constexpr = H if H <= HEADS else HEADS // 2
    REST: tl.constexpr = H % TOGETHER
    c = tl.arange(0, D)
    inside = valid[:, None] & (c < d)[None, :]
    at = keys + position[:, None] * stride_n + c[None, :]
    total = tl.zeros([position.shape[0], D], tl.float32)
    for first in tl.range(0, H - REST, TOGETHER, num_stages=1):
        for h in tl.static_range(TOGETHER):
            total += _head(at, first + h, stride_h, inside, d)
    for h in tl.static_range(REST):
        total += _head(at, H - REST + h, stride_h, inside, d)
    return total * (1.0 / H)


@triton.jit
def _unit_vectors(mean):
    """Rows [BLOCK, D] scaled to length 1, or 0 if they have no direction; and whether they have one."""
    squared = tl.sum(mean * mean, axis=1)
    has_direction = (squared > EPS_SQUARED) & (squared < float("inf"))
    norm = tl.sqrt_rn(tl.maximum(squared, EPS_SQUARED))
    return tl.where(has_direction[:, None], mean / norm[:, None], 0.0), has_direction


@triton.jit
def _halves(unit):
    """Split a scaled unit vector into the sum of two float16 vectors."""
    scaled = unit * SCALE
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _cosines(a_high, a_low, b_high, b_low):
    """Products of rows of A and rows of B, as accurate as in float32; the smallest terms are added first."""
    b_high, b_low = tl.trans(b_high), tl.trans(b_low)
    s = tl.dot(a_low, b_high)
    s = tl.dot(a_high, b_low, s)
    s = tl.dot(a_high, b_high, s)
    return s * (1.0 / (SCALE * SCALE))


@triton.jit
def _best(s, a_has, b_has, position, valid):
    """The largest similarity of each row, and the lowest position that has it. Vectors without a direction
    (``a_has``, ``b_has``) have products of 0 and become similar to nothing; only ``valid`` columns count."""
    s = tl.minimum(s, tl.where(b_has, float("inf"), tl.where(valid, NOT_ALIKE, float("-inf")))[None, :])
    best = tl.max(s, axis=1)
    closest = tl.min(tl.where(s == best[:, None], position[None, :], LAST), axis=1)
    first = tl.min(tl.where(valid, position, LAST), axis=0)
    return tl.where(a_has, best, tl.minimum(best, NOT_ALIKE)), tl.where(a_has, closest, first)


@triton.jit
def _store_outside(similarity, partner, position, valid):
    """Store that tokens outside A have no partner."""
    tl.store(similarity + position, tl.full(position.shape, float("-inf"), tl.float32), mask=valid)
    tl.store(partner + position, tl.full(position.shape, -1, tl.int32), mask=valid)


@triton.jit
def match_image_kernel(
    keys,
    sizes,
    cu_seqlens,
    similarity,
    partner,
    counts,
    theta,
    stride_h,
    stride_n,
    P: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    PER: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program compares ``PER`` tiles of ``ROWS`` members of A with all of B. If several programs share an image,
    ``counts`` must hold 0 at the start."""
    PROGRAMS: tl.constexpr = BLOCK // (ROWS * PER)
    image, first = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS * (ROWS * PER)
    start, length = image_bounds(cu_seqlens, image)
    stride_n *= STEP
    keys += start * stride_n
    similarity += start
    partner += start
    na, nb = _group_sizes(length, P, GROUP)
    if (first > 0) & (first >= na):
        return
    order = _sorted(sizes + start + P, na + nb, 2 * BLOCK) if GROUP == BY_SIZE else None
    b = _positions(order, na, 0, True, P, GROUP, BLOCK)
    in_b = tl.arange(0, BLOCK) < nb
    if first == 0:
        _store_outside(similarity, partner, b, in_b)
        p = tl.arange(0, PREFIX)
        _store_outside(similarity, partner, p, p < tl.minimum(P, length))
    candidates = tl.zeros([], tl.int32)
    for k in tl.static_range(PER):
        member = first + k * ROWS
        a = _positions(order, na, member, False, P, GROUP, ROWS)
        in_a = member + tl.arange(0, ROWS) < na
        a_mean = _mean_keys(keys, a, in_a, stride_h, stride_n, H, d, D, HEADS)
        if k == 0:  # after the first loads of A
            b_unit, b_has = _unit_vectors(_mean_keys(keys, b, in_b, stride_h, stride_n, H, d, D, HEADS))
            b_high, b_low = _halves(b_unit)
        a_unit, a_has = _unit_vectors(a_mean)
        a_high, a_low = _halves(a_unit)
        s = _cosines(a_high, a_low, b_high, b_low)
        best, closest = _best(s, a_has, b_has, b, in_b)
        tl.store(similarity + a, best, mask=in_a)  # -inf if B is empty
        tl.store(partner + a, tl.where(nb > 0, closest, -1), mask=in_a)
        candidates += tl.sum((in_a & (best >= theta)).to(tl.int32))
    if PROGRAMS == 1:
        tl.store(counts + image, candidates.to(tl.int64))
    else:
        tl.atomic_add(counts + image, candidates.to(tl.int64))


@triton.jit
def unit_rows_kernel(
    keys,
    sizes,
    cu_seqlens,
    unit,
    order,
    similarity,
    partner,
    counts,
    stride_h,
    stride_n,
    P: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program takes some tokens of a long image and writes their unit vectors to ``unit`` [rows, 2, d] float16,
    A's rows before B's, and their positions to ``order``; -1 - position if a key has no direction."""
    image, tile = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image)
    stride_n *= STEP
    keys += start * stride_n
    similarity += start
    partner += start
    na, nb = _group_sizes(length, P, GROUP)
    free = na + nb
    token = tile * TOKENS + tl.arange(0, TOKENS)
    valid = token < free
    if GROUP == ALTERNATE:
        row = tl.where((token + P) % 2 == 0, token // 2, na + token // 2)
    elif GROUP == HALVES:
        row = token
    else:
        row = _rank(sizes + start + P, token, free, CHUNK)
    position = P + token
    vectors, has = _unit_vectors(_mean_keys(keys, position, valid, stride_h, stride_n, H, d, D, 2))
    high, low = _halves(vectors)
    c = tl.arange(0, D)
    at = unit + (start + row)[:, None] * (2 * d) + c[None, :]
    inside = valid[:, None] & (c < d)[None, :]
    tl.store(at, high, mask=inside)
    tl.store(at + d, low, mask=inside)
    tl.store(order + start + row, tl.where(has, position, -1 - position), mask=valid)
    _store_outside(similarity, partner, position, valid & (row >= tl.where(nb > 0, na, 0)))
    if tile == 0:
        p = tl.arange(0, PREFIX)
        _store_outside(similarity, partner, p, p < tl.minimum(P, length))
        tl.store(counts + image, tl.zeros([], tl.int64))


@triton.jit
def _load_rows(unit, order, row, valid, d: tl.constexpr, D: tl.constexpr):
    """Load both halves of some unit vectors, their positions, and whether they have a direction."""
    c = tl.arange(0, D)
    at = unit + row[:, None] * (2 * d) + c[None, :]
    inside = valid[:, None] & (c < d)[None, :]
    high = tl.load(at, mask=inside, other=0.0)
    low = tl.load(at + d, mask=inside, other=0.0)
    position = tl.load(order + row, mask=valid, other=-1)
    return high, low, tl.where(position < 0, -1 - position, position), position >= 0


@triton.jit
def match_tiles_kernel(
    unit,
    order,
    cu_seqlens,
    similarity,
    partner,
    counts,
    theta,
    P: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program compares some rows of A with all tiles of B."""
    image, tile = tl.program_id(0), tl.program_id(1)
    start, length = image_bounds(cu_seqlens, image)
    na, nb = _group_sizes(length, P, GROUP)
    if tile * ROWS >= na:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    in_a = i < na
    a_high, a_low, a, a_has = _load_rows(unit, order, start + i, in_a, d, D)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    closest = tl.full([ROWS], -1, tl.int32)
    for first in tl.range(0, nb, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        b_high, b_low, b, b_has = _load_rows(unit, order, start + na + j, j < nb, d, D)
        s = _cosines(a_high, a_low, b_high, b_low)
        here, position = _best(s, a_has, b_has, b, j < nb)
        better = (here > best) | ((here == best) & (position < closest))  # if B goes by size, positions are not sorted
        best = tl.where(better, here, best)
        closest = tl.where(better, position, closest)
    tl.store(similarity + start + a, best, mask=in_a)
    tl.store(partner + start + a, closest, mask=in_a)
    tl.atomic_add(counts + image, tl.sum((in_a & (best >= theta)).to(tl.int32)).to(tl.int64))


def match_image_table(block: int, d: int, by_size: bool, dtype: torch.dtype, H: int) -> dict[str, int]:
    """``block``: tokens of a group, rounded up to a power of two; ``by_size``: groups go by sizes that may differ.
    Larger values spill on some chip.

    Measured on an H200, triton 3.6.0, bfloat16: 197 and 101 tokens, 6 heads of 64 channels, in batches of 1, 8, 64 and
    256; 197 tokens, 3 heads of 32, in batches of 1 and 64. At 256 images of 197 tokens, tiles of 64 with 4 warps were
    as fast or a microsecond faster. Not measured: four tiles per program with groups by size; more than 6 heads.
    """
    if block > 16 and (dtype == torch.float32 or d % 16):  # keys, or addresses of small pieces, take more registers
        return {"ROWS": 16, "HEADS": 6 if block == 64 else 2, "num_warps": 8}
    warps = 8 if block > 64 and d > 32 and attention.BACKEND == "cuda" else 4  # AMD's warps are twice as wide
    heads = 2 if block == 64 and d <= 32 else 4 if by_size and H > 6 else 6
    return {"ROWS": 16 if block <= 32 else 32, "HEADS": heads, "num_warps": warps}


def tiles_each(B: int, tiles: int, warps: int, multiprocessors: int) -> int:
    """How many of an image's ``tiles`` a program takes. It is one if few images would leave multiprocessors idle, and
    all if one program per image gives every multiprocessor about 16 warps. There is nothing in between, so that all
    batches share two compiled kernels. No result depends on it."""
    share = multiprocessors * 16 // (B * warps)  # how many programs per image fit
    return 1 if 2 * share >= tiles else tiles


UNIT_ROWS = {"TOKENS": 32, "CHUNK": 128, "num_warps": 8}


def match_tiles_table(d: int) -> dict[str, int]:
    """Tiles for d channels per head. Larger ones spill on some chip."""
    rows, columns = (128, 64) if d <= 64 else (64, 32)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 8, "num_stages": 1}


def match(
    keys: Tensor,
    sizes: Tensor | None,
    cu_seqlens: Tensor,
    num_prefix: int,
    by_size: bool,
    theta: float,
    N: int,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find partners and similarities as :func:`atm_triton.reference.match` defines them, and count candidates.

    Args:
        keys: [H, T, d]; channels contiguous (last stride 1), other strides arbitrary.
        sizes: float32 [T]; None for all ones.
        cu_seqlens: int32 [B + 1], where each image begins; N: upper bound on the tokens of an image.
        config: replaces the table's, for the kernel that finds partners.

    Returns:
        similarity float32, partner int32, both [T]; counts int64 [B]: how many similarities are at or above ``theta``.

    Raises:
        ValueError: the channels of keys are not contiguous or their tokens too far apart; or there are more protected
            tokens than a tile holds.
    """
    H, T, d = keys.shape
    if num_prefix > PREFIX.value:
        raise ValueError(f"num_prefix={num_prefix} is above {PREFIX.value}, the most that this kernel protects")
    check_strides("keys", keys, N)
    B = len(cu_seqlens) - 1
    similarity = torch.empty(T, dtype=torch.float32, device=keys.device)
    partner = torch.empty(T, dtype=torch.int32, device=keys.device)
    counts = torch.empty(B, dtype=torch.int64, device=keys.device)
    out = (similarity, partner, counts)
    if B == 0 or T == 0:
        counts.zero_()
        return out
    sizes, cu_seqlens = aligned(sizes if by_size else None), aligned(cu_seqlens)
    group = (BY_SIZE if sizes is not None else HALVES) if by_size else ALTERNATE
    stride_n, step = _in_steps(keys.stride(1))
    strides = (None if keys.stride(0) == d else keys.stride(0), stride_n)
    free = max(N - num_prefix, 1)
    shape = {"P": num_prefix, "d": d, "D": block_for(d), "GROUP": group.value}
    of_keys, by_size = {"H": H, "STEP": step}, sizes is not None
    if free <= WHOLE_IMAGE and d <= 64:
        _match_image(B, free, by_size, (keys, sizes, cu_seqlens, *out, theta, *strides), shape | of_keys, config)
        return out
    unit = torch.empty((T, 2, d), dtype=torch.float16, device=keys.device)
    order = torch.empty(T, dtype=torch.int32, device=keys.device)
    grid = (B, -(-free // UNIT_ROWS["TOKENS"]))
    unit_rows_kernel[grid](keys, sizes, cu_seqlens, unit, order, *out, *strides, **shape, **of_keys, **UNIT_ROWS)
    config = config or match_tiles_table(d)
    grid = (B, -(-((free + 1) // 2) // config["ROWS"]))
    match_tiles_kernel[grid](unit, order, cu_seqlens, *out, theta, **shape, **config)
    return out


def _in_steps(stride: int) -> tuple[int, int]:
    """Write a stride as a number of steps times their length, which is compiled in. All that Triton knows of a stride
    is whether it is a multiple of 16. With 1,080 (6 heads of 60 channels) it would load channel by channel, each with
    its own address."""
    step = stride & -stride
    return (stride // step, step) if 0 < step < 16 else (stride, 1)


def _match_image(
    B: int, free: int, by_size: bool, arguments: tuple, constants: dict[str, Any], config: dict[str, int] | None
) -> None:
    block, keys, counts = block_for((free + 1) // 2), arguments[0], arguments[5]
    config = config or match_image_table(block, constants["d"], by_size, keys.dtype, constants["H"])
    tiles = block // config["ROWS"]
    per = tiles_each(B, tiles, config["num_warps"], multiprocessors(keys.device))
    if per < tiles:
        counts.zero_()
    match_image_kernel[(B * (tiles // per),)](*arguments, **constants, BLOCK=block, PER=per, **config)
