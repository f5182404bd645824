"""Compile the kernels for real chips, without one: ``python -m benchmarks.offline_compile``.

The launchers are called on tensors without memory; what they would launch is compiled for every target instead, so what
is checked is what ships. No kernel may spill registers, nor want more shared memory than a chip has. Registers, shared
memory and how many programs fit a multiprocessor at once go to ``benchmarks/results/offline_compile.json``; this says
nothing about time.
"""

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported
os.environ.pop("ATM_TRITON_AUTOTUNE", None)  # what is checked is what the tables say
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from atm_triton.command import Parser, exit_code
from atm_triton.env import check_file, write_result
from atm_triton.kernels import assign, attention, match, merge, unmerge

RESULT = Path(__file__).parent / "results" / "offline_compile.json"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Chip:
    """A target and what one of its multiprocessors has: shared memory in bytes for one program and for all, 32-bit
    registers (of AMD's, vector registers a lane of each of its 4 SIMDs), threads for all and for one."""

    target: GPUTarget
    shared_program: int
    shared: int
    registers: int
    threads: int = 2048
    workgroup: int = 1024

    def takes(self, shared: int, warps: int) -> bool:
        """Whether one program can run at all."""
        return shared <= self.shared_program and warps * self.target.warp_size <= self.workgroup

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """How many programs fit a multiprocessor at once, by registers, shared memory and threads."""
        by_threads = self.threads // (warps * self.target.warp_size)
        by_shared = self.shared // shared if shared else by_threads
        if self.target.backend == "hip":
            by_registers = 4 * (self.registers // max(registers, 1)) // warps
        else:
            by_registers = self.registers // (warps * 256 * math.ceil(registers * 32 / 256))
        return min(by_threads, by_shared, by_registers)


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, 167936, 65536),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, 233472, 65536),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, 233472, 65536),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, 65536, 512),
}


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def qkv(B: int, H: int, N: int, d: int, dtype: torch.dtype) -> Tensor:
    return tensor(B, N, 3, H, d, dtype=dtype).permute(2, 0, 3, 1, 4)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMENSIONS = (32, 48, 60, 64, 72, 80, 96, 128)
TILES = ("BLOCK", "BLOCK_C", "D", "ROWS", "COLUMNS", "CHUNK", "TOKENS", "TILE", "STAGES")
GROUPINGS = ("alternate", "by size", "halves")  # halves: by size, where no size is known
KINDS = (  # dtype, packed, heads apart in memory: every entry of a table with each value; --full: with all together
    (torch.bfloat16, False, False),
    (torch.float32, True, True),
)
EVERY_KIND = tuple(itertools.product(DTYPES, (False, True), (False, True)))
CU_SEQLENS = tensor(3, dtype=torch.int32)
Case = tuple[str, Callable[[], Any]]


def cases(full: bool = False) -> Iterator[Case]:
    """A name and a launch for every entry of the tables beside the kernels: all their keys, and what else a kernel is
    compiled for; ``full``: all combinations of that."""
    kinds = EVERY_KIND if full else KINDS
    yield from match_cases(kinds)
    yield from assign_cases()
    yield from merge_cases()
    yield from attention_cases(kinds)


def match_cases(kinds: Iterable[tuple[torch.dtype, bool, bool]]) -> Iterator[Case]:
    """N: groups of up to 16, 32, 64 and 128 tokens, and two launches."""
    for N, d, grouping, kind in itertools.product((33, 65, 129, 197, 577), DIMENSIONS, GROUPINGS, kinds):
        dtype, packed, apart = kind
        if N < 577 and d > 64:
            continue
        if kinds is EVERY_KIND or kind == KINDS[0] or N == 197:  # a second kind where registers are scarcest
            B, T = (1, 2 * N) if packed else (2, N)
            keys = tensor(B, 6, T, d, dtype=dtype) if apart else qkv(B, 6, T, d, dtype)[1]
            sizes = tensor(B, T) if grouping == "by size" else None
            images = (CU_SEQLENS, N) if packed else ()
            arguments = (keys, sizes, 1, grouping != "alternate", 0.9, *images)
            yield f"match N={N} d={d} {grouping} {named(*kind)}", partial(match.match, *arguments)


