"""Every kernel configuration compiles for its target chips without spills. Needs no GPU."""

import json
import os

import pytest

from benchmarks.pages import RESULTS
from processes import ROOT, Forking

KEYS = ("case", "kernel", "chip", "configuration", "code")
VERSIONS = ("3.6.0", "3.9.0")  # the oldest and the newest triton


@pytest.fixture(scope="module")
def python():
    """Run Python in another process, because in this one the kernels belong to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with Forking("timm", "timm.data", "benchmarks.launches", environment=environment) as forking:
        yield forking.python


@pytest.fixture(scope="module")
def rows_without_figures(python):
    code = """
import json
from benchmarks.offline_compile import described, jobs
print(json.dumps([described(job) for job in jobs()]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COMPILE = ("--once", "--chips", "sm_90", "--jobs", "1", "--json")
COMPILE_IN_A_FORK = """
import sys
from multiprocessing import get_context
from benchmarks import offline_compile
offline_compile.get_context = lambda _: get_context("fork")  # which imports nothing anew
sys.exit(offline_compile.main(sys.argv[1:]))
"""


def test_no_choice_of_tiles_warps_and_stages_spills(python, tmp_path):
    """With the Triton at hand, on one chip; the committed results of the oldest and the newest have all of them."""
    done = python("-m", "benchmarks.offline_compile", *COMPILE, tmp_path / "now.json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "now.json").read_text())
    now = document["rows"]
    assert all(row["fits"] and row["programs"] >= 1 for row in now)
    kept = [row | {"registers": 999} for row in now]
    kept[0]["code"] = "of another kernel"  # that row is compiled anew
    (tmp_path / "now.json").write_text(json.dumps(document | {"rows": kept}))
    done = python("-c", COMPILE_IN_A_FORK, "--keep", *COMPILE, tmp_path / "now.json")
    assert done.returncode == 0, done.stdout + done.stderr
    then = json.loads((tmp_path / "now.json").read_text())["rows"]
    assert then == [now[0], *kept[1:]]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_compiled_is_what_the_tables_say(version, rows_without_figures):
    """This notices a change of tiles, warps or stages alone. Every entry was compiled, and none spilled."""
    kept = json.loads((RESULTS / f"offline_compile_triton_{version}.json").read_text())
    assert kept["environment"]["triton"] == version
    told, now = ([{name: row[name] for name in KEYS} for row in rows] for rows in (kept["rows"], rows_without_figures))
    assert told == now
    assert all(row["fits"] and row["programs"] >= 1 for row in kept["rows"])


def test_the_digest_of_a_kernel_s_code_covers_all_that_it_calls(python):
    """Kernels call functions and read constants only from modules that the digest covers."""
    code = """
import importlib
from pathlib import Path
import triton.language as tl
from triton.runtime.jit import JITFunction
from benchmarks.kept_rows import covered
import atm_triton.kernels as kernels
for path in Path(kernels.__file__).parent.glob("*.py"):
    if path.stem != "__init__":
        module = importlib.import_module(f"atm_triton.kernels.{path.stem}")
        code = covered(path)
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                assert f"def {name} (" in code, (path, name)
            if isinstance(value, tl.constexpr):
                assert name in code.split(), (path, name)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_what_is_compiled_is_what_triton_would_compile(python):
    """Numbers of rows and images stay arguments, even 1 and 16; None and strides divisible by 16 are compiled in."""
    code = """
from benchmarks.launches import *
from benchmarks.offline_compile import CHIPS, source
for target in (chip.target for chip in CHIPS.values()):
    for images in (1, 16):
        kernel, arguments, options = captured(dict(merge_cases(48, torch.float16))["merge C=48 fp16 no sizes"])[0]
        made = source(kernel, arguments | {"images": images}, options, target)
        at = kernel.arg_names.index
        assert made.signature["images"] == "i32" and (at("images"),) not in made.attrs
        assert made.signature["x"] == "*fp16" and made.attrs[at("x"),][0] == ["tt.divisibility", 16]
        assert made.constants[at("sizes"),] is None and made.constants[at("C"),] == 48
    kernel, arguments, options = captured(match_case(3, 17, 32, 1, "alternate", torch.float16)[1])[0]
    made = source(kernel, arguments, options, target)
    assert made.attrs[kernel.arg_names.index("stride_n"),] == [["tt.divisibility", 16]]
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_program_fits_a_workgroup_and_shared_memory(python):
    code = """
from benchmarks.offline_compile import CHIPS
for name, warps in (("gfx942", 16), ("sm_90", 32)):
    assert CHIPS[name].takes(65536, warps) and not CHIPS[name].takes(0, 2 * warps)
    assert not CHIPS[name].takes(300000, 1)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


BAD = [
    ("--jobs 0", "offline_compile: --jobs 0 is too small; give 1 or more\n"),
    (
        "--chips sm_90",
        "offline_compile: --chips sm_90: the results have all of them; give --json FILE for these alone\n",
    ),
    ("--json .", "offline_compile: --json . is a directory; name a file in it\n"),
    ("--triton 3.6.0 3.9", "offline_compile: --triton 3.9 is not a version; give one such as 3.6.0\n"),
    (
        "--triton 3.6.0 --json a.json",
        "offline_compile: --json names one file, --triton writes one a version; give one of them\n",
    ),
]


def test_bad_input(python):
    code = f"""
import contextlib, io, json
from benchmarks.offline_compile import main
for options in {[options for options, _ in BAD]}:
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(options.split())
    print(json.dumps([code, error.getvalue()]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[2, message] for _, message in BAD]


def test_a_triton_that_is_not_there(python):
    done = python("-m", "benchmarks.offline_compile", "--triton", "0.0.1", PIP_NO_INDEX="1")
    message = "--triton 0.0.1 cannot be installed: ERROR: No matching distribution found for triton==0.0.1"
    assert done.returncode == 2 and done.stderr == f"offline_compile: {message}\n"
    assert not list(ROOT.glob(".venv-triton-0.0.1"))
