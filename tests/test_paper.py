"""Small runs of the paper's tables and figures, and of the page of models."""

import argparse
import copy
import json
import re
import shlex
import shutil
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import ATMConfig, apply_patch, cli
from atm_triton.calibration.costs import Costs
from atm_triton.cli import report
from atm_triton.digits.model import CONFIG, IMAGE_CONFIG
from atm_triton.measure.configurations import digits_config
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.operating_points import operating_points
from atm_triton.training.recipe import Recipe
from benchmarks import zoo
from benchmarks.pages import EXPERIMENTS
from benchmarks.paper import __main__ as paper
from benchmarks.paper import (
    figure4,
    figure5,
    figure6,
    finetuned,
    flops,
    jobs,
    methods,
    points,
    subject,
    table1,
    table4,
    theorem1,
)
from benchmarks.paper.methods import NEAR, counted, nearest, of_baseline
from benchmarks.paper.rows import Rows
from benchmarks.paper.thresholds import Thresholds
from models import images, vit
from paper_process import FEW, dies, open_shallow, shallow, warns
from processes import FORKS


def test_flops_are_counted_as_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flops, "MODELS", {name: flops.MODELS[name] for name in ("DeiT-T", "LV-ViT-T")})
    assert paper.main(["flops", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| DeiT-T, `deit_tiny_patch16_224` | 5.72 (5.72) | 1.25 (1.25) | 1,253,683,200 |" in printed
    assert "finds the same MACs to the integer in all 4 cases" in printed
    result = json.loads((tmp_path / "paper_flops.json").read_text())
    assert len(result["models"]) == 2 and result["environment"]["torch"]
    result["models"][0]["macs"] += 1
    assert "Torch's counter differs: DeiT-T: 1,253,683,201, by torch 1,253,683,200." in flops.table(result)


@pytest.fixture(autouse=True)
def few_images_to_choose_by(monkeypatch):
    monkeypatch.setattr(subject, "CHOOSE_BY", FEW)


@pytest.fixture
def by_curve(tmp_path, monkeypatch):
    """Experiments run on four blocks of the digits model. The options that give it thresholds, by the paper's curve."""
    monkeypatch.setattr(subject, "open_model", shallow)
    options = ["--config"]
    for adapt in ("batch", "image"):
        config = {"alpha": 0.9, "beta": 0.1, "theta_min": 0.5, "adapt": adapt}
        options.append(str(tmp_path / f"{adapt}.json"))
        Path(options[-1]).write_text(json.dumps({"config": config, "promise": {"gflops": 0.1}}))
    return options


@pytest.fixture
def forked(monkeypatch):
    """Processes that measure rows open four blocks of the digits model. They are forked from one that has imported
    torch, which saves seconds; test_an_experiment_runs_on_directories spawns one."""

    def context(method):
        assert method == "spawn"
        return FORKS

    monkeypatch.setattr(jobs, "get_context", context)
    monkeypatch.setattr(jobs, "_open", open_shallow)


def run(name, out, *options):
    """Run an experiment on the digits and return its result. Without --resume it starts anew."""
    if "--resume" not in options:
        (out / f"digits_{name}.json").unlink(missing_ok=True)
    assert paper.main([name, "--workers", "0", "--out", str(out), *options]) == 0
    return json.loads((out / f"digits_{name}.json").read_text())


def test_figure4_measures_every_method_at_one_cost(by_curve, tmp_path, monkeypatch, capsys):
    options = ["--limit", "4", "--shares", "0.4", *by_curve]
    result = run("figure4", tmp_path, *options)
    assert [row["method"] for row in result["rows"]] == list(methods.METHODS)
    for row in result["rows"]:
        assert 0.3 < 1 - row["overall"]["gflops"] / row["gflops_unpatched"] < 0.5, row["method"]
        assert row["gflops_all_tokens_last"] > row["overall"]["gflops"] and row["overall"]["images"] == 4
    assert (tmp_path / "digits_figure4.png").stat().st_size > 10_000
    assert "| atm, image |" in capsys.readouterr().out

    path = tmp_path / "digits_figure4.json"
    partial = tmp_path / "digits_figure4.json.partial"
    assert not partial.exists()
    partial.write_text(json.dumps(result | {"rows": result["rows"][:-1]}))  # as if interrupted
    measured_at, asked = figure4.measured_at, []
    monkeypatch.setattr(figure4, "measured_at", lambda *about: asked.append(about[1]) or measured_at(*about))
    assert run("figure4", tmp_path, *options, "--resume")["rows"] == result["rows"] and asked == ["atm, image"]
    assert not partial.exists() and json.loads(path.read_text())["rows"] == result["rows"]
    for text, message in (
        (None, "digits_figure4.json was made with another batch_size; leave --resume out, or give another --out"),
        ('{"rows": []}', "digits_figure4.json is no result of this experiment; give another --out"),
        (
            '{"settings": [], "not_read": [], "rows": []}',
            "digits_figure4.json was made with another model, another model_kwargs",
        ),
        ('{"rows": [', "digits_figure4.json is no result of this experiment; give another --out"),
        (json.dumps(result | {"rows": ["x"]}), "digits_figure4.json is no result of this experiment; give another"),
    ):
        path.write_text(text or path.read_text())
        assert paper.main(["figure4", *options, "--out", str(tmp_path), "--resume", "--batch-size", "2"]) == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_last_result_as_it_was(tmp_path, monkeypatch, capsys):
    options = ["figure4", "--workers", "0", "--limit", "4", "--shares", "0.4", "--out", str(tmp_path)]
    monkeypatch.setattr(figure4, "METHODS", ("tome",))
    assert paper.main(options) == 0
    path = tmp_path / "digits_figure4.json"
    before = path.read_text()
    measured_at = figure4.measured_at

    def interrupted(of, method, goal):
        if method == "evit":
            raise KeyboardInterrupt
        return measured_at(of, method, goal)

    monkeypatch.setattr(figure4, "measured_at", interrupted)
    monkeypatch.setattr(figure4, "METHODS", ("tome", "evit"))
    capsys.readouterr()
    assert paper.main(options) == 130 and path.read_text() == before
    assert capsys.readouterr().err.splitlines()[-1] == "benchmarks.paper: interrupted"
    (row,) = json.loads((tmp_path / "digits_figure4.json.partial").read_text())["rows"]
    assert row["method"] == "tome"
    assert paper.main(options) == 2
    assert "partial is of a run that was interrupted; go on with --resume, or delete it" in capsys.readouterr().err
    (tmp_path / "digits_figure4.json.partial").unlink()
    for text, message in (
        (before.replace('"limit": 4', '"limit": 5'), "is a result with another limit; give another --out, or delete"),
        (before.replace('"limit": 4,', ""), "is a result with another limit; give another --out, or delete it"),
        ("whole", "digits_figure4.json is no result of this experiment; give another --out, or delete it"),
    ):
        path.write_text(text)
        assert paper.main(options) == 2 and message in capsys.readouterr().err and path.read_text() == text


def test_fine_tuned_beside_training_free(by_curve, tmp_path, monkeypatch, capsys):
    """All are compared with the model before training, and a resumed run trains nothing twice."""
    options = ["--limit", "8", "--shares", "0.5", "--images", "16", "--epochs", "1", "--batch-size", "4"]
    options += ["--workers", "0", "--out", str(tmp_path), *by_curve]
    trained, finetune = [], finetuned.finetune

    def interrupted(model, images, validation, config, *arguments, **options):
        trained.append(config.adapt)
        if trained == ["static", "batch"]:
            raise KeyboardInterrupt
        return finetune(model, images, validation, config, *arguments, **options)

    monkeypatch.setattr(finetuned, "finetune", interrupted)
    assert paper.main(["finetuned", *options]) == 130
    assert paper.main(["finetuned", *options, "--resume"]) == 0
    assert trained == ["static", "batch", "batch"] and not (tmp_path / "digits_finetuned.runs").exists()
    rows = json.loads((tmp_path / "digits_finetuned.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [finetuned.FREE, finetuned.UNMERGED, finetuned.TUNED]
    free, unmerged, tuned = (row["overall"] for row in rows)
    assert unmerged["gflops"] == rows[0]["gflops_unpatched"] > 1.5 * free["gflops"]
    assert tuned["gflops"] == pytest.approx(free["gflops"], rel=0.05) and tuned["kl"] != free["kl"]
    assert unmerged["kl"] > 1e-6  # with the same weights it would be 0
    assert len({row["overall"]["top1_unpatched"] for row in rows}) == 1
    assert "| -50 % | ATM, fine-tuned | batch | 0 |" in capsys.readouterr().out
    for wrong, message in (
        (["--train", "x"], "--train DIR goes with --data DIR: images to train on beside those to judge by"),
        (["--seeds", "1", "1"], "--seeds wants each once"),
        (["--epochs", "0"], "epochs=0 is out of range"),
        (["--jobs", "0"], "--jobs 0: give 1 or more"),
    ):
        assert paper.main(["finetuned", *options, *wrong]) == 2 and message in capsys.readouterr().err


def test_no_training_of_another_model_is_gone_on_with(tmp_path, monkeypatch):
    """Files that an interrupted table left behind are refused by name, not taken for this model's."""
    subjects = []
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text(ATMConfig(alpha=0.98, beta=0.7, theta_min=0.6).to_json())
    for checkpoint, scale in ((tmp_path / "one.safetensors", 1), (tmp_path / "other.safetensors", 1.01)):
        save_file({name: value * scale for name, value in open_model().state_dict().items()}, checkpoint)
        options = ["--limit", "4", "--images", "8", "--epochs", "1", "--batch-size", "2", "--workers", "0"]
        options += ["--checkpoint", str(checkpoint), "--config", str(thresholds)]
        args = finetuned.arguments().parse_args(options)
        subjects.append((subject.Subject(args), args))
    (one, args), (other, others) = subjects
    weights = copy.deepcopy(one.model.state_dict())
    finetuned.tuned(one, args, finetuned.unmerged(one), 0, tmp_path / "run")
    for name, weight in one.model.state_dict().items():  # every training starts from them
        assert torch.equal(weight, weights[name]), name
    known = finetuned.environment()
    monkeypatch.setattr(finetuned, "environment", lambda: known | {"commit": "another"})
    with pytest.raises(ValueError, match='--resume: commit is "another"'):
        finetuned.tuned(one, args, finetuned.unmerged(one), 0, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--resume: checkpoint is .*other.safetensors"):
        finetuned.tuned(other, others, finetuned.unmerged(other), 0, tmp_path / "run")


TINY = ["--limit", "8", "--images", "16", "--epochs", "1", "--batch-size", "4", "--workers", "0"]


def test_table_4_trains_every_method_and_none_twice(by_curve, tmp_path, monkeypatch, capsys):
    """Each method starts from the same weights and has its own recipe; the paper's figures are beside its own."""
    options = [*TINY, *by_curve, "--seeds", "0", "1", "--out", str(tmp_path)]
    options += ["--methods", "unmerged", "dynamicvit", "atm, training-free", "atm"]
    monkeypatch.setattr(subject, "open_model", partial(shallow, blocks=5))  # as DynamicViT leaves out the last
    seen, finetune = [], finetuned.finetune

    def interrupted(model, images, validation, config, recipe, *arguments, method, **options):
        seen.append((None if method is None else type(method.baseline).__name__, recipe.lr, recipe.seed))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return finetune(model, images, validation, config, recipe, *arguments, method=method, **options)

    monkeypatch.setattr(finetuned, "finetune", interrupted)
    assert paper.main(["table4", *options]) == 130
    (tmp_path / "digits_table4.json.partial").rename(tmp_path / "kept")
    assert paper.main(["table4", *options]) == 2
    assert "digits_table4.runs holds trainings that were interrupted; go on with --resume" in capsys.readouterr().err
    (tmp_path / "kept").rename(tmp_path / "digits_table4.json.partial")
    assert paper.main(["table4", *options, "--resume"]) == 0
    assert not (tmp_path / "digits_table4.runs").exists() and seen.pop(3) == seen[3]
    assert [name for name, _, _ in seen[:3]] == [None, "DynamicViT", None]
    assert [lr for _, lr, _ in seen[:3]] == [2e-5, 1e-3, 2e-5]
    result = json.loads((tmp_path / "digits_table4.json").read_text())
    assert len(result["rows"]) == 7 and len({row["overall"]["top1_unpatched"] for row in result["rows"]}) == 1
    costs = {row["method"]: row["overall"]["gflops"] for row in result["rows"]}
    free, tuned = (costs[name] / costs["unmerged"] for name in ("atm, training-free", "atm"))
    assert (free, tuned) == (pytest.approx(3.0 / 4.6, abs=0.1), pytest.approx(2.6 / 4.6, abs=0.1))
    kl = {row["method"]: row["overall"]["kl"] for row in result["rows"]}
    assert all(0 < value < 5 for value in kl.values())
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("| dynamicvit |"))
    assert " ± " in line and re.search(
        r"% \| \d\.\de-\d\d \| 1 \| \d+\.\d ± \d\.\d \| 2\.9 \| 79\.3 % \| 30 \| 43 \|$", line
    )
    assert any(
        line.startswith("| atm, training-free |") and line.endswith("| 0 | - | 3.0 | 79.7 % | 0 | - |")
        for line in lines
    )
    for wrong, message in (
        (["--adapt", "batch", "image"], "--adapt: this table has one row of ATM; give one"),
        (["--seeds", "1", "1"], "--seeds wants each once"),
    ):
        assert paper.main(["table4", *options, *wrong]) == 2 and message in capsys.readouterr().err


def test_trainings_at_once_give_the_rows_of_one_after_the_other(by_curve, forked, tmp_path, capsys):
    """In processes of their own, to the bit; if one fails, the others are kept and it alone is measured again."""
    options = [*TINY, *by_curve, "--seeds", "0", "--methods", "unmerged", "evit", "tome"]
    for number, out in (("1", tmp_path / "one"), ("2", tmp_path / "two")):
        out.mkdir()
        again = [*options, "--jobs", number, "--out", str(out)]
        if number == "2":
            (out / "digits_table4.runs").mkdir()
            (out / "digits_table4.runs" / "evit-0").write_text("in the way")
            assert paper.main(["table4", *again, "--resume"]) == 2
            assert "evit, 0: " in capsys.readouterr().err
            partial = json.loads((out / "digits_table4.json.partial").read_text())
            assert {row["method"] for row in partial["rows"]} == {"unmerged", "tome"}
            (out / "digits_table4.runs" / "evit-0").unlink()
            again.append("--resume")
        assert paper.main(["table4", *again]) == 0
    one, two = (
        {row.pop("method"): row for row in json.loads((tmp_path / out / "digits_table4.json").read_text())["rows"]}
        for out in ("one", "two")
    )
    for name, row in one.items():
        assert row.pop("seconds") > 0 and two[name].pop("seconds") > 0
        assert (row.pop("at_once"), two[name].pop("at_once")) == (1, 2)
        assert two[name] == row, name
    assert "minutes each, up to 2 at once" in capsys.readouterr().out


def test_what_a_process_warns_of_is_said(by_curve, forked, tmp_path):
    rows = Rows(tmp_path / "out.json", {}, resume=False)
    args = table4.arguments().parse_args(["--jobs", "2", "--limit", "4", "--workers", "0", *by_curve])
    with pytest.warns(UserWarning, match="a, 3: careful"):
        jobs.add_all(rows, None, args, [jobs.Job(key={"method": "a", "seed": 3}, measure=warns, arguments=())])
    assert rows.rows == [{"method": "a", "seed": 3, "n": 1}]


def test_a_process_that_dies_is_one_line(by_curve, forked, tmp_path):
    rows = Rows(tmp_path / "out.json", {}, resume=False)
    args = table4.arguments().parse_args(["--jobs", "2", "--limit", "4", "--workers", "0", *by_curve])
    with pytest.raises(ValueError, match="one of 2 processes died, .*; give fewer --jobs, with --resume"):
        jobs.add_all(rows, None, args, [jobs.Job(key={"method": "a"}, measure=dies, arguments=())])


def test_every_method_of_table_4_can_be_made_for_a_model():
    """With DeiT's twelve blocks every method reduces in its published blocks, and it runs in the model."""
    model = open_model()
    of = SimpleNamespace(model=model, depth=12, loader=[torch.randn(4, 1, 112, 112)])
    made = {name: make() for name, make in table4.of_model(of).items()}
    assert set(made) == set(table4.ROWS) - {"unmerged", "atm, training-free", "atm"}
    assert {name: method.blocks for name, method in made.items() if getattr(method, "blocks", None)} == {
        **dict.fromkeys(("dynamicvit", "evit", "evit, keep rate falls", "bat"), (3, 6, 9)),
        "iared2": (0, 4, 8),
        "evovit": (4, 8),
    }
    for method in made.values():
        own = copy.deepcopy(model)
        own.num_classes = 10
        learning = method.learning(own)
        learning.patch(own)(of.loader[0])
        assert learning.recipe(Recipe.for_digits(epochs=5)).epochs == 5


def test_table_a3_trains_at_the_papers_costs(by_curve, tmp_path, capsys):
    options = [*TINY, *by_curve, "--seeds", "0", "--points", "2", "--out", str(tmp_path)]
    assert paper.main(["tableA3", *options]) == 0
    rows = json.loads((tmp_path / "digits_tableA3.json").read_text())["rows"]
    assert [(row["method"], row.get("paper_gflops")) for row in rows] == [
        (finetuned.FREE, 3.64),
        (finetuned.FREE, 2.52),
        (finetuned.UNMERGED, None),
        (finetuned.TUNED, 3.64),
        (finetuned.TUNED, 2.52),
    ]
    for row in [*rows[:2], *rows[3:]]:
        assert row["overall"]["gflops"] / rows[2]["overall"]["gflops"] == pytest.approx(
            row["paper_gflops"] / 4.6, abs=0.1
        )
    printed = capsys.readouterr().out
    assert "| -20.9 % | batch |" in printed and "| 2.52 | 79.58 % |" in printed
    for wrong in ("0", "16"):
        assert paper.main(["tableA3", *options, "--points", wrong]) == 2
        assert f"--points {wrong}: the paper has 15 of DeiT-S; give 1 to 15" in capsys.readouterr().err


def test_a_resumed_run_still_names_the_broken_images(tmp_path):
    first = Rows(tmp_path / "out.json", {}, resume=False)
    first.broken = lambda: {"a.jpg"}
    first.add({"block": 1}, dict)
    again = Rows(tmp_path / "out.json", {}, resume=True)
    again.broken = lambda: {"b.jpg"}
    assert again.add({"block": 1}, lambda: {"measured": "twice"}) == {"block": 1}
    assert again.finish()["not_read"] == ["a.jpg", "b.jpg"]


def test_plots_without_matplotlib_are_refused_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert paper.main(["figure2", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "benchmarks.paper: plots need matplotlib: pip install 'atm-triton[paper]'\n"


def test_the_thresholds_of_the_nearest_cost_are_taken(tmp_path):
    def file(name, adapt, alpha, gflops):
        path = tmp_path / f"{name}.json"
        config = asdict(ATMConfig(alpha=alpha, beta=0.04, theta_min=0.5, adapt=adapt))
        path.write_text(json.dumps({"config": config} | ({} if gflops is None else {"promise": {"gflops": gflops}})))
        return str(path)

    cheap, dear = file("cheap", "image", 0.8, 0.1), file("dear", "image", 0.9, 0.3)
    other, plain = file("other", "batch", 0.7, 0.3), file("plain", "image", 0.6, None)
    parsed = argparse.ArgumentParser(parents=[subject.options()])

    def near(adapt, gflops, *files):
        thresholds = Thresholds.asked(parsed.parse_args(["--config", *files]))
        assert thresholds.of_either(adapt, gflops).adapt == adapt
        config = thresholds.near(adapt, gflops)
        assert config is None or config == thresholds.of_either(adapt, gflops)
        return None if config is None else config.alpha

    assert near("image", 0.19, cheap, dear) == 0.8 and near("image", 0.21, cheap, dear) == 0.9
    assert near("batch", 0.1, cheap, dear) is None and near("batch", 0.1, cheap, dear, other) == 0.7
    assert near("image", 0.1, plain) == 0.6 and near("batch", 0.5, plain) is None
    with pytest.raises(ValueError, match="plain.json promises no cost; give it alone, or files of atm-tri"):
        near("image", 0.1, plain, cheap)
    schedule = tmp_path / "schedule.json"
    schedule.write_text(ATMConfig(adapt="static", schedule=(1,) * 12).to_json())
    with pytest.raises(ValueError, match="schedule.json is a schedule; want thresholds"):
        near("image", 0.1, str(schedule))
    for other_weights in (["--checkpoint", "mine.safetensors"], ["--model-kwargs", "num_heads=4"]):
        with pytest.raises(ValueError, match="^--config FILE: give ATM's thresholds for digits; atm-triton calibrate"):
            Thresholds.asked(parsed.parse_args(other_weights))
    for text in ('{"rows": [{}]}', '{"rows": []}'):
        schedule.write_text(text)
        with pytest.raises(ValueError, match="is no result of benchmarks.calibration; make it anew, or give --config"):
            Thresholds.of_digits(schedule)


def test_a_cost_that_a_method_cannot_have_is_said(by_curve, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subject, "open_model", partial(shallow, blocks=8))
    monkeypatch.setattr(figure4, "METHODS", ("tome", "evit", "atm, image"))
    monkeypatch.setattr(figure5, "DRAWS", 2)
    rows = run("table2", tmp_path, "--limit", "4", "--shares", "0.8", *by_curve)["rows"]
    missing = {row["method"]: row["missing"] for row in rows if "missing" in row}
    assert missing["evit"].startswith("no setting comes close to 0.0") and "tome" not in missing
    assert f"| -80 % | evit | {missing['evit']} |" in capsys.readouterr().out
    rows = run("figure6", tmp_path, "--limit", "4", "--shares", "0.97")["rows"]
    assert len(rows) == 3 and all("missing" in row for row in rows)


def test_the_stress_test_ends_where_top1_falls(tmp_path, monkeypatch, capsys):
    """The method here loses nothing up to -40 % and one point beyond."""
    monkeypatch.setattr(table1, "METHODS", ("tome", "evit"))

    def measured(of, method, goal, find):
        share = 1 - goal / of.costs.unmerged
        quality = {"top1": 90 - (share > 0.4), "top1_unpatched": 90.0, "gflops": goal, "agreement": 99.0, "kl": 0.0}
        about = {"gflops_unpatched": of.costs.unmerged, "gflops_all_tokens_last": goal, "top1_drop_se": 0.0}
        about |= {"settings": {"r": round(20 * share)}}
        return {"missing": "it cannot"} if method == "evit" else {"overall": quality | {"images": 4}, **about}

    monkeypatch.setattr(table1, "measured_at", measured)
    result = run("table1", tmp_path, "--limit", "4")
    assert len(result["rows"]) == 2 * table1.STEPS
    best = table1.best(result)
    saved = 1 - best["tome"]["overall"]["gflops"] / best["tome"]["gflops_unpatched"]
    assert best["evit"] is None and 0.4 - table1.MOST / 2**table1.STEPS < saved <= 0.4
    assert "| evit | it cannot |" in capsys.readouterr().out
    floor = min(row["share"] for row in result["rows"])
    assert 0.07 < floor  # the last block alone saves as much
    for row in result["rows"]:
        if "overall" in row:
            row["overall"]["top1"] = 80
    assert "| tome | none of 4 settings keeps top-1 |" in table1.table(result)
    assert table1.best(run("table1", tmp_path, "--limit", "4", "--drop", "1"))["tome"]["share"] > 0.88


def test_table3_splits_at_every_depth(by_curve, tmp_path):
    rows = run("table3", tmp_path, "--limit", "8", *by_curve)["rows"]
    assert [(row["adapt"], row["split_depth"]) for row in rows] == [
        (adapt, split) for adapt in ("batch", "image") for split in range(5)
    ]
    first, last = rows[0], rows[4]
    assert first["settings"]["config"]["thresholds"] == last["settings"]["config"]["thresholds"]
    assert first["overall"]["kl"] != last["overall"]["kl"]


def test_table_a1_batches_anew(tmp_path, monkeypatch, capsys):
    rows = run("tableA1", tmp_path, "--limit", "9", "--sizes", "4", "2")["rows"]
    assert [(row["batch_size"], row["adapt"]) for row in rows] == [
        (size, adapt) for size in (2, 4) for adapt in ("batch", "image")
    ]
    assert all(row["overall"]["images"] == 9 for row in rows)
    assert rows[0]["overall"]["gflops"] != rows[2]["overall"]["gflops"]
    assert rows[1]["overall"]["gflops"] == rows[3]["overall"]["gflops"]
    assert rows[1]["overall"]["kl"] == pytest.approx(rows[3]["overall"]["kl"], abs=1e-9)

    monkeypatch.setattr(subject.Subject, "in_other_batches", lambda *_: torch.empty(10**15))
    rows = run("tableA1", tmp_path, "--limit", "4", "--sizes", "4", "8")["rows"]
    assert [(row["batch_size"], row["missing"]) for row in rows] == [(4, "out of memory")] * 2
    assert "batches of 8 and more are left out: there are 4 images" in capsys.readouterr().out


def test_the_papers_points_stand_beside_ours(tmp_path, monkeypatch, capsys):
    some = [p for p in operating_points() if p.model == "DeiT-S" and not p.fine_tuned][:3]
    monkeypatch.setattr(points, "operating_points", lambda: some)
    result = run("tablesA2-A5", tmp_path, "--limit", "8")
    assert result["settings"]["points_of"] == "DeiT-S" and len(result["rows"]) == 3
    whole, first, _ = result["rows"]
    assert first["settings"]["config"]["alpha"] == some[1].alpha == first["alpha"]
    assert whole["alpha"] is None and whole["overall"]["kl"] == pytest.approx(0, abs=1e-9)
    printed = capsys.readouterr().out
    assert f"| no merging (A2) | {some[0].gflops:.2f}, {some[0].top1:.2f} % |" in printed
    assert f"| {some[1].gflops:.2f}, {some[1].top1:.2f} % |" in printed
    fine_tuned = [replace(some[1], fine_tuned=True, table="A3")]
    monkeypatch.setattr(points, "operating_points", lambda: some + fine_tuned)
    assert [row["table"] for row in run("pointsA3", tmp_path, "--limit", "4")["rows"]] == ["A3"]


def test_figure2_merges_in_one_block_alone(tmp_path, monkeypatch):
    result = run("figure2", tmp_path, "--limit", "8", "--thetas", "0.9", "0.99")
    rows = {(row["theta"], row["block"]): row for row in result["rows"]}
    assert set(rows) == {(theta, block) for theta in (0.9, 0.99) for block in range(1, 12)}
    for block in range(1, 12):
        low, high = rows[0.9, block], rows[0.99, block]
        assert low["merged"] >= high["merged"] and 0 <= high["loss"] < 2
        assert (low["loss"] > 1e-9) == (low["merged"] > 0)
    assert (tmp_path / "digits_figure2.png").stat().st_size > 10_000


def test_figures_5_and_6_compare_schedules_at_one_cost(by_curve, tmp_path, monkeypatch):
    monkeypatch.setattr(figure5, "DRAWS", 2)
    rows = run("figure5", tmp_path, "--limit", "4", "--shares", "0.33")["rows"]
    assert [row["method"] for row in rows] == list(figure5.STYLES)
    constant, rising, falling = (row["settings"]["r"] for row in rows[:3])
    assert len(set(constant)) == 1
    assert {b - a for a, b in pairwise(rising) if a} == {1} == {a - b for a, b in pairwise(falling) if b}
    assert all(0.25 < row["saved"] < 0.42 for row in rows)
    assert rows[-1]["settings"]["config"]["split_depth"] == 4

    bars = run("figure6", tmp_path, "--limit", "4")["rows"]
    assert [row["method"] for row in bars] == list(figure6.COMPARED)
    assert bars[0]["merged"] == constant[:-1]
    for row in bars:
        assert len(row["merged"]) == 3 and sum(row["merged"]) == pytest.approx(197 - row["tokens"][-1])
    assert (tmp_path / "digits_figure6.png").stat().st_size > 10_000


def test_theorem1_on_random_vectors_and_on_real_merges(tmp_path, monkeypatch):
    monkeypatch.setattr(theorem1, "DRAWN", 10_000)
    rows = run("theorem1", tmp_path, "--limit", "8", "--config", str(CONFIG))["rows"]
    assert [row["vectors"] for row in rows] == ["random"] * 3 + ["merged"] * 11
    assert all(row["outside"] == 0 for row in rows)
    for row in rows[:3]:
        assert row["pairs"] == theorem1.DRAWN and 1 - theorem1.SLACK < row["least_ratio"] < row["most_ratio"] <= 2
    patched = apply_patch(open_model(), digits_config())
    (batch,) = open_images(patched, limit=8)
    with torch.inference_mode():
        patched(batch[0])
    assert [row["pairs"] for row in rows[3:]] == [8 * r for r in patched.blocks.last.merged[:-1]]
    by_image = run("theorem1", tmp_path, "--limit", "8", "--config", str(IMAGE_CONFIG))["rows"]
    assert sum(row["pairs"] for row in by_image[3:]) > 0


def test_an_error_beyond_its_bounds_is_counted(monkeypatch):
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    n, m = torch.tensor([1.0]), torch.tensor([3.0])
    error, scale, cosine = theorem1.merging_error(x, y, n, m)
    middle = torch.tensor([1.0, 3.0], dtype=torch.float64) / 10**0.5
    assert error.item() == pytest.approx((1 - middle[0]).item() + 3 * (1 - middle[1]).item())
    assert scale.item() == pytest.approx(3 / 4) and cosine.item() == pytest.approx(0)
    monkeypatch.setattr(theorem1, "merging_error", lambda *_: (3 * scale, scale, cosine))
    assert theorem1.bounds(x, y, n, m)["outside"] == 1


def test_figure7_shows_easy_and_hard_images_by_both_methods(tmp_path):
    options = ["--limit", "24", "--pictures", "2", "--blocks", "3", "9"]
    easy, easy_tome, hard, hard_tome = run("figure7", tmp_path, *options)["rows"]
    assert easy["gflops"] < hard["gflops"] and easy["left"] < hard["left"] and easy_tome["left"] == hard_tome["left"]
    assert "ATM" in easy["title"] and "ToMe, r = " in hard_tome["title"]
    assert (tmp_path / "digits_figure7.png").stat().st_size > 10_000


CLASSES = 100
SMALL = {"embed_dim": 24, "num_heads": 1, "depth": 4, "img_size": 128, "num_classes": CLASSES}


def kwargs(shape):
    return ["--model-kwargs", *(f"{name}={value}" for name, value in shape.items())]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Directories like ImageNet's, with one image in each of 100 class folders, one of them broken, and weights and
    thresholds of a small model."""
    place = tmp_path_factory.mktemp("place")
    for split in ("val", "train"):
        for number in range(CLASSES):
            folder = place / "imagenet" / split / f"n{number:08}"
            folder.mkdir(parents=True)
            pixels = torch.randint(0, 255, (24, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "image.jpg")
    (place / "imagenet" / "val" / "n00000025" / "image.jpg").write_bytes(b"no image")
    torch.manual_seed(0)
    save_file(timm.create_model("deit_tiny_patch16_224", **SMALL).state_dict(), place / "deit_tiny.safetensors")
    thresholds = {"alpha": 0.9, "beta": 0.1, "theta_min": 0.5}
    (place / "deit_tiny.json").write_text(ATMConfig(adapt="image", **thresholds).to_json())
    return place


def test_the_line_for_imagenet_in_docs(imagenet, monkeypatch, capsys):
    """The line runs word for word. Added options, among them those of a small model, and few methods make it short."""
    compared = ("tome", "evit", "threshold, image", "atm, batch", "atm, image")
    monkeypatch.setattr(figure4, "METHODS", compared)
    text = EXPERIMENTS.read_text()
    (line,) = re.findall(r"^python -m benchmarks.paper figure4 --model .*$", text, re.MULTILINE)
    monkeypatch.chdir(imagenet)
    arguments = shlex.split(line, comments=True)[3:]
    assert paper.main([*arguments, *kwargs(SMALL), "--limit", "4", "--shares", "0.3", "--out", "."]) == 0
    result = json.loads(Path("deit_tiny_patch16_224_figure4.json").read_text())
    assert [row["method"] for row in result["rows"]] == list(compared)
    missing = {row["method"]: row["missing"] for row in result["rows"] if "missing" in row}
    assert missing == {"atm, batch": 'no thresholds are calibrated for adapt="batch"; give them by --config'}
    measured = [row["overall"] for row in result["rows"] if "overall" in row]
    assert all(quality["images"] == 3 and quality["top1"] is not None for quality in measured)
    assert result["not_read"] == [str(Path("imagenet/val/n00000025/image.jpg"))]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "1 image could not be read and was left out: imagenet/val/n00000025/image.jpg"


NAMED = ["--model", "deit_tiny_patch16_224", *kwargs(SMALL), "--checkpoint", "deit_tiny.safetensors"]
NAMED += ["--data", "imagenet/val", "--limit", "4", "--workers", "0"]
CHOOSE, CONFIG_FILE = ["--choose-by", "imagenet/train"], ["--config", "deit_tiny.json"]
TRAIN = ["--train", "imagenet/train", "--epochs", "1", "--seeds", "0", "--adapt", "image", "--batch-size", "24"]
ON_DIRECTORIES = {
    "table4": [*CHOOSE, *CONFIG_FILE, *TRAIN, "--methods", "evit", "--jobs", "2"],
    "table1": [*CHOOSE, *CONFIG_FILE],
    "table2": [*CHOOSE, *CONFIG_FILE, "--shares", "0.3"],
    "table3": CONFIG_FILE,
    "tableA1": [*CONFIG_FILE, "--sizes", "2"],
    "tablesA2-A5": [],
    "pointsA3": [],
    "figure2": ["--thetas", "0.9"],
    "figure5": [*CHOOSE, "--shares", "0.3"],
    "figure6": CHOOSE,
    "figure7": [*CHOOSE, *CONFIG_FILE, "--pictures", "2", "--blocks", "1", "3", "--share", "0.3"],
    "theorem1": CONFIG_FILE,
}


@pytest.mark.parametrize("name", ON_DIRECTORIES)
def test_an_experiment_runs_on_directories(name, imagenet, monkeypatch, capsys):
    monkeypatch.chdir(imagenet)
    monkeypatch.setattr(figure5, "DRAWS", 2)
    monkeypatch.setattr(theorem1, "DRAWN", 1000)
    monkeypatch.setattr(table1, "STEPS", 2)
    for table in (table1, figure4):
        monkeypatch.setattr(table, "METHODS", ("tome", "atm, image"))
    some = [p for p in operating_points() if p.model == "DeiT-T"]
    monkeypatch.setattr(points, "operating_points", lambda: [*some[:2], *(p for p in some if p.fine_tuned)][:4])
    assert paper.main([name, *NAMED, *ON_DIRECTORIES[name], "--out", "."]) == 0
    result = json.loads(Path(f"deit_tiny_patch16_224_{name}.json").read_text())
    assert result["not_read"] == ["imagenet/val/n00000025/image.jpg"]
    measured = [row for row in result["rows"] if "missing" not in row]
    assert measured and all(row["overall"]["images"] == 3 for row in measured if "overall" in row)
    assert "left out: imagenet/val/n00000025/image.jpg" in capsys.readouterr().out.splitlines()[-1]


def test_training_images_go_with_those_to_judge_by(imagenet, monkeypatch, capsys):
    monkeypatch.chdir(imagenet)
    for n in range(CLASSES):
        Path("other", f"m{n:08}").mkdir(parents=True)
        shutil.copy(Path("imagenet", "train", f"n{n:08}", "image.jpg"), Path("other", f"m{n:08}"))
    options = ["table4", *NAMED, *CHOOSE, *CONFIG_FILE, "--epochs", "1", "--seeds", "0", "--methods", "evit"]
    for wrong, message in (
        (["--train", "imagenet/val"], "--train imagenet/val holds images of --data: train on others"),
        (["--train", "imagenet/train", "--images", "8"], "--images draws digits; with --train all images are used"),
        (["--train", "other"], "--train other and --data imagenet/val hold different classes; want equal folder names"),
    ):
        assert paper.main([*options, *wrong, "--out", "other"]) == 2 and message in capsys.readouterr().err
    shutil.rmtree("other")


def headless(directory, classes):
    """The options that name a model with this many classes, and images."""
    shape = {**SMALL, "num_classes": classes}
    save_file(timm.create_model("deit_tiny_patch16_224", **shape).state_dict(), directory / "other.safetensors")
    named = ["--model", "deit_tiny_patch16_224", *kwargs(shape)]
    reading = ["--checkpoint", str(directory / "other.safetensors"), "--data", "imagenet/val", "--limit", "4"]
    return [*named, *reading, "--workers", "0"]


@pytest.mark.parametrize(("name", "digits"), [("table3", 2), ("figure5", 1)])
def test_a_model_without_a_head_is_compared_by_its_features(name, digits, imagenet, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(imagenet)
    monkeypatch.setattr(figure5, "DRAWS", 2)
    options = CONFIG_FILE if name == "table3" else [*CHOOSE, "--shares", "0.3"]
    assert paper.main([name, *headless(tmp_path, 0), *options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"deit_tiny_patch16_224_{name}.json").read_text())
    distances = [row["overall"]["distance"] for row in result["rows"] if "overall" in row]
    assert distances and all(distance > 0 for distance in distances)
    assert f"distance {distances[0]:.{digits}e}" in capsys.readouterr().out


def test_a_table_of_classes_refuses_a_head_of_labels(imagenet, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(imagenet)
    results = tmp_path / "results"
    results.mkdir()
    assert paper.main(["table3", *headless(tmp_path, 1), *CONFIG_FILE, "--out", str(results)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "this experiment compares classes or features, not logits of labels" in error
    assert not list(results.iterdir())


def test_the_other_line_for_imagenet_in_docs(imagenet, monkeypatch, capsys):
    """The line runs word for word except for a path; weights are not downloaded here."""
    (line,) = re.findall(
        r"`atm-triton (eval --model deit_small_patch16_224 --pretrained .*?)`", EXPERIMENTS.read_text()
    )
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))
    monkeypatch.chdir(imagenet)
    arguments = shlex.split(line.replace("imagenet/val", "imagenet/train"))
    assert cli.main([*arguments, *kwargs({"num_classes": CLASSES}), "--limit", "2", "--workers", "0"]) == 0
    assert "of the MACs saved" in capsys.readouterr().out


def test_every_method_comes_close_to_the_cost():
    class Wide:
        costs = Costs(vit(), (3, 40, 40), True)

        def __init__(self):
            self.model = vit()

        def image(self):
            return images(1)

    for name, setting, values in (("tome", "r", range(1, 12)), ("pitome", "ratio", [1 - n / 50 for n in range(26)])):
        ways = [of_baseline(name, **{setting: value}) for value in values]
        costs = [counted(Wide(), way) for way in ways]
        assert costs == sorted(costs, reverse=True)
        for goal in (costs[0] * 2, costs[2], (costs[4] + 2 * costs[5]) / 3, 0.0):
            way = nearest(Wide(), ways, goal)
            off = min(abs(cost - goal) for cost in costs)
            if off > NEAR * Wide.costs.unmerged:
                assert way is None
            else:
                assert abs(counted(Wide(), way) - goal) == off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure4", "--shares", "0.4", "0.4"], "benchmarks.paper: --shares wants each share once"),
        (["figure4", "--shares", "2"], "benchmarks.paper: --shares want numbers between 0 and 1"),
        (["figure4", "--model", "deit_tiny_patch16_224"], "deit_tiny_patch16_224 would have random weights"),
        (
            ["figure4", "--model", "deit_tiny_patch16_224", "--pretrained"],
            "--config FILE: give ATM's thresholds for deit_tiny",
        ),
        (["figure4", "--data", "somewhere"], "--choose-by DIR: give images to choose settings by, other than"),
        (["figure7", "--pictures", "0"], "benchmarks.paper: --pictures wants 1 or more"),
        (["figure7", "--share", "1"], "benchmarks.paper: --share 1 is out of range; want one between 0 and 1"),
        (["figure7", "--limit", "4", "--share", "0.97"], "give another --share"),
        (["figure4", "--limit", "x"], "figure4: argument --limit: invalid int value: 'x'"),
        (["flops", "--data", "digits"], "unrecognized arguments: --data digits"),
        (["figure7", "--limit", "4", "--blocks", "13"], "--blocks 13 is outside 1 .. 12"),
        (["table3", "--config", "OTHER"], "other.json was calibrated for deit_tiny_patch16_224, not for digits"),
        (
            ["figure5", "--data", "tests", "--choose-by", "tests/deeper"],
            "holds images of --data: choose settings by others",
        ),
        (["figure2", "--thetas", "2"], "--thetas wants cosine similarities, -1 to 1, each once"),
        (["table1", "--drop", "-1"], "--drop -1 is out of range; say how many points may be lost"),
        (["table1", "--drop", "nan"], "--drop nan is out of range; say how many points may be lost"),
        (["figure7", "--limit", "2", "--pictures", "3"], "--pictures 3 is more than there are images, 2; give fewer"),
        (["figure2", "--data", "BROKEN", "--workers", "0"], "none of its images can be read"),
        (["theorem1", "--data", "BROKEN", "--workers", "0"], "none of its images can be read"),
        (["tablesA2-A5", "--data", "BROKEN", "--workers", "0"], "none of its images can be read"),
        (["tableA1", "--sizes", "0"], "--sizes wants each size once, 1 or more"),
        (
            ["tablesA2-A5", "--model", "vit_tiny_patch16_224", "--pretrained"],
            "the paper has no",
        ),
        (["figure5", "--data", "nowhere", "--choose-by", "tests"], "directory nowhere does not exist"),
        (
            ["figure5", "--data", "tests", "--choose-by", "nowhere"],
            "directory tests must hold one folder of images",
        ),
        (["figure2", "--model", "deit_tiny_patch16"], "model 'deit_tiny_patch16' is unknown to timm; did you mean"),
        (["flops", "--out", "none/here"], "benchmarks.paper: --out none/here/paper_flops.json"),
        (["table9"], "invalid choice: 'table9' (choose from"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(theorem1, "DRAWN", 1000)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": "deit_tiny_patch16_224", "config": json.loads(digits_config().to_json())}))
    broken = tmp_path / "broken" / "class" / "0.jpg"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no image")
    named = {"OTHER": str(other), "BROKEN": str(tmp_path / "broken")}
    arguments = [named.get(argument, argument) for argument in arguments]
    try:
        code = paper.main([*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path)])])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in error[-1] and len([line for line in error if "%|" not in line]) == 1


def test_the_page_of_models_names_them_all():
    rows = [line for line in zoo.PAGE.read_text().splitlines() if line.startswith("| ")]
    named = [name.strip("`") for row in rows for name in row.split(" | ")[1].strip(" |").split(", ") if "`" in name]
    assert sorted(named) == sorted(zoo.names()) and len(named) == 200


def test_the_page_of_models_holds_for_every_tenth_and_all_that_are_refused(monkeypatch):
    text = zoo.PAGE.read_text()
    merged, refused = text.split("| refused because | names |")
    chosen = [name for i, name in enumerate(zoo.names()) if i % 10 == 0 or f"`{name}`" in refused]
    assert len(chosen) > 25
    monkeypatch.setattr(zoo, "names", lambda: chosen)
    run = zoo.run

    def run_shallow(model):
        """The blocks of a model are alike, but for the last, which may compute the class token alone."""
        model.blocks = model.blocks[:2]
        run(model)

    monkeypatch.setattr(zoo, "run", run_shallow)
    for name, reason, kind in zoo.classified():
        part, row = (merged, f"| {kind} | ") if reason is None else (refused, f"| {reason} | ")
        (line,) = (line for line in part.splitlines() if line.startswith(row))
        assert f"`{name}`" in line