def assign_cases() -> Iterator[Case]:
    """N: every power of two that the next is rounded to."""
    for N in (9, *(2**n + 1 for n in range(4, 14))):
        counts = tensor(2, dtype=torch.int64)
        for name, B, r, images in (
            ("one r", 2, 8, ()),
            ("to packed", 2, counts, ()),
            ("packed", 1, counts, (CU_SEQLENS, N)),
        ):
            shape = (B, 2 * N // B)
            pair = tensor(*shape), tensor(*shape, dtype=torch.int32)
            yield f"assign N={N} {name}", partial(assign.assign, *pair, r, 1, *images)
    yield "lists", partial(assign.lists, tensor(2, 577, dtype=torch.int32), 500)
    yield "lists to packed", partial(assign.lists, tensor(2, 577, dtype=torch.int32), 1000, None, CU_SEQLENS)
    yield "lists packed", partial(assign.lists, tensor(1, 1154, dtype=torch.int32), 1000, CU_SEQLENS, CU_SEQLENS, 577)


def merge_cases() -> Iterator[Case]:
    tokens, spans = tensor(394, dtype=torch.int32), tensor(300, 2, dtype=torch.int32)
    for C, dtype in itertools.product((192, 384, 768, 1024, 1280), DTYPES):
        x, vector, name = tensor(394, C, dtype=dtype), tensor(C, dtype=dtype), f"C={C} {TYPES[dtype]}"
        rows, slots = tensor(2, 189, C, dtype=dtype), tensor(2, 197, dtype=torch.int32)
        fused = (x, vector, (vector, vector, 1e-6))
        yield f"merge {name}", partial(merge.merge, x, tensor(394), tokens, spans)
        yield f"residual, merge, norm {name}", partial(merge.merge, x, tensor(394), tokens, spans, *fused)
        yield f"unmerge {name}", partial(unmerge.unmerge, rows, slots)


def attention_cases(kinds: Iterable[tuple[torch.dtype, bool, bool]]) -> Iterator[Case]:
    """One query and all of them, dense and packed, in all dtypes; heads apart as in ``kinds``."""
    layouts = [(False, False), (True, False), *dict.fromkeys(kind[1:] for kind in kinds if kind[2])]
    for dtype, d, (packed, apart), bias, Nq in itertools.product(DTYPES, DIMENSIONS, layouts, (True, False), (197, 1)):
        if bias or packed:  # dense and without sizes torch's own attention computes
            B, T = (1, 394) if packed else (2, 197)
            q, k, v = (tensor(B, 6, T, d, dtype=dtype) for _ in "qkv") if apart else qkv(B, 6, T, d, dtype)
            if Nq == 1:
                q = tensor(2, 1, 6, d, dtype=dtype).transpose(1, 2)
            images = (CU_SEQLENS, 197) if packed else ()
            name = f"attention d={d} queries={Nq} {named(dtype, packed, apart)}{'' if bias else ' no sizes'}"
            yield name, partial(attention.attention, q, k, v, tensor(B, T) if bias else None, 0.125, *images)


def named(dtype: torch.dtype, packed: bool, apart: bool) -> str:
    return TYPES[dtype] + (" packed" if packed else "") + (" heads apart" if apart else "")


def captured(launch: Callable[[], Any], chip: str) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """What a launcher would launch: the kernel, its arguments by name, and the options (warps, stages)."""
    seen = []
    attention.BACKEND = CHIPS[chip].target.backend

    def note(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        named = dict(zip(self.arg_names, arguments, strict=False))
        named |= {name: value for name, value in keywords.items() if name in self.arg_names}
        seen.append((self, named, {name: value for name, value in keywords.items() if name not in self.arg_names}))

    run, JITFunction.run = JITFunction.run, note
    try:
        launch()
    finally:
        JITFunction.run = run
    return seen


def source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The kernel specialised as a launch with these arguments would: integers of 1 and None are constants, pointers and
    integers divisible by 16 say so."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def configuration(arguments: dict[str, Any], options: dict[str, Any], names: Iterable[str]) -> str:
    """Those of the ``names`` that a launch has, and its options, in one line."""
    chosen = {name: arguments[name] for name in names if name in arguments}
    return " ".join(f"{name}={value}" for name, value in (chosen | options).items())


def jobs(full: bool = False, once: bool = False) -> list[tuple[str, str, int]]:
    """Case, chip and number of every launch that compiles to code of its own; ``once``: to tiles, warps and stages of
    its own."""
    found: dict[Any, tuple[str, str, int]] = {}
    for name, launch in cases(full):
        for chip in CHIPS:
            for index, (kernel, arguments, options) in enumerate(captured(launch, chip)):
                key: tuple = (configuration(arguments, options, TILES),)
                if not once:
                    code = source(kernel, arguments)
                    key += tuple(map(str, (code.signature, code.constants, code.attrs)))
                found.setdefault((kernel.__name__, chip, *key), (name, chip, index))
    return list(found.values())


@cache
def case(name: str) -> Callable[[], Any]:
    return dict(cases(full=True))[name]


def described(job: tuple[str, str, int]) -> dict[str, Any]:
    """What is compiled: a row without figures."""
    name, chip, index = job
    kernel, arguments, options = captured(case(name), chip)[index]
    constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    configured = configuration(arguments, options, constants)
    return {"case": name, "kernel": kernel.__name__, "chip": chip, "configuration": configured}


def compile_job(job: tuple[str, str, int]) -> dict[str, Any]:
    """The row of one launch on one chip."""
    name, chip_name, index = job
    chip = CHIPS[chip_name]
    kernel, arguments, options = captured(case(name), chip_name)[index]
    compiled = triton.compile(source(kernel, arguments), target=chip.target, options=options)
    registers, spilled = usage(compiled)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return described(job) | {
        "warps": warps,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "programs": chip.programs(registers, shared, warps),
        "fits": spilled == 0 and chip.takes(shared, warps),
    }


def usage(compiled: Any) -> tuple[int, int]:
    """Registers a thread, and what is spilled: bytes of stack (NVIDIA), vector registers (AMD)."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return tuple(int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def compile_all(processes: int, full: bool, once: bool) -> list[dict[str, Any]]:
    todo = jobs(full, once)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        done = pool.map(compile_job, todo, chunksize=4)
        return list(tqdm(done, total=len(todo), desc="compile", unit="kernel", disable=None))


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel and case: registers / KiB of shared memory / programs a multiprocessor, chip by chip."""
    lines = [f"{'':58}" + "".join(f"{chip:>15}" for chip in CHIPS)]
    for key in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        cells = []
        for row in (row for row in rows if (row["case"], row["kernel"]) == key):
            cell = f"{row['registers']}/{row['shared'] / 1024:.0f}/{row['programs']}"
            cells.append(cell if row["fits"] else f"{cell}!")
        lines.append(f"{key[0] + ': ' + key[1]:58}" + "".join(f"{cell:>15}" for cell in cells))
    lines.append("registers a thread / KiB shared / programs at once on a multiprocessor; !: does not fit")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    check_file("--json", args.json)
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} is too small; give 1 or more")
    rows = compile_all(args.jobs, args.full, args.once)
    print(table(rows))
    write_result(args.json, {"rows": rows})
    bad = [f"{row['case']} on {row['chip']}" for row in rows if not row["fits"]]
    if bad:
        raise ValueError(f"registers spill or shared memory is short: {', '.join(bad)}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="the figures")
    parser.add_argument("--full", action="store_true", help="all dtypes, packed or not, heads together or apart: hours")
    parser.add_argument("--once", action="store_true", help="every choice of tiles, warps and stages once: minutes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    return exit_code("offline_compile", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
