"""ATM_TRITON_AUTOTUNE: off, nothing is searched; on, the results are the same and a better table is printed."""

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec, patch

import pytest
import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from atm_triton.kernels import assign as assign_kernels
from atm_triton.kernels import tune
from atm_triton.kernels.assign import assign
from atm_triton.kernels.attention import attention, attention_candidates, attention_table
from atm_triton.kernels.match import match, match_image_table
from atm_triton.kernels.merge import add_norm, merge
from atm_triton.kernels.stem import stem
from atm_triton.kernels.unmerge import unmerge
from atm_triton.packed import Images

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def searching(monkeypatch):
    """A search of the first and the last candidate, in which the last wins; returns what is found."""
    times, every = iter(range(1000, 0, -1)), tune.every

    def microseconds(launch, config):
        launch(**config)
        return float(next(times))

    def ends(**choices):
        first, *_, last = every(**choices)
        return [first, last]

    monkeypatch.setattr(tune, "every", ends)
    monkeypatch.setattr(tune, "SEARCH", True)
    monkeypatch.setattr(tune, "_found", {})
    monkeypatch.setattr(tune, "_microseconds", microseconds)
    monkeypatch.setattr(tune.atexit, "register", lambda report: None)
    return tune._found


def everything():
    """What every launcher returns, one after another; each time on the same inputs."""
    torch.manual_seed(0)
    images, first = (Images.of(2, N, DEVICE).cu_seqlens for N in (19, 1))
    x, sizes = torch.randn(3, 38, 32, device=DEVICE), torch.randint(1, 4, (38,), device=DEVICE).float()
    wide = torch.randn(1, 38, 80, device=DEVICE)
    for keys in (x, wide):  # one launch, two launches
        for by_size in (False, True):
            yield match(keys, sizes, images, 1, by_size, 0.0, 19)
    similarity, partner, _ = match(x, sizes, images, 1, False, 0.0, 19)
    step = (similarity, partner, torch.full((2,), 4, device=DEVICE), images, 1, 19, 30)
    slots, *lists = assign(*step)
    yield slots, *lists
    with patch.object(assign_kernels, "ONE_PROGRAM", 16):  # two launches
        yield assign(*step)
    rows, norm = torch.randn(38, 48, device=DEVICE), (None, None, 1e-6)
    merged, _, *merged_sizes = merge(rows, sizes, *lists)
    yield merged, *merged_sizes
    yield merge(rows, sizes, *lists, rows, None, norm)
    yield add_norm(rows, rows, None, norm)
    yield (unmerge(merged, slots),)
    yield (stem(torch.randn(2, 3, 8, 8, device=DEVICE), torch.randn(40, 3, 4, 4, device=DEVICE), None, rows[:5, :40]),)
    for q, queries, longest in ((x, images, 19), (x[:, ::19], first, 1)):
        yield (attention(q, x, x, sizes.log2(), queries, images, longest, 19, 0.2),)


def test_results_are_those_of_the_tables_and_a_key_is_searched_once(searching, monkeypatch):
    results = [list(everything())]
    names = {"match_image", "unit_rows", "match_tiles", "assign", "assign_long", "merge", "add_norm", "unmerge"}
    names |= {"attention", "stem"}
    assert {name for name, *_ in searching} == names
    assert all(found.best != found.table and found.ran == found.tried for found in searching.values())
    monkeypatch.setattr(tune, "_microseconds", None)
    results.append(list(everything()))
    monkeypatch.setattr(tune, "SEARCH", False)
    for *ours, theirs in zip(*results, everything(), strict=True):
        for *mine, other in zip(*ours, theirs, strict=True):
            for tensor in mine:
                torch.testing.assert_close(tensor, other, rtol=1e-6, atol=2e-6)


def test_off_nothing_is_searched(monkeypatch):
    monkeypatch.setattr(tune, "SEARCH", tune.switch(None))
    monkeypatch.setattr(tune, "tuned", None)
    assert len(list(everything())) == 13


def failing(errors):
    """A launch that fails for the configurations in ``errors``, by their warps."""

    def launch(num_warps):
        if num_warps in errors:
            raise errors[num_warps]

    return launch


WARPS = [{"num_warps": n} for n in (1, 2, 4, 8)]
UNFIT = {
    1: OutOfResources(2, 1, "shared memory"),
    2: CompilationError("", None, "no"),
    8: RuntimeError("PassManager::run failed"),
}


