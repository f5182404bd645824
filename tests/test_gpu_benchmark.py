"""``make gpu`` at tiny sizes with the interpreter: every stage runs, and wrong kernels are caught."""

import copy
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

from atm_triton import ATMConfig, apply_patch, ops
from atm_triton.engine import Engine
from atm_triton.graphs import Replays
from atm_triton.measure.configurations import digits_config
from atm_triton.patch import install
from benchmarks.gpu import STAGES, StageError, attention, engine, models, parity, sanitize, targets, timing
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.sanitize import FOUND, verdict
from benchmarks.gpu.trace import Event, gaps, timeline
from benchmarks.gpu.unfused import UnfusedBlock
from models import images, vit

TINY = ["--device", "cpu", "--tiny"]

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU: there, make gpu itself", allow_module_level=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        for stage in (engine, timing):
            patch.setattr(stage, "WARM_UP", 1)  # before a capture; here it sets nothing up
        assert main(["--out", str(folder), *TINY]) == 0
    return folder


def test_every_stage_measures(out):
    result = json.loads((out / "gpu.json").read_text())
    assert {"gpu", "driver", "cuda", "torch", "triton", "timm", "commit", "dirty", "utc"} <= set(result["environment"])
    assert result["failures"] == [] and tuple(result["stages"]) == STAGES
    stages = result["stages"]
    for name in ("parity", "repeat", "kernels", "attention", "engine", "training", "host", "memory", "targets"):
        assert stages[name]["rows"], name
    assert all(0 <= share <= 1 for row in stages["parity"]["rows"] for share in row["of_tolerance"].values())
    assert {row["operation"] for row in stages["kernels"]["rows"]} == {
        "match",
        "assign",
        "unmerge",
        "merge",
        "add_merge_norm",
        "add_norm",
        "linear_gelu",
        "attention",
    }
    assert all(row["bound_us"] > 0 for row in stages["kernels"]["rows"])
    assert all(row["microseconds"] > 0 and row["error"] < 1 for row in stages["attention"]["rows"])
    assert {row["candidate"] for row in stages["attention"]["rows"] if row["taken"]} == {"kernel"}
    assert {"digits", "DeiT-S", "image"} <= set(stages["trace"])
    merging = [theta for theta in digits_config().thresholds if theta is not None]
    assert stages["trace"]["digits"]["reads"] == len(merging) and (out / "trace.json.gz").stat().st_size > 0
    assert all({"value", "wanted", "met"} <= set(row) for row in stages["targets"]["rows"])


def test_the_engine_beside_whole_graphs(out):
    section = json.loads((out / "gpu.json").read_text())["stages"]["engine"]
    assert section["wrong"] == section["left_out"] == []
    rows = {(row["model"], row["name"]): row for row in section["rows"]}
    ours = ["ATM static", "ATM batch", "ATM image"]
    names = ["timm", "timm, one graph", "free-merge bound", "free-merge bound, one graph", "ATM static, one graph"]
    names += [*ours, "ATM static, r = 0", "unfused, one graph"]
    assert {("DeiT-S", name) for name in [*names, "timm, compiled", "free-merge bound, compiled"]} <= set(rows)
    assert {("digits", name) for name in [*names, "ATM static, one graph, image's r"]} <= set(rows)
    for row in rows.values():
        assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1] and row["error"] < 1e-5
        assert row["of_timm"] > 0 and row["of_timm_graph"] > 0
        assert ("whole" in row) == ("of_bound" in row) == (row["name"] in ours)
    deit = [rows["DeiT-S", name] for name in ours]
    assert [row["graphs"] for row in deit] == [1, 1, 1] and [row["merged"] for row in deit] == [2, 2, 2]
    assert rows["digits", "ATM static"]["merged"] == rows["digits", "ATM batch"]["merged"] > 0
    unmerged = rows["DeiT-S", "ATM static, r = 0"]
    assert unmerged["graphs"] == 1 and unmerged["merged"] == 0


def test_the_table_has_every_stage(out):
    table = (out / "gpu.md").read_text()
    assert re.findall(r"^## (\w+)$", table, re.MULTILINE) == list(STAGES)
    assert "(no " not in table and "FAILED" not in table


