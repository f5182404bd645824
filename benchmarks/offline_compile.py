"""Compile the kernels for real chips, without one: ``python -m benchmarks.offline_compile``.

The launchers are called on tensors without memory, and what they would launch is compiled for every target instead. So
this checks what ships and what the tests launch. No kernel may spill registers or need more shared memory than a chip
has. Registers, shared memory and the number of programs that fit a multiprocessor at once go to
``benchmarks/results/offline_compile_triton_<version>.json``, one file per version of Triton. Nothing is timed.

Every chip gets every entry of the tables beside the kernels and every launch of ``tests/test_kernels.py``. Parameters
that are compiled in but are not part of a table's key vary too: match takes bfloat16 with the heads of a token together
and, at 197 tokens, float32 with heads apart; merge and LayerNorm take each dtype and autocast's pairs; attention takes
each dtype with each layout. ``--full`` adds every dtype and layout of match.

``--keep`` takes rows, each with its commit, from the existing file if neither the kernel's code nor Triton's
specialisation of the launch has changed.

``--triton VERSION ...`` compiles under other versions of Triton, one after the other. Each is installed in an
environment of its own, ``.venv-triton-<version>``, which takes all other packages from this one.
"""

import argparse
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from tqdm import tqdm
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.kernels import attention
from atm_triton.kernels.linear_gelu import linear_gelu_kernel
from atm_triton.measure.provenance import check_file, environment, write_result
from benchmarks.kept_rows import code_of, digest, known_rows, named
from benchmarks.launches import (
    GROUPINGS,
    MANY,
    Case,
    Launch,
    assign_cases,
    attention_backward_case,
    attention_case,
    captured,
    cases_of_tests,
    linear_gelu_case,
    match_case,
    merge_cases,
    norm_cases,
    stem_case,
)

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / f"offline_compile_triton_{triton.__version__}.json"
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Chip:
    """A target and the resources of one multiprocessor: shared memory in bytes for one program and for all, 32-bit
    registers (on AMD: vector registers per lane of each of the 4 SIMDs), threads for all programs and for one."""

    target: GPUTarget
    shared_program: int
    shared: int
    registers: int
    threads: int = 2048
    workgroup: int = 1024

    def takes(self, shared: int, warps: int) -> bool:
        """Whether a single program can run at all."""
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


MOVES_TENSORS = ("sm_90", "sm_100")  # they have tensor memory accelerators

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AUTOCAST = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))  # dtypes of x and of attention's output
DIMENSIONS = (32, 48, 60, 64, 72, 80, 96, 128)
TILES = (
    "BLOCK",
    "D",
    "ROWS",
    "COLUMNS",
    "CHUNK",
    "TOKENS",
    "STAGES",
    "TAILS",
    "PER",
    "HEADS",
    "PARTS",
    "PART",
)
KINDS = (  # dtype, heads apart in memory: each value occurs; --full takes all combinations
    (torch.bfloat16, False),
    (torch.float32, True),
)
EVERY_KIND = tuple(itertools.product(DTYPES, (False, True)))


def cases(full: bool = False) -> Iterator[Case]:
    """Yield a name and a launch for every entry of the tables beside the kernels, with different values of what else is
    compiled in (``full``: all combinations), then for every launch of the tests."""
    yield from match_table_cases(EVERY_KIND if full else KINDS)
    for grouping, B in itertools.product(GROUPINGS, MANY):  # more heads than are loaded at once
        yield match_case(12, 197, 64, 1, grouping, torch.bfloat16, B=B)
    for n in range(3, 14):  # N that are rounded up to each power of two
        yield from assign_cases(2**n + 1, 1)
    for C, dtype in itertools.product((192, 384, 768, 1024, 1280), DTYPES):
        yield from merge_cases(C, dtype)
        yield from norm_cases(C, dtype, dtype)
    for dtypes in AUTOCAST:
        yield from norm_cases(768, *dtypes)
    types = (torch.bfloat16, torch.float32)  # the tests' launches have float16
    for dtype, d, apart, bias, Nq in itertools.product(types, DIMENSIONS, (False, True), (True, False), (197, 577, 1)):
        yield attention_case(6, max(197, Nq), d, dtype, bias, Nq, apart)
    for dtype, d, bias, Nq in itertools.product(types, DIMENSIONS, (True, False), (197, 1)):
        yield attention_backward_case(6, 197, d, dtype, bias, Nq)
    for C, side in itertools.product((384, 768), (16, 14)):
        of_images = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
        yield from (stem_case(C, (side,) * 2, (14 * side,) * 2, *pair) for pair in of_images.items())
    for C, ratio, dtype in itertools.product((192, 384, 768, 1024, 1280), (3, 4), (torch.bfloat16, torch.float16)):
        yield linear_gelu_case(C, ratio * C, dtype)
    yield from ((f"test: {name}", launch) for name, launch in cases_of_tests())


