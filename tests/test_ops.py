"""The operations check what they are given, in one line, and say which backend computes."""

import pytest
import torch

from atm_triton import ops

keys, x, sizes = torch.randn(2, 3, 7, 4), torch.randn(2, 7, 8), torch.ones(2, 7)
assignment = torch.zeros(2, 7, dtype=torch.int32)


PACKED = ops.Packing.of(torch.tensor([3, 4]))

ONE = ops.Packing.of(torch.tensor([7]))

norm = torch.nn.LayerNorm(8)


def found(by_size=False, P=1):
    return ops.match(keys, sizes, P, by_size)


def single():
    return ops.match(keys[:, :, :1], None, 0, False)


def attend(q, log2_sizes=None):
    return ops.attention(q, keys, keys, sizes, log2_sizes=log2_sizes)


def fused(lists=None, n=None, gamma=None, norm=norm, M=6):
    lists = ops.Lists(assignment.flatten(), torch.zeros(12, 2, dtype=torch.int32)) if lists is None else lists
    return ops.add_merge_norm(x, x, gamma, n, assignment, lists, M, norm)


def assigned(counts, **options):
    return ops.assign_each(*found()[:2], 0.5, ops.CountRead(torch.tensor(counts)), 1, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.match(keys[0], None, 1, False), "keys has shape [3, 7, 4]; want [B, H, N, d]"),
        (lambda: ops.assign(found().similarity[:1], found().partner, 1, 1, False), "partner has shape [2, 7]; want"),
        (
            lambda: ops.assign(*found()[:2], -1, 1, False),
            "r=-1 is outside 0 .. 3, the tokens in A: 7 tokens",
        ),
        (lambda: ops.assign(*found()[:2], 4, 1, False), "r=4 is outside 0 .. 3"),
        (lambda: ops.assign(*found(P=0)[:2], 5, 0, False), "r=5 is outside 0 .. 4"),
        (lambda: ops.assign(*found(True, 0)[:2], 4, 0, True), "r=4 is outside 0 .. 3"),
        (lambda: ops.assign(*single()[:2], 1, 0, False), "r=1 is outside 0 .. 0, the tokens in A: 1 tokens"),
        (lambda: ops.match(keys, None, -1, False), "num_prefix=-1 is below 0; want the number of protected tokens"),
        (lambda: ops.assign(*found()[:2], 1, -1, False), "num_prefix=-1 is below 0"),
        (lambda: ops.assign_each(*found()[:2], 0.5, ops.CountRead(torch.tensor([1, 2])), -2), "num_prefix=-2 is below"),
        (lambda: ops.assign(found().similarity, found().partner.to("meta"), 1, 1, False), "partner is on meta, simi"),
        (lambda: ops.merge(x, None, assignment, -1), "M=-1 is below 0; want the number of slots of an image"),
        (lambda: ops.merge(x, None, assignment, ONE), "M is of 1 images, the tokens of 2; want the same number"),
        (lambda: fused(M=5), "lists.spans has shape [12, 2]; want [10, 2]: M=5 of each image"),
        (lambda: fused(n=sizes[:1]), "sizes has shape [1, 7]; want [2, 7]"),
        (lambda: fused(gamma=torch.ones(4)), "gamma has shape [4]; want [8], one for each channel of x"),
        (lambda: fused(norm=torch.nn.LayerNorm(4)), "norm.weight has shape [4]; want [8]"),
        (
            lambda: fused(norm=torch.nn.LayerNorm(4, elementwise_affine=False)),
            "norm is over [4]; want [8], the channels of x",
        ),
        (lambda: ops.unmerge(x[0], assignment, x_packing=PACKED, packing=ONE), "assignment has shape [2, 7]; want [7]"),
        (lambda: ops.unmerge(x, assignment[0], packing=ONE), "x is of 2 images, the tokens of 1; want the same number"),
        (lambda: attend(keys[:1]), "q has shape [1, 3, 7, 4]; want [2, 3, Nq, 4], to go with k"),
        (lambda: attend(keys[:, :2]), "q has shape [2, 2, 7, 4]; want [2, 3, Nq, 4]"),
        (lambda: attend(keys[..., :2]), "q has shape [2, 3, 7, 2]; want [2, 3, Nq, 4]"),
        (lambda: attend(keys.to("meta")), "k is on cpu, q on meta; move one of them"),
        (lambda: attend(keys, log2_sizes=sizes[:1]), "log2_sizes has shape [1, 7]; want [2, 7]"),
        (
            lambda: ops.attention(keys[0, :2], keys[0], keys[0], None, packing=PACKED),
            "q has shape [2, 7, 4]; want the shape of k",
        ),
        (
            lambda: ops.attention(keys[:1, :, :1], keys[0], keys[0], None, packing=PACKED),
            "q has shape [1, 3, 1, 4]; want [2, 3, Nq, 4]",
        ),
        (lambda: ops.merge(x[0], None, assignment, 3), "x has shape [7, 8]; want [B, N, C]"),
        (lambda: ops.merge(x, None, assignment[:1], 3), "assignment has shape [1, 7]; want [2, 7], one for each token"),
        (lambda: ops.merge(x, sizes[:, 1:], assignment, 3), "sizes has shape [2, 6]; want [2, 7], one for each token"),
        (lambda: ops.unmerge(x[0], assignment), "x has shape [7, 8]; want [B, M, C]"),
        (lambda: ops.unmerge(x, assignment[0]), "assignment has shape [7]; want [2, 7], one for each token"),
        (lambda: ops.attention(keys, keys, keys[:1], None), "v has shape [1, 3, 7, 4]; want the shape of k"),
        (lambda: ops.match(keys, None, 1, False, packing=PACKED), "keys has shape [2, 3, 7, 4]; want [H, T, d]"),
        (lambda: ops.match(keys[0], sizes, 1, False, packing=PACKED), "sizes has shape [2, 7]; want [7]"),
        (lambda: assigned([2, 4, 1]), "counts has shape [3]; want [B]"),
        (lambda: assigned([1, 2], packing=PACKED), "partner has shape [2, 7]; want [T]"),
        (lambda: ops.merge(x, None, assignment, 3, packing=PACKED), "x has shape [2, 7, 8]; want [T, C]"),
        (lambda: ops.unmerge(x[0], assignment, x_packing=ONE), "assignment has shape [2, 7]; want [1, 7]"),
        (lambda: ops.attention(keys, keys, keys, None, packing=PACKED), "k has shape [2, 3, 7, 4]; want [H, T, d]"),
        (lambda: ops.match(keys, None, 1, False, 1.5), "theta=1.5 is outside -1 .. 1"),
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
        (lambda: ops.assign(found().similarity.half(), found().partner, 1, 1, False), "similarity has dtype torch.flo"),
        (lambda: ops.assign(found().similarity, found().partner.long(), 1, 1, False), "partner has dtype torch.int64"),
        (lambda: attend(keys.half()), "k has dtype torch.float32; want torch.float16: k.to(torch.float16)"),
        (lambda: ops.attention(keys, keys, keys.half(), sizes), "v has dtype torch.float16; want torch.float32"),
        (lambda: attend(keys, log2_sizes=sizes.double()), "log2_sizes has dtype torch.float64; want torch.float32"),
    ],
)
def test_bad_dtypes(call, message):
    with pytest.raises(TypeError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("by_size", "P", "most"), [(False, 0, 4), (False, 1, 3), (True, 0, 3), (True, 1, 3)])
def test_the_largest_r_takes_every_token_of_a(by_size, P, most):
    matched = found(by_size, P)
    assert (matched.partner >= 0).sum(1).tolist() == [most] * 2
    assignment, _ = ops.assign(*matched[:2], most, P, by_size)
    assert ops.merge(x, None, assignment, 7 - most).x.isfinite().all()


def test_explain():
    assert ops.explain("reference", "cuda") == ("reference", "asked for")
    assert ops.explain("auto", "cpu")[0] == "reference"
