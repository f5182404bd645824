"""The reference against loops, image by image, and against the properties of the method."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loops
from atm_triton import reference
from atm_triton.packed import Images

F64 = torch.float64
SHAPES = [(2, 0), (3, 0), (3, 1), (8, 0), (9, 1), (9, 2), (10, 2), (17, 5), (26, 10)]  # N, P
LENGTHS = [[17, 1, 26, 2, 20], [5], [9, 9, 9], [2, 1], []]
BATCHES = [([N] * 3, True, P) for N, P in SHAPES] + [(n, False, P) for n, P in product(LENGTHS, (0, 1, 3))]

shapes = pytest.mark.parametrize(("N", "P"), SHAPES, ids=[f"N{N}-P{P}" for N, P in SHAPES])
batches = pytest.mark.parametrize(
    ("lengths", "equal", "P"), BATCHES, ids=[f"{n[:1] if equal else n}-P{P}" for n, equal, P in BATCHES]
)
groupings = pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
ways = pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])


def images_of(lengths, equal=False):
    return Images.of(len(lengths), lengths[0]) if equal else Images.of_lengths(torch.tensor(lengths, dtype=torch.long))


def each(images):
    """The rows of every image."""
    return [slice(*ends) for ends in pairwise(images.cu_seqlens.tolist())]


def keys_with_ties(H, T, d):
    """Random keys; every third token repeats an earlier one exactly."""
    keys = torch.randn(H, T, d, dtype=F64)
    keys[:, 2::3] = keys[:, : len(range(2, T, 3))]
    return keys


def sizes_of(images, most=3):
    return torch.randint(1, most + 1, (int(images.cu_seqlens[-1]),)).float()


def matched(images, P, by_size=False, sizes=None):
    """Random keys with their similarity and partner."""
    keys = keys_with_ties(2, int(images.cu_seqlens[-1]), 4)
    return keys, *reference.match(keys, sizes, P, by_size, images)


def found_by(similarity, partner):
    """The match of one image in the form of the loops, {i of A: (similarity, position in B)}."""
    pairs = enumerate(zip(similarity.tolist(), partner.tolist(), strict=True))
    return {i: pair for i, pair in pairs if pair[1] >= 0}


def alternate(keys, P=1):
    """The match of one image [H, N, d]."""
    return reference.match(keys, None, P, False, Images.of(1, keys.shape[1]))


def assigned(similarity, partner, r, P=1):
    """The slots of one image."""
    return reference.assign(similarity, partner, torch.tensor([r]), P, Images.of(1, len(partner)))[0]


def test_threshold_equals_the_papers_example():
    values = [reference.threshold(block, 0.99, 0.04, 0.88) for block in range(1, 6)]
    assert values == pytest.approx([0.99, 0.949189, 0.906713, 0.88, 0.88], abs=1e-6)
    assert reference.threshold(3, 0.99, 0.04, 0.88) == loops.theta(3, 0.99, 0.04, 0.88)


@shapes
def test_alternate_groups(N, P):
    a, b = reference.group_alternate(2, N, P)
    expected_a, expected_b = loops.groups(N, P)
    assert a.tolist() == [expected_a] * 2
    assert b.tolist() == [expected_b] * 2


@shapes
def test_groups_by_size_keep_the_order_of_equals(N, P):
    sizes = torch.randint(1, 4, (3, N)).float()
    a, b = reference.group_by_size(sizes, P)
    for image in range(3):
        assert (a[image].tolist(), b[image].tolist()) == loops.groups(N, P, sizes[image].tolist())


@groupings
@batches
def test_match_and_count(lengths, equal, P, by_size):
    images = images_of(lengths, equal)
    sizes = sizes_of(images)
    keys, similarity, partner = matched(images, P, by_size, sizes)
    for image in each(images):
        k = loops.mean_keys(keys[:, image])
        pairs = loops.match(k, *loops.groups(len(k), P, sizes[image].tolist() if by_size else None))
        ours = found_by(similarity[image], partner[image])
        assert list(ours) == sorted(pairs)
        for i, (s, j) in ours.items():
            assert s == pytest.approx(pairs[i][0], abs=1e-12) == pytest.approx(loops.cosine(k[i], k[j]), abs=1e-12)
    outside = partner < 0
    assert (similarity[outside] == -math.inf).all() and similarity[~outside].isfinite().all()
    counts = [int((similarity[image] >= 0.5).sum()) for image in each(images)]
    assert reference.count(similarity, 0.5, images).tolist() == counts


def test_match_takes_the_first_of_equal_partners():
    _, partner = alternate(torch.ones(1, 8, 4))  # every cosine is the same
    assert partner.tolist() == [-1, -1, 1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_bad_key_is_similar_to_nothing(bad):
    keys = torch.rand(2, 9, 4) + 0.1
    keys[:, 3:5] = bad  # one in B, one in A
    similarity, partner = alternate(keys)
    assert similarity[4] == reference.NOT_ALIKE
    assert 3 not in partner[[2, 6, 8]].tolist()
    assert reference.count(similarity, -1.0, Images.of(1, 9)).tolist() == [3]
    assert similarity[[2, 6, 8]].isfinite().all()


def test_only_bad_keys_in_b():
    keys = torch.rand(1, 7, 4)
    keys[0, 1::2] = math.nan
    similarity, _ = alternate(keys)
    assert reference.count(similarity, -1.0, Images.of(1, 7)).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_match_computes_in_float32(dtype):
    keys = torch.randn(3, 100, 16).to(dtype)
    similarity, _ = reference.match(keys, None, 1, False, Images.of(2, 50))
    exact, _ = reference.match(keys.double(), None, 1, False, Images.of(2, 50))
    assert similarity.dtype == torch.float32
    assert (similarity[exact.isfinite()] - exact[exact.isfinite()]).abs().max() < 1e-6


def test_counts_and_the_r_of_a_batch():
    similarity = torch.tensor([[-math.inf, 0.9, 0.5], [0.91, 0.9, 0.95], [0.9, 0.2, -2.0]], dtype=F64)
    counts = reference.count(similarity.flatten(), 0.9, Images.of(3, 3))
    assert counts.tolist() == [1, 3, 1]
    assert reference.batch_r(counts).tolist() == [1] * 3  # 5 / 3, rounded down
    assert reference.batch_r(torch.tensor([2, 3, 1])).tolist() == [2] * 3
    assert reference.batch_r(torch.tensor([], dtype=torch.int64)).tolist() == []
    assert [reference.largest_r(N, P) for N, P in ((197, 1), (198, 2), (1, 1), (0, 1), (3, 0))] == [98, 98, 0, 0, 1]


@groupings
def test_the_tokens_in_a_are_those_that_find_a_partner(by_size):
    for N, P in product(range(1, 7), range(4)):
        pairs = loops.match(torch.ones(N, 2).tolist(), *loops.groups(N, P, [1.0] * N if by_size else None))
        _, partner = reference.match(torch.ones(1, N, 2), None, P, by_size, Images.of(1, N))
        in_a = loops.most_pairs(N, P, by_size)
        assert in_a == len(pairs) == int((partner >= 0).sum()) >= reference.largest_r(N, P)


@groupings
@batches
def test_assign_for_every_r(lengths, equal, P, by_size):
    """One r for all images, up to one more than any has in A, and then one r per image."""
    images = images_of(lengths, equal)
    sizes = sizes_of(images)
    _, similarity, partner = matched(images, P, by_size, sizes)
    most = loops.most_pairs(images.N, P, by_size) + 1
    own = torch.randint(0, most + 1, (images.B,))
    for r in [torch.full((images.B,), r) for r in range(most + 1)] + [own]:
        slots, cu_seqlens = reference.assign(similarity, partner, r, P, images)
        assert slots.dtype == cu_seqlens.dtype == torch.int32
        first, expected = 0, []
        for image, n in zip(each(images), r.tolist(), strict=True):
            length, pairs = image.stop - image.start, found_by(similarity[image], partner[image])
            a, b = loops.groups(length, P, sizes[image].tolist() if by_size else None)
            n = min(n, len(pairs))
            assert slots[image].tolist() == [first + slot for slot in loops.assign(length, P, a, b, pairs, n)]
            first += length - n
            expected.append(first)
        assert cu_seqlens.tolist() == [0, *expected]


def test_equal_similarities_merge_from_the_first():
    assert assigned(*alternate(torch.ones(1, 9, 2)), 2).tolist() == [0, 3, 3, 4, 3, 5, 1, 6, 2]


def test_a_given_r_merges_a_bad_key_last():
    keys = torch.rand(1, 9, 4) + 0.1
    keys[0, 2] = math.nan
    pairs = alternate(keys)
    three = assigned(*pairs, 3)
    assert three.bincount().tolist()[three[2]] == 1
    assert sorted(set(assigned(*pairs, 4).tolist())) == list(range(5))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=3, max_size=3), st.integers(0, 10), st.booleans(), st.data())
def test_properties_of_an_assignment(patches, P, by_size, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    equal = data.draw(st.booleans())
    images = images_of([P + n for n in (patches[:1] * 3 if equal else patches)], equal)
    sizes = sizes_of(images, 8)
    _, similarity, partner = matched(images, P, by_size, sizes)
    in_a = [loops.most_pairs(N, P, by_size) for N in images.lengths.tolist()]
    r = torch.tensor([data.draw(st.integers(0, most)) for most in in_a])
    slots, cu_seqlens = reference.assign(similarity, partner, r, P, images)
    left, T = images._replace(cu_seqlens=cu_seqlens, equal=False), int(cu_seqlens[-1])
    assert torch.equal(left.lengths, images.lengths - r)
    x = torch.randn(len(slots), 5, dtype=F64)
    merged, merged_sizes = reference.merge(x, sizes, slots, T)
    for image, own in zip(each(images), each(left), strict=True):
        row = slots[image].tolist()
        assert row[:P] == list(range(own.start, own.start + P))  # protected tokens stay unchanged and first
        assert sorted(set(row)) == list(range(own.start, own.stop))  # every token once, no slot empty
        assert all(row.count(slot) == 1 for slot in row[:P])
        assert merged_sizes[own].sum() == sizes[image].sum()
        longest = x[image].norm(dim=1).max()
        assert (merged[own].norm(dim=1) <= longest + 1e-12).all()  # a mean is no longer than the longest of its vectors
    alone = slots.long().bincount(minlength=T)[slots.long()] == 1
    assert torch.equal(x[alone], reference.unmerge(merged, slots)[alone])  # bitwise


@batches
def test_merge_and_lists(lengths, equal, P):
    images = images_of(lengths, equal)
    _, similarity, partner = matched(images, P)
    r = reference.count(similarity, 0.2, images)
    slots, cu_seqlens = reference.assign(similarity, partner, r, P, images)
    T = int(cu_seqlens[-1])
    slots[-1:] = -1  # dropped
    x, sizes = torch.randn(len(slots), 3, dtype=F64), sizes_of(images, 8)
    merged, merged_sizes = reference.merge(x, sizes, slots, T)
    tokens, spans = reference.lists(slots, T)
    assert tokens.dtype == spans.dtype == torch.int32 and spans.shape == (T, 2)
    members = [[i for i, slot in enumerate(slots.tolist()) if slot == row] for row in range(T)]
    assert [tokens[begin:end].tolist() for begin, end in spans.tolist()] == members
    assert sorted(tokens.tolist()) == list(range(len(slots))) and tokens[-1:].tolist() == [len(slots) - 1][: len(slots)]
    if len(slots) > 1:
        expected, expected_sizes = loops.merge(x, sizes.tolist(), slots.tolist())
        torch.testing.assert_close(merged[: len(expected)], expected, rtol=0, atol=1e-12)
        assert merged_sizes[: len(expected)].tolist() == expected_sizes
        assert torch.equal(reference.unmerge(merged, slots), loops.unmerge(merged, slots.tolist()))


def test_merge_drops_and_leaves_an_unused_slot_empty():
    x, sizes = torch.tensor([[1.0], [2.0], [3.0], [6.0]]), torch.tensor([1.0, 1.0, 2.0, 3.0])
    slots = torch.tensor([2, -1, 9, 2])
    merged, merged_sizes = reference.merge(x, sizes, slots, 4)
    assert merged.flatten().tolist() == [0, 0, 4.75, 0]
    assert merged_sizes.tolist() == [0, 0, 4, 0]
    assert reference.unmerge(merged, slots).flatten().tolist() == [4.75, 0, 0, 4.75]


def test_sizes_of_none_are_ones():
    x, slots = torch.randn(5, 3), torch.tensor([0, 1, 1, -1, 0])
    torch.testing.assert_close(reference.merge(x, None, slots, 2), reference.merge(x, torch.ones(5), slots, 2))


def test_a_nan_stays_in_its_slot():
    x = torch.tensor([[math.nan], [2.0], [6.0], [1.0], [2.0], [6.0]])
    merged, _ = reference.merge(x, torch.ones(6), torch.tensor([0, 1, 1, 2, 3, 3]), 4)
    assert merged.isnan().flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_sums_in_float32(dtype):
    x = torch.randn(600, 4).to(dtype)
    merged, sizes = reference.merge(x, torch.ones(600), torch.zeros(600, dtype=torch.int32), 1)
    exact = x.double().mean(dim=0, keepdim=True)
    assert merged.dtype == dtype and sizes.tolist() == [600.0]
    assert (merged.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_merge_is_bitwise_the_same_on_every_run():
    T = 8 * 197
    x, sizes = torch.randn(T, 384), torch.randint(1, 50, (T,)).float()
    slots = torch.randint(0, 480, (T,), dtype=torch.int32)
    first = reference.merge(x, sizes, slots, 480)[0]
    assert all(torch.equal(first, reference.merge(x, sizes, slots, 480)[0]) for _ in range(20))


def test_compose_follows_a_token_through_two_steps():
    first = torch.tensor([0, 1, 1, 2, -1], dtype=torch.int32)
    second = torch.tensor([0, 0, -1], dtype=torch.int32)
    assert reference.compose(first, second).tolist() == [0, 0, 0, -1, -1]


@ways
@pytest.mark.parametrize(("lengths", "equal"), [([7, 7], True), ([5, 1, 8], False), ([7, 7], False), ([], False)])
def test_attention(lengths, equal, fused):
    """Queries are all tokens, then only the first token of each image."""
    images = images_of(lengths, equal)
    sizes = sizes_of(images, 8)
    q, k, v = torch.randn(3, 2, len(sizes), 4, dtype=F64)
    firsts = images.cu_seqlens[:-1].long()
    for n in (sizes, None):
        out = reference.attention(q, k, v, n, images, fused=fused)
        leading = reference.attention(q[:, firsts], k, v, n, images, Images.of(images.B, 1), fused=fused)
        assert out.shape == q.shape and leading.shape == (2, images.B, 4)
        for b, image in enumerate(each(images)):
            own = (sizes[image] if n is not None else torch.ones_like(sizes[image])).tolist()
            expected = loops.attention(q[:, image], k[:, image], v[:, image], own)
            torch.testing.assert_close(out[:, image], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(leading[:, b], expected[:, 0], rtol=0, atol=1e-12)


@ways
def test_a_token_of_size_n_counts_as_n_equal_tokens(fused):
    q, k, v = (torch.randn(2, n, 4, dtype=F64) for n in (3, 4, 4))
    repeats, queries = torch.tensor([1, 5, 2, 3]), Images.of(1, 3)
    each_alone = (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), None, Images.of(1, 11))
    short = reference.attention(q, k, v, repeats.float(), Images.of(1, 4), queries, fused=fused)
    torch.testing.assert_close(short, reference.attention(q, *each_alone, queries, fused=fused), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sizes_are_not_rounded_to_16_bits(dtype):
    q = torch.zeros(1, 1, 8, dtype=dtype)  # the weights are then the shares of the sizes
    v = torch.eye(8)[None].to(dtype)
    sizes = torch.tensor([131.0, 137, 139, 149, 151, 157, 163, 167])
    keys = torch.zeros(1, 8, 8, dtype=dtype)
    out = reference.attention(q, keys, v, sizes, Images.of(1, 8), Images.of(1, 1)).double().flatten()
    exact = sizes.double() / sizes.sum()
    assert ((out - exact).abs() / exact).max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_off_the_cpu_no_kernel_of_torch_gets_a_mask_of_another_dtype(dtype, monkeypatch):
    """CUDA's kernels silently misread a float32 mask with 16-bit queries."""
    masks, run = [], torch.nn.functional.scaled_dot_product_attention
    watched = lambda *tensors, attn_mask, **options: masks.append(attn_mask) or run(*tensors, **options)  # noqa: E731
    monkeypatch.setattr(reference.F, "scaled_dot_product_attention", watched)
    q = torch.empty(1, 8, 8, dtype=dtype, device="meta")
    reference.attention(q, q, q, torch.ones(8, device="meta"), Images.of(1, 8, torch.device("meta")))
    assert [mask.dtype for mask in masks] == ([] if dtype.itemsize == 2 else [dtype])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 200), st.integers(1, 200))
