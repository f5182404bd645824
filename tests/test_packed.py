"""Packed images, each of its own length, against each image alone: the reference, and the kernels against it."""

import itertools

import pytest
import torch

from atm_triton import library, ops, reference
from atm_triton.kernels import assign as assign_kernels
from atm_triton.kernels.attention import attention
from atm_triton.kernels.match import match

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [[17, 1, 33, 2, 20], [5], [9, 9, 9], [2, 1]]
H, d, C, P = 2, 16, 6, 1
THETA = 0.5  # where some images merge much and some nothing

pytestmark = pytest.mark.usefixtures("poison")
lengths_of = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
groupings = pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])


def packed(lengths, dtype=torch.float64):
    """cu_seqlens, keys [H, T, d], sizes [T] and tokens [T, C]; some sizes, keys and similarities are equal."""
    T = sum(lengths)
    keys = torch.randn(H, T, d, dtype=dtype, device=DEVICE)
    keys[:, 2::5] = keys[:, : len(range(2, T, 5))]
    keys[:, 3::11] = 0
    sizes = torch.randint(1, 4, (T,), device=DEVICE).float()
    return cumulated(lengths), keys, sizes, torch.randn(T, C, dtype=dtype, device=DEVICE)


def cumulated(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def images(cu_seqlens):
    return [slice(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]


def alone(keys, sizes, by_size):
    """What the dense functions say of one image: similarity and partner [1, N]."""
    groups = reference.group(sizes.unsqueeze(0), 1, len(sizes), P, by_size, keys.device)
    return reference.match(keys.unsqueeze(0), *groups)


@groupings
@lengths_of
def test_match(lengths, by_size):
    cu_seqlens, keys, sizes, _ = packed(lengths)
    similarity, partner = reference.match_packed(keys, sizes, P, by_size, cu_seqlens)
    for image in images(cu_seqlens):
        want, want_partner = alone(keys[:, image], sizes[image], by_size)
        torch.testing.assert_close(similarity[image], want[0], rtol=0, atol=1e-12)
        assert torch.equal(partner[image], want_partner[0])
    counts = reference.count(similarity, THETA, cu_seqlens)
    assert counts.tolist() == [int((similarity[image] >= THETA).sum()) for image in images(cu_seqlens)]


@groupings
@lengths_of
def test_assign_and_lists(lengths, by_size):
    cu_seqlens, keys, sizes, _ = packed(lengths)
    similarity, partner = reference.match_packed(keys, sizes, P, by_size, cu_seqlens)
    assignment = reference.assign_each(similarity, partner, THETA, P, cu_seqlens)
    r = reference.count(similarity, THETA, cu_seqlens)
    new_cu_seqlens = reference.new_cu_seqlens(r, cu_seqlens.diff())
    assert new_cu_seqlens.dtype == torch.int32
    tokens, spans = reference.lists(assignment, new_cu_seqlens, cu_seqlens)
    for image, slots, own in zip(images(cu_seqlens), images(new_cu_seqlens), r.tolist(), strict=True):
        want = reference.assign(*alone(keys[:, image], sizes[image], by_size), own, P)[0]
        assert torch.equal(assignment[image], want) and slots.stop - slots.start == len(want) - own
        for slot, (begin, end) in enumerate(spans[slots].tolist()):
            assert tokens[begin:end].tolist() == [image.start + i for i in range(len(want)) if want[i] == slot]


@lengths_of
def test_merge_unmerge_and_compose(lengths):
    cu_seqlens, keys, sizes, x = packed(lengths)
    similarity, partner = reference.match_packed(keys, sizes, P, False, cu_seqlens)
    assignment = reference.assign_each(similarity, partner, THETA, P, cu_seqlens)
    r = reference.count(similarity, THETA, cu_seqlens)
    assignment[-1] = -1  # dropped
    new_cu_seqlens = reference.new_cu_seqlens(r, cu_seqlens.diff())
    merged, merged_sizes = reference.merge(x, sizes, assignment, new_cu_seqlens, cu_seqlens)
    back = reference.unmerge(merged, assignment, cu_seqlens, new_cu_seqlens)
    for image, slots in zip(images(cu_seqlens), images(new_cu_seqlens), strict=True):
        mine = assignment[image].unsqueeze(0)
        want, want_sizes = reference.merge(x[image][None], sizes[image][None], mine, slots.stop - slots.start)
        torch.testing.assert_close(merged[slots], want[0])
        assert torch.equal(merged_sizes[slots], want_sizes[0])
        assert torch.equal(back[image], reference.unmerge(want, mine)[0])


def test_no_image():
    cu_seqlens, keys, sizes, x = packed([])
    similarity, partner = reference.match_packed(keys, sizes, P, True, cu_seqlens)
    assignment = reference.assign_each(similarity, partner, THETA, P, cu_seqlens)
    merged, _ = reference.merge(x, sizes, assignment, cu_seqlens, cu_seqlens)
    back = reference.unmerge(merged, assignment, cu_seqlens, cu_seqlens)
    assert assignment.shape == (0,) and merged.shape == back.shape == x.shape
    assert reference.count(similarity, THETA, cu_seqlens).shape == (0,)
    assert reference.attention_packed(keys, keys, keys, sizes, cu_seqlens).shape == keys.shape


def test_a_dense_batch_becomes_packed_and_dense_again():
    B, N = 3, 19
    keys, x = torch.randn(B, H, N, d, device=DEVICE), torch.randn(B, N, C, device=DEVICE)
    r = torch.tensor([4, 0, 9], device=DEVICE)
    similarity, partner = reference.match(keys, *reference.group_alternate(B, N, P, keys.device))
    first = reference.assign(similarity, partner, r, P)
    cu_seqlens = reference.new_cu_seqlens(r, N)
    assert cu_seqlens.tolist() == [0, 15, 34, 44]
    merged, sizes = reference.merge(x, None, first, cu_seqlens)
    assert merged.shape == (44, C) and sizes.sum() == B * N
    second = torch.cat([torch.arange(n, device=DEVICE) // 2 for n in (15, 19, 10)]).int()
    trace = reference.compose(first, second, cu_seqlens)
    assert torch.equal(trace, first // 2)
    halves = cumulated([8, 10, 5])
    again, _ = reference.merge(merged, sizes, second, halves, cu_seqlens)
    torch.testing.assert_close(reference.unmerge(again, trace, None, halves)[1, 18], merged[15:34][18])


@pytest.mark.parametrize("sized", [False, True], ids=["plain", "log-size"])
@lengths_of
def test_attention(lengths, sized):
    cu_seqlens, keys, sizes, _ = packed(lengths)
    q, v = torch.randn_like(keys), torch.randn_like(keys)
    sizes = sizes if sized else None
    out = reference.attention_packed(q, keys, v, sizes, cu_seqlens)
    first = torch.stack([q[:, image][:, :1] for image in images(cu_seqlens)])
    leading = reference.attention_packed(first, keys, v, sizes, cu_seqlens)
    for b, image in enumerate(images(cu_seqlens)):
        n = sizes[image][None] if sized else None
        want = reference.attention(q[None, :, image], keys[None, :, image], v[None, :, image], n)[0]
        torch.testing.assert_close(out[:, image], want)
        torch.testing.assert_close(leading[b], want[:, :1])


def test_gradients_of_packed_merge_and_attention():
    lengths = [5, 1, 4]
    cu_seqlens, keys, sizes, x = packed(lengths)
    assignment = torch.tensor([0, 1, 1, 2, 0, 0, 0, 1, 0, -1], dtype=torch.int32, device=DEVICE)
    new = cumulated([3, 1, 2])
    sizes = sizes.double()

    def merges(x):
        return reference.merge(x, sizes, assignment, new, cu_seqlens)[0]

    def attends(q, k, v):
        return reference.attention_packed(q, k, v, sizes, cu_seqlens)

    assert torch.autograd.gradcheck(merges, x.requires_grad_())
    assert torch.autograd.gradcheck(attends, [keys.detach().clone().requires_grad_() for _ in range(3)])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_dense_batch_to_packed_images_and_back_with_gradients(backend):
    """Slots of a dense batch, tokens of packed images: shapes, values and gradients, by a matrix."""
    packing = ops.Packing.of(torch.tensor([9, 5]), torch.device(DEVICE))
    assignment = torch.cat([torch.arange(9), torch.arange(5)]).to(DEVICE).int() % 4
    slots, x = torch.randn(2, 4, C, device=DEVICE), torch.randn(14, C, device=DEVICE)
    where = torch.zeros(14, 8, device=DEVICE)
    where[torch.arange(14), assignment.long() + 4 * (torch.arange(14, device=DEVICE) >= 9)] = 1
    got = ops.unmerge(slots.requires_grad_(), assignment, backend, packing=packing)
    torch.testing.assert_close(got, where @ slots.view(8, C))
    merged = ops.merge(x.requires_grad_(), None, assignment, 4, backend, packing=packing)
    mean = (where / where.sum(0)).T
    assert merged.x.shape == (2, 4, C) and merged.sizes.shape == (2, 4)
    torch.testing.assert_close(merged.x, (mean @ x).view(2, 4, C), rtol=1e-6, atol=1e-6)
    weights, of_slots = torch.randn(14, C, device=DEVICE), torch.randn(2, 4, C, device=DEVICE)
    grads = torch.autograd.grad((got * weights).sum() + (merged.x * of_slots).sum(), (slots, x))
    torch.testing.assert_close(grads[0].view(8, C), where.T @ weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[1], mean.T @ of_slots.view(8, C), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lists", "merge", "unmerge"])
def test_opcheck_of_a_dense_batch_and_packed_images(name):
    cu_seqlens = cumulated([9, 5])
    assignment = torch.cat([torch.arange(9), torch.arange(5)]).to(DEVICE).int() % 4
    tokens, spans = library.lists(assignment, 4, cu_seqlens, None, 9)
    slots, x = torch.randn(2, 4, C, device=DEVICE), torch.randn(14, C, device=DEVICE)
    given = {
        "lists": (assignment, 4, cu_seqlens, None, 9),
        "merge": (x.requires_grad_(), None, assignment, tokens, spans, 4, cu_seqlens, None, 9),
        "unmerge": (slots.requires_grad_(), assignment, cu_seqlens, None, 9),
    }
    torch.library.opcheck(getattr(torch.ops.atm_triton, name).default, given[name])


def test_kernels_in_float16_as_the_reference():
    packing = ops.Packing.of(torch.tensor([17, 1, 33, 2]), torch.device(DEVICE))
    _, keys, sizes, x = packed([17, 1, 33, 2], torch.float16)
    found = ops.match(keys, sizes, P, False, THETA, "triton", packing)
    want, _ = reference.match_packed(keys, sizes, P, False, packing.cu_seqlens)
    torch.testing.assert_close(found.similarity, want, rtol=0, atol=2e-6)
    options = (THETA, ops.CountRead(found.counts), P, "triton", packing)
    assignment, lists, after = ops.assign_each(found.similarity, found.partner, *options)
    merged = ops.merge(x, sizes, assignment, after, "triton", lists, packing)
    want, want_sizes = reference.merge(x, sizes, assignment, after.cu_seqlens, packing.cu_seqlens)
    torch.testing.assert_close(merged.x, want, rtol=2e-3, atol=2e-3)
    assert torch.equal(merged.sizes, want_sizes)
    back = ops.unmerge(want, assignment, "triton", after, packing)
    assert torch.equal(back, reference.unmerge(want, assignment, packing.cu_seqlens, after.cu_seqlens))
    keys = torch.randn_like(keys)
    got = ops.attention(keys, keys, keys, sizes, backend="triton", packing=packing)
    want = reference.attention_packed(keys.float(), keys.float(), keys.float(), sizes, packing.cu_seqlens)
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)


@groupings
def test_kernels_match_and_assign_as_the_reference(by_size):
    lengths = [17, 1, 577, 2, 33]
    cu_seqlens, keys, sizes, _ = packed(lengths, torch.float32)
    similarity, partner, r = match(keys[None], sizes[None], P, by_size, THETA, cu_seqlens, 577)
    want, _ = reference.match_packed(keys, sizes, P, by_size, cu_seqlens)
    torch.testing.assert_close(similarity[0], want, rtol=0, atol=2e-6)
    assignment, tokens, spans, new_cu_seqlens = assign_kernels.assign(similarity, partner, r, P, cu_seqlens, 577)
    want = reference.assign_each(similarity[0], partner[0], THETA, P, cu_seqlens)
    assert torch.equal(assignment[0], want)
    assert torch.equal(new_cu_seqlens, reference.new_cu_seqlens(r, cu_seqlens.diff()))
    want_tokens, want_spans = reference.lists(want, new_cu_seqlens, cu_seqlens)
    for found in ((tokens, spans), assign_kernels.lists(assignment, 630, cu_seqlens, new_cu_seqlens, 577)):
        assert torch.equal(found[0], want_tokens) and torch.equal(found[1][: len(want_spans)], want_spans)


def arguments(lengths):
    """Of every operation that takes packed images."""
    cu_seqlens, keys, sizes, _ = packed(lengths, torch.float32)
    longest = max(lengths)
    similarity, partner, counts = library.match(keys, sizes, P, False, THETA, cu_seqlens, longest)
    first = torch.randn(len(lengths), 1, H, d, device=DEVICE).transpose(1, 2)
    return {
        "match": (keys, sizes, P, True, THETA, cu_seqlens, longest),
        "assign_each": (similarity, partner, counts, THETA, P, cu_seqlens, longest),
        "attention": (keys, keys, keys, sizes.log2(), cu_seqlens, longest),
        "leading attention": (first, keys, keys, sizes.log2(), cu_seqlens, longest),
    }


@pytest.mark.parametrize("on_kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", ["match", "assign_each", "attention", "leading attention"])
def test_opcheck(name, on_kernels, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(library, "interpreting", lambda: on_kernels)
    operation = getattr(torch.ops.atm_triton, name.removeprefix("leading ")).default
    torch.library.opcheck(operation, arguments([7, 1, 12])[name])


@pytest.mark.parametrize("name", ["match", "assign_each", "attention", "leading attention"])
def test_kernels_and_reference_are_one_operation(name, monkeypatch):
    taken, run = arguments([7, 1, 12])[name], getattr(library, name.removeprefix("leading "))
    by_kernels = run(*taken)
    monkeypatch.setattr(library, "_on_kernels", lambda x: False)
    by_reference = run(*taken)
    torch.testing.assert_close(by_kernels, by_reference, rtol=1e-5, atol=1e-5)


def test_each_image_of_a_dense_batch_its_own_r(monkeypatch):
    keys = torch.randn(3, H, 19, d, device=DEVICE)
    similarity, partner, counts = library.match(keys, None, P, False, THETA)
    by_kernels = library.assign_each(similarity, partner, counts, THETA, P)
    monkeypatch.setattr(library, "_on_kernels", lambda x: False)
    assignment, tokens, spans, begin = library.assign_each(similarity, partner, counts, THETA, P)
    slots = int(begin[-1])
    assert slots == 3 * 19 - int(counts.sum()) < 3 * 19
    for one, other in zip(by_kernels, (assignment, tokens, spans, begin), strict=True):
        assert torch.equal(one[:slots], other[:slots])


def test_the_kernel_attends_from_the_leading_tokens_of_packed_images():
    lengths = [17, 2, 70]
    cu_seqlens, keys, sizes, _ = packed(lengths, torch.float32)
    for rows in (1, 2, 3):  # also where an image has no more
        q = torch.randn(len(lengths), rows, H, d, device=DEVICE).transpose(1, 2)
        got = attention(q, keys[None], keys[None], sizes.log2()[None], d**-0.5, cu_seqlens, 70)
        want = reference.attention_packed(q, keys, keys, sizes, cu_seqlens)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
