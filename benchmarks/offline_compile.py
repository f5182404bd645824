"""Compile the kernels for real chips, without one: ``python -m benchmarks.offline_compile``.

The launchers are called on tensors without memory; what they would launch is compiled for every target instead, so what
is checked is what ships. No kernel may spill registers, nor want more shared memory than a chip has. Registers, shared
memory and how many programs fit a multiprocessor at once go to ``benchmarks/results/offline_compile.json``; this says
nothing about time.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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

from atm_triton.env import check_file, write_result
from atm_triton.errors import exit_code
from atm_triton.kernels import assign, attention, match, merge, unmerge

RESULT = Path(__file__).parent / "results" / "offline_compile.json"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Chip:
    """A target and what one of its multiprocessors has: shared memory in bytes for one program and for all, 32-bit
    registers (of AMD's, vector registers a lane of each of its 4 SIMDs), threads."""

    target: GPUTarget
    shared_program: int
    shared: int
    registers: int
    threads: int = 2048

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


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a launch for every configuration that the launchers choose from, in the common dtypes."""
    cu_seqlens = tensor(3, dtype=torch.int32)
    for d in (32, 60, 64, 128):
        for N in (65, 197, 577) if d == 64 else (197,):
            for grouping in ("alternate", "size") if d in (64, 128) else ("alternate",):
                keys = qkv(2, 6, N, d, torch.bfloat16)[1]
                sizes, by_size = tensor(2, N), grouping == "size"
                name = f"match N={N} d={d} {grouping}"
                yield name, lambda k=keys, s=sizes, b=by_size: match.match(k, s, 1, b, 0.9)
    keys = qkv(1, 6, 394, 64, torch.bfloat16)[1]
    yield "match N=197 d=64 packed", lambda: match.match(keys, None, 1, False, 0.9, cu_seqlens, 197)
    keys32 = qkv(2, 6, 197, 64, torch.float32)[1]
    yield "match N=197 d=64 float32", lambda: match.match(keys32, None, 1, False, 0.9)
    for N in (65, 197, 577, 1370):
        s, p = tensor(2, N), tensor(2, N, dtype=torch.int32)
        yield f"assign N={N}", lambda s=s, p=p: assign.assign(s, p, 8, 1)
    s, p, r = tensor(1, 394), tensor(1, 394, dtype=torch.int32), tensor(2, dtype=torch.int64)
    yield "assign N=197 packed", lambda: assign.assign(s, p, r, 1, cu_seqlens, 197)
    yield "lists", lambda: assign.lists(tensor(2, 577, dtype=torch.int32), 500)
    tokens, spans = tensor(394, dtype=torch.int32), tensor(300, 2, dtype=torch.int32)
    for C in (192, 384, 768, 1024, 1280):
        x, vector = tensor(394, C, dtype=torch.bfloat16), tensor(C, dtype=torch.bfloat16)
        norm = (vector, vector, 1e-6)
        yield f"merge C={C}", lambda x=x: merge.merge(x, tensor(394), tokens, spans)
        yield (
            f"residual, merge, norm C={C}",
            lambda x=x, v=vector, n=norm: merge.merge(x, tensor(394), tokens, spans, x, v, n),
        )
    rows, slots = tensor(2, 189, 384, dtype=torch.bfloat16), tensor(2, 197, dtype=torch.int32)
    yield "unmerge C=384", lambda: unmerge.unmerge(rows, slots)
    for d in (32, 60, 64, 80, 128):
        for dtype in (torch.bfloat16, torch.float32) if d in (64, 128) else (torch.bfloat16,):
            q, k, v = qkv(2, 6, 197, d, dtype)
            for Nq in (197, 1):
                name = f"attention d={d} {str(dtype).removeprefix('torch.')} queries={Nq}"
                yield name, lambda q=q[:, :, :Nq], k=k, v=v: attention.attention(q, k, v, tensor(2, 197), 0.125)
    q, k, v = qkv(1, 6, 394, 64, torch.bfloat16)
    yield "attention d=64 packed", lambda: attention.attention(q, k, v, tensor(1, 394), 0.125, cu_seqlens, 197)


def captured(launch: Callable[[], Any]) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """What a launcher would launch: the kernel, its arguments by name, and the options (warps, stages)."""
    seen = []

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


def compile_case(name: str) -> list[dict[str, Any]]:
    """A row for every kernel of a case and every chip."""
    rows = []
    for chip_name, chip in CHIPS.items():
        attention.BACKEND = chip.target.backend
        for kernel, arguments, options in captured(dict(cases())[name]):
            compiled = triton.compile(source(kernel, arguments), target=chip.target, options=options)
            registers, spilled = usage(compiled)
            shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
            rows.append(
                {
                    "case": name,
                    "kernel": kernel.__name__,
                    "chip": chip_name,
                    "warps": warps,
                    "registers": registers,
                    "spilled": spilled,
                    "shared": shared,
                    "programs": chip.programs(registers, shared, warps),
                    "fits": spilled == 0 and shared <= chip.shared_program,
                }
            )
    return rows


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


def compile_all(jobs: int) -> list[dict[str, Any]]:
    names = [name for name, _ in cases()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        done = tqdm(pool.map(compile_case, names), total=len(names), desc="compile", unit="case", disable=None)
        return [row for rows in done for row in rows]


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
    rows = compile_all(args.jobs)
    print(table(rows))
    write_result(args.json, {"rows": rows})
    bad = [f"{row['case']} on {row['chip']}" for row in rows if not row["fits"]]
    if bad:
        raise ValueError(f"registers spill or shared memory is short: {', '.join(bad)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="the figures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    return exit_code("offline_compile", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
