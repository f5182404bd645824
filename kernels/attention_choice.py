"""What computes attention: a table beside the kernel that needs no Triton to be read."""

import torch

KERNEL = "kernel"
MASK = "SDPA with a broadcast mask"  # of log n, in float32: beside 16-bit queries the scores are written out instead
PLAIN = "SDPA without a bias"  # where every token stands for one patch


def attention_choice(dtype: torch.dtype, d: int, N: int, packed: bool, bias: bool) -> str:
    """Where the kernel can compute, what does: for channels of a head, keys of an image (packed: at most so many),
    whether images are packed and whether log n is added.

    Measured on an H200 in 16 bits, where the kernel is the fastest that adds log n exactly. In float32 with 64 channels
    torch's attention with a mask was faster; ``benchmarks/gpu/attention.py`` times both.
    """
    return KERNEL if packed or bias else PLAIN
