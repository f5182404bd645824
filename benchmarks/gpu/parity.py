"""Parity: the tests of the kernels as they stand, then every operation at real sizes against the reference in float64.

Matches are compared up to ties, assignments and unmerged tokens exactly, other values within what rounding allows.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atm_triton import ops, reference
from benchmarks.gpu import StageError
from benchmarks.gpu.setting import Setting, qkv, short, some_sizes

ROOT = Path(__file__).parents[2]
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROUNDING = {FLOAT: 0.0, HALF: 1.01 * 2**-11, BF16: 1.01 * 2**-8}  # one rounding to the dtype, relative
ARITHMETIC = 2e-6  # float32 arithmetic, relative to the sum of the magnitudes that are added
SMALLEST = {FLOAT: 1e-7, HALF: 1e-5, BF16: 1e-7}  # absolute; float16 has no exponents for the smallest probabilities
BEST, OWN = 1e-6, 2e-6  # a similarity from the largest cosine; the partner's own cosine from it

PARTS = (  # of the tests, side by side: most of their time is compiling
    ("tests/test_kernels.py", "match"),
    ("tests/test_kernels.py", "attention"),
    ("tests/test_kernels.py", "not match and not attention"),
    ("tests/test_triton.py", "a_model"),
    ("tests/test_triton.py", "not a_model"),
    ("tests/test_packed.py", "kernel"),
)
TESTS_SECONDS = 300


@dataclass(frozen=True)
class Case:
    """B images of N tokens (the first protected), H heads of d channels."""

    B: int
    N: int
    H: int
    d: int
    dtype: torch.dtype
    by_size: bool

    def __str__(self) -> str:
        grouping = "by size" if self.by_size else "alternate"
        return f"B={self.B} N={self.N} H={self.H} d={self.d} {short(self.dtype)} {grouping}"


CASES = (
    Case(8, 197, 6, 64, FLOAT, False),
    Case(1, 1370, 16, 64, FLOAT, True),
    Case(64, 577, 3, 64, FLOAT, True),
    Case(8, 197, 8, 80, FLOAT, False),
    Case(256, 197, 12, 64, HALF, True),
    Case(64, 197, 3, 64, HALF, False),
    Case(1, 577, 16, 64, HALF, False),
    Case(8, 1370, 6, 64, HALF, True),
    Case(8, 2309, 6, 64, HALF, False),  # more than one program sorts
    Case(8, 577, 3, 32, HALF, True),
    Case(256, 197, 6, 64, BF16, False),
    Case(64, 577, 12, 64, BF16, False),
    Case(8, 197, 16, 64, BF16, True),
    Case(1, 197, 3, 64, BF16, False),
    Case(8, 1370, 6, 64, BF16, True),
    Case(8, 197, 4, 60, BF16, True),
)
TINY = (
    Case(2, 33, 2, 32, FLOAT, False),
    Case(1, 40, 2, 20, HALF, True),
    Case(1, 33, 2, 72, FLOAT, True),
)


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    tests = [] if setting.tiny else start_tests(setting.out)
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
        rows.append({"case": "large", "of_tolerance": {"merge": check_large(setting)}})
        section["tests"] = end_tests(tests)
    finally:
        for test in tests:
            test.kill()


def start_tests(out: Path) -> list[subprocess.Popen]:
    tests = []
    for number, (file, chosen) in enumerate(PARTS):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
        log = (out / f"tests{number}.log").open("w")
        tests.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ)))
        tests[-1].log = Path(log.name)
    return tests


def end_tests(tests: list[subprocess.Popen]) -> list[str]:
    """The last line of each; all of them must have passed."""
    until = time.monotonic() + TESTS_SECONDS
    last = []
    for (file, chosen), test in zip(PARTS, tests, strict=False):
        code = test.wait(timeout=max(1.0, until - time.monotonic()))
        lines = test.log.read_text().strip().splitlines()
        last.append(f"{file} -k {chosen!r}: {lines[-1] if lines else 'said nothing'}")
        if code != 0:
            wrong = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "")
            raise StageError(f"{last[-1]}; {wrong} (see {test.log.name})")
    return last


@torch.inference_mode()
def check_case(case: Case, device: torch.device) -> dict[str, float]:
    """How much of its tolerance each operation uses; above 1 raises :class:`StageError`."""
    B, N, H, d = case.B, case.N, case.H, case.d
    q, k, v = qkv(B, H, N, d, case.dtype, device)
    sizes, r = some_sizes(B, N, device, most=200), (N - 1) // 4
    used = {}
    with naming(f"match {case}"):
        used["match"], found = check_match(k, sizes, case.by_size)
    with naming(f"assign {case}"):
        check_assign(found.similarity.mul(50).round().div(50), found.partner, r, case.by_size)  # with many ties
        assignment, lists = check_assign(found.similarity, found.partner, r, case.by_size)
    x, attended = (torch.randn(B, N, H * d, dtype=case.dtype, device=device) for _ in range(2))
    with naming(f"merge {case}"):
        used["merge"], merged = check_merge(x, sizes, assignment, lists, N - r)
    with naming(f"add_merge_norm {case}"):
        used["add_merge_norm"] = check_add_merge_norm(x, attended, sizes, assignment, lists, N - r)
    with naming(f"unmerge {case}"), poisoned():
        back = ops.unmerge(merged.x, assignment, "triton")
        same(back, reference.unmerge(merged.x, assignment), "values")
    for queries in (N, 1):
        with naming(f"attention of {queries} {case}"):
            used[f"attention of {queries}"] = check_attention(q[:, :, :queries], k, v, sizes)
    return used


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in a failure what was checked."""
    try:
        yield
    except StageError as failure:
        raise StageError(f"{what}: {failure}") from None


