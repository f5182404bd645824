"""The operations check what they are given, in one line, and say which backend computes."""

import pytest
import torch

from atm_triton import ops

keys, x, sizes = torch.randn(2, 3, 7, 4), torch.randn(2, 7, 8), torch.ones(2, 7)
assignment = torch.zeros(2, 7, dtype=torch.int32)


PACKED = ops.Packing.of(torch.tensor([3, 4]))

ONE = ops.Packing.of(torch.tensor([7]))


def found(by_size=False, P=1):
    return ops.match(keys, sizes, P, by_size)


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


@pytest.mark.parametrize(("by_size", "P", "most"), [(False, 0, 4), (False, 1, 3), (True, 0, 3), (True, 1, 3)])
def test_the_largest_r_takes_every_token_of_a(by_size, P, most):
    matched = found(by_size, P)
    assert (matched.partner >= 0).sum(1).tolist() == [most] * 2
    assignment, _ = ops.assign(*matched[:2], most, P, by_size)
    assert ops.merge(x, None, assignment, 7 - most).x.isfinite().all()


def test_explain():
    assert ops.explain("reference", "cuda") == ("reference", "asked for")
    assert ops.explain("auto", "cpu")[0] == "reference"