def test_theorem_1(seed, n_i, n_j):
    torch.manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=1)
    x[1] *= torch.sign(x[0] @ x[1])  # the theorem requires x_i . x_j >= 0
    n_i, n_j = torch.tensor(float(n_i)).double(), torch.tensor(float(n_j)).double()
    error = reference.merging_error(x[0], x[1], n_i, n_j)
    bound = n_i * n_j / (n_i + n_j) * (1 - x[0] @ x[1])
    assert bound - 1e-9 <= error <= 2 * bound + 1e-9


def test_merging_error_by_hand():
    x_i, x_j = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    one = torch.tensor(1.0).double()
    assert reference.merging_error(x_i, x_j, one, one).item() == pytest.approx(2 * (1 - math.sqrt(0.5)))


@pytest.mark.parametrize(("lengths", "equal"), [([6, 6], True), ([5, 1, 6], False)])
def test_gradients(lengths, equal):
    images = images_of(lengths, equal)
    sizes = sizes_of(images, 4)
    slots = torch.tensor([0, 1, 1, 2, -1, 1, 3, 5, 5, 4, 4, 3])
    x = torch.randn(12, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: reference.merge(t, sizes, slots, 6)[0], (x,))
    y = torch.randn(6, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: reference.unmerge(t, slots), (y,))
    q, k, v = (torch.randn(2, 12, 3, dtype=F64, requires_grad=True) for _ in range(3))
    for fused in (True, False):
        call = lambda *qkv, fused=fused: reference.attention(*qkv, sizes, images, fused=fused)  # noqa: E731
        assert torch.autograd.gradcheck(call, (q, k, v))
