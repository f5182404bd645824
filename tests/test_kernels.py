"""The Triton kernels against the reference; on a machine without a GPU by Triton's interpreter.

Indices are compared up to ties: a partner is right if its cosine is the largest within rounding.
"""

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from atm_triton import reference
from atm_triton.kernels import assign as assign_kernels
from atm_triton.kernels import match as match_kernels
from atm_triton.kernels.assign import assign
from atm_triton.kernels.attention import attention
from atm_triton.kernels.match import match
from atm_triton.kernels.merge import merge
from atm_triton.kernels.unmerge import unmerge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COSINE = 2e-6  # the similarities are float32's
VALUE = {torch.float32: 2e-6, torch.float16: 2e-3}  # relative to 1

SHAPES = [  # B, H, N, d, P
    (2, 3, 17, 32, 1),
    (2, 2, 63, 60, 2),
    (1, 2, 197, 64, 1),
    (1, 1, 197, 128, 1),
    (3, 2, 1, 32, 0),
    (2, 1, 2, 48, 0),
    (2, 2, 3, 72, 1),
    (1, 2, 5, 80, 5),
    (1, 2, 33, 96, 1),
    (1, 1, 300, 32, 10),  # more than a program takes
    (1, 1, 577, 64, 1),
]
shapes = pytest.mark.parametrize(("B", "H", "N", "d", "P"), SHAPES, ids=lambda value: str(value))
groupings = pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
dtypes = pytest.mark.parametrize("dtype", VALUE, ids=["float32", "float16"])
pytestmark = pytest.mark.usefixtures("poison")


def qkv(B, H, N, d, dtype=torch.float32):
    """q, k and v as a block has them: views of one product."""
    return torch.randn(B, N, 3, H, d, device=DEVICE).to(dtype).permute(2, 0, 3, 1, 4)


def some_sizes(B, N):
    return torch.randint(1, 4, (B, N), device=DEVICE).float()


def expected(keys, sizes, P, by_size):
    B, _, N, _ = keys.shape
    groups = reference.group_by_size(sizes, P) if by_size else reference.group_alternate(B, N, P, keys.device)
    return reference.match(keys, *groups)


def cosine_with(keys, partner):
    """The cosine of every token with its partner, in float64; rows without a partner are nonsense."""
    k = torch.nn.functional.normalize(keys.double().mean(1), dim=2)
    return (k * torch.take_along_dim(k, partner.clamp(min=0).long().unsqueeze(2), 1)).sum(2)


@groupings
@dtypes
@shapes
def test_match(B, H, N, d, P, dtype, by_size):
    keys, sizes = qkv(B, H, N, d, dtype)[1], some_sizes(B, N)
    want, want_partner = expected(keys, sizes, P, by_size)
    similarity, partner, counts = match(keys, sizes, P, by_size, 0.1)
    assert similarity.dtype == torch.float32 and partner.dtype == torch.int32
    assert torch.equal(partner >= 0, want_partner >= 0)
    in_a = partner >= 0
    assert torch.equal(similarity.isneginf(), ~in_a)
    torch.testing.assert_close(similarity[in_a], want[in_a], rtol=0, atol=COSINE)
    torch.testing.assert_close(cosine_with(keys, partner)[in_a].float(), want[in_a], rtol=0, atol=COSINE)
    assert torch.equal(counts, reference.count(similarity, 0.1))


def test_match_takes_the_first_of_equal_partners_and_refuses_bad_keys():
    keys = torch.ones(1, 1, 9, 32, device=DEVICE)
    assert match(keys, None, 1, False, 0.5)[1].tolist() == [[-1, -1, 1, -1, 1, -1, 1, -1, 1]]
    sizes = torch.tensor([[1.0, 5, 1, 4, 1, 6, 1, 7, 1]], device=DEVICE)
    assert match(keys, sizes, 1, True, 0.5)[1].tolist() == [[-1, -1, 1, -1, 1, -1, 1, -1, 1]]


