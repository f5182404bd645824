"""README and docs: every block runs, every table is what the result files say, every link leads somewhere."""

import ast
import doctest
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import block, config, reference
from atm_triton.calibration import calibrate, search
from atm_triton.cli import commands, main
from benchmarks.pages import README, ROOT, filled
from test_patch import KINDS

PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, *sorted((ROOT / "benchmarks/results").glob("*.md"))]
BLOCKS = [
    (f"{page.stem}-{number}", language, code)
    for page in PAGES
    for number, (language, code) in enumerate(
        re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )
]
PYTHON = {  # tests/integration/test_onnx.py runs blocks that need onnx
    name: code for name, language, code in BLOCKS if language == "python" and "onnx" not in code
}
SHELL = [(name.rpartition("-")[0], code.splitlines()) for name, language, code in BLOCKS if language == "sh"]


def test_every_block_is_python_or_sh():
    assert {language for _, language, _ in BLOCKS} == {"python", "sh"}
    assert len(PYTHON) >= 4 and sum(len(lines) for _, lines in SHELL) >= 10


def test_readme_is_read_in_two_minutes():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", dict.fromkeys(name.rpartition("-")[0] for name in PYTHON))
def test_python_blocks_run(page):
    """Blocks of a page run one after the other."""
    names = {}
    for name, code in PYTHON.items():
        if name.rpartition("-")[0] == page:
            exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize("module", [block, config, reference])
def test_examples_in_docstrings_run(module):
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted and not outcome.failed


def test_the_first_example_saves_what_stands_below_it(capsys):
    exec(compile(PYTHON["README-1"], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    entering = [line.split()[1] for line in printed.splitlines()[1:13]]
    cost = re.search(r"([\d.]+) GFLOPs per image \(.*\); unmerged ([\d.]+): ([\d.]+) % of the MACs saved", printed)
    said = re.search(
        r"An image costs ([\d.]+) GFLOPs instead of ([\d.]+): of its (\d+) tokens, "
        r"([\d.]+) on average enter the last block\.",
        README.read_text(),
    )
    assert said.groups()[2:] == (entering[0], entering[-1])
    assert [f"{float(gflops):.2f}" for gflops in said.groups()[:2]] == list(cost.groups()[:2])
    assert float(cost[3]) > 50


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's directory with a model's weights, a folder of photos in three classes, and a folder of more photos."""
    place = tmp_path_factory.mktemp("place")
    save_file(timm.create_model("deit_tiny_patch16_224", num_classes=3).state_dict(), place / "mine.safetensors")
    for number in range(66):
        path = place / "photos" / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8).numpy()).save(path)
    shutil.copytree(place / "photos", place / "more")
    return place


@pytest.fixture
def small_runs(monkeypatch):
    """Calibrate by a small search and evaluate on few images."""
    for name, value in {"LEVELS": (1 / 4,), "CURVES": ((0.5, 6.0),), "STEPS": 1}.items():
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(calibrate, "MOST", {"fit": 8, "choose": 8})
    open_images = commands.open_images

    def few(model, data, split, limit, *arguments, dealt=False, **options):
        if dealt:  # as an evaluation does; a calibration needs them all
            limit = 16 if limit is None else min(limit, 16)
        return open_images(model, data, split, limit, *arguments, dealt=dealt, **options)

    monkeypatch.setattr(commands, "open_images", few)


@pytest.mark.parametrize("page", dict.fromkeys(page for page, _ in SHELL))
def test_shell_lines_run(page, place, capsys, monkeypatch, small_runs):
    """Lines of a page run one after the other, because some read what earlier ones write; other pages do not."""
    monkeypatch.chdir(place)
    (place / "mine.json").unlink(missing_ok=True)
    for line in dict.fromkeys(line for other, lines in SHELL if other == page for line in lines):
        _run(line, capsys)


def _run(line, capsys):
    program, *arguments = shlex.split(line, comments=True)
    if program == "atm-triton":
        command, *options = arguments
        small = ["--batch-size", "1"] if command == "bench" else []
        assert main([command, *small, *options]) == 0
        assert capsys.readouterr().out
    elif program == "python":
        assert arguments[:2] == ["-m", "benchmarks.paper"]  # test_paper.py runs it
    elif program == "make":  # only check that the target exists: it would run this very test
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert program == "pip"
        command = [sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_the_tables_are_the_result_files():
    for path, text in filled().items():
        assert path.read_text() == text, "run python -m benchmarks.report"


@pytest.mark.parametrize("page", ALL, ids=[f"{page.parent.name}/{page.stem}" for page in ALL])
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{target}#{anchor}"
    for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_the_walk_names_what_is_there():
    """Each `file` `name` in the walk exists, and no step lacks one."""
    text = (ROOT / "docs/walk.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`\s`([\w.]+)`", text)
    assert len(named) >= 25 and text.count("\n| 1") + text.count("\n| 2") >= 7
    for path, name in named:
        body = ast.parse((ROOT / path).read_text()).body
        for part in name.split("."):
            (definition,) = (node for node in body if getattr(node, "name", None) == part)
            body = getattr(definition, "body", [])


def test_the_map_of_tests_names_every_file():
    """Also the reverse: what CONTRIBUTING names as a test exists."""
    named = re.findall(r"`(test_\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert set(named) == {path.name for path in (ROOT / "tests").glob("test_*.py")}


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/[^)#]+)\)", README.read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_kinds_of_model_are_counted():
    assert f"{len(KINDS)} kinds of model" in (ROOT / "docs/correctness.md").read_text()
