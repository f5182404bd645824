"""The reference against loops, and against the properties that the method promises."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loops
from atm_triton import reference

SHAPES = [(2, 0), (3, 0), (3, 1), (8, 0), (9, 1), (9, 2), (10, 2), (17, 5), (26, 10)]  # N, P
ids = [f"N{N}-P{P}" for N, P in SHAPES]


def keys_with_ties(B, H, N, d):
    """Random keys; every third token repeats an earlier one exactly."""
    keys = torch.randn(B, H, N, d, dtype=torch.float64)
    keys[:, :, 2::3] = keys[:, :, : len(range(2, N, 3))]
    return keys


def matched(B, N, P, sizes=None):
    keys = keys_with_ties(B, 2, N, 4)
    if sizes is None:
        a, b = reference.group_alternate(B, N, P)
    else:
        a, b = reference.group_by_size(sizes, P)
    return keys, a, b, *reference.match(keys, a, b)


def test_threshold_equals_the_papers_example():
    values = [reference.threshold(block, 0.99, 0.04, 0.88) for block in range(1, 6)]
    assert values == pytest.approx([0.99, 0.949189, 0.906713, 0.88, 0.88], abs=1e-6)
    assert reference.threshold(3, 0.99, 0.04, 0.88) == loops.theta(3, 0.99, 0.04, 0.88)


@pytest.mark.parametrize(("N", "P"), SHAPES, ids=ids)
def test_alternate_groups(N, P):
    a, b = reference.group_alternate(2, N, P)
    expected_a, expected_b = loops.groups(N, P)
    assert a.tolist() == [expected_a] * 2
    assert b.tolist() == [expected_b] * 2


@pytest.mark.parametrize(("N", "P"), SHAPES, ids=ids)
def test_groups_by_size_keep_the_order_of_equals(N, P):
    sizes = torch.randint(1, 4, (3, N)).float()
    a, b = reference.group_by_size(sizes, P)
    for image in range(3):
        assert (a[image].tolist(), b[image].tolist()) == loops.groups(N, P, sizes[image].tolist())


@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
@pytest.mark.parametrize(("N", "P"), SHAPES, ids=ids)
def test_match(N, P, by_size):
    sizes = torch.randint(1, 4, (3, N)).float() if by_size else None
    keys, _, _, similarity, partner = matched(3, N, P, sizes)
    for image in range(3):
        a, b = loops.groups(N, P, sizes[image].tolist() if by_size else None)
        found = loops.partners(loops.mean_keys(keys[image]), a, b)
        assert [i for i in range(N) if partner[image, i] >= 0] == sorted(found)
        for i in range(N):
            if i in found:
                s, _j = found[i]
                assert similarity[image, i].item() == pytest.approx(s, abs=1e-12)
                k = loops.mean_keys(keys[image])
                assert loops.cosine(k[i], k[partner[image, i].item()]) == pytest.approx(s, abs=1e-12)
            else:
                assert similarity[image, i] == -math.inf


def test_match_takes_the_first_of_equal_partners():
    keys = torch.ones(1, 1, 8, 4)  # every cosine is the same
    _, partner = reference.match(keys, *reference.group_alternate(1, 8, 1))
    assert partner.tolist() == [[-1, -1, 1, -1, 1, -1, 1, -1]]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_bad_key_is_similar_to_nothing(bad):
    keys = torch.rand(1, 2, 9, 4) + 0.1
    keys[0, 0, 3] = keys[0, 1, 3] = bad  # in B
    keys[0, 0, 4] = keys[0, 1, 4] = bad  # in A
    similarity, partner = reference.match(keys, *reference.group_alternate(1, 9, 1))
    assert similarity[0, 4] == reference.NOT_ALIKE
    assert 3 not in partner[0, [2, 6, 8]].tolist()
    assert reference.count(similarity, -1.0).tolist() == [3]
    assert similarity[0, [2, 6, 8]].isfinite().all()


def test_only_bad_keys_in_b():
    keys = torch.rand(1, 1, 7, 4)
    keys[0, 0, 1::2] = math.nan
    similarity, _ = reference.match(keys, *reference.group_alternate(1, 7, 1))
    assert reference.count(similarity, -1.0).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_match_computes_in_float32(dtype):
    keys = torch.randn(2, 3, 50, 16).to(dtype)
    groups = reference.group_alternate(2, 50, 1)
    similarity, _ = reference.match(keys, *groups)
    exact, _ = reference.match(keys.double(), *groups)
    assert similarity.dtype == torch.float32
    assert (similarity[exact.isfinite()] - exact[exact.isfinite()]).abs().max() < 1e-6


def test_counts_and_the_r_of_a_batch():
    similarity = torch.tensor([[-math.inf, 0.9, 0.5], [0.91, 0.9, 0.95], [0.9, 0.2, -2.0]], dtype=torch.float64)
    counts = reference.count(similarity, 0.9)
    assert counts.tolist() == [1, 3, 1]
    assert reference.batch_r(counts) == 1  # 5 / 3, rounded down
    assert reference.batch_r(torch.tensor([2, 3, 1])) == 2
    assert reference.batch_r(torch.tensor([], dtype=torch.int64)) == 0
    assert [reference.largest_r(N, P) for N, P in ((197, 1), (198, 2), (1, 1), (0, 1), (3, 0))] == [98, 98, 0, 0, 1]


@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
def test_the_tokens_in_a_are_those_that_find_a_partner(by_size):
    for N, P in itertools.product(range(1, 7), range(4)):
        sizes = torch.ones(1, N)
        found = loops.partners(torch.ones(N, 2).tolist(), *loops.groups(N, P, sizes[0] if by_size else None))
        _, partner = reference.match(torch.ones(1, 1, N, 2), *reference.group(sizes, 1, N, P, by_size, sizes.device))
        in_a = reference.group_a_size(N, P, by_size)
        assert in_a == len(found) == int((partner >= 0).sum()) >= reference.largest_r(N, P)
        assert reference.group_a_size(torch.tensor([N]), P, by_size).tolist() == [in_a]


@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
@pytest.mark.parametrize(("N", "P"), SHAPES, ids=ids)
def test_assign_for_every_r(N, P, by_size):
    sizes = torch.randint(1, 4, (3, N)).float() if by_size else None
    _keys, a, _, similarity, partner = matched(3, N, P, sizes)
    most = a.shape[1] if (partner >= 0).any() else 0
    for r in range(most + 1):
        assignment = reference.assign(similarity, partner, r, P)
        assert assignment.dtype == torch.int32
        for image in range(3):
            ga, gb = loops.groups(N, P, sizes[image].tolist() if by_size else None)
            found = {i: (similarity[image, i].item(), partner[image, i].item()) for i in ga if partner[image, i] >= 0}
            assert assignment[image].tolist() == loops.slots(N, P, ga, gb, found, r)


def test_each_image_its_own_r():
    _, _a, _, similarity, partner = matched(4, 17, 1)
    r = torch.tensor([0, 3, 8, 1])
    together = reference.assign(similarity, partner, r, 1)
    for image in range(4):
        alone = reference.assign(similarity[image : image + 1], partner[image : image + 1], int(r[image]), 1)
        assert together[image].tolist() == alone[0].tolist()
        assert sorted(set(together[image].tolist())) == list(range(17 - int(r[image])))


def test_equal_similarities_merge_from_the_first():
    similarity, partner = reference.match(torch.ones(1, 1, 9, 2), *reference.group_alternate(1, 9, 1))
    assert reference.assign(similarity, partner, 2, 1).tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


def test_a_given_r_merges_a_bad_key_last():
    keys = torch.rand(1, 1, 9, 4) + 0.1
    keys[0, 0, 2] = math.nan
    similarity, partner = reference.match(keys, *reference.group_alternate(1, 9, 1))
    three = reference.assign(similarity, partner, 3, 1)
    assert three[0].bincount().tolist()[three[0, 2]] == 1
    assert sorted(set(reference.assign(similarity, partner, 4, 1)[0].tolist())) == list(range(5))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10), st.booleans(), st.integers(0, 2**20), st.data())
def test_properties_of_an_assignment(patches, P, by_size, seed, data):
    torch.manual_seed(seed)
    N, B, C = patches + P, 3, 5
    sizes = torch.randint(1, 9, (B, N)).float()
    _, a, _, similarity, partner = matched(B, N, P, sizes if by_size else None)
    r = data.draw(st.integers(0, a.shape[1] if (partner >= 0).any() else 0))
    assignment = reference.assign(similarity, partner, r, P)
    assert assignment[:, :P].tolist() == [list(range(P))] * B  # protected tokens stay themselves, first
    for row in assignment.tolist():
        assert sorted(set(row)) == list(range(N - r))  # every token once, no slot empty
        assert all(row.count(slot) == 1 for slot in range(P))
    x = torch.randn(B, N, C, dtype=torch.float64)
    merged, merged_sizes = reference.merge(x, sizes, assignment, N - r)
    assert torch.equal(merged_sizes.sum(1), sizes.sum(1))
    longest = x.norm(dim=2).amax(1, keepdim=True)
    assert (merged.norm(dim=2) <= longest + 1e-12).all()  # a mean is no longer than what it is the mean of
    alone = torch.zeros(B, N - r).scatter_add_(1, assignment.long(), torch.ones(B, N)) == 1
    rows = torch.take_along_dim(alone, assignment.long(), 1)
    assert torch.equal(x[rows], reference.unmerge(merged, assignment)[rows])  # bitwise
    swap = torch.randperm(B)  # the order of the batch does not matter
    again = reference.assign(similarity[swap], partner[swap], r, P)
    assert torch.equal(again, assignment[swap])


@pytest.mark.parametrize(("N", "P"), SHAPES, ids=ids)
def test_merge(N, P):
    _, a, _, similarity, partner = matched(2, N, P)
    r = a.shape[1] // 2 if (partner >= 0).any() else 0
    assignment = reference.assign(similarity, partner, r, P)
    x, sizes = torch.randn(2, N, 3, dtype=torch.float64), torch.randint(1, 9, (2, N)).float()
    merged, merged_sizes = reference.merge(x, sizes, assignment, N - r)
    for image in range(2):
        expected, expected_sizes = loops.merge(x[image], sizes[image].tolist(), assignment[image].tolist())
        torch.testing.assert_close(merged[image], expected, rtol=0, atol=1e-12)
        assert merged_sizes[image].tolist() == expected_sizes


def test_merge_drops_and_leaves_an_unused_slot_empty():
    x, sizes = torch.tensor([[[1.0], [2.0], [6.0]]]), torch.tensor([[1.0, 1.0, 3.0]])
    merged, merged_sizes = reference.merge(x, sizes, torch.tensor([[2, -1, 2]]), 4)
    assert merged.flatten().tolist() == [0, 0, 4.75, 0]
    assert merged_sizes.flatten().tolist() == [0, 0, 4, 0]
    back = reference.unmerge(merged, torch.tensor([[2, -1, 2]]))
    assert back.flatten().tolist() == [4.75, 0, 4.75]


def test_a_nan_stays_in_its_slot():
    x = torch.tensor([[[math.nan], [2.0], [6.0]], [[1.0], [2.0], [6.0]]])
    merged, _ = reference.merge(x, torch.ones(2, 3), torch.tensor([[0, 1, 1], [0, 1, 1]]), 2)
    assert merged.isnan().flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_sums_in_float32(dtype):
    x = torch.randn(1, 600, 4).to(dtype)
    assignment = torch.zeros(1, 600, dtype=torch.int32)
    merged, sizes = reference.merge(x, torch.ones(1, 600), assignment, 1)
    exact = x.double().mean(dim=1, keepdim=True)
    assert merged.dtype == dtype and sizes.tolist() == [[600.0]]
    assert (merged.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_merge_is_bitwise_the_same_on_every_run():
    x, sizes = torch.randn(8, 197, 384), torch.randint(1, 50, (8, 197)).float()
    assignment = torch.randint(0, 60, (8, 197), dtype=torch.int32)
    first = reference.merge(x, sizes, assignment, 60)[0]
    assert all(torch.equal(first, reference.merge(x, sizes, assignment, 60)[0]) for _ in range(20))


def test_compose_follows_a_token_through_two_steps():
    first = torch.tensor([[0, 1, 1, 2, -1]], dtype=torch.int32)
    second = torch.tensor([[0, 0, -1]], dtype=torch.int32)
    assert reference.compose(first, second).tolist() == [[0, 0, 0, -1, -1]]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_attention(fused):
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (3, 7, 7))
    sizes = torch.randint(1, 9, (2, 7)).float()
    out = reference.attention(q, k, v, sizes, fused=fused)
    expected = torch.stack([loops.attention(q[b], k[b], v[b], sizes[b].tolist()) for b in range(2)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    ones = reference.attention(q, k, v, torch.ones(2, 7), fused=fused)
    torch.testing.assert_close(ones, reference.attention(q, k, v, fused=fused), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_token_of_size_n_counts_as_n_equal_tokens(fused):
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 4, 4))
    repeats = torch.tensor([1, 5, 2, 3])
    long = reference.attention(q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2), fused=fused)
    short = reference.attention(q, k, v, repeats[None].float(), fused=fused)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sizes_are_not_rounded_to_16_bits(dtype):
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)  # the weights are then the sizes' shares alone
    v = torch.eye(8)[None, None].to(dtype)
    sizes = torch.tensor([[131.0, 137, 139, 149, 151, 157, 163, 167]])
    out = reference.attention(q, torch.zeros(1, 1, 8, 8, dtype=dtype), v, sizes).double().flatten()
    exact = sizes.double().flatten() / sizes.sum()
    assert ((out - exact).abs() / exact).max() <= torch.finfo(dtype).eps


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 200), st.integers(1, 200))
def test_theorem_1(seed, n_i, n_j):
    torch.manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=1)
    x[1] *= torch.sign(x[0] @ x[1])  # the theorem asks for x_i . x_j >= 0
    n_i, n_j = torch.tensor(float(n_i)).double(), torch.tensor(float(n_j)).double()
    error = reference.merging_error(x[0], x[1], n_i, n_j)
    bound = n_i * n_j / (n_i + n_j) * (1 - x[0] @ x[1])
    assert bound - 1e-9 <= error <= 2 * bound + 1e-9


def test_merging_error_by_hand():
    x_i, x_j = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    one = torch.tensor(1.0).double()
    assert reference.merging_error(x_i, x_j, one, one).item() == pytest.approx(2 * (1 - math.sqrt(0.5)))


def test_gradients():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.randint(1, 5, (2, 6)).float()
    assignment = torch.tensor([[0, 1, 1, 2, -1, 1], [0, 2, 2, 1, 1, 0]])
    assert torch.autograd.gradcheck(lambda t: reference.merge(t, sizes, assignment, 3)[0], (x,))
    y = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: reference.unmerge(t, assignment), (y,))
    q, k, v = (torch.randn(2, 2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for fused in (True, False):
        call = lambda *qkv, fused=fused: reference.attention(*qkv, sizes, fused=fused)  # noqa: E731
        assert torch.autograd.gradcheck(call, (q, k, v))
