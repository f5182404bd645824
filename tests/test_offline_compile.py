"""Every kernel configuration compiles for the chips it is meant for, without spills. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import RESULTS

KEYS = ("case", "kernel", "chip", "configuration")
ROOT = Path(__file__).parents[1]


def python(*arguments):
    """In a process of its own: here the kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def compile_all(*options):
    return python("-m", "benchmarks.offline_compile", *options)


def kept():
    return json.loads((RESULTS / "offline_compile.json").read_text())["rows"]


def test_no_choice_of_tiles_warps_and_stages_spills_on_any_chip(tmp_path):
    done = compile_all("--once", "--json", str(tmp_path / "now.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    now = json.loads((tmp_path / "now.json").read_text())["rows"]
    assert all(row["fits"] and row["programs"] >= 1 for row in now)


def test_what_was_compiled_is_what_the_tables_say():
    """Also where only tiles, warps or stages have changed; every entry was compiled, and nothing spilled."""
    code = """
import json
from benchmarks.offline_compile import described, jobs
print(json.dumps([described(job) for job in jobs()]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{name: row[name] for name in KEYS} for row in kept()]
    assert all(row["fits"] and row["programs"] >= 1 for row in kept())


def test_a_program_fits_a_workgroup_and_shared_memory():
    code = """
from benchmarks.offline_compile import CHIPS
for name, warps in (("gfx942", 16), ("sm_90", 32)):
    assert CHIPS[name].takes(65536, warps) and not CHIPS[name].takes(0, 2 * warps)
    assert not CHIPS[name].takes(300000, 1)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "offline_compile: --jobs 0 is too small; give 1 or more\n"),
        (["--json", "."], "offline_compile: --json . is a directory; name a file in it\n"),
    ],
)
def test_bad_input(options, message):
    done = compile_all(*options)
    assert done.returncode == 2 and done.stderr == message
