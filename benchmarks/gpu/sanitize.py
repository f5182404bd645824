"""Sanitizer: every kernel at small, odd shapes under NVIDIA's memcheck and racecheck, where they are installed.

Run as a script it is the program under check: ``python -m benchmarks.gpu.sanitize cuda``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import StageError
from benchmarks.gpu.host import OURS
from benchmarks.gpu.parity import Case, check_case
from benchmarks.gpu.setting import Setting

TOOLS = ("memcheck", "racecheck")
FOUND = "found in our kernels"
CASES = tuple(
    Case(3, *shape, dtype, by_size, differ=by_size)
    for shape in ((33, 2, 20), (70, 2, 72), (300, 1, 64))  # N, H, d; two of them need more than one launch
    for dtype, by_size in ((torch.float32, True), (torch.float16, True), (torch.float16, False))
)
ROOT = Path(__file__).parents[2]


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    if not setting.on_gpu:
        launch_all(setting.device)
        section["tools"] = dict.fromkeys(TOOLS, "needs a GPU; ran without it")
        return
    program = find()
    if program is None:
        section["tools"] = dict.fromkeys(TOOLS, "not installed")
        return
    section["program"] = program
    launch_all(setting.device)  # compile and cache the kernels first: the tools slow the host down too
    torch.cuda.empty_cache()
    running = {tool: start(program, tool) for tool in TOOLS}
    section["tools"] = {tool: outcome(process, setting.left()) for tool, process in running.items()}
    wrong = [f"{tool}: {said}" for tool, said in section["tools"].items() if said.startswith(FOUND)]
    if wrong:
        raise StageError("; ".join(wrong))


def find() -> str | None:
    """The path of compute-sanitizer, from the PATH or the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [folder for home in homes if home for folder in (f"{home}/bin", f"{home}/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def start(program: str, tool: str) -> subprocess.Popen:
    checked = [sys.executable, "-m", "benchmarks.gpu.sanitize", "cuda"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a cached block hides bounds of tensors
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch starts with probes that fail
    command = [program, "--tool", tool, *options, *checked]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def outcome(process: subprocess.Popen, seconds: float) -> str:
    """One line on what a tool reported. It begins with ``FOUND`` if the tool found an error in a kernel of ours."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"not done after {seconds:.1f} s"
    return verdict(text, process.returncode)


def verdict(text: str, code: int) -> str:
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    last = " ".join(text.strip().splitlines()[-1:])[:200]
    if not summaries:
        return f"could not run: {last}"
    number = sum(int(count) for pair in summaries for count in pair if count)
    if number:
        lines = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
        ours = [line for line in lines if any(name in line for name in OURS)]
        first = " | ".join(ours[:2] or lines[1:3])[:300]
        return f"{FOUND} {number} errors: {first}" if ours else f"{number} errors in others' kernels: {first}"
    return "no errors" if code == 0 else f"could not run: exit code {code}, {last}"


def launch_all(device: torch.device) -> None:
    """Launch every kernel in every case; on a CPU only in small cases."""
    for case in CASES:
        if device.type == "cuda" or (case.dtype == torch.float32 and case.N < 50):
            check_case(case, device)


if __name__ == "__main__":
    launch_all(torch.device(sys.argv[1]))
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
