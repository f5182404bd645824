"""Which configuration of a kernel is the fastest on this chip: ``python -m benchmarks.gpu.tune attention --N 577``.

It times the configuration in the table beside the kernel and every other one worth trying, as CUDA graphs, and prints
them, the fastest first. Write the fastest into the table, with the chip that it was measured on.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from atm_triton import ops
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.kernels.assign import LONG_CONFIG, ONE_PROGRAM, assign, assign_table
from atm_triton.kernels.attention import attention, attention_table
from atm_triton.kernels.common import block_for
from atm_triton.kernels.match import WHOLE_IMAGE, match, match_image_table, match_tiles_table
from atm_triton.kernels.merge import Norm, add_norm, merge, rows_table
from atm_triton.kernels.stem import stem, stem_table
from atm_triton.kernels.unmerge import unmerge
from atm_triton.measure.models import check_device
from atm_triton.measure.provenance import environment
from atm_triton.packed import Images
from benchmarks.gpu.setting import qkv, some_sizes
from benchmarks.gpu.timing import median_us, replayed

Config = dict[str, int]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHOWN = 10  # configurations that are printed
NORM: Norm = (None, None, 1e-6)
PATCH, SIDE = 16, 14  # side of a patch in pixels, side of an image in patches
NUMBERS = {"B": (256, "images"), "N": (197, "tokens of an image"), "H": (6, "heads"), "d": (64, "channels of a head")}


class Inputs(NamedTuple):
    """B images of N tokens with x as rows [B N, H d], heads of d channels; ``r``: tokens that each image merges."""

    B: int
    N: int
    H: int
    d: int
    by_size: bool
    r: int
    x: Tensor
    keys: Tensor
    sizes: Tensor
    images: Images


class Tuning(NamedTuple):
    """``launch(config=...)``, the configuration in its table, and the others to try."""

    launch: Callable[..., Any]
    table: Config
    others: list[Config]


def every(**choices: Iterable[int]) -> list[Config]:
    """All combinations of the choices, as configurations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def of_attention(at: Inputs) -> Tuning:
    q, k, v = qkv(len(at.x), at.H, at.d, at.x.dtype, at.x.device)
    cu_seqlens = at.images.cu_seqlens
    launch = partial(attention, q, k, v, at.sizes.log2(), cu_seqlens, cu_seqlens, at.N, at.N, at.d**-0.5)
    tiles = (16, 32, 64) if at.x.dtype == torch.float32 else (32, 64, 128)
    others = every(ROWS=tiles, COLUMNS=tiles, STAGES=(1, 2, 3, 4), TAILS=(0, 1, 2, 3), num_warps=(4, 8))
    least = {
        4: 16,
        8: 32 if at.x.dtype == torch.float32 else 16,
    }  # triton 3.6 on an H200: pipelined, others read unmapped memory
    others = [one for one in others if one["COLUMNS"] >> max(one["TAILS"] - 1, 0) >= least[one["num_warps"]]]
    return Tuning(launch=launch, table=attention_table(at.x.dtype, at.d, at.N), others=others)


