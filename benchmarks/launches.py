"""Named launches of the kernels on tensors without memory, those of the tests among them, for ``offline_compile``.

``tests/test_kernels.py`` takes its shapes from here, and fails if it launches anything else.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atm_triton.kernels import assign, attention, attention_backward, linear_gelu, match, merge, stem, unmerge

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
GROUPINGS = ("alternate", "by size", "halves")  # halves: grouped by size while all sizes are 1
DTYPES = (torch.float32, torch.float16)  # of the tests; without bfloat16, which the interpreter gets wrong
SHAPES = (  # B, H, N, d, P
    (2, 3, 17, 32, 1),
    (2, 2, 63, 60, 2),
    (1, 2, 197, 64, 1),
    (1, 1, 197, 128, 1),
    (3, 2, 1, 32, 0),
    (2, 1, 2, 48, 0),
    (2, 2, 3, 72, 1),
    (1, 2, 5, 80, 5),
    (1, 2, 33, 96, 1),
    (1, 1, 300, 32, 10),  # more tokens than one program takes
    (1, 1, 577, 64, 1),
)
SINGLE = (  # H, N, d, P, dtype, heads apart in memory: shapes that only one test uses
    (1, 9, 32, 1, torch.float32, True),
    (2, 9, 32, 1, torch.float32, True),
    (2, 9, 72, 1, torch.float32, True),
    (3, 5, 16, 0, torch.float16, True),
    (1, 20, 32, 1, torch.float32, False),
    (2, 33, 32, 1, torch.float32, False),
    (2, 50, 32, 1, torch.float32, False),
    (2, 260, 32, 1, torch.float32, False),
    (2, 70, 60, 0, torch.float32, False),
)
MANY = (2, 600)  # numbers of images with which a program of match takes one tile, or all tiles
CHANNELS = (3, 6, 32, 48, 384, 1280)
STEMS = tuple(  # patch, image sides, dtype of the convolution, dtype of images and positions, prefix tokens, bias
    (patch, sides, *dtypes, *rest)
    for patch, sides in (((16, 16), (32, 48)), ((14, 14), (42, 14)), ((4, 8), (12, 24)))
    for dtypes in ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32))
    for rest in ((2, True), (0, False))
)
LAYERS = ((1, 16, 8), (130, 72, 264), (300, 64, 512))  # rows, channels in and out
LONG = {  # constants of kernels/assign.py with which images of a few tokens count as long
    "ONE_PROGRAM": 16,
    "JOINED": 16,
    "LONG_CONFIG": {"CHUNK": 16, "num_warps": 1},
}
Case = tuple[str, Callable[[], Any]]
Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # a kernel, its arguments by name, options (warps, stages)


def cases_of_tests() -> Iterator[Case]:
    """Every launch of ``tests/test_kernels.py``."""
    shapes = [(*shape, dtype, False) for (_, *shape), dtype in itertools.product(SHAPES, DTYPES)]
    for H, N, d, P, dtype, apart in (*shapes, *SINGLE):
        for grouping in GROUPINGS:
            yield match_case(H, N, d, P, grouping, dtype, apart)
        for bias, Nq in itertools.product((True, False), dict.fromkeys((N, 1))):
            yield attention_case(H, N, d, dtype, bias, Nq, apart)
            if N < 197:
                yield attention_backward_case(H, N, d, dtype, bias, Nq)
        yield from assign_cases(N, P)
    for grouping, B, dtype in itertools.product(GROUPINGS, MANY, DTYPES):
        yield match_case(2, 197, 32, 1, grouping, dtype, B=B)
    for P in range(6):
        yield from assign_cases(256, P)
    for N, P in ((17, 0), (20, 1), (50, 1), (50, 5)):
        for name, launch in assign_cases(N, P):
            yield f"long {name}", partial(_with_short_long_images, launch)
    for C, dtype in itertools.product(CHANNELS, DTYPES):
        yield from merge_cases(C, dtype)
    yield from (stem_case(40, *shape) for shape in STEMS)
    for (M, K, N), biased in itertools.product(LAYERS, (True, False)):
        yield linear_gelu_case(K, N, torch.float16, biased, M)
    for (x, attended), affine in itertools.product(itertools.product(DTYPES, repeat=2), (True, False)):
        yield from norm_cases(48, x, attended, affine)


def _with_short_long_images(launch: Callable[[], Any]) -> None:
    with patch.multiple(assign, **LONG):
        launch()


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def qkv(T: int, H: int, d: int, dtype: torch.dtype) -> Tensor:
    return tensor(T, 3, H, d, dtype=dtype).permute(1, 2, 0, 3)


IMAGES = tensor(3, dtype=torch.int32)  # where two images begin


def match_case(
    H: int, N: int, d: int, P: int, grouping: str, dtype: torch.dtype, apart: bool = False, B: int = 2
) -> Case:
    """A launch of match. ``apart``: each head has memory of its own; ``B``: images that share the multiprocessors."""
    keys = tensor(H, B * N, d, dtype=dtype) if apart else qkv(B * N, H, d, dtype)[1]
    sizes = tensor(B * N) if grouping == "by size" else None
    images = tensor(B + 1, dtype=torch.int32)
    launch = partial(match.match, keys, sizes, images, P, grouping != "alternate", 0.9, N)
    return f"match {B} x H={H} N={N} d={d} P={P} {grouping} {_named(dtype, apart)}", launch


def assign_cases(N: int, P: int) -> Iterator[Case]:
    """A launch of assign for each source of r: one r per image, one r for all, the mean, and a threshold."""
    pair, r = (tensor(2 * N), tensor(2 * N, dtype=torch.int32)), tensor(2, dtype=torch.int64)
    sources = {"r": (r, {}), "one r": (1, {}), "mean": (r, {"mean": True}), "threshold": (r, {"theta": 0.5})}
    for name, (r, options) in sources.items():
        yield f"assign N={N} P={P} {name}", partial(assign.assign, *pair, r, IMAGES, P, N, 2 * N, **options)


LISTS = (tensor(394, dtype=torch.int32), tensor(300, 2, dtype=torch.int32), IMAGES)


def merge_cases(C: int, dtype: torch.dtype) -> Iterator[Case]:
    x = tensor(394, C, dtype=dtype)
    for sizes in (tensor(394), None):
        yield f"merge C={C} {TYPES[dtype]}{_without(sizes)}", partial(merge.merge, x, sizes, *LISTS)
    yield f"unmerge C={C} {TYPES[dtype]}", partial(unmerge.unmerge, x, tensor(394, dtype=torch.int32))


def norm_cases(C: int, dtype: torch.dtype, of_attended: torch.dtype, affine: bool = True) -> Iterator[Case]:
    """Launches of merge and add_norm; ``dtype`` is that of x, ``of_attended`` that of attention's output."""
    x, attended = (tensor(394, C, dtype=dtype) for dtype in (dtype, of_attended))
    vector = tensor(C, dtype=dtype)
    norm = (vector, vector, 1e-6) if affine else (None, None, 1e-6)
    name = f"{'' if affine else 'bare '}norm C={C} {TYPES[dtype]} + {TYPES[of_attended]}"
    for gamma in (vector, None):
        fused, scaled = (attended, gamma, norm), "" if gamma is None else "scaled "
        yield f"{scaled}residual, merge, {name}", partial(merge.merge, x, tensor(394), *LISTS, *fused)
        yield f"{scaled}residual, {name}", partial(merge.add_norm, x, *fused)