def wrong_merge(*arguments, run, **options):
    """The last channel is off by one float16 step."""
    merged, *rest = run(*arguments, **options)
    merged[:, -1] *= 1 + 2**-10
    return merged, *rest


def wrong_match(*arguments, run, **options):
    similarity, partner, counts = run(*arguments, **options)
    return similarity, torch.where(partner > 0, partner - 1, partner), counts


def wrong_attention(*arguments, run, **options):
    """Attention without log n."""
    return run(*arguments[:3], None, *arguments[4:], **options)


def wrong_among_others(*arguments, run, **options):
    """The last bit depends on whether there are other images."""
    return run(*arguments, **options) * (1 + 2**-23 * (len(arguments[5]) > 2))


def wrong_norm(*arguments, run, **options):
    """The norm has another epsilon."""
    x, attended, gamma, (weight, bias, _), *out = arguments
    return run(x, attended, gamma, (weight, bias, 0.1), *out)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("merge", wrong_merge, "merge .* merged tokens are .* times the tolerance from the reference"),
        ("match", wrong_match, "match .* partners in B are not those of the reference"),
        ("attention", wrong_attention, "attention .* values are .* times the tolerance from the reference"),
        ("attention", wrong_among_others, "attention .* values of an image among others are not those it has alone"),
        ("add_norm", wrong_norm, "the norms of summed tokens are .* times the tolerance from the reference"),
    ],
)
def test_a_wrong_kernel_fails_in_one_line(name, wrong, message, tmp_path, monkeypatch, capsys):
    launchers = ops._kernels()
    run = getattr(launchers, name)
    monkeypatch.setattr(launchers, name, lambda *arguments, **options: wrong(*arguments, run=run, **options))
    assert main(["--out", str(tmp_path), "--stages", "parity", "repeat", *TINY]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(rf"benchmarks.gpu: parity: .*{message}.*", line)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["stages"]) == ["parity", "repeat"] and result["failures"] == [line.partition(": ")[2]]
    assert "FAILED" in (tmp_path / "gpu.md").read_text()


def a_little_off(out):
    logits, record = out
    return logits * (1 + 2 * engine.LOGITS[torch.float32]), record


def uncapturable(self, run):
    raise RuntimeError("such a thing cannot be captured")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        ("off", "logits are 0.002 from those without graphs, above 0.001"),
        ("stale", r"logits are [\d.]+ from those without graphs, above 0.001"),
        ("refused", "the engine did not run: blocks: engine=False in the configuration"),
        ("uncapturable", "runs eagerly from now on: such a thing cannot be captured"),
        ("endless", "after 6 passes there is more to capture beside 0 graphs"),
    ],
)
def test_an_engine_at_fault_is_found_out(fault, message, monkeypatch):
    model, x = vit(depth=2, img_size=16), images(2, side=16)
    config = ATMConfig(alpha=0.5, beta=0.04, theta_min=0.3, adapt="image", cls_only_last=False, backend="triton")
    ours, blocks = (models.patched(model, config, on) for on in (fault != "refused", False))
    play, first = Engine._run, []
    if fault == "off":
        monkeypatch.setattr(Engine, "_run", lambda *arguments: a_little_off(play(*arguments)))
    if fault == "stale":
        monkeypatch.setattr(Engine, "_run", lambda *arguments: first.append(play(*arguments)) or first[0])
    if fault == "uncapturable":
        monkeypatch.setattr(Replays, "capture", uncapturable)
    if fault == "endless":
        ours.engine.max_graphs, ours.engine.read_gflop = 1, 0
    variant = engine.Variant(ours, blocks, engine=True)
    with torch.inference_mode():
        if fault == "none":
            assert engine.check(variant, x) < 1e-5
            return
        with pytest.raises(StageError, match=message):
            engine.check(variant, x)


