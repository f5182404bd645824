"""Several processes under torchrun, or in its environment, find what one finds and see every image once; a process that
dies is named."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from processes import python

HERE = Path(__file__).parent
MAIN = HERE.parent / "atm_triton" / "__main__.py"
EVAL = ["-m", "atm_triton", "eval", "--limit", "17", "--batch-size", "4", "--adapt"]


def torchrun(processes, script, *arguments):
    """The script runs in processes that torchrun forks: an import of torch in each would take seconds."""
    options = ["--standalone", "--nproc-per-node", processes, "--start-method", "fork", "--run-path", script]
    return python("-m", "torch.distributed.run", *options, *arguments)


def lines_of_ours(done):
    return [line for line in done.stderr.splitlines() if "atm-triton: " in line]


@pytest.mark.parametrize(("adapt", "more"), [("batch", [3]), ("image", [2]), ("image --dense", [2])])
def test_eval_gives_the_result_of_one_process(adapt, more, tmp_path):
    """17 images in 5 batches: the number of processes divides neither."""
    results = []
    for processes in (1, *more):
        out = tmp_path / f"{processes}.json"
        done = python(*EVAL, *adapt.split(), "--json", out, ranks=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("of the MACs saved") == 1  # only one process reports
        results.append(json.loads(out.read_text())["evaluation"])
    assert results[0]["overall"]["images"] == 17
    assert all(result == results[0] for result in results[1:])


@pytest.fixture
def folder(tmp_path):
    for number in range(24):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 255, (112, 112), dtype=torch.uint8).numpy()).save(path)
    return tmp_path / "photos"


def test_eval_of_a_folder(tmp_path, folder):
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        options = ["--data", folder, "--batch-size", "8", "--workers", "0", "--adapt", "image", "--json", out]
        done = python("-m", "atm_triton", "eval", *options, ranks=processes)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text())["evaluation"])
    assert results[0]["overall"]["images"] == 24 and results[0] == results[1]


def test_bad_input_of_one_process_is_one_line(folder):
    (folder / "a" / "20.png").write_text("no image")  # in the second batch, which the second process gets
    done = torchrun(2, MAIN, "eval", "--data", folder, "--batch-size", "8", "--workers", "0")
    assert done.returncode != 0
    (line,) = lines_of_ours(done)
    assert line.startswith("atm-triton: ") and "20.png is not a readable image" in line


def test_a_process_without_a_batch():
    done = python("-m", "atm_triton", "eval", "--limit", "5", "--batch-size", "8", ranks=2)
    assert done.returncode == 0, done.stderr
    (line,) = (line.split() for line in done.stdout.splitlines() if line.startswith("all"))
    assert line[1] == "5"


@pytest.mark.parametrize(
    ("adapt", "more"), [("image", [2]), ("batch", [2]), ("static", [3]), ("image dense", [2]), ("image whole", [2])]
)
def test_calibrate_gives_the_configuration_of_one_process(adapt, more, tmp_path):
    configurations = {}
    for processes in (1, *more):
        (tmp_path / str(processes)).mkdir()
        done = python(HERE / "calibrating.py", tmp_path / str(processes), adapt, ranks=processes)
        assert done.returncode == 0, done.stderr
        configurations[processes] = {path.read_text() for path in (tmp_path / str(processes)).glob("*.txt")}
        assert len(list((tmp_path / str(processes)).glob("*.txt"))) == processes
    assert len(configurations[1]) == 1 and all(configurations[1] == configurations[processes] for processes in more)


def test_bad_input_is_one_line():
    done = torchrun(2, MAIN, "eval", "--batch-size", "0")
    assert done.returncode != 0
    assert lines_of_ours(done) == ["atm-triton: batch size 0 is too small; give 1 or more"]


def test_a_rank_that_dies_is_named(tmp_path):
    done = torchrun(3, HERE / "calibrating.py", tmp_path, "image", 1)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert lines_of_ours(done) == ["atm-triton: rank 1 has died: the run is ended"]
