"""What the tests change in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)


@triton.jit
def twice(x):
    return 2 * tl.maximum(x, 0)


@triton.jit
def twice_kernel(x, out):
    tl.store(out, tl.sum(twice(tl.load(x + tl.arange(0, 2))), 0))


def test_functions_of_a_kernel_are_interpreted():
    x = torch.tensor([3, -5], dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        twice_kernel[(1,)](x, out)
        assert out.item() == 6
        out.zero_()
    assert tl.core.is_builtin(tl.load), "the language is left patched"


@triton.jit
def combined_kernel(x, y, out, BY: tl.constexpr):
    a, b = tl.load(x), tl.load(y)
    tl.store(out, a + b if BY == "add" else a - b if BY == "sub" else a * b)


@pytest.mark.parametrize(("by", "y"), [("add", 2**31 - 2), ("sub", -(2**31) + 2), ("mul", 2**30)])
def test_an_integer_that_overflows_is_found(by, y, overflow):
    x, out = torch.tensor([2], dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    combined_kernel[(1,)](x, torch.tensor([y // 2], dtype=torch.int32), out, BY=by)
    with pytest.raises(InterpreterError, match=f"int32: {by} of"):
        combined_kernel[(1,)](x, torch.tensor([y], dtype=torch.int32), out, BY=by)


@triton.jit
def three_kernel(out):
    tl.store(out, tl.sum(tl.zeros([3], tl.int32)))


def test_a_shape_that_is_refused_is_refused_again():
    for _ in range(2):
        with pytest.raises(InterpreterError, match="must be a power of 2"):
            three_kernel[(1,)](torch.zeros(1, dtype=torch.int32))
