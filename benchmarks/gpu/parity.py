"""Parity: run the tests of the kernels, then check every operation at real sizes against the reference in float64.

Matches are compared up to ties, assignments and unmerged tokens exactly, other values within rounding. An image in a
batch, whatever the lengths of the other images, must get the same bits as alone.
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atm_triton import ops, reference
from atm_triton.packed import Assignment, Images, Packed
from atm_triton.reference import of_tokens
from benchmarks.gpu import StageError
from benchmarks.gpu.setting import Setting, qkv, short, some_sizes

ROOT = Path(__file__).parents[2]
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROUNDING = {FLOAT: 0.0, HALF: 1.01 * 2**-11, BF16: 1.01 * 2**-8}  # one rounding to the dtype, relative
ARITHMETIC = 2e-6  # float32 arithmetic, relative to the sum of the magnitudes that are added
SMALLEST = {FLOAT: 1e-7, HALF: 1e-5, BF16: 1e-7}  # absolute; float16 has no exponents for the smallest probabilities
GELU = 2e-6  # absolute distance of the kernel's GELU from the exact one
GRADIENTS = 1e-5  # of the largest gradient, in addition to rounding
BEST, OWN = 1e-6, 2e-6  # distance of a similarity from the largest cosine, and from the cosine with the partner

TESTS = tuple(
    f"tests/test_{name}.py" for name in ("engine", "gelu", "kernels", "triton", "packed", "image", "reference")
)
PROCESSES = 12  # the tests spend most of their time compiling
TESTS_SECONDS = 300
LOG = "tests.log"


@dataclass(frozen=True)
class Case:
    """B images of N tokens (the first protected), H heads of d channels; ``differ``: images have 1 to N tokens."""

    B: int
    N: int
    H: int
    d: int
    dtype: torch.dtype
    by_size: bool
    differ: bool = False

    def __str__(self) -> str:
        grouping, up_to = "by size" if self.by_size else "alternate", "up to " * self.differ
        return f"B={self.B} N={up_to}{self.N} H={self.H} d={self.d} {short(self.dtype)} {grouping}"

    def images(self, device: torch.device) -> Images:
        if not self.differ:
            return Images.of(self.B, self.N, device)
        lengths = torch.randint(2, self.N + 1, (self.B,))
        lengths[:2] = torch.tensor([self.N, 1])
        return Images.of_lengths(lengths.to(device))


CASES = (
    Case(8, 197, 6, 64, FLOAT, False),
    Case(1, 1370, 16, 64, FLOAT, True),
    Case(64, 577, 3, 64, FLOAT, True),
    Case(8, 197, 8, 80, FLOAT, False),
    Case(256, 197, 12, 64, HALF, True),
    Case(64, 197, 3, 64, HALF, False),
    Case(1, 577, 16, 64, HALF, False),
    Case(8, 1370, 6, 64, HALF, True),
    Case(8, 2309, 6, 64, HALF, False),  # too long for one program to sort
    Case(8, 577, 3, 32, HALF, True),
    Case(256, 197, 6, 64, BF16, False),
    Case(64, 577, 12, 64, BF16, False),
    Case(8, 197, 16, 64, BF16, True),
    Case(1, 197, 3, 64, BF16, False),
    Case(8, 1370, 6, 64, BF16, True),
    Case(8, 197, 4, 60, BF16, True),
    *(
        Case(64, N, 6, 64, dtype, by_size, differ=True)
        for dtype, N, by_size in product((BF16, HALF, FLOAT), (197, 577), (False, True))
    ),
    Case(4, 2309, 3, 64, HALF, True, differ=True),
)
TINY = (
    Case(2, 33, 2, 32, FLOAT, False),
    Case(1, 40, 2, 20, HALF, True),
    Case(1, 33, 2, 72, FLOAT, True),
    Case(3, 20, 2, 16, FLOAT, False, differ=True),
    Case(3, 20, 2, 16, FLOAT, True, differ=True),
)


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    tests = None if setting.tiny else start_tests(setting.out, TESTS)
    section["tolerances"] = {
        "rounding": {short(dtype): value for dtype, value in ROUNDING.items()},
        "arithmetic": ARITHMETIC,
        "smallest": {short(dtype): value for dtype, value in SMALLEST.items()},
        "similarity": BEST,
        "partner": OWN,
    }
    rows = section["rows"] = []
    try:
        for case in setting.pick(CASES, TINY):
            rows.append({"case": str(case), "of_tolerance": check_case(case, setting.device)})
        rows.append({"case": "stem", "of_tolerance": {"stem": check_stem(setting)}})
        rows.append({"case": "linear_gelu", "of_tolerance": {"linear_gelu": check_linear_gelu(setting)}})
        rows.append({"case": "large", "of_tolerance": {"merge": check_large(setting)}})
        section["tests"] = end_tests(tests) if tests else []
    finally:
        if tests:
            tests.kill()


def start_tests(out: Path, files: Iterable[str], processes: int = PROCESSES) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(processes), *files]
    with (out / LOG).open("w") as log:
        tests = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
    tests.log = out / LOG
    return tests


def end_tests(tests: subprocess.Popen) -> list[str]:
    """Wait for the tests and return their files and last line. Raises StageError unless all passed."""
    code = tests.wait(timeout=TESTS_SECONDS)
    lines = tests.log.read_text().strip().splitlines() or ["the tests said nothing"]
    if code != 0:
        wrong = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
        raise StageError(f"{lines[-1]}; {wrong} (see {LOG})")
    return [*TESTS, lines[-1]]


@torch.inference_mode()
def check_case(case: Case, device: torch.device) -> dict[str, float]:
    """Check all operations of a case. Returns the share of its tolerance that each uses; above 1 raises
    :class:`StageError`."""
    images, (H, d) = case.images(device), (case.H, case.d)
    T, B = int(images.cu_seqlens[-1]), images.B
    q, k, v = qkv(T, H, d, case.dtype, device)
    sizes, shares = some_sizes(T, device, most=200), defaultdict(list)
    with naming(f"match {case}"):
        share, pairs = check_match(k, sizes, images, case.by_size)
        shares["match"].append(share)
    x, attended = (torch.randn(T, H * d, dtype=case.dtype, device=device) for _ in range(2))
    tokens = Packed(x=x, sizes=sizes, images=images)
    same_r = torch.full((B,), (case.N - 1) // 4, device=device)
    one_each = [] if case.differ else [("batch", True), ((case.N - 1) // 4, True), (same_r, True)]
    for r, one_r in (("image", False), (pairs.counts, False), *one_each):
        with naming(f"assign {case}"):
            if isinstance(r, Tensor):  # counts belong to the unrounded similarities
                ties = pairs._replace(similarity=pairs.similarity.mul(50).round().div(50))
                check_assign(ties, r, images, one_r)
            assignment = check_assign(pairs, r, images, one_r)
        with naming(f"merge {case}"):
            share, merged = check_merge(tokens, assignment)
            shares["merge"].append(share)
        with naming(f"add_merge_norm {case}"):
            shares["add_merge_norm"].append(check_norms(tokens, attended, assignment))
        with naming(f"unmerge {case}"), poisoned():
            back = ops.unmerge(merged.x, assignment.slots, "triton")
            same(back, reference.unmerge(merged.x, assignment.slots), "values")
    for name, n in (("attention", None), ("attention of 1", 1)):
        with naming(f"{name} {case}"):
            shares[name].append(check_attention(q, k, v, sizes, images, n))
    with naming(f"gradients of attention {case}"):
        shares["gradients of attention"].append(check_gradients(q, k, v, sizes, images))
    return {name: max(of) for name, of in shares.items()}


def check_gradients(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, images: Images) -> float:
    """Check the gradients of attention, relative to the largest of each, since a gradient is a sum whose terms
    cancel."""
    with torch.inference_mode(False), torch.enable_grad():  # the caller is in inference mode
        grad, sizes, images = torch.randn_like(q), sizes.clone(), images._replace(cu_seqlens=images.cu_seqlens.clone())
        ours, exact = ([x.clone().to(of).requires_grad_() for x in (q, k, v)] for of in (q.dtype, torch.float64))
        with poisoned():
            ops.attention(*ours, sizes, images, backend="triton").backward(grad)
        reference.attention(*exact, sizes, images, fused=False).backward(grad.double())
    share = 4 * ROUNDING[q.dtype] + GRADIENTS
    return max(
        within(one.grad, other.grad, share * other.grad.abs().max(), f"gradients of {name}")
        for name, one, other in zip("qkv", ours, exact, strict=True)
    )


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Prefix the message of a StageError with what was checked."""
    try:
        yield
    except StageError as failure:
        raise StageError(f"{what}: {failure}") from None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, or with an index out of range, so that values a kernel leaves unwritten are noticed."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(2**30)

        return made

    with (
        patch.object(torch, "empty", filling(torch.empty)),
        patch.object(torch, "empty_like", filling(torch.empty_like)),
    ):
        yield


