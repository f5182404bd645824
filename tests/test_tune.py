"""The search for a kernel's fastest configuration; results are the same with any configuration."""

import re

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from atm_triton.kernels.merge import rows_table
from benchmarks.gpu import tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ["--device", DEVICE, "--dtype", "float32", "--B", "2", "--N", "49", "--H", "2", "--d", "16"]


@pytest.mark.parametrize(
    ("kernel", "options"),
    [*((kernel, options) for kernel in tune.KERNELS for options in ([], ["--d", "80"])), ("match", ["--by-size"])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_configuration_changes_no_result(kernel, options):
    at = tune.inputs(tune.arguments([kernel, *SMALL, *options]))
    launch, table, others = tune.KERNELS[kernel](at)
    other = next(config for config in others if config != table)
    assert other.keys() == table.keys()
    expected = launch()
    for config in (table, other):
        torch.testing.assert_close(launch(config=config), expected, rtol=1e-5, atol=1e-5)


def test_the_fastest_come_first_and_the_table_s_is_told(capsys, monkeypatch):
    assert tune.main(["unmerge", *SMALL, "--B", "1", "--N", "9"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"unmerge: (\d+) of \1 configurations ran on .+, triton [\d.]+", head)
    times = [float(line.split(" us  ")[0]) for line in lines]
    assert times == sorted(times) and len(times) in (tune.SHOWN, tune.SHOWN + 1)
    table = rows_table(torch.float32, 32)
    assert [line for line in lines if line.endswith(f"{table}  (in the table)")]


def test_long_images_have_a_search_of_their_own():
    at = tune.inputs(tune.arguments(["assign", *SMALL, "--B", "1", "--N", "2050"]))
    assert all(config.keys() == {"CHUNK", "num_warps"} for config in tune.of_assign(at).others)


def failing(error):
    def launch(config):
        raise error

    return launch


def test_what_does_not_compile_or_fit_is_left_out_and_other_errors_are_seen():
    device = torch.device(DEVICE)
    unfit = (OutOfResources(2, 1, "shared"), CompilationError("", None, "no"), RuntimeError("PassManager::run failed"))
    for error in unfit:
        assert tune.microseconds(failing(error), {}, device) is None
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.microseconds(failing(RuntimeError("illegal memory access")), {}, device)


def test_a_table_that_does_not_fit_is_told(capsys, monkeypatch):
    def unfit(at):
        return tune.Tuning(failing(OutOfResources(2, 1, "shared memory")), {"num_warps": 4}, [{"num_warps": 8}])

    monkeypatch.setitem(tune.KERNELS, "unmerge", unfit)
    assert tune.main(["unmerge", *SMALL]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("unmerge: 0 of 2 configurations ran")
    assert line == "the configuration in the table did not run: {'num_warps': 4}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["unmerge", *SMALL, "--B", "0"], "--B 0 is too small; give 1 or more"),
        (["unmerge"], "--device cuda: torch sees no CUDA device here; give cpu"),
    ],
)
def test_bad_input(options, message, capsys):
    assert tune.main(options) == 2
    assert capsys.readouterr().err == f"benchmarks.gpu.tune: {message}\n"


def test_a_kernel_that_there_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["sort"])
    assert "invalid choice: 'sort'" in capsys.readouterr().err