@pytest.mark.parametrize("times", [1, 4])
@torch.inference_mode()
def test_16_bit_logits_may_be_as_far_from_float32_as_those_of_the_blocks(times):
    model, x = vit(depth=2, img_size=16), images(2, side=16)
    config = ATMConfig(adapt="static", schedule=(1, 1), backend="triton")
    exact = models.patched(model, config, engine=False)
    ours, blocks = (models.patched(copy.deepcopy(model).half(), config, on) for on in (True, False))

    class Off(torch.nn.Module):
        def forward(self, images):
            true = exact(images.float())
            return true + times * (blocks(images) - true)

    variant = engine.Variant(Off(), blocks, exact=exact)
    if times == 1:
        assert 0 < engine.check(variant, x.half()) < 1e-2
        assert 0 < engine.check(engine.Variant(ours, blocks, engine=True, exact=exact), x.half()) < 1e-2
    else:
        with pytest.raises(StageError, match="from those in float32, above"):
            engine.check(variant, x.half())


def test_a_wrong_engine_fails_the_stage_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    play = Engine._run
    monkeypatch.setattr(Engine, "_run", lambda *arguments: a_little_off(play(*arguments)))
    monkeypatch.setattr(engine, "cells", lambda setting: [engine.Cell("DeiT-S", 2, False)])
    monkeypatch.setattr(engine, "WARM_UP", 1)
    assert main(["--out", str(tmp_path), "--stages", "engine", *TINY]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("benchmarks.gpu: engine: ATM static of DeiT-S at 2: logits are 0.002 from those without")
    section = json.loads((tmp_path / "gpu.json").read_text())["stages"]["engine"]
    assert len(section["wrong"]) == 4 and "ATM static, one graph" in {row["name"] for row in section["rows"]}
    assert not {"ATM static", "ATM batch", "ATM image"} & {row["name"] for row in section["rows"]}
    assert (tmp_path / "gpu.md").read_text().count("WRONG: ") == 4


@pytest.mark.parametrize("wanted", [1, 7, 24, 100])
def test_thresholds_that_fit(wanted):
    """All images together have 24 tokens in A; in every block but the last the wanted number of them are candidates."""
    model, x = vit(), images(2)
    config = models.fitted(model, x, "image", wanted)
    patched = models.patched(model, config, engine=False)
    with torch.inference_mode():
        patched(x)
    first, *later = [int(counts.sum()) for counts in patched.blocks.last.counts[:-1]]
    assert first == min(wanted, 24) and all(count <= wanted for count in later)
    assert wanted > 7 or later == [wanted, wanted]


def test_targets_of_the_engine():
    row = {"model": "DeiT-S", "batch": 64, "session": False, "name": "ATM image"}
    row |= {"of_timm": 1.2, "whole": 1.15, "of_bound": None}
    small, compiled = row | {"batch": 8}, row | {"session": True}
    rows = targets.of_engine([row, small, compiled, {"session": False, "name": "timm", "batch": 64}])
    assert [target["met"] for target in rows] == [True, False, None, True]
    assert [target["wanted"] for target in rows] == [1.0, 1.1, 0.97, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "parity", "speed", *TINY], "--stages speed: unknown; choose from parity repeat"),
        (["--device", "cpu"], "--device cpu: the interpreter would take days at these sizes; add --tiny"),
        ([], "--device cuda: torch sees no CUDA device here"),
    ],
)
def test_bad_input(options, message, tmp_path, capsys):
    assert main(["--out", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"benchmarks.gpu: {message}")


@pytest.mark.parametrize(("fastest", "right"), [("kernel", True), ("written out", False), ("SDPA, no bias", True)])
def test_whether_the_library_takes_the_fastest_attention(fastest, right):
    rows = [{"candidate": name, "microseconds": 9.0} for name in ("kernel", "SDPA, no bias", "written out")]
    for row in rows:
        row["microseconds"] -= row["candidate"] == fastest
    attention.judge(rows)
    assert [row["taken"] for row in rows] == [True, False, False]
    assert [row["fastest"] for row in rows] == [right, False, False]


def test_gaps_of_a_gpu_trace():
    """Two counts are read. The GPU idles 30 us after the kernel that overlaps the first copy, 5 us after the second."""
    raw = [
        {"ph": "X", "cat": "kernel", "ts": 0, "dur": 10, "name": "match"},
        {"ph": "X", "cat": "gpu_memcpy", "ts": 10, "dur": 2, "name": "Memcpy DtoH (Device -> Pinned)"},
        {"ph": "X", "cat": "cpu_op", "ts": 11, "dur": 100, "name": "not on the GPU"},
        {"ph": "X", "cat": "kernel", "ts": 13, "dur": 20, "name": "attention"},
        {"ph": "X", "cat": "kernel", "ts": 63, "dur": 7, "name": "assign"},
        {"ph": "X", "cat": "gpu_memcpy", "ts": 70, "dur": 2, "name": "Memcpy DtoH (Device -> Pinned)"},
        {"ph": "X", "cat": "kernel", "ts": 77, "dur": 3, "name": "attention"},
    ]
    idle = gaps(timeline(raw, on_gpu=True))
    assert [gap["microseconds"] for gap in idle["gaps"]] == [30, 5]
    assert idle["gaps"][0] | {"microseconds": 0} == {"microseconds": 0, "after": "attention", "before": "assign"}
    assert idle["reads"] == 2 and idle["longest_gap_microseconds"] == 30
    assert idle["pass_microseconds"] == 80 and idle["busy"] == 44 / 80
    assert gaps([Event(0, 1, "match")])["longest_gap_microseconds"] is None


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, "no errors"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "no errors"),
        ("========= Error: Device not supported\n", 1, "could not run"),
        ("========= ERROR SUMMARY: 0 errors\n", 1, "could not run: exit code 1"),
        (
            "========= Invalid __global__ read of size 4 bytes\n"
            "=========     at merge_kernel+0x120\n========= ERROR SUMMARY: 2 errors\n",
            0,
            f"{FOUND} 2 errors",
        ),
        (
            "========= Invalid read\n=========     at elementwise+0x1\n========= ERROR SUMMARY: 1 error\n",
            0,
            "1 errors in others' kernels",
        ),
    ],
)
def test_verdict_of_the_sanitizer(text, code, said):
    assert verdict(text, code).startswith(said)