@contextmanager
def poisoned() -> Iterator[None]:
    """What a kernel leaves unwritten is NaN, or an index far out."""

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


def same(got: Tensor, want: Tensor, name: str) -> None:
    if not torch.equal(got, want):
        differ = (got != want).sum().item() if got.shape == want.shape else f"shape {list(got.shape)},"
        raise StageError(f"{name} are not those of the reference: {differ} differ of {want.numel()}")


def within(got: Tensor, want: Tensor, allowed: Tensor | float, name: str) -> float:
    """The largest share of the distance ``allowed`` that ``got`` is away from ``want``; NaN is never within."""
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
    """What rounding allows: of the result to ``dtype``, of float32 sums of terms of this ``magnitude`` (and of terms
    that are in ``dtype`` themselves)."""
    rounded = ROUNDING[dtype] * (want.abs() + (steps - 1) * magnitude)
    return rounded + ARITHMETIC * magnitude + SMALLEST[dtype]


def check_match(keys: Tensor, sizes: Tensor, by_size: bool) -> tuple[float, ops.Match]:
    B, _, N, _ = keys.shape
    a, b = reference.group(sizes, B, N, 1, by_size, keys.device)
    best, want_partner = reference.match(keys.double(), a, b)
    in_a = want_partner >= 0
    theta = round(best[in_a].median().item(), 3)
    with poisoned():
        found = ops.match(keys, sizes, 1, by_size, theta, "triton")
    same(found.partner >= 0, in_a, "tokens with a partner")
    same(found.similarity.isneginf(), ~in_a, "tokens without a similarity")
    share = within(found.similarity[in_a], best[in_a], BEST, "similarities")
    in_b = torch.zeros_like(in_a).scatter_(1, b, True)
    partner = found.partner.clamp(min=0).long()
    same(in_b.gather(1, partner)[in_a], in_a[in_a], "partners in B")
    unit = F.normalize(keys.double().mean(1), dim=2)
    own = (unit * torch.take_along_dim(unit, partner.unsqueeze(2), 1)).sum(2)
    share = max(share, within(own[in_a], best[in_a], OWN, "cosines with the partners"))
    same(found.counts, reference.count(found.similarity, theta), "counts")
    return share, found


def check_assign(similarity: Tensor, partner: Tensor, r: int, by_size: bool) -> tuple[Tensor, ops.Lists]:
    with poisoned():
        assignment, lists = ops.assign(similarity, partner, r, 1, by_size, "triton")
    same(assignment, reference.assign(similarity, partner, r, 1), "slots")
    tokens, spans = reference.lists(assignment, partner.shape[1] - r)
    same(lists.tokens, tokens, "tokens of the slots")
    same(lists.spans, spans, "spans of the slots")
    return assignment, lists