@pytest.mark.parametrize("d", [32, 72], ids=["one launch", "two launches"])
def test_keys_without_direction_are_similar_to_nothing(d):
    for bad in (0.0, torch.nan, torch.inf):
        keys = torch.ones(1, 2, 9, d, device=DEVICE)
        keys[0, 1, 1] = keys[0, :, 4] = bad
        if bad == 0:
            keys[0, :, 1] = 0
        similarity, partner, counts = match(keys, None, 1, False, 0.5)
        assert partner.tolist() == [[-1, -1, 3, -1, 1, -1, 3, -1, 3]]
        assert similarity[0, 4] == reference.NOT_ALIKE and counts.tolist() == [3]
        by_size = match(keys, None, 1, True, 0.5)
        assert by_size[1].tolist() == [[-1, 5, 5, 5, 5, -1, -1, -1, -1]] and by_size[2].tolist() == [2]
        assert by_size[0].tolist()[0][1:5:3] == [reference.NOT_ALIKE] * 2


@pytest.mark.parametrize("apart", [80, 2**30 + 7], ids=["near", "far"])
def test_heads_may_lie_far_apart(apart):
    keys = torch.empty_strided((1, 3, 5, 16), (3 * apart, apart, 16, 1), dtype=torch.float16, device=DEVICE)
    keys.copy_(torch.randn(1, 3, 5, 16))  # memory that is not touched costs nothing
    near = keys.contiguous()
    assert torch.equal(match(keys, None, 0, False, 0.5)[0], match(near, None, 0, False, 0.5)[0])
    assert torch.equal(attention(keys, keys, keys, None, 0.25), attention(near, near, near, None, 0.25))


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
    """What is allocated for 16384 tokens is twice what it is for 8192; no kernel runs here."""
    kernel = type(match_kernels.unit_rows_kernel)
    monkeypatch.setattr(kernel, "__getitem__", lambda self, grid: lambda *arguments, **options: None)
    taken = []
    for N in (8192, 16384):
        keys = torch.zeros(1, N, 3, 2, d, device="meta").permute(2, 0, 3, 1, 4)[1]
        with Allocated() as allocated:
            match(keys, None, 1, False, 0.5)
        taken.append(allocated.bytes)
    assert taken[1] == pytest.approx(2 * taken[0], rel=1e-3)
    assert 0 < taken[1] < 16384 * (4 * d + 100)  # half of one similarity matrix would be 2^29 bytes


