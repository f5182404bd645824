"""linear_gelu: the first layer of an MLP with its activation, gelu(x w^T + b), in 16 bits, for many rows.

torch writes the product to memory, reads it and writes its GELU. Here it is taken where the product is: in registers,
of float32 sums. Each multiprocessor runs one program, which takes tile after tile; the tensor memory accelerator
(NVIDIA's from sm_90 on) moves them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atm_triton.kernels.common import aligned, multiprocessors

ROWS, COLUMNS, DEPTH, STAGES, WARPS = 128, 256, 64, 4, 8  # the fastest of 46 on an H200
BUSY = 2  # tiles a multiprocessor: with fewer, torch's two kernels are faster


@triton.jit
def _gelu(x):
    """x Phi(x) of float32 as max(x, 0) - |x| Q(|x|), Q(a) = erfc(a / sqrt 2) / 2, whose log2 is a polynomial, fitted to
    float64's up to a = 6. The result is within 2e-6, and above x = -4 within 2e-5 of its own value. The exact erf takes
    three times as many instructions."""
    above = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    a = tl.minimum(tl.abs(x), 10.0)  # where Q is 2^-75
    p = -6.9824454e-04 + a * 2.8495014e-05
    p = 7.70417554e-03 + a * p
    p = -5.253243e-02 + a * p
    p = -4.59684789e-01 + a * p
    p = -1.1508441 + a * p
    p = -1.0000205 + a * p
    return above - a * tl.exp2(p)


@triton.jit
def _finish(half, bias, out, row, column, N, HALF: tl.constexpr):
    """Bias, GELU and store of half a tile."""
    n = column + tl.arange(0, HALF)
    if bias is not None:
        half += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out.store([row, column], _gelu(half).to(out.dtype))


@triton.jit(do_not_specialize=["M"])
def linear_gelu_kernel(
    x,
    weight,
    bias,
    out,
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program for every ``num_programs``-th tile. ``x``, ``weight`` and ``out`` are descriptors, which read 0 and
    write nothing beyond the edges; ``later`` numbers the tiles once more, so that the loop overlaps the end of one with
    the beginning of the next."""
    HALF: tl.constexpr = COLUMNS // 2
    columns = tl.cdiv(N, COLUMNS)
    tiles = tl.cdiv(M, ROWS) * columns
    later = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True, num_stages=STAGES):
        row, column = tile // columns * ROWS, tile % columns * COLUMNS
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(tl.cdiv(K, DEPTH)):
            product = tl.dot(x.load([row, k * DEPTH]), weight.load([column, k * DEPTH]).T, product)
        later += tl.num_programs(0)
        row, column = later // columns * ROWS, later % columns * COLUMNS
        left, right = product.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        _finish(left, bias, out, row, column, N, HALF)
        _finish(right, bias, out, row, column + HALF, N, HALF)


def pays(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes such a layer, and is faster than torch's product and GELU: many rows, on sm_90 or later.
    Rows must begin at multiples of 16 bytes."""
    if dtype not in (torch.float16, torch.bfloat16) or N % 8 or K % 8:
        return False
    return programs(device) > 0 and -(-M // ROWS) * -(-N // COLUMNS) >= BUSY * programs(device)


@cache
def programs(device: torch.device) -> int:
    """How many run at once: one on each multiprocessor of a device with tensor memory accelerators and 224 KiB of
    shared memory for a program (Hopper, and Blackwell of data centres); 0 on another. By the interpreter, one."""
    if device.type != "cuda":
        return int(triton.knobs.runtime.interpret)
    fits = torch.cuda.get_device_properties(device).major in (9, 10) and not torch.version.hip
    return multiprocessors(device) if fits else 0


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x weight^T + bias), the exact GELU up to 2e-6, in the dtype of x.

    Args:
        x: [M, K]; weight: [N, K]; bias: [N] or None; float16 or bfloat16, where :func:`pays` says so.
    """
    (M, K), N = x.shape, len(weight)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tiles = -(-M // ROWS) * -(-N // COLUMNS)
    if tiles:
        blocks = ((x, (ROWS, DEPTH)), (weight, (COLUMNS, DEPTH)), (out, (ROWS, COLUMNS // 2)))
        x, weight, to = (TensorDescriptor.from_tensor(aligned(rows), list(block)) for rows, block in blocks)
        shape = {"K": K, "N": N, "ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "STAGES": STAGES}
        grid = (min(tiles, max(1, programs(out.device))),)
        linear_gelu_kernel[grid](x, weight, aligned(bias), to, M, **shape, num_warps=WARPS, num_stages=STAGES)
    return out
