"""Micro-benchmarks of the operations, a block and whole models: ``make microbench``.

Inputs have the shapes of DeiT-S's first block: 197 tokens, class token first. On a GPU, calls are timed to completion.
"""

from dataclasses import replace

import pytest
import timm
import torch

from atm_triton import ATMBlock, ATMConfig, apply_patch, ops
from atm_triton.measure.configurations import digits_config
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.packed import Images, Packed
from atm_triton.reference import group_by_size

B, H, N, d, C, R = 8, 6, 197, 64, 384, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"] if DEVICE == "cuda" else ["reference"]
IMAGES = Images.of(B, N, DEVICE)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def sizes():
    return torch.randint(1, 5, (B * N,), device=DEVICE).float()


@pytest.fixture
def qkv():
    """q, k and v as a block has them: views of the qkv product."""
    return torch.randn(B * N, 3, H, d, device=DEVICE).permute(1, 2, 0, 3)


def time(benchmark, call, *arguments):
    def run():
        result = call(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    with torch.inference_mode():
        return benchmark(run)


@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
def test_match(benchmark, backend, qkv, sizes, by_size):
    pairs = time(benchmark, ops.match, qkv[1], sizes, IMAGES, 1, by_size, 0.5, backend)
    assert pairs.similarity.shape == (B * N,)


def to_assign(keys, sizes, backend):
    """The arguments with which ``assign`` merges R tokens of each image."""
    pairs = ops.match(keys, sizes, IMAGES, 1, False, None, backend)
    return pairs, torch.full((B,), R, device=DEVICE), IMAGES, 1, B * (N - R), True, backend


def test_assign(benchmark, backend, qkv, sizes):
    assignment = time(benchmark, ops.assign, *to_assign(qkv[1], sizes, backend))
    assert assignment.slots.max() == assignment.num_slots - 1 == B * (N - R) - 1


def test_merge(benchmark, backend, qkv, sizes):
    assignment = ops.assign(*to_assign(qkv[1], sizes, backend))
    tokens = Packed(x=torch.randn(B * N, C, device=DEVICE), sizes=sizes, images=IMAGES)
    merged = time(benchmark, ops.merge, tokens, assignment, backend)
    assert merged.x.shape == (B * (N - R), C)


def test_unmerge(benchmark, backend, qkv, sizes):
    assignment = ops.assign(*to_assign(qkv[1], sizes, backend))
    merged = torch.randn(assignment.num_slots, C, device=DEVICE)
    assert time(benchmark, ops.unmerge, merged, assignment.slots, backend).shape == (B * N, C)


def test_group_by_size(benchmark, sizes):
    a, _ = time(benchmark, group_by_size, sizes.view(B, N), 1)
    assert a.shape == (B, (N - 1) // 2)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "log-size"])
def test_attention(benchmark, backend, qkv, sizes, bias):
    out = time(benchmark, ops.attention, *qkv, sizes if bias else None, IMAGES, None, 0.0, True, backend)
    assert out.shape == (H, B * N, d)


@pytest.mark.parametrize("r", [0, R], ids=lambda r: f"r{r}")
def test_block(benchmark, backend, sizes, r):
    config = ATMConfig(adapt="static", schedule=(r,) * 12, backend=backend)
    block = ATMBlock(C, H, qkv_bias=True, block_index=0, depth=12, config=config).eval().to(DEVICE)
    x, _ = time(benchmark, block, torch.randn(B, N, C, device=DEVICE), sizes.view(B, N))
    assert x.shape[1] == N - r


@pytest.mark.parametrize("merging", ["timm", "static"])
def test_deit_small(benchmark, backend, merging):
    model = timm.create_model("deit_small_patch16_224").eval().to(DEVICE)
    if merging == "static":
        apply_patch(model, ATMConfig(adapt="static", schedule=(R,) * 12, backend=backend))
    assert time(benchmark, model, torch.randn(B, 3, 224, 224, device=DEVICE)).shape == (B, 1000)


@pytest.mark.parametrize("merging", ["timm", "batch"])
def test_digits(benchmark, backend, merging):
    model = open_model().to(DEVICE)
    if merging == "batch":
        apply_patch(model, replace(digits_config(), backend=backend))
    images, _ = next(iter(open_images(model, limit=64)))
    assert time(benchmark, model, images.to(DEVICE)).shape == (64, 10)