def attention_case(H: int, N: int, d: int, dtype: torch.dtype, bias: bool, Nq: int, apart: bool = False) -> Case:
    q, k, v = (tensor(H, 2 * N, d, dtype=dtype) for _ in "qkv") if apart else qkv(2 * N, H, d, dtype)
    if Nq == 1:
        q = tensor(2, H, d, dtype=dtype).transpose(0, 1)
    sizes = tensor(2 * N) if bias else None
    launch = partial(attention.attention, q, k, v, sizes, IMAGES, IMAGES, Nq, N, 0.125)
    return f"attention H={H} N={N} d={d} queries={Nq} {_named(dtype, apart)}{_without(sizes)}", launch


def attention_backward_case(H: int, N: int, d: int, dtype: torch.dtype, bias: bool, Nq: int) -> Case:
    """A launch of the forward pass, which keeps what the backward pass needs, and of the backward pass."""
    q, k, v = qkv(2 * N, H, d, dtype)
    if Nq == 1:
        q = tensor(2, H, d, dtype=dtype).transpose(0, 1)
    sizes, Tq = tensor(2 * N) if bias else None, q.shape[1]
    out, lse = tensor(Tq, H, d, dtype=dtype).transpose(0, 1), tensor(Tq, H)

    def launch() -> None:
        attention.attention(q, k, v, sizes, IMAGES, IMAGES, Nq, N, 0.125, lse)
        attention_backward.attention_backward(out, q, k, v, sizes, IMAGES, IMAGES, out, lse, Nq, N, 0.125)

    return f"attention backward H={H} N={N} d={d} queries={Nq} {TYPES[dtype]}{_without(sizes)}", launch


