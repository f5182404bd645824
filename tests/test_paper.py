"""The paper's tables, and the page of models, in the small."""

import json

import pytest

from atm_triton.shapes import Predictor
from benchmarks import zoo
from benchmarks.paper import __main__ as paper
from benchmarks.paper import figure4, flops, subject
from benchmarks.paper.methods import NEAR, by_shapes, counted, of_baseline
from models import images, vit


def test_flops_are_counted_as_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flops, "MODELS", {name: flops.MODELS[name] for name in ("DeiT-T", "LV-ViT-T")})
    assert paper.main(["flops", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| DeiT-T, `deit_tiny_patch16_224` | 5.72 (5.72) | 1.25 (1.25) | 1,253,683,200 |" in printed
    assert "finds the same MACs to the integer in all 4 cases" in printed
    found = json.loads((tmp_path / "paper_flops.json").read_text())
    assert len(found["models"]) == 2 and found["environment"]["torch"]
    found["models"][0]["macs"] += 1
    assert "Torch's counter differs: DeiT-T: 1,253,683,201, by torch 1,253,683,200." in flops.table(found)


def test_figure4_measures_every_method_at_one_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subject, "CHOOSE_BY", 64)
    arguments = ["figure4", "--limit", "8", "--shares", "0.4", "--workers", "0", "--out", str(tmp_path)]
    assert paper.main(arguments) == 0
    found = json.loads((tmp_path / "digits_figure4.json").read_text())
    assert [row["method"] for row in found["rows"]] == list(figure4.STYLES)
    for row in found["rows"]:
        assert 0.3 < 1 - row["overall"]["gflops"] / row["gflops_unpatched"] < 0.5, row["method"]
        assert row["gflops_all_tokens_last"] > 0.9 * row["overall"]["gflops"] and row["overall"]["images"] == 8
    assert (tmp_path / "digits_figure4.png").stat().st_size > 10_000
    assert "| atm, image |" in capsys.readouterr().out

    monkeypatch.setattr(figure4, "at_cost", lambda *_: pytest.fail("measured again"))
    assert paper.main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "digits_figure4.json").read_text())["rows"] == found["rows"]
    assert paper.main([*arguments, "--resume", "--batch-size", "4"]) == 2
    assert "digits_figure4.json is of other settings or another commit; leave --resume out" in capsys.readouterr().err


def test_figure7_shows_easy_and_hard_images_by_both_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "CHOOSE_BY", 64)
    arguments = ["figure7", "--limit", "24", "--pictures", "2", "--blocks", "3", "9", "--workers", "0"]
    assert paper.main([*arguments, "--out", str(tmp_path)]) == 0
    easy, easy_tome, hard, hard_tome = json.loads((tmp_path / "digits_figure7.json").read_text())["rows"]
    assert easy["gflops"] < hard["gflops"] and easy["left"] < hard["left"] and easy_tome["left"] == hard_tome["left"]
    assert "ATM" in easy["title"] and "ToMe, r = " in hard_tome["title"]
    assert (tmp_path / "digits_figure7.png").stat().st_size > 10_000


def test_every_method_comes_close_to_the_cost():
    class Wide:
        predictor = Predictor(vit(), (3, 40, 40), [], True)

        def __init__(self):
            self.model = vit()

        def image(self):
            return images(1)

    for name, setting, values in (("tome", "r", range(1, 12)), ("pitome", "ratio", [1 - n / 50 for n in range(26)])):
        costs = [counted(Wide(), of_baseline(name, **{setting: value})) for value in values]
        assert costs == sorted(costs, reverse=True)
        for goal in (costs[0] * 2, costs[2], (costs[4] + 2 * costs[5]) / 3, 0.0):
            way = by_shapes(Wide(), name, setting, list(values), goal)
            off = min(abs(cost - goal) for cost in costs)
            if off > NEAR * Wide.predictor.unmerged:
                assert way is None
            else:
                assert abs(counted(Wide(), way) - goal) == off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure4", "--shares", "0.4", "0.4"], "benchmarks.paper: --shares wants each share once"),
        (["figure4", "--shares", "2"], "benchmarks.paper: --shares want numbers between 0 and 1"),
        (["figure4", "--model", "deit_tiny_patch16_224"], "--config FILE: say ATM's thresholds for deit_tiny"),
        (["figure4", "--data", "somewhere"], "--choose-by DIR: say by which images settings are chosen"),
        (["figure7", "--pictures", "0"], "benchmarks.paper: --pictures wants 1 or more"),
        (["flops", "--out", "none/here"], "benchmarks.paper: --out none/here/paper_flops.json"),
        (["table9"], "invalid choice: 'table9' (choose from"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    try:
        code = paper.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in error[-1] and len(error) <= 2


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
    for name, reason, kind in zoo.classified():
        part, row = (merged, f"| {kind} | ") if reason is None else (refused, f"| {reason} | ")
        (line,) = (line for line in part.splitlines() if line.startswith(row))
        assert f"`{name}`" in line
