"""The GELU of the linear_gelu kernel by itself, in float32."""

import math

import pytest
import torch
import triton
import triton.language as tl

from atm_triton.kernels.linear_gelu import _gelu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def each_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, _gelu(tl.load(x + i)))


def kernels(x):
    out = torch.empty_like(x)
    each_kernel[(1,)](x, out, len(x))
    return out


def exact(x):
    """GELU by erfc, which avoids the cancellation of 1 + erf for negative numbers."""
    return 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2))


def test_it_is_within_2e_6_and_above_minus_4_within_2e_5_of_its_value():
    x = torch.linspace(-12, 12, 2**16, device=DEVICE)
    out, want = kernels(x).double(), exact(x)
    error = (out - want).abs()
    assert error.max() < 2e-6
    assert (error / want.abs())[(x > -4) & (x.abs() > 1e-3)].max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_to_16_bits_it_is_the_next_number_at_most(dtype):
    """From -6, where the value is -6e-9, to 6."""
    x = torch.linspace(-6, 6, 2**16, device=DEVICE)
    ours, want = (y.to(dtype).view(torch.int16).int() for y in (kernels(x), exact(x)))
    assert (ours - want).abs().max() <= 1


def test_what_is_not_finite():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 60000.0, -60000.0], device=DEVICE)
    out = kernels(x)
    assert out[0].isnan() and out[1] == math.inf and out[3] == 0
    assert torch.equal(out[[4, 6]], x[[4, 6]]) and (out[[2, 5, 7]].abs() < 1e-21).all()
