"""The paper's tables, and the page of models, in the small."""

import json

import pytest

from benchmarks import zoo
from benchmarks.paper import __main__ as paper
from benchmarks.paper import flops


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
