"""linear_gelu: computes the first layer of an MLP with its activation, gelu(x w^T + b), in 16 bits, for many rows.

torch writes the product to memory, reads it again and writes its GELU. This kernel applies the GELU to the float32 sums
in registers. Each multiprocessor runs one program, which takes tile after tile; the tensor memory accelerator (NVIDIA,
from sm_90 on) moves them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atm_triton.kernels.common import aligned, multiprocessors

ROWS, COLUMNS, DEPTH, STAGES, WARPS = 128, 256, 64, 4, 8  # the fastest of 46 on an H200
BUSY = 2  # with fewer tiles per multiprocessor torch's two kernels are faster


@triton.jit
def _gelu(x):
    """Compute x Phi(x), float32, as max(x, 0) - |x| Q(|x|) with Q(a) = erfc(a / sqrt 2) / 2. The log2 of Q is a
    polynomial, fitted in float64 up to a = 6. The absolute error is within 2e-6, the relative error above x = -4 within
    2e-5. The exact erf takes three times as many instructions."""
    above = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    a = tl.minimum(tl.abs(x), 10.0)  # Q(10) is 2^-75
    p = -6.9824454e-04 + a * 2.8495014e-05
    p = 7.70417554e-03 + a * p
    p = -5.253243e-02 + a * p
    p = -4.59684789e-01 + a * p
    p = -1.1508441 + a * p
    p = -1.0000205 + a * p
    return above - a * tl.exp2(p)


@triton.jit
def _finish(half, bias, out, row, column, N, HALF: tl.constexpr):
    """Add the bias to half a tile, apply the GELU and store it."""
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
    """Each program takes every ``num_programs``-th tile. ``x``, ``weight`` and ``out`` are descriptors, which read 0
    and write nothing beyond the edges. ``later`` numbers the tiles a second time, so that the compiler can overlap the
    end of one tile with the beginning of the next."""
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
    """Whether the kernel takes such a layer and is faster than torch's product and GELU, which needs many rows and a
    GPU with :func:`programs`. Rows must begin at multiples of 16 bytes."""
    if dtype not in (torch.float16, torch.bfloat16) or N % 8 or K % 8:
        return False
    return programs(device) > 0 and -(-M // ROWS) * -(-N // COLUMNS) >= BUSY * programs(device)


@cache
def programs(device: torch.device) -> int:
    """How many programs run at once: one per multiprocessor on a device with tensor memory accelerators and 224 KiB of
    shared memory per program (Hopper and data-centre Blackwell), 0 on any other. In the interpreter, one."""
    if device.type != "cuda":
        return int(triton.knobs.runtime.interpret)
    fits = torch.cuda.get_device_properties(device).major in (9, 10) and not torch.version.hip
    return multiprocessors(device) if fits else 0


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x weight^T + bias), within 2e-6 of the exact GELU before rounding, in the dtype of x.

    Args:
        x: [M, K]; weight: [N, K]; bias: [N] or None; float16 or bfloat16, of a shape for which :func:`pays` is True.
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