def test_the_sanitizer_is_found_and_its_word_taken(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "========= $2 of $*"\necho "========= ERROR SUMMARY: 0 errors"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sanitize.find() == str(program)
    assert sanitize.outcome(sanitize.start(str(program), "memcheck"), 60) == "no errors"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert sanitize.outcome(sanitize.start(str(program), "racecheck"), 0.2) == "not done after 0.2 s"


def test_the_tests_of_the_kernels_must_pass(tmp_path):
    """An empty file starts without torch, which takes seconds to import."""
    *files, last = parity.end_tests(parity.start_tests(tmp_path, ["tests/test_gelu.py", "-k", "finite"], processes=0))
    assert tuple(files) == parity.TESTS and re.fullmatch(r"\d passed.*", last)
    assert all((parity.ROOT / file).is_file() for file in files)
    empty = tmp_path / "test_empty.py"
    empty.touch()
    with pytest.raises(StageError, match="no tests ran"):
        parity.end_tests(parity.start_tests(tmp_path, [str(empty)], processes=0))


class FakeEvent:
    """A CUDA event on a GPU that finishes its work at once, by the clock of ``time.perf_counter``."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_times_by_events(monkeypatch):
    """Every call takes two milliseconds of a clock that only calls move."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_buffer", lambda: torch.zeros(1))
    calls = []

    def call():
        calls.append(clock.now)
        clock.now += 0.002

    assert timing.median_us(call, torch.device("cuda")) == pytest.approx(2000)
    assert timing.host_us(call, torch.device("cuda"), calls=2) == pytest.approx(2000)
    assert timing.WARM_UP + 3 + timing.LEAST + 11 <= len(calls) <= 40


def test_the_unfused_block_merges_as_the_reference():
    model, x = vit(dtype=torch.float64), images(dtype=torch.float64)
    config = ATMConfig(adapt="static", schedule=(3, 5, 2, 4), split_depth=4)
    unfused = install(copy.deepcopy(model), lambda block, i: UnfusedBlock.of(block, config, i, 4, 1), config)
    ours = apply_patch(copy.deepcopy(model), config)
    torch.testing.assert_close(unfused(x), ours(x), rtol=1e-6, atol=1e-6)  # sizes of ours are float32
    assert unfused.blocks.last.tokens == ours.blocks.last.tokens
