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


def test_an_integer_that_overflows_is_found(overflow):
    x = torch.tensor([2**30, 0], dtype=torch.int32)
    with pytest.raises(InterpreterError, match="int32: multiply of"):
        twice_kernel[(1,)](x, torch.empty(1, dtype=torch.int32))