def check_merge(x: Tensor, sizes: Tensor, assignment: Tensor, lists: ops.Lists, M: int) -> tuple[float, ops.Merged]:
    with poisoned():
        merged = ops.merge(x, sizes, assignment, M, "triton", lists)
    want, want_sizes = reference.merge(x.double(), sizes, assignment, M)
    magnitude, _ = reference.merge(x.double().abs(), sizes, assignment, M)
    same(merged.sizes, want_sizes, "sizes")
    within(merged.log2_sizes, want_sizes.double().log2(), ARITHMETIC, "log2 of the sizes")
    share = within(merged.x, want, limit(want, magnitude, x.dtype), "merged tokens")
    alone = lists.spans.diff(dim=1).flatten() == 1
    first = lists.tokens[lists.spans[alone, 0].long()].long()
    same(merged.x.flatten(0, 1)[alone], x.flatten(0, 1)[first], "tokens that merged with none")
    return share, merged


def check_add_merge_norm(
    x: Tensor, attended: Tensor, sizes: Tensor, assignment: Tensor, lists: ops.Lists, M: int
) -> float:
    C, dtype = x.shape[2], x.dtype
    norm = nn.LayerNorm(C, eps=1e-6, device=x.device, dtype=dtype)
    gamma = torch.randn(C, device=x.device, dtype=dtype)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(C))
    share = 0.0
    for scale in (gamma, None):
        with poisoned():
            merged, normed = ops.add_merge_norm(x, attended, scale, sizes, assignment, lists, M, norm)
        update = attended.double() if scale is None else attended.double() * scale.double()
        want, want_sizes = reference.merge(x.double() + update, sizes, assignment, M)
        magnitude, _ = reference.merge(x.double().abs() + update.abs(), sizes, assignment, M)
        same(merged.sizes, want_sizes, "sizes")
        share = max(share, within(merged.x, want, limit(want, magnitude, dtype), "merged tokens"))
        weight, bias = norm.weight.double(), norm.bias.double()
        plain = F.layer_norm(merged.x.double(), (C,), eps=norm.eps)
        want, magnitude = plain * weight + bias, (plain * weight).abs() + bias.abs() + weight.abs()
        share = max(share, within(normed, want, limit(want, magnitude, dtype), "normed tokens"))
    return share


def check_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> float:
    """The probabilities are rounded to the dtype of v, so an error may be as large as theirs."""
    with poisoned():
        got = ops.attention(q, k, v, sizes, backend="triton")
    share = 0.0
    for part in torch.arange(len(q)).split(4):  # float64 scores of a few images at a time
        chosen = slice(part[0].item(), part[-1].item() + 1)
        operands = [x[chosen].double() for x in (q, k, v)]
        want = reference.attention(*operands, sizes[chosen], fused=False)
        magnitude = reference.attention(*operands[:2], operands[2].abs(), sizes[chosen], fused=False)
        share = max(share, within(got[chosen], want, limit(want, magnitude, q.dtype, steps=2), "values"))
    return share


@torch.inference_mode()
def check_large(setting: Setting) -> float:
    """merge of more than 2^31 elements: the images at both ends and at the border."""
    B, N, C = setting.pick((1400, 2048, 768), (5, 40, 32))
    device, r, share = setting.device, N // 4, 0.0
    similarity = torch.rand(B, N, device=device)
    position = torch.arange(N, device=device)
    in_a = position % 2 == 0
    partner = torch.where(in_a, (position + 1) % N, -1).int().expand(B, N).contiguous()
    partner[:, 0] = -1
    similarity.masked_fill_(partner < 0, -torch.inf)
    x, sizes = torch.randn(B, N, C, dtype=HALF, device=device), some_sizes(B, N, device)
    with poisoned():
        assignment, lists = ops.assign(similarity, partner, r, 1, False, "triton")
        merged = ops.merge(x, sizes, assignment, N - r, "triton", lists)
        back = ops.unmerge(merged.x, assignment, "triton")
    with naming(f"more than 2^31 elements: B={B} N={N} C={C}"):
        for b in {0, 1, B - 1, min(B - 1, 2**31 // (N * C)), min(B - 1, 2**31 // ((N - r) * C))}:
            image = slice(b, b + 1)
            want_assignment = reference.assign(similarity[image], partner[image], r, 1)
            same(assignment[image], want_assignment, "slots")
            want, _ = reference.merge(x[image].double(), sizes[image], want_assignment, N - r)
            magnitude, _ = reference.merge(x[image].double().abs(), sizes[image], want_assignment, N - r)
            share = max(share, within(merged.x[image], want, limit(want, magnitude, HALF), "merged tokens"))
            same(back[image], reference.unmerge(merged.x[image], want_assignment), "unmerged tokens")
    return share
