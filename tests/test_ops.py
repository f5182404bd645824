"""The operations check their arguments, fail with one line, and say which backend computes."""

import pytest
import torch

from atm_triton import ops
from atm_triton.packed import Assignment, Images, Packed

IMAGES = Images.of(2, 7)
keys, x, sizes = torch.randn(3, 14, 4), torch.randn(14, 8), torch.ones(14)
slots, r = torch.zeros(14, dtype=torch.int32), torch.tensor([1, 1])
norm = torch.nn.LayerNorm(8)


def pairs(by_size=False, P=1, images=IMAGES):
    return ops.match(keys, sizes, images, P, by_size)


def assign(r=r, P=1, num_slots=12, **changes):
    return ops.assign(pairs()._replace(**changes), r, IMAGES, P, num_slots, True)


def merge(x=x, n=None, slots=slots, num_slots=3):
    return ops.merge(Packed(x, n, IMAGES), Assignment(slots, num_slots, IMAGES))


def fused(attended=x, n=None, gamma=None, norm=norm):
    assignment = Assignment(slots, 12, IMAGES, slots, torch.zeros(12, 2, dtype=torch.int32))
    return ops.add_merge_norm(Packed(x, n, IMAGES), attended, gamma, assignment, norm)


def attend(q=keys, k=keys, v=keys, n=sizes, log2_sizes=None):
    return ops.attention(q, k, v, n, IMAGES, log2_sizes=log2_sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.match(keys[0], None, IMAGES, 1, False), "keys has shape [14, 4]; want [H, T, d]"),
        (lambda: pairs(images=Images.of(2, 9)), "keys has 14 tokens, 2 images of 9 tokens have 18; want"),
        (lambda: ops.match(keys, sizes[1:], IMAGES, 1, False), "sizes has shape [13]; want [14], one for each token"),
        (lambda: ops.match(keys, sizes.to("meta"), IMAGES, 1, False), "sizes is on meta, the tokens on cpu; move one"),
        (lambda: ops.match(keys, None, IMAGES, -1, False), "num_prefix=-1 is below 0; want the number of protected to"),
        (lambda: ops.match(keys, None, IMAGES, 1, False, 1.5), "theta=1.5 is outside -1 .. 1"),
        (lambda: assign(similarity=pairs().similarity[1:]), "partner has shape [14]; want [T], as similarity"),
        (lambda: assign(partner=pairs().partner.to("meta")), "partner is on meta, similarity on cpu; move one of them"),
        (lambda: assign(torch.tensor([2, 4, 1])), "r has shape [3]; want [2], one for each image"),
        (lambda: assign(r.to("meta")), "r is on meta, similarity on cpu; move one of them"),
        (lambda: assign("mean"), 'r=\'mean\' is unknown; want "image", "batch", a number or a tensor'),
        (lambda: assign("image"), "r='image' asks for counts, and nothing was counted; give match a theta"),
        (lambda: assign(num_slots=-1), "num_slots=-1 is outside 0 .. 14, the rows that there are"),
        (lambda: assign(num_slots=15), "num_slots=15 is outside 0 .. 14"),
        (lambda: assign(P=-2), "num_prefix=-2 is below 0"),
        (lambda: merge(x[0]), "x has shape [8]; want [T, C]"),
        (lambda: merge(slots=slots[1:]), "slots has shape [13]; want [14], one for each token"),
        (lambda: merge(slots=slots.to("meta")), "slots is on meta, the tokens on cpu; move one of them"),
        (lambda: merge(n=sizes[1:]), "sizes has shape [13]; want [14], one for each token"),
        (lambda: merge(num_slots=-1), "num_slots=-1 is below 0; want the number of slots"),
        (lambda: fused(attended=x[1:]), "attended has shape [13, 8]; want the shape of x"),
        (lambda: fused(attended=x.to("meta")), "attended is on meta, the tokens on cpu; move one of them"),
        (lambda: fused(n=sizes[1:]), "sizes has shape [13]; want [14]"),
        (lambda: fused(gamma=torch.ones(4)), "gamma has shape [4]; want [8], one for each channel of x"),
        (lambda: fused(norm=torch.nn.LayerNorm(4)), "norm.weight has shape [4]; want [8]"),
        (
            lambda: fused(norm=torch.nn.LayerNorm(4, elementwise_affine=False)),
            "norm is over [4]; want [8], the channels of x",
        ),
        (
            lambda: ops.stem(x[None, :2, None], x.new_ones(8, 3, 1, 1), None, x),
            "images has shape [1, 2, 1, 8]; want [B, 3, H, W]",
        ),
        (lambda: ops.linear_gelu(x[None], x, None), "x has shape [1, 14, 8]; want [T, C]"),
        (lambda: ops.linear_gelu(x, x[:, 1:], None), "weight has shape [14, 7]; want [hidden, 8]"),
        (lambda: ops.linear_gelu(x, x, x[0]), "bias has shape [8]; want [14]"),
        (lambda: ops.linear_gelu(x, x.to("meta"), None), "weight is on meta, the tokens on cpu; move one of them"),
        (lambda: ops.add_norm(x, x[1:], None, norm), "attended has shape [13, 8]; want the shape of x"),
        (lambda: ops.unmerge(x[0], slots), "x has shape [8]; want [T, C]"),
        (lambda: ops.unmerge(x, slots.view(2, 7)), "slots has shape [2, 7]; want [2], one for each token"),
        (lambda: ops.unmerge(x, slots.to("meta")), "slots is on meta, the tokens on cpu; move one of them"),
        (lambda: attend(k=keys[0]), "k has shape [14, 4]; want [H, T, d]"),
        (lambda: attend(keys[0]), "q has shape [14, 4]; want [3, Tq, 4], to go with k"),
        (lambda: attend(keys[:2]), "q has shape [2, 14, 4]; want [3, Tq, 4]"),
        (lambda: attend(keys[..., :2]), "q has shape [3, 14, 2]; want [3, Tq, 4]"),
        (lambda: attend(keys.to("meta")), "k is on cpu, q on meta; move one of them"),
        (lambda: attend(v=keys[:1]), "v has shape [1, 14, 4]; want the shape of k"),
        (lambda: attend(n=sizes[1:]), "sizes has shape [13]; want [14]"),
        (lambda: attend(log2_sizes=sizes[1:]), "log2_sizes has shape [13]; want [14]"),
        (lambda: ops.explain("triton", "mps"), 'backend="triton" cannot run: there are no kernels for mps; move'),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.match(keys, sizes.double(), IMAGES, 1, False),
            "sizes has dtype torch.float64; want torch.float32",
        ),
        (
            lambda: assign(similarity=pairs().similarity.half()),
            "similarity has dtype torch.float16; want torch.float32",
        ),
        (lambda: assign(partner=pairs().partner.long()), "partner has dtype torch.int64; want torch.int32"),
        (lambda: assign(r.int()), "r has dtype torch.int32; want torch.int64: r.to(torch.int64)"),
        (lambda: merge(slots=slots.long()), "slots has dtype torch.int64; want torch.int32"),
        (lambda: merge(n=sizes.double()), "sizes has dtype torch.float64; want torch.float32"),
        (lambda: ops.unmerge(x, slots.long()), "slots has dtype torch.int64; want torch.int32"),
        (lambda: attend(keys.half()), "k has dtype torch.float32; want torch.float16: k.to(torch.float16)"),
        (lambda: attend(v=keys.half()), "v has dtype torch.float16; want torch.float32"),
        (lambda: attend(log2_sizes=sizes.double()), "log2_sizes has dtype torch.float64; want torch.float32"),
    ],
)
def test_bad_dtypes(call, message):
    with pytest.raises(TypeError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("by_size", "P", "most"), [(False, 0, 4), (False, 1, 3), (True, 0, 3), (True, 1, 3)])
