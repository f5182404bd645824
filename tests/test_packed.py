"""Packed images of different lengths against each image alone, and operations on them by both backends."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atm_triton import ops, reference
from atm_triton.packed import Assignment, Images, Packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, d, C, P = 2, 16, 6, 1

backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def images_of(*lengths):
    return Images.of_lengths(torch.tensor(lengths, dtype=torch.int64, device=DEVICE))


def exact_keys(T):
    """Keys whose cosines are exact multiples of a quarter in any order of summation; many are equal, some zero."""
    keys = torch.zeros(T, d, dtype=torch.float64)
    for row in keys:
        row[4 * torch.arange(4) + torch.randint(2, (4,))] = torch.randint(2, (4,)).double() * 2 - 1
    keys[3::11] = 0
    apart = torch.randint(-3, 4, (T, d))
    return torch.stack([keys + apart, keys - apart]).to(DEVICE)


def some_sizes(T):
    return torch.randint(1, 4, (T,), device=DEVICE).float()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 24), max_size=6), st.integers(0, 5), st.booleans(), st.data())
def test_each_image_is_as_if_alone(lengths, num_prefix, by_size, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    images, T = images_of(*lengths), sum(lengths)
    keys, sizes, x = exact_keys(T), some_sizes(T), torch.randn(T, C, dtype=torch.float64, device=DEVICE)
    q, v = torch.randn(2, H, T, d, dtype=torch.float64, device=DEVICE)
    similarity, partner = reference.match(keys, sizes, num_prefix, by_size, images)
    counts = reference.count(similarity, 0.5, images)
    slots, cu_seqlens = reference.assign(similarity, partner, counts, num_prefix, images)
    slots[data.draw(st.integers(0, 5)) :: 7] = -1  # dropped
    merged, merged_sizes = reference.merge(x, sizes, slots, int(cu_seqlens[-1]))
    back = reference.unmerge(merged, slots)
    out = reference.attention(q, keys, v, sizes, images)
    for b, (own, left) in enumerate(
        zip(pairwise(images.cu_seqlens.tolist()), pairwise(cu_seqlens.tolist()), strict=True)
    ):
        image, rows = slice(*own), slice(*left)
        alone = Images.of(1, lengths[b], DEVICE)
        pairs = reference.match(keys[:, image], sizes[image], num_prefix, by_size, alone)
        assert torch.equal(similarity[image], pairs[0]) and torch.equal(partner[image], pairs[1])
        assert counts[b : b + 1].tolist() == reference.count(pairs[0], 0.5, alone).tolist()
        want, end = reference.assign(*pairs, counts[b : b + 1], num_prefix, alone)
        want[slots[image] < 0] = -1
        assert end.tolist() == [0, left[1] - left[0]]
        assert torch.equal(slots[image], torch.where(want < 0, -1, want + left[0]))
        want_merged, want_sizes = reference.merge(x[image], sizes[image], want, left[1] - left[0])
        torch.testing.assert_close(merged[rows], want_merged, rtol=0, atol=1e-12)
        assert torch.equal(merged_sizes[rows], want_sizes)
        assert torch.equal(back[image], reference.unmerge(merged[rows], want))
        want_out = reference.attention(q[:, image], keys[:, image], v[:, image], sizes[image], alone)
        torch.testing.assert_close(out[:, image], want_out, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "images", [Images.of(3, 5, DEVICE), images_of(5, 5, 5), images_of(4, 9, 2)], ids=["equal", "as equal", "differ"]
)
def test_where_images_lie(images):
    lengths = images.lengths.tolist()
    rows = torch.randn(15, C, device=DEVICE)
    each = rows.split(lengths)
    assert images.cu_seqlens.dtype == torch.int32 and images.lengths.dtype == torch.int64
    assert (images.B, images.N) == (3, max(lengths))
    assert torch.equal(images.first(rows, 2), torch.stack([own[:2] for own in each]))
    assert images.shaped(rows).shape == ((3, 5, C) if images.equal else (15, C))
    padded = reference.padded(rows, images, 7.0)
    for own, image in zip(each, padded, strict=True):
        assert torch.equal(image[: len(own)], own) and (image[len(own) :] == 7).all()
    assert images.equal or (padded[:, -1] == 7).all()
    assert torch.equal(reference.packed(padded, images, len(rows)), rows)
    of_images = torch.randn(3, 2, device=DEVICE)
    assert torch.equal(
        reference.of_tokens(of_images, images, 15), of_images[torch.arange(3).repeat_interleave(images.lengths.cpu())]
    )


def test_a_batch_of_one_length_is_a_view():
    x, sizes = torch.randn(2, 5, C), torch.rand(2, 5)
    packed = Packed.of(x, sizes)
    assert packed.x.data_ptr() == x.data_ptr() and packed.sizes.data_ptr() == sizes.data_ptr()
    assert packed.images.shaped(packed.x).shape == x.shape and packed.images.cu_seqlens.tolist() == [0, 5, 10]


def test_images_merge_to_lengths_of_their_own_and_back():
    images = Images.of(3, 19, DEVICE)
    keys, x = torch.randn(H, 57, d, device=DEVICE), torch.randn(57, C, device=DEVICE)
    pairs = reference.match(keys, None, P, False, images)
    first, cu_seqlens = reference.assign(*pairs, torch.tensor([4, 0, 9], device=DEVICE), P, images)
    assert cu_seqlens.tolist() == [0, 15, 34, 44]
    merged, sizes = reference.merge(x, None, first, 44)
    assert merged.shape == (44, C) and sizes.sum() == 57
    second = torch.cat([start + torch.arange(n, device=DEVICE) // 2 for start, n in ((0, 15), (8, 19), (18, 10))]).int()
    again, all_sizes = reference.merge(merged, sizes, second, 23)
    assert all_sizes.split([8, 10, 5])[1].sum() == 19
    trace = reference.compose(first, second)
    assert torch.equal(reference.unmerge(again, trace), reference.unmerge(reference.unmerge(again, second), first))
    torch.testing.assert_close(reference.unmerge(again, trace)[19 + 18], merged[15 + 18])


@backends
def test_merge_and_unmerge_are_products_with_a_matrix(backend):
    """Values and gradients, with an empty slot and a dropped token."""
    slots = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 4, 5, 7, -1, 4], dtype=torch.int32, device=DEVICE)
    x, merged = torch.randn(14, C, device=DEVICE), torch.randn(8, C, device=DEVICE)
    where = torch.zeros(14, 8, device=DEVICE)
    where[slots >= 0, slots[slots >= 0].long()] = 1
    sizes = some_sizes(14)
    got = ops.unmerge(merged.requires_grad_(), slots, backend)
    torch.testing.assert_close(got, where @ merged)
    images = Images(torch.tensor([0, 4, 8], dtype=torch.int32, device=DEVICE), 4, True)
    after = ops.merge(Packed(x.requires_grad_(), sizes, Images.of(2, 7, DEVICE)), Assignment(slots, 8, images), backend)
    number = sizes @ where
    mean = (where * sizes[:, None] / number.clamp(min=1)).T
    assert after.images is images and torch.equal(after.sizes, number)
    torch.testing.assert_close(after.x, mean @ x, rtol=1e-6, atol=1e-6)
    weights = torch.randn(14, C, device=DEVICE), torch.randn(8, C, device=DEVICE)
    grads = torch.autograd.grad((got * weights[0]).sum() + (after.x * weights[1]).sum(), (merged, x))
    torch.testing.assert_close(grads[0], where.T @ weights[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[1], mean.T @ weights[1], rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("images", [Images.of(0, 9, DEVICE), images_of()], ids=["equal", "differ"])
def test_no_image(images, backend):
    keys, x = torch.zeros(H, 0, d, device=DEVICE), torch.zeros(0, C, device=DEVICE)
    pairs = ops.match(keys, None, images, P, False, 0.5, backend)
    assert pairs.similarity.shape == pairs.partner.shape == pairs.counts.shape == (0,)
    assignment = ops.assign(pairs, pairs.counts, images, P, 0, False, backend)
    merged = ops.merge(Packed(x, None, images), assignment, backend)
    assert merged.x.shape == ops.unmerge(merged.x, assignment.slots, backend).shape == x.shape
    assert merged.images.cu_seqlens.tolist() == [0]
    assert ops.attention(keys, keys, keys, None, images, backend=backend).shape == keys.shape


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_as_the_reference(dtype, by_size):
    """Matching and assigning in short and long images, with keys that are equal or zero."""
    images, T = images_of(17, 1, 577, 2, 33), 630
    keys, sizes = torch.randn(H, T, d, device=DEVICE).to(dtype), some_sizes(T)
    keys[:, 2::5] = keys[:, : len(range(2, T, 5))]
    keys[:, 3::11] = 0
    pairs = ops.match(keys, sizes, images, P, by_size, 0.5, "triton")
    want, _ = reference.match(keys, sizes, P, by_size, images)
    torch.testing.assert_close(pairs.similarity, want, rtol=0, atol=2e-6)
    assert torch.equal(pairs.counts, reference.count(pairs.similarity, 0.5, images))
    T = 630 - int(pairs.counts.sum())
    assert T < 630
    got, want = (ops.assign(pairs, pairs.counts, images, P, T, False, backend) for backend in ("triton", "reference"))
    assert torch.equal(got.slots, want.slots) and torch.equal(got.images.cu_seqlens, want.images.cu_seqlens)
    tokens, spans = reference.lists(want.slots, T)
    assert torch.equal(got.order, tokens) and torch.equal(got.spans, spans)