@groupings
def test_match_of_packed_images_is_that_of_each_alone(by_size):
    lengths = [17, 1, 33, 2, 260]
    keys, sizes = qkv(1, 2, sum(lengths), 32)[1], some_sizes(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    for longest in (max(lengths), 400):
        similarity, partner, counts = match(keys, sizes, 1, by_size, 0.1, cu_seqlens, longest)
        for image, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            alone = match(keys[:, :, start:end], sizes[:, start:end].contiguous(), 1, by_size, 0.1)
            torch.testing.assert_close(similarity[:, start:end], alone[0], rtol=0, atol=1e-6)
            assert torch.equal(partner[:, start:end], alone[1]) and counts[image] == alone[2][0]


def lists_of(assignment, slots):
    """The tokens of every slot, image by image."""
    B, N = assignment.shape
    return [[b * N + i for i in range(N) if assignment[b, i] == s] for b in range(B) for s in range(slots)]


def read(tokens, spans):
    return [tokens[begin:end].tolist() for begin, end in spans.tolist()]


@groupings
@shapes
def test_assign(B, H, N, d, P, by_size):
    keys = qkv(B, H, N, d)[1]
    keys[:, :, 2::3] = keys[:, :, : len(range(2, N, 3))]  # ties
    similarity, partner = expected(keys, some_sizes(B, N), P, by_size)
    for r in sorted({0, 1, 3, reference.largest_r(N, P)}):
        if r > (partner >= 0).sum(1).min():
            continue
        assignment, tokens, spans, _ = assign(similarity, partner, r, P)
        assert torch.equal(assignment, reference.assign(similarity, partner, r, P))
        assert read(tokens, spans) == lists_of(assignment, N - r)


@groupings
def test_assign_to_a_long_image(by_size, monkeypatch):
    monkeypatch.setattr(assign_kernels, "ONE_PROGRAM", 16)
    monkeypatch.setattr(assign_kernels, "JOINED", 16)
    monkeypatch.setattr(assign_kernels, "assign_long_table", lambda block: {"CHUNK": 16, "num_warps": 1})
    for N, P in ((17, 0), (50, 5)):
        keys = qkv(2, 1, N, 32)[1]
        keys[:, :, 2::3] = keys[:, :, : len(range(2, N, 3))]  # ties
        similarity, partner = expected(keys, some_sizes(2, N), P, by_size)
        for r in (1, reference.group_a_size(N, P, by_size)):
            assignment, tokens, spans, _ = assign(similarity, partner, r, P)
            assert torch.equal(assignment, reference.assign(similarity, partner, r, P))
            assert read(tokens, spans) == lists_of(assignment, N - r)


@pytest.mark.parametrize("one_program", [2048, 16], ids=["sorted", "ranked"])
def test_assign_each_image_its_own_count(one_program, monkeypatch):
    monkeypatch.setattr(assign_kernels, "ONE_PROGRAM", one_program)
    lengths, r = [17, 1, 33, 2, 50], [3, 0, 16, 1, 0]
    keys = qkv(1, 2, sum(lengths), 32)[1]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    similarity, partner, _ = match(keys, None, 1, False, 0.1, cu_seqlens, 50)
    counts = torch.tensor(r, device=DEVICE)
    assignment, tokens, spans, new_cu_seqlens = assign(similarity, partner, counts, 1, cu_seqlens, 50)
    assert new_cu_seqlens.diff().tolist() == [n - m for n, m in zip(lengths, r, strict=True)]
    for image, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        alone = reference.assign(similarity[:, start:end], partner[:, start:end], r[image], 1)
        assert torch.equal(assignment[:, start:end], alone)
        mine = spans[new_cu_seqlens[image] : new_cu_seqlens[image + 1]]
        want = [[start + i for i in slot] for slot in lists_of(alone, end - start - r[image])]
        assert read(tokens, mine) == want


def test_assign_from_a_dense_batch_to_packed_images(monkeypatch):
    keys = qkv(3, 2, 19, 32)[1]
    similarity, partner, _ = match(keys, None, 1, False, 0.1)
    r = torch.tensor([4, 0, 9], device=DEVICE)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", None)  # one launch, no fill
        assignment, tokens, spans, new_cu_seqlens = assign(similarity, partner, r, 1)
    assert torch.equal(assignment, reference.assign(similarity, partner, r, 1))
    assert new_cu_seqlens.tolist() == [0, 15, 34, 44]
    want = [slot for b in range(3) for slot in lists_of(assignment, 19)[19 * b : 19 * b + 19 - r[b]]]
    assert read(tokens, spans[:44]) == want


def test_lists_of_any_assignment():
    assignment = torch.tensor([[0, 2, -1, 2, 5], [3, -1, -1, 0, 3]], dtype=torch.int32, device=DEVICE)
    tokens, spans = assign_kernels.lists(assignment, 6)
    assert read(tokens, spans) == lists_of(assignment, 6)


@dtypes
@pytest.mark.parametrize("C", [32, 48, 384, 1280])
def test_merge(C, dtype):
    B, N, P, r = 2, 17, 1, 6
    keys, sizes = qkv(B, 2, N, 32)[1], some_sizes(B, N)
    similarity, partner = expected(keys, sizes, P, False)
    assignment, tokens, spans, _ = assign(similarity, partner, r, P)
    x = torch.randn(B, N, C, device=DEVICE).to(dtype)
    for n in (sizes, None):
        merged, _, merged_sizes, log2_sizes = merge(x.view(-1, C), n, tokens, spans)
        want, want_sizes = reference.merge(x, torch.ones_like(sizes) if n is None else n, assignment, N - r)
        torch.testing.assert_close(merged.view(B, -1, C), want, rtol=0, atol=VALUE[dtype])
        assert torch.equal(merged_sizes.view(B, -1), want_sizes)
        torch.testing.assert_close(log2_sizes, merged_sizes.log2())
        alone = spans.diff(dim=1).flatten() == 1
        assert torch.equal(merged[alone], x.view(-1, C)[tokens[spans[alone, 0]]])  # unchanged, to the bit


@pytest.mark.parametrize(
    ("N", "P"), [*itertools.product((1, 2, 3), (0, 1, 2, 5)), (17, 0), (17, 5), (63, 2), (197, 1), (577, 1)]
)
def test_merge_lists_and_unmerge(N, P):
    """Images of every size, from no merge to the largest, and with sizes or none."""
    B, C = (2, 6) if N < 63 else (1, 3)
    most = reference.largest_r(N, P)
    chosen = list(itertools.product(VALUE, sorted({0, min(1, most), most})))
    if N >= 63:  # the interpreter takes its time
        chosen = [(torch.float32, 0), (torch.float16, 1), (torch.float32, most)][-1 if N > 197 else -3 :]
    similarity, partner = expected(qkv(B, 1, N, 32)[1], None, P, False)
    for dtype, r in chosen:
        sizes = some_sizes(B, N) if dtype == torch.float32 else None
        assignment = reference.assign(similarity, partner, r, P)
        tokens, spans = assign_kernels.lists(assignment, N - r)
        for ours, want in zip((tokens, spans), reference.lists(assignment, N - r), strict=True):
            assert torch.equal(ours, want)
        x = torch.randn(B, N, C, device=DEVICE).to(dtype)
        merged, _, merged_sizes, _ = merge(x.view(-1, C), sizes, tokens, spans)
        want, want_sizes = reference.merge(x, sizes, assignment, N - r)
        torch.testing.assert_close(merged.view_as(want), want, rtol=VALUE[dtype], atol=VALUE[dtype])
        assert torch.equal(merged_sizes.view_as(want_sizes), want_sizes)
        assert torch.equal(unmerge(want, assignment), reference.unmerge(want, assignment))


@dtypes
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
def test_merge_between_residual_and_norm(dtype, scaled):
    B, N, C, r = 2, 17, 48, 6
    similarity, partner = expected(qkv(B, 2, N, 32)[1], None, 1, False)
    assignment, tokens, spans, _ = assign(similarity, partner, r, 1)
    x, attended = (torch.randn(B, N, C, device=DEVICE).to(dtype) for _ in range(2))
    sizes = some_sizes(B, N)
    gamma, weight, bias = (torch.randn(C, device=DEVICE).to(dtype) for _ in range(3))
    gamma = gamma if scaled else None
    merged, normed, _, _ = merge(x.view(-1, C), sizes, tokens, spans, attended.view(-1, C), gamma, (weight, bias, 1e-6))
    summed = x.float() + attended.float() * (1 if gamma is None else gamma.float())
    want, _ = reference.merge(summed, sizes, assignment, N - r)
    torch.testing.assert_close(merged.view(B, -1, C), want.to(dtype), rtol=VALUE[dtype], atol=VALUE[dtype])
    want = torch.nn.functional.layer_norm(merged.float(), (C,), weight.float(), bias.float(), 1e-6).to(dtype)
    torch.testing.assert_close(normed, want, rtol=2 * VALUE[dtype], atol=2 * VALUE[dtype])


@dtypes
@pytest.mark.parametrize("sized", [False, True], ids=["plain", "log-size"])
@shapes
def test_attention(B, H, N, d, P, dtype, sized):
    q, k, v = qkv(B, H, N, d, dtype)
    sizes = some_sizes(B, N) if sized else None
    log2_sizes = sizes.log2() if sized else None
    for Nq in {N, 1}:
        got = attention(q[:, :, :Nq], k, v, log2_sizes, d**-0.5)
        want = reference.attention(q[:, :, :Nq].float(), k.float(), v.float(), sizes)
        torch.testing.assert_close(got.float(), want, rtol=VALUE[dtype], atol=VALUE[dtype])
        assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("lengths", "H", "d"), [([17, 1, 70, 33], 2, 60), ([577, 1, 197], 1, 32)], ids=str)
