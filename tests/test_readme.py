"""README: every block runs, and every table is what the result files say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from atm_triton.cli import main
from benchmarks.readme import README, ROOT, fill
from test_patch import KINDS

TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


def test_every_block_is_python_or_sh():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert len(PYTHON) >= 2 and len(LINES) >= 5


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_run(line, capsys):
    program, *arguments = shlex.split(line, comments=True)
    if program == "atm-triton":
        assert main(arguments) == 0
        assert capsys.readouterr().out
    elif program == "make":  # only that the target is there: it would run this very test
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert program == "pip"
        command = [sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_the_tables_are_the_result_files():
    assert fill(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(tests/[\w/]+\.py)`", TEXT):
        assert Path(ROOT / name).exists(), name


def test_the_kinds_of_model_are_counted():
    assert f"{len(KINDS)} kinds of model" in TEXT