def stem_case(
    C: int,
    patch: tuple[int, int],
    sides: tuple[int, int],
    dtype: torch.dtype,
    of_images: torch.dtype,
    prefix: int = 1,
    biased: bool = True,
) -> Case:
    weight, bias = (tensor(C, *shape, dtype=dtype) for shape in ((3, *patch), ()))
    N = prefix + sides[0] // patch[0] * (sides[1] // patch[1])
    images, position = (tensor(*shape, dtype=of_images) for shape in ((2, 3, *sides), (N, C)))
    launch = partial(stem.stem, images, weight, bias if biased else None, position)
    named = f"{patch[0]} x {patch[1]} {TYPES[dtype]} of {TYPES[of_images]}"
    return f"stem C={C} {named} {'prefix, bias' if biased else 'neither'}", launch


def linear_gelu_case(K: int, N: int, dtype: torch.dtype, biased: bool = True, M: int = 50000) -> Case:
    bias = tensor(N, dtype=dtype) if biased else None
    launch = partial(linear_gelu.linear_gelu, tensor(M, K, dtype=dtype), tensor(N, K, dtype=dtype), bias)
    return f"linear_gelu {K} to {N} {TYPES[dtype]}{'' if biased else ' no bias'}", launch


def _named(dtype: torch.dtype, apart: bool) -> str:
    return TYPES[dtype] + (" heads apart" if apart else "")


def _without(sizes: Tensor | None) -> str:
    return " no sizes" if sizes is None else ""


def by_name(kernel: Any, arguments: Iterable[Any], keywords: dict[str, Any]) -> Launch:
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    options = {name: named.pop(name) for name in keywords if name not in kernel.arg_names}
    return kernel, named, options


def captured(launch: Callable[[], Any]) -> list[Launch]:
    """Record what a launcher launches, without running it."""
    seen = []

    def note(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **keywords: seen.append(by_name(kernel, arguments, keywords))

    with patch.object(type(merge.merge_kernel), "__getitem__", note):
        launch()
    return seen


def code(launch: Launch) -> tuple[Any, ...]:
    """What determines the compiled code of a launch, except for strides and alignment."""
    kernel, arguments, options = launch
    of_run = {
        "theta",
        "given",
        "T",
        "eps",
        "scale",
        "images",
        "rows",
        "M",
        "B",
        "h",
        "w",
        "N",
        *(name for name in arguments if "stride" in name),
    }
    tensors = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, value in arguments.items():
        if isinstance(value, TensorDescriptor):
            tensors[name] = (value.base.dtype, value.block_shape)
    others = {name: value for name, value in arguments.items() if name not in of_run or value is None}
    return kernel.__name__, *sorted((name, str(value)) for name, value in (others | tensors | options).items())