def match_table_cases(kinds: Iterable[tuple[torch.dtype, bool]]) -> Iterator[Case]:
    """Launches of match. The values of N give groups of up to 16, 32, 64 and 128 tokens, and larger ones."""
    for N, d, grouping, kind in itertools.product((33, 65, 129, 197, 577), DIMENSIONS, GROUPINGS, kinds):
        if N < 577 and d > 64:
            continue
        if kinds is EVERY_KIND or kind == KINDS[0] or N == 197:  # a second kind where registers are scarcest
            for B in MANY if N in (129, 197) else (2,):
                yield match_case(6, N, d, 1, grouping, *kind, B=B)


def captured_for(chip: str, launch: Callable[[], Any]) -> list[Launch]:
    """Record what a launcher would launch on this chip."""
    attention.BACKEND = CHIPS[chip].target.backend
    return captured(launch)


def specialised(
    kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], target: GPUTarget
) -> tuple[dict[str, Any], list[tuple[str, Any]], dict[str, Any]]:
    """Let Triton bind a launch: all arguments, the type and specialisation of each, and the options. Triton looks up a
    compiled kernel by the specialisations and the options."""
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    return binder(**arguments, **options)


def source(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], target: GPUTarget) -> ASTSource:
    """The source that Triton would compile for a launch with these arguments."""
    bound = specialised(kernel, arguments, options, target)
    _, signature, constants, attributes = kernel._pack_args(make_backend(target), options, *bound)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def configuration(arguments: dict[str, Any], options: dict[str, Any], names: Iterable[str]) -> str:
    """The arguments in ``names`` that a launch has, and its options, in one line."""
    chosen = {name: arguments[name] for name in names if name in arguments}
    return " ".join(f"{name}={value}" for name, value in (chosen | options).items())


def jobs(full: bool = False, once: bool = False, chips: Iterable[str] = tuple(CHIPS)) -> list[tuple[str, str, int]]:
    """Case, chip and index of every launch that compiles to different code; ``once``: of every launch with different
    tiles, warps or stages."""
    kept: dict[Any, tuple[str, str, int]] = {}
    for name, launch in cases(full):
        for chip in chips:
            for index, (kernel, arguments, options) in enumerate(captured_for(chip, launch)):
                if kernel is linear_gelu_kernel and chip not in MOVES_TENSORS:
                    continue
                key: tuple = (configuration(arguments, options, TILES),)
                if not once:
                    key += (str(specialised(kernel, arguments, options, CHIPS[chip].target)[1]),)
                kept.setdefault((kernel.__name__, chip, *key), (name, chip, index))
    return list(kept.values())


@cache
def every_case() -> dict[str, Callable[[], Any]]:
    return dict(cases(full=True))


def described(job: tuple[str, str, int]) -> dict[str, Any]:
    """The row of a job without its figures: what would be compiled."""
    name, chip, index = job
    kernel, arguments, options = captured_for(chip, every_case()[name])[index]
    constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    configured = configuration(arguments, options, constants)
    made = str(specialised(kernel, arguments, options, CHIPS[chip].target)[1])
    row = {"case": name, "kernel": kernel.__name__, "chip": chip, "configuration": configured}
    return row | {"launch": digest(made), "code": code_of(kernel.fn.__code__.co_filename)}