def same(got: Tensor, want: Tensor, name: str, of: str = "of the reference") -> None:
    if not torch.equal(got, want):
        differ = (got != want).sum().item() if got.shape == want.shape else f"shape {list(got.shape)},"
        raise StageError(f"{name} are not those {of}: {differ} differ of {want.numel()}")


def within(got: Tensor, want: Tensor, allowed: Tensor | float, name: str) -> float:
    """The largest distance of ``got`` from ``want`` as a share of ``allowed``. Above 1, or NaN, raises StageError."""
    if want.numel() == 0:
        return 0.0
    distance = (got.to(want.dtype) - want).abs()
    share = (distance / allowed).max().item()
    if not share <= 1:
        raise StageError(
            f"{name} are {share:.3g} times the tolerance from the reference, by {distance.max().item():.3g}"
        )
    return share


def limit(want: Tensor, magnitude: Tensor, dtype: torch.dtype, steps: float = 1) -> Tensor:
    """The tolerance for rounding the result to ``dtype`` and for float32 sums of terms of this ``magnitude`` (with
    ``steps`` > 1 also for terms that are rounded to ``dtype``)."""
    rounded = ROUNDING[dtype] * (want.abs() + (steps - 1) * magnitude)
    return rounded + ARITHMETIC * magnitude + SMALLEST[dtype]


