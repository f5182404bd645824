"""Batches with other numbers of rows, images or slots, or at other addresses, do not make Triton recompile.

Triton looks up compiled kernels by the types of the arguments and their specialisation (1, divisible by 16, aligned).
Here Triton itself computes these keys, for a GPU, in a process without the interpreter; nothing is launched.
"""

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BATCHES = 200
MODELS = {  # H, d, C, P, N, by_size, dtype
    "one launch": (6, 64, 384, 1, 197, False, torch.float16),
    "by size": (2, 60, 120, 2, 197, True, torch.float32),
    "two launches": (3, 80, 240, 5, 300, True, torch.bfloat16),
    "long images": (1, 32, 32, 1, 3000, False, torch.float32),
}
LARGE = torch.empty(2**24, dtype=torch.uint8)  # bytes that all tensors are slices of


def a_slice(*shape, dtype):
    """A tensor somewhere in memory; half of the time it is aligned to 16 bytes."""
    numel, size = torch.Size(shape).numel(), dtype.itemsize
    first = 16 * random.randrange(100) + random.choice((0, size * random.randrange(16 // size)))
    return LARGE[first : first + numel * size].view(dtype).view(shape)


def some_lengths(N):
    """The lengths of 1 to 64 images, with 1 token in all, a multiple of 16, or any number."""
    T = random.choice((1, 16 * random.randrange(1, 60), random.randrange(2, 1000)))
    lengths = [1] * random.randint(max(1, -(-T // N)), min(64, T))
    while T > sum(lengths):
        image = random.randrange(len(lengths))
        lengths[image] += random.randint(0, min(T - sum(lengths), N - lengths[image]))
    return lengths


def bounds(lengths):
    out = a_slice(len(lengths) + 1, dtype=torch.int32)
    return out.copy_(torch.tensor([0, *lengths]).cumsum(0))


def launches(model):
    """Yield a name and a call of every launcher, each for a new random batch."""
    from atm_triton.kernels import assign, attention, attention_backward, linear_gelu, match, merge, stem, unmerge

    H, d, C, P, N, by_size, dtype = model
    lengths = some_lengths(N)
    B, T, slots = len(lengths), sum(lengths), random.randint(1, sum(lengths))
    floats, ints = {"dtype": torch.float32}, {"dtype": torch.int32}
    images, ones = bounds(lengths), bounds([1] * B)
    q, k, v = a_slice(T, 3, H, d, dtype=dtype).permute(1, 2, 0, 3)
    sizes, x, attended = a_slice(T, **floats), a_slice(T, C, **floats), a_slice(T, C, dtype=dtype)
    vector, lists = a_slice(C, **floats), (a_slice(T, **ints), a_slice(slots, 2, **ints), images)
    pair, r = (a_slice(T, **floats), a_slice(T, **ints)), a_slice(B, dtype=torch.int64)
    of_class = a_slice(B, H, d, dtype=dtype).transpose(0, 1)
    norm = (vector, vector, 1e-6)
    patches, position = a_slice(B, 3, 32, 48, dtype=dtype), a_slice(7, C, dtype=dtype)
    yield "stem", stem.stem, (patches, a_slice(C, 3, 16, 16, dtype=dtype), None, position)
    hidden, half = a_slice(T, C, dtype=torch.float16), a_slice(4 * C, C, dtype=torch.float16)
    yield "linear_gelu", linear_gelu.linear_gelu, (hidden, half, None)
    yield "match", match.match, (k, sizes, images, P, by_size, 0.9, N)
    yield "assign", assign.assign, (*pair, r, images, P, N, slots)
    yield "merge", merge.merge, (x, sizes, *lists)
    yield "merge between residual and norm", merge.merge, (x, sizes, *lists, attended, vector, norm)
    yield "add_norm", merge.add_norm, (x, attended, vector, norm)
    yield "unmerge", unmerge.unmerge, (a_slice(slots, C, dtype=dtype), a_slice(T, **ints))
    yield "attention", attention.attention, (q, k, v, sizes, images, images, N, N, 0.125)
    out, lse = a_slice(T, H, d, dtype=dtype).transpose(0, 1), a_slice(T, H, **floats)
    trained = (out, q, k, v, sizes, images, images, out, lse, N, N, 0.125)
    yield "attention backward", attention_backward.attention_backward, trained
    # in a model the queries start a tensor
    queries = (of_class.clone(), k, v, sizes, ones, images, 1, N, 0.125)
    yield "attention of one query", attention.attention, queries


def compiled():
    """The number of different keys that occur for each model, launcher and kernel."""
    from benchmarks.launches import captured
    from benchmarks.offline_compile import CHIPS, specialised

    random.seed(0)
    keys = defaultdict(set)
    for name, model in MODELS.items():
        for _ in range(BATCHES):
            for called, launcher, arguments in launches(model):
                for kernel, *launch in captured(lambda f=launcher, a=arguments: f(*a)):
                    _, specialisation, options = specialised(kernel, *launch, CHIPS["sm_90"].target)
                    keys[f"{name}: {called}: {kernel.__name__}"].add(str((specialisation, options)))
    return {at: len(different) for at, different in keys.items()}


def test_two_keys_a_kernel_and_model_at_most():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    kernels = {at.split(": ")[2] for at in counts}
    assert kernels >= {"match_image_kernel", "match_tiles_kernel", "join_kernel", "merge_kernel", "attention_kernel"}
    assert {at: count for at, count in counts.items() if count > 2} == {}


if __name__ == "__main__":
    print(json.dumps(compiled()))
