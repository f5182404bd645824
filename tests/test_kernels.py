"""The Triton kernels against the reference; without a GPU they run in Triton's interpreter.

Indices are compared up to ties: a partner is correct if its cosine is the largest within rounding.
"""

import ast
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import loops
from atm_triton import reference
from atm_triton.kernels import assign as assign_kernels
from atm_triton.kernels import match as match_kernels
from atm_triton.kernels import merge as merge_kernels
from atm_triton.kernels.assign import assign
from atm_triton.kernels.attention import attention
from atm_triton.kernels.attention_backward import attention_backward
from atm_triton.kernels.linear_gelu import linear_gelu
from atm_triton.kernels.match import match
from atm_triton.kernels.merge import add_norm, merge
from atm_triton.kernels.stem import stem
from atm_triton.kernels.unmerge import unmerge
from atm_triton.packed import Images
from benchmarks.launches import (
    CHANNELS,
    DTYPES,
    LAYERS,
    LONG,
    MANY,
    SHAPES,
    STEMS,
    by_name,
    captured,
    cases_of_tests,
    code,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COSINE = 2e-6  # similarities are float32
VALUE = {torch.float32: 2e-6, torch.float16: 2e-3}  # relative to 1

shapes = pytest.mark.parametrize(("B", "H", "N", "d", "P"), SHAPES, ids=lambda value: str(value))
groupings = pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
pytestmark = pytest.mark.usefixtures("poison", "overflow")
KERNEL = type(match_kernels.match_image_kernel)


@cache
def compiled_offline():
    return {code(launch) for _, case in cases_of_tests() for launch in captured(case)}


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """Check that ``offline_compile`` compiles every launch of these tests."""
    compiled_offline()
    launch = KERNEL.__getitem__

    def look(kernel, grid):
        def run(*arguments, **keywords):
            missing = code(by_name(kernel, arguments, keywords))
            assert missing in compiled_offline(), "add the shape to benchmarks/launches.py"
            return launch(kernel, grid)(*arguments, **keywords)

        return run

    monkeypatch.setattr(KERNEL, "__getitem__", look)


def qkv(T, H, d, dtype=torch.float32):
    """q, k and v as a block has them: views of one product."""
    return torch.randn(T, 3, H, d, device=DEVICE).to(dtype).permute(1, 2, 0, 3)


def some_sizes(T):
    return torch.randint(1, 4, (T,), device=DEVICE).float()


def of_lengths(*lengths):
    return Images.of_lengths(torch.tensor(lengths, device=DEVICE))


def whole(r, images):
    """One r for all images."""
    return torch.full((images.B,), r, device=DEVICE)


def with_ties(keys, images):
    by_image = keys.unflatten(1, (images.B, images.N))
    by_image[:, :, 2::3] = by_image[:, :, : len(range(2, images.N, 3))]
    return keys


def cosine_with(keys, partner, images):
    """The cosine of every token with its partner, in float64; meaningless for rows without a partner."""
    k = F.normalize(keys.double().mean(0), dim=1)
    start = reference.of_tokens(images.cu_seqlens[:-1].long(), images, len(partner))
    return (k * k[start + partner.clamp(min=0)]).sum(1)


@groupings
@dtypes
@shapes
def test_match(B, H, N, d, P, dtype, by_size):
    images = Images.of(B, N, DEVICE)
    keys, sizes = qkv(B * N, H, d, dtype)[1], some_sizes(B * N)
    want, want_partner = reference.match(keys, sizes, P, by_size, images)
    similarity, partner, counts = match(keys, sizes, images.cu_seqlens, P, by_size, 0.1, N)
    assert similarity.dtype == torch.float32 and partner.dtype == torch.int32
    assert torch.equal(partner >= 0, want_partner >= 0)
    in_a = partner >= 0
    assert torch.equal(similarity.isneginf(), ~in_a)
    torch.testing.assert_close(similarity[in_a], want[in_a], rtol=0, atol=COSINE)
    torch.testing.assert_close(cosine_with(keys, partner, images)[in_a].float(), want[in_a], rtol=0, atol=COSINE)
    assert torch.equal(counts, reference.count(similarity, 0.1, images))


@groupings
@dtypes
def test_no_result_depends_on_how_many_programs_share_an_image(by_size, dtype, monkeypatch):
    """Results are equal bit for bit. In a small batch a program takes one tile, in a large one all tiles."""
    images = of_lengths(197, 1, 130)
    keys, sizes = qkv(328, 2, 32, dtype)[1], some_sizes(328)
    made, tiles_each = [], match_kernels.tiles_each
    for many in MANY:  # as if there were this many images

        def each(B, tiles, warps, multiprocessors, many=many):
            return tiles_each(many, tiles, warps, 132)

        monkeypatch.setattr(match_kernels, "tiles_each", each)
        made.append(match(keys, sizes, images.cu_seqlens, 1, by_size, 0.1, 197))
    for other in made[1:]:
        assert all(map(torch.equal, made[0], other))


def test_few_images_take_more_programs_each():
    """Every tile has its own program as long as two programs per image run at once. The 132 multiprocessors of an H100
    take 16 warps each."""
    for B, each in ((1, 1), (132, 1), (133, 4), (10**6, 4)):
        assert match_kernels.tiles_each(B, 4, 8, 132) == each
    assert match_kernels.tiles_each(10**6, 1, 4, 132) == 1
    assert [match_kernels.tiles_each(B, 4, 8, 132) for B in MANY] == [1, 4]


def match_one(keys, sizes=None, by_size=False):
    """Match one image with one protected token."""
    N = keys.shape[1]
    return match(keys, sizes, Images.of(1, N, DEVICE).cu_seqlens, 1, by_size, 0.5, N)


def test_match_takes_the_first_of_equal_partners():
    keys = torch.ones(1, 9, 32, device=DEVICE)
    assert match_one(keys)[1].tolist() == [-1, -1, 1, -1, 1, -1, 1, -1, 1]
    sizes = torch.tensor([1.0, 5, 1, 4, 1, 6, 1, 7, 1], device=DEVICE)
    assert match_one(keys, sizes, by_size=True)[1].tolist() == [-1, -1, 1, -1, 1, -1, 1, -1, 1]


def test_match_takes_the_first_of_equal_partners_of_several_tiles():
    """When grouped by size, the first token of the other group may lie in any tile."""
    N, P = 300, 10
    keys, cu_seqlens = qkv(N, 1, 32, torch.float32)[1].fill_(1), Images.of(1, N, DEVICE).cu_seqlens
    rising = torch.arange(1.0, N + 1, device=DEVICE)
    for sizes, by_size, first in ((rising, False, 11), (rising, True, 155), (rising.flip(0), True, 10)):
        partner = match(keys, sizes, cu_seqlens, P, by_size, 0.5, N)[1]
        assert set(partner[partner >= 0].tolist()) == {first} and (partner >= 0).sum() == (N - P) // 2


@pytest.mark.parametrize("d", [32, 72], ids=["one launch", "two launches"])
def test_keys_without_direction_are_similar_to_nothing(d):
    for bad in (0.0, torch.nan, torch.inf):
        keys = torch.ones(2, 9, d, device=DEVICE)
        keys[0, 1] = keys[:, 4] = bad
        if bad == 0:
            keys[:, 1] = 0
        similarity, partner, counts = match_one(keys)
        assert partner.tolist() == [-1, -1, 3, -1, 1, -1, 3, -1, 3]
        assert similarity[4] == reference.NOT_ALIKE and counts.tolist() == [3]
        similarity, partner, counts = match_one(keys, by_size=True)
        assert partner.tolist() == [-1, 5, 5, 5, 5, -1, -1, -1, -1] and counts.tolist() == [2]
        assert similarity.tolist()[1:5:3] == [reference.NOT_ALIKE] * 2


@pytest.mark.parametrize("apart", [80, 2**30 + 7], ids=["near", "far"])
def test_heads_may_lie_far_apart(apart):
    """Results agree within rounding, because the layout of heads is compiled in."""
    keys = torch.empty_strided((3, 5, 16), (apart, 16, 1), dtype=torch.float16, device=DEVICE)
    keys.copy_(torch.randn(3, 5, 16))  # untouched memory costs nothing
    cu_seqlens = Images.of(1, 5, DEVICE).cu_seqlens
    both = (keys, keys.contiguous())
    far, near = (match(x, None, cu_seqlens, 0, False, 0.5, 5)[0] for x in both)
    torch.testing.assert_close(far, near, rtol=0, atol=COSINE)
    far, near = (attention(x, x, x, None, cu_seqlens, cu_seqlens, 5, 5, 0.25) for x in both)
    torch.testing.assert_close(far, near, rtol=0, atol=VALUE[torch.float16])


class Allocated(TorchFunctionMode):
    """Counts the bytes of new tensors."""

    bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (torch.Tensor.new_empty, torch.Tensor.contiguous) or function.__name__ == "empty":
            self.bytes += made.numel() * made.element_size()
        return made


@pytest.mark.parametrize("d", [64, 128])
def test_match_takes_memory_of_order_n(d, monkeypatch):
    """It allocates twice as much for 16384 tokens as for 8192; no kernel runs here."""
    monkeypatch.setattr(KERNEL, "__getitem__", lambda self, grid: lambda *arguments, **options: None)
    taken = []
    for N in (8192, 16384):
        keys = torch.zeros(N, 3, 2, d, device="meta").permute(1, 2, 0, 3)[1]
        with Allocated() as allocated:
            match(keys, None, torch.zeros(2, dtype=torch.int32, device="meta"), 1, False, 0.5, N)
        taken.append(allocated.bytes)
    assert taken[1] == pytest.approx(2 * taken[0], rel=1e-3)
    assert 0 < taken[1] < 16384 * (4 * d + 100)  # half of one similarity matrix would be 2^29 bytes


@groupings
def test_match_of_packed_images_is_that_of_each_alone(by_size):
    """Results are equal bit for bit, because the configuration depends on ``N`` alone."""
    images = of_lengths(17, 1, 33, 2, 260)
    keys, sizes = qkv(313, 2, 32)[1], some_sizes(313)
    for N in (260, 400):
        similarity, partner, counts = match(keys, sizes, images.cu_seqlens, 1, by_size, 0.1, N)
        for image, (start, end) in enumerate(itertools.pairwise(images.cu_seqlens.tolist())):
            cu_seqlens = Images.of(1, end - start, DEVICE).cu_seqlens
            alone = match(keys[:, start:end], sizes[start:end], cu_seqlens, 1, by_size, 0.1, N)
            assert torch.equal(similarity[start:end], alone[0])
            assert torch.equal(partner[start:end], alone[1]) and counts[image] == alone[2]


def read(order, spans):
    return [order[begin:end].tolist() for begin, end in spans.tolist()]


def lists_of(slots, T):
    """The tokens of every slot."""
    return [[i for i, other in enumerate(slots.tolist()) if other == slot] for slot in range(T)]


def check_assign(similarity, partner, r, images, P, slots=None, N=None, given=None, **options):
    """Compare assign with the reference. ``given``: the source of r that the kernel gets."""
    given = r if given is None else given
    want, want_cu_seqlens = reference.assign(similarity, partner, r, P, images)
    T = int(want_cu_seqlens[-1])
    more = T if slots is None else slots
    got, order, spans, cu_seqlens = assign(
        similarity, partner, given, images.cu_seqlens, P, N or images.N, more, **options
    )
    assert torch.equal(got, want) and torch.equal(cu_seqlens, want_cu_seqlens)
    assert spans.shape == (more, 2)
    assert read(order, spans[:T]) == lists_of(want, T)


@groupings
@shapes
def test_assign(B, H, N, d, P, by_size):
    images = Images.of(B, N, DEVICE)
    keys = with_ties(qkv(B * N, H, d)[1], images)
    similarity, partner = reference.match(keys, some_sizes(B * N), P, by_size, images)
    for r in {0, 1, 3, reference.largest_r(N, P)}:
        if r <= loops.most_pairs(N, P, by_size):
            check_assign(similarity, partner, whole(r, images), images, P)


@pytest.fixture
def long(monkeypatch):
    """Let one program sort at most 16 tokens, so that longer images count as long."""
    for name, value in LONG.items():
        monkeypatch.setattr(assign_kernels, name, value)


@groupings
def test_assign_to_a_long_image(by_size, long):
    for N, P in ((17, 0), (50, 5)):
        images = Images.of(2, N, DEVICE)
        keys = with_ties(qkv(2 * N, 1, 32)[1], images)
        similarity, partner = reference.match(keys, some_sizes(2 * N), P, by_size, images)
        for r in (1, loops.most_pairs(N, P, by_size)):
            check_assign(similarity, partner, whole(r, images), images, P)


def some_pairs(images, P, kinds):
    """Random similarity and partner, with the largest possible A at random positions in each image, and the size of
    each A. ``kinds``: for each image the function that makes its similarities."""
    similarity = torch.full((int(images.cu_seqlens[-1]),), -torch.inf)
    partner = torch.full(similarity.shape, -1, dtype=torch.int32)
    most = []
    for (start, end), values in zip(itertools.pairwise(images.cu_seqlens.tolist()), kinds, strict=True):
        free = P + torch.randperm(max(end - start - P, 0))
        a, b = free[: len(free) // 2], free[len(free) // 2 :]
        similarity[start + a] = values(len(a))
        if len(a):
            partner[start + a] = b[torch.randint(1 + len(b) // 3, (len(a),))].int()  # many join the same tokens
        most.append(len(a))
    return similarity.to(DEVICE), partner.to(DEVICE), torch.tensor(most, device=DEVICE)


VALUES = {
    "all apart": lambda n: torch.rand(n) * 2 - 1,
    "near": lambda n: 0.9 + torch.rand(n) / 1e6,
    "ties": lambda n: torch.randint(-3, 4, (n,)) / 3,
    "equal": lambda n: torch.full((n,), 0.5),
    "zeros": lambda n: torch.tensor([0.0, -0.0]).repeat(n)[:n],
    "like nothing": lambda n: torch.tensor([reference.NOT_ALIKE, 0.7]).repeat(n)[:n],
}


@pytest.mark.parametrize("P", [0, 1, 2, 5])
def test_assign_takes_r_from_four_sources(P):
    """Each source gives the reference's assignment for the same r, in images of every kind, short and long."""
    kinds = [*VALUES.values()] * 2
    images = of_lengths(*torch.randint(1, 200, (5,)).tolist(), 256, 1, 2, *torch.randint(1, 9, (4,)).tolist())
    similarity, partner, most = some_pairs(images, P, kinds)

    def check(r, given, **options):
        check_assign(similarity, partner, r, images, P, len(partner), N=256, given=given, **options)

    for r in (torch.zeros_like(most), (most / 3).long(), most):
        check(r, r)
    for theta in (-1.0, 0.5, 0.9):
        counts = reference.count(similarity, theta, images)
        check(counts, counts, theta=theta)
    images = Images.of(6, 20, DEVICE)
    similarity, partner, _ = some_pairs(images, P, VALUES.values())
    check(whole(1, images), torch.tensor([0, 0, 0, 5, 4, 2], device=DEVICE), mean=True)  # 11 / 6
    check(whole(3, images), 3)


@pytest.mark.parametrize("way", ["in one launch", "long"])
def test_assign_each_image_its_own_count(way, request):
    if way == "long":
        request.getfixturevalue(way)
    images = of_lengths(17, 1, 33, 2, 50)
    similarity, partner, _ = match(qkv(103, 2, 32)[1], None, images.cu_seqlens, 1, False, 0.1, 50)
    r = torch.tensor([3, 0, 16, 0, 2], device=DEVICE)
    for slots in (82, 90):  # as many as there will be, and more
        check_assign(similarity, partner, r, images, 1, slots)
    counts = reference.count(similarity, 0.1, images)
    check_assign(similarity, partner, counts, images, 1, 103, given=counts, theta=0.1)


@groupings
def test_assign_all_images_one_r_the_long_way(by_size, long):
    images = Images.of(3, 50, DEVICE)
    similarity, partner = reference.match(qkv(150, 1, 32)[1], None, 1, by_size, images)
    check_assign(similarity, partner, whole(4, images), images, 1, given=4)
    uneven = torch.tensor([9, 0, 5], device=DEVICE)
    check_assign(similarity, partner, whole(4, images), images, 1, given=uneven, mean=True)


def test_assign_fills_no_memory_that_it_then_writes(monkeypatch):
    images = Images.of(3, 19, DEVICE)
    similarity, partner, counts = match(qkv(57, 2, 32)[1], None, images.cu_seqlens, 1, False, 0.1, 19)
    for name in ("zeros", "full"):
        monkeypatch.setattr(torch, name, None)
    r = torch.tensor([4, 0, 9], device=DEVICE)
    for given, options, ends in (
        (r, {}, [0, 15, 34, 44]),
        (r, {"mean": True}, [0, 15, 30, 45]),
        (4, {}, [0, 15, 30, 45]),
        (counts, {"theta": 0.1}, None),
    ):
        made = assign(similarity, partner, given, images.cu_seqlens, 1, 19, 57, **options)[3]
        assert made.tolist() == ends or ends is None


def test_rows_beyond_the_last_image_are_of_no_slot(long):
    images = of_lengths(17, 20)
    similarity, partner, _ = match(qkv(37, 1, 32)[1], None, images.cu_seqlens, 1, False, 0.1, 20)
    more = [torch.cat([rows, rows[:5]]) for rows in (similarity, partner)]
    slots, tokens, spans, _ = assign(*more, whole(3, images), images.cu_seqlens, 1, 20, 33)
    assert slots[37:].tolist() == [-1] * 5
    assert read(tokens, spans) == [*lists_of(slots, 31), [], []]


def some_assignment(images, r, P=1):
    """An assignment by the reference: slots, T', tokens and spans of the slots, and cu_seqlens of the merged images."""
    keys = qkv(int(images.cu_seqlens[-1]), 1, 32)[1]
    similarity, partner = reference.match(keys, None, P, False, images)
    slots, cu_seqlens = reference.assign(similarity, partner, whole(r, images), P, images)
    T = int(cu_seqlens[-1])
    return slots, T, reference.lists(slots, T), cu_seqlens


@dtypes
@pytest.mark.parametrize("C", [C for C in CHANNELS if C >= 32])
def test_merge(C, dtype):
    slots, T, lists, cu_seqlens = some_assignment(Images.of(2, 17, DEVICE), 6)
    x = torch.randn(34, C, device=DEVICE).to(dtype)
    for sizes in (torch.randint(1, 100, (34,), device=DEVICE).float(), None):  # 49 * (1 / 49) is not 1
        merged, normed, merged_sizes, log2_sizes = merge(x, sizes, *lists, cu_seqlens)
        want, want_sizes = reference.merge(x, sizes, slots, T)
        torch.testing.assert_close(merged, want, rtol=0, atol=VALUE[dtype])
        assert normed is None and torch.equal(merged_sizes, want_sizes)
        torch.testing.assert_close(log2_sizes, merged_sizes.log2())
        tokens, spans = lists
        alone = spans.diff(dim=1).flatten() == 1
        assert torch.equal(merged[alone], x[tokens[spans[alone, 0]]])  # unchanged bit for bit


@pytest.mark.parametrize(
    ("N", "P"), [*itertools.product((1, 2, 3), (0, 1, 2, 5)), (17, 0), (17, 5), (63, 2), (197, 1), (577, 1)]
)
def test_merge_and_unmerge(N, P):
    """Images of many lengths, with r from 0 to the largest, with and without sizes."""
    B, C = (2, 6) if N < 63 else (1, 3)
    most = reference.largest_r(N, P)
    chosen = list(itertools.product(DTYPES, sorted({0, min(1, most), most})))
    if N >= 63:  # the interpreter is slow
        chosen = [(torch.float32, 0), (torch.float16, 1), (torch.float32, most)][-1 if N > 197 else -3 :]
    for dtype, r in chosen:
        slots, T, lists, cu_seqlens = some_assignment(Images.of(B, N, DEVICE), r, P)
        sizes = some_sizes(B * N) if dtype == torch.float32 else None
        x = torch.randn(B * N, C, device=DEVICE).to(dtype)
        merged, _, merged_sizes, _ = merge(x, sizes, *lists, cu_seqlens)
        want, want_sizes = reference.merge(x, sizes, slots, T)
        torch.testing.assert_close(merged, want, rtol=VALUE[dtype], atol=VALUE[dtype])
        assert torch.equal(merged_sizes, want_sizes)
        assert torch.equal(unmerge(want, slots), reference.unmerge(want, slots))


def test_dropped_tokens():
    slots = torch.tensor([0, 2, -1, 2, 5, 3, 2**30, -7, 0, 3], dtype=torch.int32, device=DEVICE)
    tokens, spans = reference.lists(slots, 5)
    x = torch.randn(10, 6, device=DEVICE)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    merged, _, sizes, log2_sizes = merge(x, some_sizes(10), tokens, spans, cu_seqlens)
    assert (merged[[1, 4]] == 0).all() and (sizes[[1, 4]] == 0).all() and log2_sizes[[1, 4]].isneginf().all()
    assert not merged[[0, 2, 3]].isnan().any()
    assert torch.equal(unmerge(merged, slots), reference.unmerge(merged, slots))


def test_slots_beyond_the_last_are_not_made():
    """The spans of such slots, which are poisoned here, point nowhere."""
    images = of_lengths(17, 5)
    similarity, partner, _ = match(qkv(22, 1, 32)[1], None, images.cu_seqlens, 1, False, 0.1, 17)
    r = torch.tensor([4, 2], device=DEVICE)
    slots, tokens, spans, cu_seqlens = assign(similarity, partner, r, images.cu_seqlens, 1, 17, 20)
    assert (spans[16:] == 2**30).all()
    x = torch.randn(22, 48, device=DEVICE)
    out = merge(x, some_sizes(22), tokens, spans, cu_seqlens, x, None, (None, None, 1e-6))
    assert all(not rows[:16].isnan().any() and rows[16:].isnan().all() for rows in out)
    assert torch.equal(unmerge(out[0], slots), out[0][slots.long()])


@pytest.mark.parametrize("C", [48, 384, 1280])
def test_a_merged_row_does_not_depend_on_its_neighbours(C):
    """Results are equal bit for bit for an image alone, whose slots are other rows of their programs."""
    images = Images.of(2, 17, DEVICE)
    _, T, (tokens, spans), cu_seqlens = some_assignment(images, 6)
    x, sizes = torch.randn(34, C, device=DEVICE), some_sizes(34)
    both = merge(x, sizes, tokens, spans, cu_seqlens)
    first = int(cu_seqlens[1])
    alone = merge(x[17:], sizes[17:], tokens[17:] - 17, spans[first:] - 17, (cu_seqlens[1:] - first).contiguous())
    for one, other in zip(both, alone, strict=True):
        assert one is other is None or torch.equal(one[first:T], other)


MIXED = (torch.float32, torch.float16)
update_dtypes = pytest.mark.parametrize(
    "kinds",
    [(torch.float32,) * 2, (torch.float16,) * 2, MIXED, MIXED[::-1]],
    ids=["float32", "float16", "float32 with float16", "float16 with float32"],
)
layerscale = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])


def residual_and_norm(kinds, scaled, T=34, C=48):
    """Random x, attended, gamma and norm, and the sum x + gamma * attended."""
    x, attended = (torch.randn(T, C, device=DEVICE).to(dtype) for dtype in kinds)
    gamma, weight, bias = (torch.randn(C, device=DEVICE).to(kinds[0]) for _ in range(3))
    gamma = gamma if scaled else None
    summed = x.float() + attended.float() * (1 if gamma is None else gamma.float())
    return x, attended, gamma, (weight, bias, 1e-6), summed


def check_residual_and_norm(got, normed, want, norm, dtype):
    assert got.dtype == normed.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=VALUE[dtype], atol=VALUE[dtype])
    weight, bias = (None if parameter is None else parameter.float() for parameter in norm[:2])
    want = F.layer_norm(got.float(), got.shape[1:], weight, bias, norm[2]).to(dtype)
    torch.testing.assert_close(normed, want, rtol=2 * VALUE[dtype], atol=2 * VALUE[dtype])


@update_dtypes
@layerscale
def test_merge_between_residual_and_norm(kinds, scaled):
    slots, T, lists, cu_seqlens = some_assignment(Images.of(2, 17, DEVICE), 6)
    x, attended, gamma, norm, summed = residual_and_norm(kinds, scaled)
    sizes = some_sizes(34)
    merged, normed, *_ = merge(x, sizes, *lists, cu_seqlens, attended, gamma, norm)
    check_residual_and_norm(merged, normed, reference.merge(summed, sizes, slots, T)[0], norm, kinds[0])


@update_dtypes
@layerscale
def test_add_norm(kinds, scaled):
    x, attended, gamma, norm, summed = residual_and_norm(kinds, scaled)
    check_residual_and_norm(*add_norm(x, attended, gamma, norm), summed, norm, kinds[0])
    bare = (None, None, 1e-6)
    check_residual_and_norm(*add_norm(x, attended, gamma, bare), summed, bare, kinds[0])


@pytest.mark.parametrize(("patch", "sides", "dtype", "wide", "prefix", "biased"), STEMS, ids=str)
def test_stem(patch, sides, dtype, wide, prefix, biased):
    """It rounds as often as a convolution and a sum. With autocast, images and positions have another dtype."""
    images = torch.randn(3, 3, *sides, dtype=wide, device=DEVICE)
    weight = torch.randn(40, 3, *patch, device=DEVICE).to(dtype) / 16
    bias = torch.randn(40, device=DEVICE).to(dtype) if biased else None
    patches = sides[0] // patch[0] * (sides[1] // patch[1])
    position = torch.randn(prefix + patches, 40, dtype=wide, device=DEVICE)
    exact = [None if x is None else x.double() for x in (images.to(dtype), weight, bias)]
    embedded = F.conv2d(*exact, stride=patch).flatten(2).transpose(1, 2)
    out = stem(images, weight, bias, position)
    assert out.dtype == wide and torch.equal(out[:, :prefix], position[:prefix].expand(3, -1, -1))
    within = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(
        out[:, prefix:].double(), embedded + position[prefix:].double(), rtol=within, atol=within
    )


@pytest.mark.parametrize(("M", "K", "N"), LAYERS)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_gelu(M, K, N, biased):
    """It rounds once. In the interpreter one program takes all tiles."""
    x = torch.randn(M, K, device=DEVICE).half()
    weight = (2 * torch.randn(N, K, device=DEVICE) / K**0.5).half()
    bias = torch.randn(N, device=DEVICE).half() if biased else None
    exact = [None if each is None else each.double() for each in (x, weight, bias)]
    want = F.gelu(F.linear(*exact))
    torch.testing.assert_close(linear_gelu(x, weight, bias).double(), want, rtol=5e-4, atol=1e-5)


@dtypes
@pytest.mark.parametrize("sized", [False, True], ids=["plain", "log-size"])
@shapes
def test_attention(B, H, N, d, P, dtype, sized):
    """All tokens ask, and the first of each image alone."""
    images = Images.of(B, N, DEVICE)
    q, k, v = qkv(B * N, H, d, dtype)
    sizes = some_sizes(B * N) if sized else None
    log2_sizes = sizes.log2() if sized else None
    for queries in {N: images, 1: Images.of(B, 1, DEVICE)}.values():
        asking = q if queries.N == N else q[:, ::N]
        arguments = (queries.cu_seqlens, images.cu_seqlens, queries.N, N, d**-0.5)
        got = attention(asking, k, v, log2_sizes, *arguments)
        want = reference.attention(asking.float(), k.float(), v.float(), sizes, images, queries)
        torch.testing.assert_close(got.float(), want, rtol=VALUE[dtype], atol=VALUE[dtype])
        assert got.dtype == dtype and got.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(("lengths", "H", "d"), [([17, 1, 70, 33], 2, 60), ([577, 1, 197], 1, 32)], ids=str)
def test_attention_of_packed_images_is_that_of_each_alone(lengths, H, d):
    images, T = of_lengths(*lengths), sum(lengths)
    q, k, v = qkv(T, H, d)
    sizes, N = some_sizes(T), max(lengths)
    cu_seqlens = images.cu_seqlens
    got = attention(q, k, v, sizes.log2(), cu_seqlens, cu_seqlens, N, N, 0.1)
    want = reference.attention(q, k, v, sizes, images, scale=0.1)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        part = [x[:, start:end] for x in (q, k, v)]
        alone = Images.of(1, end - start, DEVICE).cu_seqlens
        other = attention(*part, sizes[start:end].log2(), alone, alone, N, N, 0.1)
        assert torch.equal(got[:, start:end], other)  # to the bit


def test_attention_of_other_queries():
    """Queries may differ in number from image to image and need not be the image's own tokens."""
    images, queries = of_lengths(17, 1, 33), of_lengths(2, 5, 20)
    q, (_, k, v) = qkv(27, 2, 32)[0], qkv(51, 2, 32)
    sizes = some_sizes(51)
    got = attention(q, k, v, sizes.log2(), queries.cu_seqlens, images.cu_seqlens, 20, 33, 0.1)
    want = reference.attention(q, k, v, sizes, images, queries, scale=0.1)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def gradients(q, k, v, sizes, queries, images, grad):
    """The gradients of q, k and v by the kernels, and by the reference in float64."""
    log2_sizes, lse = None if sizes is None else sizes.log2(), torch.empty(q.shape[1], q.shape[0], device=DEVICE)
    arguments = (q, k, v, log2_sizes, queries.cu_seqlens, images.cu_seqlens)
    numbers = (queries.N, images.N, q.shape[-1] ** -0.5)
    out = attention(*arguments, *numbers, lse)
    assert torch.equal(out, attention(*arguments, *numbers))  # saving lse changes nothing
    got = attention_backward(grad, *arguments, out, lse, *numbers)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    reference.attention(*exact, sizes, images, queries, fused=False).backward(grad.double())
    return got, [x.grad for x in exact]


def assert_gradients(got, want, dtype):
    """Compare relative to the largest gradient, or to 1, because a gradient sums terms of that size that cancel."""
    for one, exact in zip(got, want, strict=True):
        assert one.dtype == dtype and one.transpose(0, 1).is_contiguous()
        error = (one.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
        assert error <= VALUE[dtype]


SHORT = [shape for shape in SHAPES if shape[2] < 197]


@pytest.mark.parametrize("sized", [True, False], ids=["sizes", "no sizes"])
@dtypes
@pytest.mark.parametrize(("B", "H", "N", "d", "P"), SHORT, ids=str)
def test_attention_backward(B, H, N, d, P, dtype, sized):
    """All tokens ask, and the first of each image alone."""
    images = Images.of(B, N, DEVICE)
    q, k, v = qkv(B * N, H, d, dtype)
    sizes = some_sizes(B * N) if sized else None
    for queries in {N: images, 1: Images.of(B, 1, DEVICE)}.values():
        asking = q if queries.N == N else q[:, ::N]
        grad = torch.randn(H, queries.B * queries.N, d, device=DEVICE).to(dtype)
        assert_gradients(*gradients(asking, k, v, sizes, queries, images, grad), dtype)


@pytest.mark.parametrize("lengths", [(17, 1, 70, 33), (5, 90)], ids=str)
def test_attention_backward_of_packed_images_is_that_of_each_alone(lengths):
    images, T = of_lengths(*lengths), sum(lengths)
    q, k, v = qkv(T, 2, 60)
    sizes, grad = some_sizes(T), torch.randn(2, T, 60, device=DEVICE)
    got, want = gradients(q, k, v, sizes, images, images, grad)
    assert_gradients(got, want, torch.float32)
    for start, end in itertools.pairwise(images.cu_seqlens.tolist()):
        alone = Images(Images.of(1, end - start, DEVICE).cu_seqlens, images.N, False)  # as long as among the others
        parts = [x[:, start:end] for x in (q, k, v)]
        others, _ = gradients(*parts, sizes[start:end], alone, alone, grad[:, start:end])
        for one, other in zip(got, others, strict=True):
            assert torch.equal(one[:, start:end], other)  # to the bit


def test_attention_backward_of_other_queries():
    images, queries = of_lengths(17, 1, 33), of_lengths(2, 5, 20)
    q, (_, k, v) = qkv(27, 2, 32)[0], qkv(51, 2, 32)
    grad = torch.randn(2, 27, 32, device=DEVICE)
    assert_gradients(*gradients(q, k, v, some_sizes(51), queries, images, grad), torch.float32)


@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("N", [0, 5, 3000])
def test_without_tokens_nothing_is_launched(B, N, monkeypatch):
    monkeypatch.setattr(KERNEL, "__getitem__", None)
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=DEVICE)
    q, k, v = qkv(0, 2, 32)
    similarity, partner, counts = match(k, None, cu_seqlens, 1, False, 0.5, N)
    assert similarity.shape == partner.shape == (0,) and counts.tolist() == [0] * B
    slots, order, spans, merged_cu_seqlens = assign(similarity, partner, counts, cu_seqlens, 1, N, 0)
    assert slots.shape == order.shape == (0,) and spans.shape == (0, 2) and merged_cu_seqlens.tolist() == [0] * (B + 1)
    x = torch.empty(0, 16, device=DEVICE)
    assert [len(rows) for rows in merge(x, None, order, spans, cu_seqlens, x, None, (None, None, 0))] == [0] * 4
    assert add_norm(x, x, None, (None, None, 0))[1].shape == unmerge(x, slots).shape == (0, 16)
    empty = (q, k, v, None, cu_seqlens, cu_seqlens)
    assert attention(*empty, N, N, 1.0).shape == (2, 0, 32)
    lse = torch.empty(0, 2, device=DEVICE)
    assert [x.shape for x in attention_backward(q, *empty, q, lse, N, N, 1.0)] == [(2, 0, 32)] * 3


def test_what_no_kernel_can_take_is_refused():
    keys, cu_seqlens = qkv(5, 2, 32)[1], Images.of(1, 5, DEVICE).cu_seqlens
    with pytest.raises(ValueError, match="keys has stride 2 between channels; want 1"):
        match(keys[..., ::2], None, cu_seqlens, 1, False, 0.5, 5)
    far = torch.empty(200 * 2**24, dtype=torch.float16, device="meta").as_strided((2, 200, 32), (32, 2**24, 1))
    with pytest.raises(ValueError, match="keys has stride 16777216 between tokens: 200 of them reach 2.31 elements"):
        match(far, None, cu_seqlens, 1, False, 0.5, 200)
    with pytest.raises(ValueError, match="k has stride 16777216 between tokens: 200 of them reach"):
        attention(keys, far, far, None, cu_seqlens, cu_seqlens, 5, 200, 1.0)
    with pytest.raises(ValueError, match="num_prefix=17 is above 16"):
        match(keys, None, cu_seqlens, 17, False, 0.5, 5)
    with pytest.raises(ValueError, match="v has stride 2 between channels"):
        attention(keys[..., :16], keys[..., :16], keys[..., ::2], None, cu_seqlens, cu_seqlens, 5, 5, 1.0)


def jit_functions():
    """The source of every function that Triton compiles."""
    functions = {}
    for path in Path(match_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
                functions[node.name] = node
    return functions


def test_no_kernel_has_a_while():
    """Triton up to 3.8 fails to compile some while loops."""
    functions = jit_functions()
    assert "match_image_kernel" in functions
    assert [name for name, node in functions.items() if any(isinstance(x, ast.While) for x in ast.walk(node))] == []


def test_no_kernel_sums_floats_in_an_order_of_its_own():
    """Only the counts, which are integers, use atomics."""
    calls = [x for node in jit_functions().values() for x in ast.walk(node) if isinstance(x, ast.Call)]
    targets = [ast.unparse(x.args[0]) for x in calls if "atomic" in ast.unparse(x.func)]
    assert set(targets) == {"counts + image"}


def test_tables_name_nothing_that_their_kernels_do_not_take():
    taken = {name: {argument.arg for argument in node.args.args} for name, node in jit_functions().items()}
    tables = {
        "match_image": match_kernels.match_image_table(128, 64, False, torch.float16, 6),
        "unit_rows": match_kernels.UNIT_ROWS,
        "match_tiles": match_kernels.match_tiles_table(64),
        "assign": assign_kernels.assign_table(256, True),
        "assign_long": assign_kernels.LONG_CONFIG,
        "merge": merge_kernels.rows_table(torch.float16, 384),
        "add_norm": merge_kernels.rows_table(torch.float16, 384),
    }
    for name, table in tables.items():
        assert table.keys() - {"num_warps", "num_stages"} <= taken[f"{name}_kernel"], name


def test_no_kernel_has_more_than_16_arguments_at_run_time():
    for name, node in jit_functions().items():
        assert sum(argument.annotation is None for argument in node.args.args) <= 16, name