def each_alone(images: Images) -> Iterator[tuple[slice, Images]]:
    """Yield the rows of each image, and the image as a batch of one."""
    start = 0
    for length in images.lengths.tolist():
        yield slice(start, start + length), images._replace(cu_seqlens=images.cu_seqlens.new_tensor([0, length]))
        start += length


def check_match(keys: Tensor, sizes: Tensor, images: Images, by_size: bool) -> tuple[float, ops.Match]:
    best, want_partner = reference.match(keys.double(), sizes, 1, by_size, images)
    in_a = want_partner >= 0
    theta = round(best[in_a].median().item(), 3)
    with poisoned():
        pairs = ops.match(keys, sizes, images, 1, by_size, theta, "triton")
    same(pairs.partner >= 0, in_a, "tokens with a partner")
    same(pairs.similarity.isneginf(), ~in_a, "tokens without a similarity")
    share = within(pairs.similarity[in_a], best[in_a], BEST, "similarities")
    first, length = (of_tokens(of, images, len(in_a)) for of in (images.cu_seqlens[:-1], images.lengths))
    in_image = pairs.partner < length
    same(in_image[in_a], in_a[in_a], "partners in the image")
    position = torch.arange(len(in_a), device=keys.device) - first
    partner = first + pairs.partner.clamp(min=0)
    same(((position > 0) & ~in_a)[partner[in_a]], in_a[in_a], "partners in B")
    unit = F.normalize(keys.double().mean(0), dim=1)
    share = max(share, within((unit[in_a] * unit[partner[in_a]]).sum(1), best[in_a], OWN, "cosines with the partners"))
    same(pairs.counts, reference.count(pairs.similarity, theta, images), "counts")
    for rows, alone in each_alone(images):
        own = ops.match(keys[:, rows], sizes[rows], alone, 1, by_size, theta, "triton")
        same(pairs.similarity[rows], own.similarity, "similarities of an image among others", "it has alone")
        same(pairs.partner[rows], own.partner, "partners of an image among others", "it has alone")
    return share, pairs


