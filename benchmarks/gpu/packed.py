"""Packed: images of different lengths in one batch get the bits that each gets alone, and they are the right ones."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atm_triton import ops, reference
from benchmarks.gpu.parity import limit, naming, poisoned, same, within
from benchmarks.gpu.setting import Setting, short

BATCH, LONGEST = 64, 577


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    rows = section["rows"] = []
    H, d = setting.pick((6, 64), (2, 16))
    for dtype in setting.pick((torch.bfloat16, torch.float16, torch.float32), (torch.float32,)):
        for longest in setting.pick((197, LONGEST), (20,)):
            lengths = torch.randint(2, longest + 1, (setting.pick(BATCH, 3),))
            lengths[:2] = torch.tensor([longest, 1])
            packing = packed(lengths, longest, setting.device)
            for by_size in (False, True):
                with naming(f"{short(dtype)}, up to {longest} tokens, {'by size' if by_size else 'alternate'}"):
                    used = check(packing, H, d, dtype, by_size)
                rows.append({"dtype": short(dtype), "longest": longest, "by_size": by_size, "of_tolerance": used})


def packed(lengths: Tensor, longest: int, device: torch.device) -> ops.Packing:
    return ops.Packing.of(lengths, device)._replace(longest=longest)


def images(packing: ops.Packing) -> Iterator[tuple[slice, ops.Packing]]:
    """The rows of every image, and it alone as a batch of one."""
    start = 0
    for length in packing.lengths.tolist():
        alone = packed(torch.tensor([length]), packing.longest, packing.cu_seqlens.device)
        yield slice(start, start + length), alone
        start += length


def check(packing: ops.Packing, H: int, d: int, dtype: torch.dtype, by_size: bool) -> dict[str, float]:
    """How much of their tolerance the operations that round use."""
    T, device = int(packing.lengths.sum()), packing.cu_seqlens.device
    q, k, v = torch.randn(T, 3, H, d, dtype=dtype, device=device).permute(1, 2, 0, 3).unbind(0)
    sizes = torch.randint(1, 200, (T,), device=device).float()
    theta = 0.3
    with poisoned():
        found = ops.match(k, sizes, 1, by_size, theta, "triton", packing)
        attended = ops.attention(q, k, v, sizes, backend="triton", packing=packing)
    for rows, alone in images(packing):
        own = ops.match(k[:, rows], sizes[rows], 1, by_size, theta, "triton", alone)
        same(found.similarity[rows], own.similarity, "similarities of an image among others")
        same(found.partner[rows], own.partner, "partners of an image among others")
        mixed = ops.attention(q[:, rows], k[:, rows], v[:, rows], sizes[rows], backend="triton", packing=alone)
        same(attended[:, rows], mixed, "attention of an image among others")
    same(found.counts, reference.count(found.similarity, theta, packing.cu_seqlens), "counts")
    used = check_merge(found, sizes, theta, packing, dtype, H * d)
    leading = torch.randn(len(packing.lengths), H, 1, d, dtype=dtype, device=device)
    for name, queries, got in (
        ("attention", q, attended),
        ("attention of 1", leading, ops.attention(leading, k, v, sizes, backend="triton", packing=packing)),
    ):
        exact = (queries.double(), k.double(), v.double())
        want = reference.attention_packed(*exact, sizes, packing.cu_seqlens, fused=False)
        magnitude = reference.attention_packed(*exact[:2], exact[2].abs(), sizes, packing.cu_seqlens, fused=False)
        used[name] = within(got, want, limit(want, magnitude, dtype, steps=2), "values")
    return used


def check_merge(
    found: ops.Match, sizes: Tensor, theta: float, packing: ops.Packing, dtype: torch.dtype, C: int
) -> dict[str, float]:
    cu_seqlens, T, device = packing.cu_seqlens, len(sizes), sizes.device
    x, update = (torch.randn(T, C, dtype=dtype, device=device) for _ in range(2))
    norm = nn.LayerNorm(C, device=device, dtype=dtype)
    read = ops.CountRead(found.counts)
    with poisoned():
        assignment, lists, left = ops.assign_each(*found[:2], theta, read, 1, "triton", packing)
        merged = ops.merge(x, sizes, assignment, left, "triton", lists, packing)
        fused, _ = ops.add_merge_norm(x, update, None, sizes, assignment, lists, left, norm, packing)
        back = ops.unmerge(merged.x, assignment, "triton", left, packing)
    same(assignment, reference.assign_each(*found[:2], theta, 1, cu_seqlens), "slots")
    same(left.cu_seqlens, reference.new_cu_seqlens(found.counts, cu_seqlens.diff()), "the images' first slots")
    tokens, spans = reference.lists(assignment, left.cu_seqlens, cu_seqlens)
    same(lists.tokens, tokens, "tokens of the slots")
    same(lists.spans, spans, "spans of the slots")
    same(back, reference.unmerge(merged.x, assignment, cu_seqlens, left.cu_seqlens), "unmerged tokens")
    used = {}
    for name, got, rows in (("merge", merged, x.double()), ("add_merge_norm", fused, x.double() + update.double())):
        want, want_sizes = reference.merge(rows, sizes, assignment, left.cu_seqlens, cu_seqlens)
        magnitude, _ = reference.merge(
            x.double().abs() + update.double().abs(), sizes, assignment, left.cu_seqlens, cu_seqlens
        )
        same(got.sizes, want_sizes, "sizes")
        used[name] = within(got.x, want, limit(want, magnitude, dtype), "merged tokens")
    return used