def compile_job(job: tuple[str, str, int]) -> dict[str, Any]:
    """Compile one launch for one chip and return its row."""
    name, chip_name, index = job
    chip = CHIPS[chip_name]
    kernel, arguments, options = captured_for(chip_name, every_case()[name])[index]
    compiled = triton.compile(source(kernel, arguments, options, chip.target), target=chip.target, options=options)
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
    """Registers per thread, and what is spilled: bytes of stack (NVIDIA) or vector registers (AMD)."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return tuple(int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def compile_all(processes: int, full: bool, once: bool, chips: list[str], kept: Path | None) -> list[dict[str, Any]]:
    every = jobs(full, once, chips)
    known = {} if kept is None else known_rows(kept)
    rows = [known.get(named(described(job))) for job in every]
    todo = [job for job, row in zip(every, rows, strict=True) if row is None]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        done = pool.map(compile_job, todo, chunksize=4)
        new = iter(list(tqdm(done, total=len(todo), desc="compile", unit="kernel", disable=None)))
    commit = environment()["commit"]
    return [row or next(new) | {"commit": commit} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each case and kernel: registers / KiB of shared memory / programs per multiprocessor, by chip."""
    chips = [chip for chip in CHIPS if any(row["chip"] == chip for row in rows)]
    lines = [f"{'':58}" + "".join(f"{chip:>15}" for chip in chips)]
    for key in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        cells = dict.fromkeys(chips, "")
        for row in (row for row in rows if (row["case"], row["kernel"]) == key):
            cell = f"{row['registers']}/{row['shared'] / 1024:.0f}/{row['programs']}"
            cells[row["chip"]] = cell if row["fits"] else f"{cell}!"
        lines.append(f"{key[0] + ': ' + key[1]:58}" + "".join(f"{cell:>15}" for cell in cells.values()))
    lines.append("registers a thread / KiB shared / programs at once on a multiprocessor; !: does not fit")
    return "\n".join(lines)


def interpreter(version: str) -> Path:
    """Make an environment with that version of Triton and all other packages of this one; return its Python."""
    directory = ROOT / f".venv-triton-{version}"
    python = directory / "bin" / "python"
    _call(sys.executable, "-m", "venv", directory)
    try:
        _call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"triton=={version}", "numpy")
    except ValueError as error:
        shutil.rmtree(directory)
        raise ValueError(f"--triton {version} cannot be installed: {error}") from error
    packages = sysconfig.get_path("purelib", "venv", {"base": str(directory)})
    Path(packages, "running.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # searched after its own packages
    running, file, *_ = _call(python, "-c", "import triton; print(triton.__version__, triton.__file__)").split()
    if running != version or directory not in Path(file).parents:
        raise ValueError(f"--triton {version}: its environment finds triton {running} in {file}; unset PYTHONPATH")
    return python


def _call(*command: str | Path) -> str:
    """Run a command and return its output. If it fails, its last line becomes a ValueError."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip() or f"{command[0]} ended with {done.returncode}").splitlines()[-1])
    return done.stdout


def run_under(versions: list[str], options: list[str]) -> None:
    """Run this program under each version of Triton. All versions are installed before the first run."""
    for version in versions:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise ValueError(f"--triton {version} is not a version; give one such as 3.6.0")
    pythons = {version: interpreter(version) for version in versions}
    failed = []
    for version, python in pythons.items():
        command = [python, "-m", "benchmarks.offline_compile", "--triton", version, *options]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(version)
    if failed:
        raise ValueError(f"failed under triton {', '.join(failed)}; see the errors above")


def run(args: argparse.Namespace) -> None:
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} is too small; give 1 or more")
    if args.triton and args.json:
        raise ValueError("--json names one file, --triton writes one a version; give one of them")
    if args.json is None and set(args.chips) < set(CHIPS):
        raise ValueError(
            f"--chips {' '.join(args.chips)}: the results have all of them; give --json FILE for these alone"
        )
    if args.triton not in (None, [triton.__version__]):
        switches = [f"--{name}" for name in ("full", "once", "keep") if getattr(args, name)]
        run_under(args.triton, ["--jobs", str(args.jobs), *switches])
        return
    result = args.json or RESULT
    check_file("--json", result)
    rows = compile_all(args.jobs, args.full, args.once, args.chips, result if args.keep else None)
    print(table(rows))
    write_result(result, {"rows": rows})
    bad = [f"{row['case']} on {row['chip']}" for row in rows if not row["fits"]]
    if bad:
        raise ValueError(f"registers spill or shared memory is short: {', '.join(bad)}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="the figures; default: a file of the results for this Triton")
    parser.add_argument("--full", action="store_true", help="all dtypes with heads together and apart: hours")
    parser.add_argument("--once", action="store_true", help="every choice of tiles, warps and stages once: minutes")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="for these alone")
    parser.add_argument("--keep", action="store_true", help="compile only what differs from the file that is there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--triton", nargs="+", metavar="VERSION", help="under these versions, which are installed")
    args = parser.parse_args(argv)
    return exit_code("offline_compile", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