def check_stem(setting: Setting) -> float:
    """Check the stem in every dtype, with and without patches aligned to 16 bytes; returns the largest share of the
    tolerance."""
    shares = []
    dtypes = setting.pick((BF16, HALF, FLOAT), (HALF, FLOAT))  # the interpreter cannot multiply bfloat16
    for dtype, p in product(dtypes, setting.pick((16, 14), (4, 3))):
        C, (B, side) = setting.pick(384, 40), setting.pick((64, 14 * p), (2, 2 * p))
        images, weight = torch.randn(B, 3, side, side), torch.randn(C, 3, p, p) / p
        tensors = images, weight, torch.randn(C), torch.randn(1 + (side // p) ** 2, C)
        images, weight, bias, position = (x.to(setting.device, dtype) for x in tensors)
        with naming(f"stem {short(dtype)}, patches of {p}"), poisoned():
            out = ops.stem(images, weight, bias, position)
            same(out[:, 0], position[:1].expand(B, -1), "prefix tokens")
        cut = F.unfold(images.double(), p, stride=p).transpose(1, 2)
        embedded = cut @ weight.double().flatten(1).t() + bias.double()
        magnitude = cut.abs() @ weight.double().abs().flatten(1).t() + bias.double().abs() + position[1:].double().abs()
        want = embedded + position[1:].double()
        allowed = limit(want, magnitude, dtype) + ROUNDING[dtype] * embedded.abs()  # a convolution rounds too
        shares.append(within(out[:, 1:], want, allowed, "tokens"))
    return max(shares)


def check_linear_gelu(setting: Setting) -> float:
    """Check linear_gelu with as many rows as a batch of 256 has and with an odd number; returns the largest share of
    the tolerance."""
    shares = []
    for M, K, N in setting.pick(((50432, 384, 1536), (33001, 768, 3072)), ((300, 64, 512),)):
        for dtype in setting.pick((BF16, HALF), (HALF,)):
            tensors = torch.randn(M, K), 2 * torch.randn(N, K) / K**0.5, torch.randn(N)
            x, weight, bias = (tensor.to(setting.device, dtype) for tensor in tensors)
            with naming(f"linear_gelu {M} rows, {K} to {N}, {short(dtype)}"), poisoned():
                out = ops.linear_gelu(x, weight, bias)
            x, weight, bias = x.double(), weight.double(), bias.double()
            want = F.gelu(F.linear(x, weight, bias))
            magnitude = F.linear(x.abs(), weight.abs(), bias.abs())
            shares.append(within(out, want, limit(want, magnitude, dtype) + GELU, "hidden layer"))
    return max(shares)


def r_of_each(pairs: ops.Match, r: int | Tensor | str) -> Tensor:
    """The r of each image that ``ops.assign`` derives from its source of r."""
    if isinstance(r, Tensor):
        return r
    if isinstance(r, int):
        return torch.full_like(pairs.counts, r)
    return reference.batch_r(pairs.counts) if r == "batch" else pairs.counts


def check_assign(pairs: ops.Match, r: int | Tensor | str, images: Images, one_r: bool) -> Assignment:
    slots, cu_seqlens = reference.assign(pairs.similarity, pairs.partner, r_of_each(pairs, r), 1, images)
    T = int(cu_seqlens[-1])
    with poisoned():
        assignment = ops.assign(pairs, r, images, 1, T, one_r, "triton")
    same(assignment.slots, slots, "slots")
    same(assignment.images.cu_seqlens, cu_seqlens, "the images' first slots")
    order, spans = reference.lists(slots, T)
    same(assignment.order, order, "tokens of the slots")
    same(assignment.spans, spans, "spans of the slots")
    return assignment


def check_merge(tokens: Packed, assignment: Assignment) -> tuple[float, Packed]:
    with poisoned():
        merged = ops.merge(tokens, assignment, "triton")
    x, slots, T = tokens.x, assignment.slots, assignment.num_slots
    want, want_sizes = reference.merge(x.double(), tokens.sizes, slots, T)
    magnitude, _ = reference.merge(x.double().abs(), tokens.sizes, slots, T)
    same(merged.sizes, want_sizes, "sizes")
    within(merged.log2_sizes, want_sizes.double().log2(), ARITHMETIC, "log2 of the sizes")
    share = within(merged.x, want, limit(want, magnitude, x.dtype), "merged tokens")
    alone = assignment.spans.diff(dim=1).flatten() == 1
    token = assignment.order[assignment.spans[alone, 0].long()]
    same(merged.x[alone], x[token.long()], "tokens that merged with none")
    return share, merged


def check_norms(tokens: Packed, attended: Tensor, assignment: Assignment) -> float:
    """Check add_merge_norm and add_norm; returns the largest share of the tolerance."""
    x, sizes, slots, T = tokens.x, tokens.sizes, assignment.slots, assignment.num_slots
    norm = nn.LayerNorm(x.shape[1], eps=1e-6, device=x.device, dtype=x.dtype)
    gamma = torch.randn_like(norm.weight)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn_like(parameter))
    shares = []
    for scale in (gamma, None):
        with poisoned():
            merged, normed = ops.add_merge_norm(tokens, attended, scale, assignment, norm)
            summed, normed_sum = ops.add_norm(x, attended, scale, norm)
        update = attended.double() if scale is None else attended.double() * scale.double()
        total, magnitude = x.double() + update, x.double().abs() + update.abs()
        want, want_sizes = reference.merge(total, sizes, slots, T)
        same(merged.sizes, want_sizes, "sizes")
        within(merged.log2_sizes, want_sizes.double().log2(), ARITHMETIC, "log2 of the sizes")
        merged_magnitude, _ = reference.merge(magnitude, sizes, slots, T)
        shares.append(check_norm(merged.x, normed, want, merged_magnitude, norm, "merged tokens"))
        shares.append(check_norm(summed, normed_sum, total, magnitude, norm, "summed tokens"))
    return max(shares)


def check_norm(x: Tensor, normed: Tensor, want: Tensor, magnitude: Tensor, norm: nn.LayerNorm, name: str) -> float:
    """Check rows x, then their norm, computed from x as rounded; returns the largest share of the tolerance."""
    share = within(x, want, limit(want, magnitude, x.dtype), name)
    weight, bias = norm.weight.double(), norm.bias.double()
    plain = F.layer_norm(x.double(), norm.normalized_shape, eps=norm.eps)
    want, magnitude = plain * weight + bias, (plain * weight).abs() + bias.abs() + weight.abs()
    return max(share, within(normed, want, limit(want, magnitude, x.dtype), f"the norms of {name}"))


def check_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, images: Images, n: int | None) -> float:
    """Check attention of all queries, or of the first n of each image; returns the share of the tolerance.
    Probabilities are rounded to the dtype of v, so the tolerance includes that rounding."""
    queries = images
    if n is not None:
        q = images.first(q.transpose(0, 1), n).flatten(0, 1).transpose(0, 1)
        queries = Images.of(images.B, n, q.device)
    with poisoned():
        got = ops.attention(q, k, v, sizes, images, queries, backend="triton")
    one_by_one = images._replace(equal=False)  # float64 scores of all images would not fit
    operands = (q.double(), k.double(), v.double())
    want = reference.attention(*operands, sizes, one_by_one, queries, fused=False)
    magnitude = reference.attention(*operands[:2], operands[2].abs(), sizes, one_by_one, queries, fused=False)
    share = within(got, want, limit(want, magnitude, q.dtype, steps=2), "values")
    for (asking, alone_asking), (rows, alone) in zip(each_alone(queries), each_alone(images), strict=True):
        part = (q[:, asking], k[:, rows], v[:, rows], sizes[rows])
        own = ops.attention(*part, alone, alone_asking, backend="triton")
        same(got[:, asking], own, "values of an image among others", "it has alone")
    return share


