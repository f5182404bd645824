"""Every kernel configuration compiles for the chips it is meant for, without spills. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import RESULTS

ROOT = Path(__file__).parents[1]


def compile_all(*options):
    """In a process of its own: here the kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offline_compile", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_no_configuration_spills_on_any_chip(tmp_path):
    done = compile_all("--json", str(tmp_path / "now.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    now = json.loads((tmp_path / "now.json").read_text())["rows"]
    assert all(row["fits"] and row["programs"] >= 1 for row in now)
    kept = json.loads((RESULTS / "offline_compile.json").read_text())["rows"]
    keys = ("case", "kernel", "chip", "warps")
    assert [[row[key] for key in keys] for row in now] == [[row[key] for key in keys] for row in kept]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "offline_compile: --jobs 0 is too small; give 1 or more\n"),
        (["--json", "no/where.json"], "offline_compile: --json no/where.json: its directory does not exist\n"),
    ],
)
def test_bad_input(options, message):
    done = compile_all(*options)
    assert done.returncode == 2 and done.stderr == message