def of_match(at: Inputs) -> Tuning:
    launch = partial(match, at.keys, at.sizes, at.images.cu_seqlens, 1, at.by_size, 0.5, at.N)
    if at.N - 1 > WHOLE_IMAGE or at.d > 64:
        others = every(ROWS=(32, 64, 128), COLUMNS=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4))
        return Tuning(launch=launch, table=match_tiles_table(at.d), others=others)
    block = block_for(at.N // 2)
    others = every(ROWS=[n for n in (16, 32, 64, 128) if n <= block], HEADS=(2, 6, 12), num_warps=(2, 4, 8, 16))
    return Tuning(launch=launch, table=match_image_table(block, at.d, at.by_size, at.x.dtype, at.H), others=others)


def of_assign(at: Inputs) -> Tuning:
    similarity, partner, _ = match(at.keys, at.sizes, at.images.cu_seqlens, 1, False, 0.5, at.N)
    block, slots = block_for(at.N), at.B * (at.N - at.r)
    launch = partial(assign, similarity, partner, at.r, at.images.cu_seqlens, 1, at.N, slots)
    if at.N > ONE_PROGRAM:
        return Tuning(launch=launch, table=LONG_CONFIG, others=every(CHUNK=(1024, 2048, 4096), num_warps=(8, 16)))
    warps = [warps for warps in (1, 2, 4, 8, 16) if block <= 512 * warps]  # more tokens a warp take minutes to compile
    return Tuning(launch=launch, table=assign_table(block, search=True), others=every(num_warps=warps))


def of_merge(at: Inputs) -> Tuning:
    pairs = ops.match(at.keys, at.sizes, at.images, 1, False, 0.5, "triton")
    merging = ops.assign(pairs, at.r, at.images, 1, at.B * (at.N - at.r), True, "triton")
    lists = (merging.order, merging.spans, merging.images.cu_seqlens)
    return of_rows(partial(merge, at.x, at.sizes, *lists, at.x, None, NORM), at.x)


def of_add_norm(at: Inputs) -> Tuning:
    return of_rows(partial(add_norm, at.x, at.x, None, NORM), at.x)


def of_rows(launch: Callable[..., Any], x: Tensor) -> Tuning:
    C = x.shape[1]
    others = every(ROWS=[n for n in (1, 2, 4, 8, 16) if n * C <= 8192 or n == 1], num_warps=(1, 2, 4, 8))
    return Tuning(launch=launch, table=rows_table(x.dtype, C), others=others)


def of_unmerge(at: Inputs) -> Tuning:
    slots = torch.arange(len(at.x), dtype=torch.int32, device=at.x.device) // 2
    return of_rows(partial(unmerge, at.x, slots), at.x)


def of_stem(at: Inputs) -> Tuning:
    new, C = partial(torch.randn, dtype=at.x.dtype, device=at.x.device), at.x.shape[1]
    images, weight = new(at.B, 3, PATCH * SIDE, PATCH * SIDE), new(C, 3, PATCH, PATCH) / (3**0.5 * PATCH)
    sides = (32, 64) if at.x.dtype == torch.float32 else (64, 128, 256)
    others = every(ROWS=sides, COLUMNS=sides, DEPTH=(32, 64), STAGES=(2, 3, 4), num_warps=(4, 8))
    launch = partial(stem, images, weight, None, new(1 + SIDE**2, C))
    return Tuning(launch=launch, table=stem_table(at.x.dtype, wide=False, together=True), others=others)


KERNELS = {
    "match": of_match,
    "assign": of_assign,
    "merge": of_merge,
    "add_norm": of_add_norm,
    "unmerge": of_unmerge,
    "attention": of_attention,
    "stem": of_stem,
}


def inputs(args: argparse.Namespace) -> Inputs:
    B, N, H, d = (getattr(args, name) for name in NUMBERS)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.manual_seed(0)
    x, (_, keys, _) = torch.randn(B * N, H * d, dtype=dtype, device=device), qkv(B * N, H, d, dtype, device)
    return Inputs(
        B=B,
        N=N,
        H=H,
        d=d,
        by_size=args.by_size,
        r=N // 24,
        x=x,
        keys=keys,
        sizes=some_sizes(B * N, device),
        images=Images.of(B, N, device),
    )


def microseconds(launch: Callable[..., Any], config: Config, device: torch.device) -> float | None:
    """Time a configuration. None if it does not compile or does not fit the chip; other errors are raised."""
    try:
        return median_us(replayed(partial(launch, config=config), device), device)
    except (TritonError, RuntimeError) as error:
        if isinstance(error, TritonError) or "PassManager::run failed" in str(error):
            return None
        raise


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    for name in NUMBERS:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small; give 1 or more")
    check_device(args.device)
    if (args.device == "cpu") != ops.interpreting():
        raise ValueError(f"--device {args.device}: set TRITON_INTERPRET=1 for the CPU, and for it alone")
    at = inputs(args)
    launch, table, others = KERNELS[args.kernel](at)
    tried = [table, *(config for config in others if config != table)]
    times = [(microseconds(launch, config, at.x.device), config) for config in tried]
    ran = sorted((pair for pair in times if pair[0] is not None), key=lambda pair: pair[0])
    made = environment()
    where = f"{made['gpu'] or 'no GPU: interpreted'}, triton {made['triton']}"
    print(f"{args.kernel}: {len(ran)} of {len(tried)} configurations ran on {where}")
    if times[0][0] is None:
        print(f"the configuration in the table did not run: {table}")
    for place, (us, config) in enumerate(ran):
        if place < SHOWN or config == table:
            print(f"{us:10.1f} us  {config}{'  (in the table)' if config == table else ''}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=KERNELS)
    for name, (default, what) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}; default {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--by-size", action="store_true", help="match: group tokens by their sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: by Triton's interpreter")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return exit_code("benchmarks.gpu.tune", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