@torch.inference_mode()
def check_large(setting: Setting) -> float:
    """Check merge and unmerge with more than 2^31 elements, on the images at both ends and at the border."""
    B, N, C = setting.pick((1400, 2048, 768), (5, 40, 32))
    device, r, share = setting.device, N // 4, 0.0
    M, images, image = N - r, Images.of(B, N, device), Images.of(1, N, device)
    similarity = torch.rand(B, N, device=device)
    position = torch.arange(N, device=device)
    in_a = position % 2 == 0
    partner = torch.where(in_a, (position + 1) % N, -1).int().expand(B, N).contiguous()
    partner[:, 0] = -1
    similarity.masked_fill_(partner < 0, -torch.inf)
    pairs = ops.Match(similarity=similarity.flatten(), partner=partner.flatten(), counts=None)
    tokens = Packed(x=torch.randn(B * N, C, dtype=HALF, device=device), sizes=some_sizes(B * N, device), images=images)
    with poisoned():
        assignment = ops.assign(pairs, torch.full((B,), r, device=device), images, 1, B * M, True, "triton")
        merged = ops.merge(tokens, assignment, "triton")
        back = ops.unmerge(merged.x, assignment.slots, "triton")
    with naming(f"more than 2^31 elements: B={B} N={N} C={C}"):
        for b in {0, 1, B - 1, min(B - 1, 2**31 // (N * C)), min(B - 1, 2**31 // (M * C))}:
            rows, left = slice(b * N, (b + 1) * N), slice(b * M, (b + 1) * M)
            x, sizes = tokens.x[rows].double(), tokens.sizes[rows]
            slots, _ = reference.assign(similarity[b], partner[b], torch.full((1,), r, device=device), 1, image)
            same(assignment.slots[rows], slots + b * M, "slots")
            want, _ = reference.merge(x, sizes, slots, M)
            magnitude, _ = reference.merge(x.abs(), sizes, slots, M)
            share = max(share, within(merged.x[left], want, limit(want, magnitude, HALF), "merged tokens"))
            same(back[rows], reference.unmerge(merged.x[left], slots), "unmerged tokens")
    return share