def test_what_does_not_compile_or_fit_is_left_out(searching, capsys):
    best = tune.tuned("merge", {"block": 512}, {"num_warps": 2}, WARPS, failing(UNFIT))
    assert best == {"num_warps": 4}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('atm-triton tune: merge block=512: table {"num_warps": 2} inf us, best {"num_warps": 4} ')
    assert line.endswith("us (1 of 4 ran)")


def test_other_errors_are_seen_and_so_is_it_if_nothing_fits(searching):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tuned("merge", {}, WARPS[0], WARPS, failing({8: RuntimeError("illegal memory access")}))
    with pytest.raises(OutOfResources):
        tune.tuned("merge", {}, WARPS[0], WARPS[:2], failing(UNFIT))
    assert not searching


def test_the_table_stays_where_nothing_is_faster(searching, monkeypatch):
    monkeypatch.setattr(tune, "_microseconds", lambda launch, config: 1.0)
    assert tune.tuned("merge", {"block": 16}, {"num_warps": 4}, WARPS, None) == {"num_warps": 4}


def test_triton_times_it_on_a_gpu(monkeypatch):
    do_bench = create_autospec(triton.testing.do_bench, return_value=0.5)
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr(tune, "triton", SimpleNamespace(knobs=knobs, testing=SimpleNamespace(do_bench=do_bench)))
    assert tune._microseconds(print, {}) == 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Nq", [1, 197])
def test_the_table_is_among_the_candidates(dtype, Nq):
    for d, bias in itertools.product((32, 64, 128), (False, True)):
        assert attention_table(dtype, d, Nq, bias) in attention_candidates(dtype, Nq)


def test_what_the_kernel_is_compiled_for_has_its_own_search(searching):
    x, images = torch.randn(2, 9, 16, device=DEVICE), Images.of(1, 9, DEVICE).cu_seqlens
    for log2_sizes in (None, torch.zeros(9, device=DEVICE)):
        for dtype in (torch.float32, torch.float16):
            q = x.to(dtype)
            for longest in (9, 17):
                attention(q, q, q, log2_sizes, images, images, longest, longest, 0.25)
    assert len(searching) == 8


def test_sizes_that_share_a_search():
    assert [tune.like(n) for n in (1, 2, 3, 128, 129)] == [range(n // 2 + 1, n + 1) for n in (1, 2, 4, 128, 256)]


CODE = """
import torch
from atm_triton.kernels.match import match
images = torch.tensor([0, 9], dtype=torch.int32)
match(torch.randn(2, 9, 32), torch.arange(9.0), images, 1, True, 0.5, 9)
match(torch.randn(2, 9, 32), None, images, 1, False, 0.5, 9)
"""


def test_at_exit_it_prints_lines_for_the_table():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ATM_TRITON_AUTOTUNE": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    first, second, header, *entries = done.stderr.splitlines()
    for line, by_size in ((first, True), (second, False)):
        table = '{"ROWS": 16, "HEADS": 6, "num_warps": 4}'
        key = f"block=16 d=32 by_size={by_size} dtype=torch.float32"
        assert line.startswith(f"atm-triton tune: match_image {key}: table {table} ")
    assert header.startswith("# first in match_image_table: ")
    space = {"torch": torch}
    exec("\n".join(["def pasted(block, d, by_size, dtype):", *entries]), space)
    for by_size, line in ((True, first), (False, second)):
        best = space["pasted"](16, 32, by_size, torch.float32)
        assert best.keys() == match_image_table(16, 32, by_size, torch.float32).keys()
        assert str(best).replace("'", '"') in line.split(" best ")[1]
    assert space["pasted"](32, 32, False, torch.float32) is None


def test_the_variable(monkeypatch):
    for value, search in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("ATM_TRITON_AUTOTUNE", value)
        assert runpy.run_path(tune.__file__)["SEARCH"] == search
    monkeypatch.delenv("ATM_TRITON_AUTOTUNE")
    assert not runpy.run_path(tune.__file__)["SEARCH"]
    monkeypatch.setenv("ATM_TRITON_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"^got ATM_TRITON_AUTOTUNE=yes; want 1 \(search\), 0 or nothing"):
        runpy.run_path(tune.__file__)
