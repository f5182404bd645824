"""README: every block runs, and every table is what the result files say."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import search
from atm_triton.cli import main
from benchmarks.readme import README, ROOT, filled
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


def test_the_first_example_saves_what_stands_below_it(capsys):
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    entering = [line.split()[1] for line in printed.splitlines()[1:13]]
    cost = re.search(r"([\d.]+) GFLOPs an image \(.*\) of ([\d.]+): ([\d.]+) % of the MACs saved", printed)
    said = re.search(
        r"Of the (\d+) tokens of an image, ([\d.]+) on average enter the last block; "
        r"it costs ([\d.]+) GFLOPs instead of ([\d.]+)\.",
        TEXT,
    )
    assert said.groups()[:2] == (entering[0], entering[-1])
    assert [f"{float(gflops):.2f}" for gflops in said.groups()[2:]] == list(cost.groups()[:2])
    assert float(cost[3]) > 50


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's directory: weights of a model, a folder of photos in three classes, and one of more."""
    place = tmp_path_factory.mktemp("place")
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), place / "mine.safetensors")
    for number in range(66):
        path = place / "photos" / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8).numpy()).save(path)
    shutil.copytree(place / "photos", place / "more")
    return place


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_run(line, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for name, value in {"DRAWS": 4, "KEPT": 2, "STEPS": 2, "FINALISTS": 2, "CURVES": 1, "BENDS": 2}.items():
        monkeypatch.setattr(search, name, value)  # a calibration in the small
    program, *arguments = shlex.split(line, comments=True)
    if program == "atm-triton":
        assert main(arguments) == 0
        assert capsys.readouterr().out
    elif program == "python":
        assert arguments[:2] == ["-m", "benchmarks.paper"]  # test_paper.py runs it
    elif program == "make":  # only that the target is there: it would run this very test
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert program == "pip"
        command = [sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_the_tables_are_the_result_files():
    for path, text in filled().items():
        assert path.read_text() == text, "run python -m benchmarks.report"


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(tests/[\w/]+\.py)`", TEXT):
        assert Path(ROOT / name).exists(), name


def test_the_kinds_of_model_are_counted():
    assert f"{len(KINDS)} kinds of model" in TEXT