def test_attention_of_packed_images_is_that_of_each_alone(lengths, H, d):
    q, k, v = qkv(1, H, sum(lengths), d)
    sizes = some_sizes(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    got = attention(q, k, v, sizes.log2(), 0.1, cu_seqlens, max(lengths))
    for start, end in itertools.pairwise(cu_seqlens):
        part = (slice(None), slice(None), slice(start, end))
        want = reference.attention(q[part], k[part], v[part], sizes[:, start:end], scale=0.1)
        torch.testing.assert_close(got[part], want, rtol=2e-6, atol=2e-6)


def test_no_packed_image_launches_nothing():
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    keys = qkv(1, 2, 0, 32)[1]
    similarity, partner, counts = match(keys, None, 1, False, 0.5, cu_seqlens, 0)
    assignment, _, spans, new_cu_seqlens = assign(similarity, partner, counts, 1, cu_seqlens, 0)
    assert counts.shape == (0,) and assignment.shape == (1, 0) and new_cu_seqlens.tolist() == [0]
    assert spans.shape == (0, 2) and attention(keys, keys, keys, None, 1.0, cu_seqlens, 0).shape == keys.shape


def test_an_empty_batch_launches_nothing():
    keys = qkv(0, 2, 5, 32)[1]
    similarity, partner, counts = match(keys, None, 1, False, 0.5)
    assignment, tokens, spans, _ = assign(similarity, partner, 1, 1)
    assert counts.shape == (0,) and assignment.shape == (0, 5) and spans.shape == (0, 2)
    merged, *_ = merge(torch.empty(0, 16, device=DEVICE), None, tokens, spans)
    assert merged.shape == (0, 16)
    assert attention(keys, keys, keys, None, 1.0).shape == keys.shape


def test_what_no_kernel_can_take_is_refused():
    keys = qkv(1, 2, 5, 32)[1]
    with pytest.raises(ValueError, match="keys has stride 2 between channels; want 1"):
        match(keys[..., ::2], None, 1, False, 0.5)
    far = torch.empty(200 * 2**24, dtype=torch.float16, device="meta").as_strided((1, 2, 200, 32), (0, 32, 2**24, 1))
    with pytest.raises(ValueError, match="keys has stride 16777216 between tokens: 200 of them reach 2.31 elements"):
        match(far, None, 1, False, 0.5)
    with pytest.raises(ValueError, match="k has stride 16777216 between tokens: 200 of them reach"):
        attention(keys, far, far, None, 1.0)
    with pytest.raises(ValueError, match="num_prefix=17 is above 16"):
        match(keys, None, 17, False, 0.5)
    with pytest.raises(ValueError, match="v has stride 2 between channels"):
        attention(keys[..., :16], keys[..., :16], keys[..., ::2], None, 1.0)
    similarity, partner, _ = match(keys, None, 1, False, 0.5)
    with pytest.raises(ValueError, match="r=1 for packed images; want a tensor"):
        assign(similarity, partner, 1, 1, torch.tensor([0, 5], dtype=torch.int32, device=DEVICE), 5)