def test_the_largest_r_takes_every_token_of_a(by_size, P, most):
    matched = pairs(by_size, P)
    assert (matched.partner.view(2, 7) >= 0).sum(1).tolist() == [most] * 2
    assignment = ops.assign(matched, torch.tensor([most] * 2), IMAGES, P, 14 - 2 * most, True)
    merged = ops.merge(Packed(x, None, IMAGES), assignment)
    assert merged.images.equal and merged.images.N == 7 - most and merged.x.shape == (14 - 2 * most, 8)
    assert merged.x.isfinite().all() and merged.sizes.sum() == 14


def test_images_of_different_lengths_keep_their_n():
    """A kernel's configuration depends on N, which other images of the batch must not change."""
    differ = Images.of_lengths(torch.tensor([9, 5]))
    for images, r, one_r, left in ((IMAGES, [1, 3], False, [6, 4]), (differ, [2, 2], True, [7, 3])):
        assignment = ops.assign(pairs(images=images), torch.tensor(r), images, 1, 10, one_r)
        assert not assignment.images.equal and assignment.images.N == images.N
        assert assignment.images.lengths.tolist() == left


def test_explain():
    assert ops.explain("reference", "cuda") == ("reference", "asked for")
    assert ops.explain("auto", "cpu")[0] == "reference"
