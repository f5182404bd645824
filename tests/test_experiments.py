"""Small runs of the experiments behind the result files."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from atm_triton import ATMConfig, apply_patch
from atm_triton.calibration import calibrate, search
from atm_triton.flops import cost, unmerged
from atm_triton.measure.evaluate import share
from atm_triton.measure.models import open_model
from benchmarks import adaptivity, calibration, coverage, few_images, invariance, kept_for_backward, model_with_images
from benchmarks.paper.thresholds import Calibrated, Thresholds
from models import vit
from onnx_file import SIDE, small


@pytest.fixture(autouse=True)
def small_search(monkeypatch):
    for name, value in {"LEVELS": (1 / 4,), "CURVES": ((0.5, 6.0),), "STEPS": 2}.items():
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(calibrate, "MOST", {"fit": 12, "choose": 12})


def shallow(monkeypatch, blocks):
    """Experiments open the digits model with its first blocks alone."""
    model = open_model()
    model.blocks = model.blocks[:blocks]
    monkeypatch.setattr(model_with_images, "open_model", lambda: model)


def rows_of(main, out, *options):
    assert main([*options, "--out", str(out)]) == 0
    return json.loads(out.read_text())["rows"]


def test_invariance(tmp_path, monkeypatch):
    monkeypatch.setattr(invariance, "BATCH_SIZES", (3, 8))
    rows = rows_of(invariance.main, tmp_path / "out.json", "--images", "12")
    assert [row["batch_size"] for row in rows] == [3, 3, 8, 8] * 2
    for row in rows:
        if row["adapt"] == "image":
            assert row["other_assignments"] == row["other_predictions"] == 0 and row["logits_differ_by"] < 1e-4
        else:
            assert row["other_assignments"] > 0 and row["logits_differ_by"] > 1e-4


def test_adaptivity(tmp_path, monkeypatch):
    """With thresholds by the paper's curve."""
    shallow(monkeypatch, 4)
    curve = {"alpha": 0.9, "beta": 0.1, "theta_min": 0.5}
    given = [Calibrated(ATMConfig(**curve, adapt=adapt), None) for adapt in ("batch", "image")]
    monkeypatch.setattr(adaptivity.Thresholds, "of_digits", lambda: Thresholds(given))
    monkeypatch.setattr(adaptivity, "SHARES", (0.45,))
    rows = rows_of(adaptivity.main, tmp_path / "out.json", "--images", "64", "--test", "20")
    assert [row["adapt"] for row in rows] == ["image", "batch", "static"]
    assert all(0.35 < row["saved"] < 0.55 for row in rows)
    easy, *_, hard = (tenth["gflops"] for tenth in rows[0]["deciles"])
    assert easy < hard
    batch, static = rows[1]["deciles"], rows[2]["deciles"]
    assert len({tenth["gflops"] for tenth in batch}) == 1 and not static


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    x = torch.randn(2, 3)
    two = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 7))
    assert kept_for_backward.kept_bytes(two, x) == 4 * (2 * 3 + 2 * 5)  # the input, and the sigmoid for both others
    model, pixels = vit(), torch.randn(1, 3, 40, 40)
    whole = kept_for_backward.kept_bytes(model, pixels)
    for backend in ("triton", "reference"):
        config = ATMConfig(adapt="static", schedule=(6, 4, 2, 0), backend=backend)
        assert kept_for_backward.kept_bytes(apply_patch(share(model), config), pixels) < 0.8 * whole


def test_kept_for_backward(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept_for_backward, "WAYS", {"ATM": (2, "reference")})
    monkeypatch.setattr(kept_for_backward, "MODEL", "deit_tiny_patch16_224")
    assert kept_for_backward.main(["--json", str(tmp_path / "out.json")]) == 0
    timm_row, atm = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert timm_row["of_timm"] == 1.0 and 0.5 < atm["of_timm"] < 1.0 and "| ATM |" in capsys.readouterr().out


def test_coverage(tmp_path, capfd):
    """Of a real run of a test, of a file that imports no torch, which takes seconds where lines are followed; a test
    that fails leaves no result."""
    out, few = tmp_path / "out.json", tmp_path / "test_few.py"
    path = coverage.ROOT / "atm_triton" / "operating_points.py"
    few.write_text(
        f"import runpy\n\n\ndef test_few():\n    assert runpy.run_path({str(path)!r})['operating_points']()\n"
    )
    assert coverage.main(["--json", str(out), "--", str(few)]) == 0
    rows = {row["file"]: row for row in json.loads(out.read_text())["rows"]}
    row = rows["atm_triton/operating_points.py"]
    assert 0 < len(row["missing"]) < 0.7 * row["statements"]
    assert len(rows["atm_triton/config.py"]["missing"]) == rows["atm_triton/config.py"]["statements"]
    assert "| `kernels` |" in capfd.readouterr().out
    out.unlink()
    few.write_text("def test_few():\n    raise ValueError\n")
    assert coverage.main(["--json", str(out), "--", str(few)]) == 2 and not out.exists()


def test_calibration(tmp_path, capsys, monkeypatch):
    shallow(monkeypatch, 4)
    monkeypatch.setattr(calibration, "ADAPT", ("image", "static"))
    monkeypatch.setattr(calibration, "RAMPS", {"ToMe": (0,), "increasing": (1,), "decreasing": (-1,)})
    out, options = tmp_path / "out.json", ("--images", "64", "--test", "8", "--draws", "2", "--shares", "0.4")
    rows = rows_of(calibration.main, out, *options)
    assert [row["method"] for row in rows] == ["calibrated", *["calibrated", "curve"] * 2, *calibration.RAMPS]
    assert all(row["overall"]["kl"] >= 0 and row["overall"]["images"] == 8 for row in rows)
    assert all(0.25 < row["saved"] < 0.55 for row in rows[1:])
    constant, rising, falling = (row["config"]["schedule"][:-1] for row in rows[-3:])
    assert max(constant) - min(constant) <= 1
    for schedule in (rising, falling[::-1]):  # except for the one token that meets the cost
        assert schedule[0] < schedule[-1] and all(after >= before - 1 for before, after in pairwise(schedule))
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_few_images(tmp_path, capsys, monkeypatch):
    """Both are judged at one cost."""
    model = open_model()
    model.blocks = model.blocks[:4]
    monkeypatch.setattr(few_images, "open_model", lambda: model)
    earlier, few, table = few_rows(monkeypatch, tmp_path / "out.json", model, (1, 112, 112), 0.9, "--test", "16")
    assert few["at_cost"]["kl"] > 0 and "| 64 images, set 0 | " in table
    assert table.endswith(f" | {few['at_cost']['kl'] / earlier['as_is']['kl']:.2f} |")
    assert "many: " in capsys.readouterr().out


def test_few_photographs(tmp_path, capsys, monkeypatch):
    """Patch tokens are compared, also in the last block; the errors are those of four photographs."""
    model, _ = small()
    monkeypatch.setattr(few_images, "open_backbone", lambda: model)
    options = (model, (3, SIDE, SIDE), 0.99, "--photos", "--test", "8")
    earlier, few, table = few_rows(monkeypatch, tmp_path / "out.json", *options)
    assert few["promise"]["measure"] == "dense" and not few["config"]["cls_only_last"]
    before, after = (torch.tensor(row["of_photos"]) for row in (earlier["as_is"], few["at_cost"]))
    assert len(before) == len(after) == 4 and before.mean() == pytest.approx(earlier["as_is"]["distance"], rel=1e-4)
    rest = after - before * (after.mean() / before.mean())
    assert table.endswith(f"{after.mean() / before.mean():.2f} ± {rest.std() / 2 / before.mean():.2f} |")
    assert "many: " in capsys.readouterr().out


def test_few_images_without_an_earlier_calibration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_images, "RESULTS", tmp_path)
    assert few_images.main(["--sets", "1", "--test", "2"]) == 2
    assert "has no digits_calibrate_512*.json to compare with; make one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def few_rows(monkeypatch, out, model, shape, alpha, *options):
    """The rows of an earlier calibration, by the paper's curve, and of one on 64 images, and their table."""
    goal = 0.7 * cost(model, unmerged(model, shape)).paper_gflops
    config = {"alpha": alpha, "beta": 0.1, "theta_min": 0.5, "adapt": "image"}
    config["thresholds"] = [ATMConfig(**config).theta(block, 4) for block in range(1, 5)]
    monkeypatch.setattr(few_images, "earlier", lambda files: iter([("many", goal, config)]))
    earlier, few = rows_of(few_images.main, out, "--sets", "1", *options)
    assert "at_cost" not in earlier and few["cpu_seconds"] > 0 and few["calibration"] == "64 images, set 0"
    assert few["at_cost"]["gflops"] == pytest.approx(earlier["as_is"]["gflops"], rel=0.02)
    assert few["as_is"]["gflops"] == pytest.approx(goal, rel=0.2)
    table = few_images.table(json.loads(out.read_text()))
    assert table.count("\n") == 3
    return earlier, few, table


def test_what_the_calibration_benchmark_keeps(tmp_path, monkeypatch):
    def rows_by(commit, *methods):
        rows = [{"method": method} for method in methods]
        made = {"commit": commit, "dirty": False}
        (tmp_path / "out.json").write_text(json.dumps({"environment": made, "settings": {"draws": 4}, "rows": rows}))

    def kept(*keep, draws=4):
        return calibration.known(tmp_path / "out.json", {"draws": draws}, list(keep))

    monkeypatch.setattr(calibration, "environment", lambda: {"dirty": False})
    monkeypatch.setattr(calibration, "_same_code", lambda commit: commit == "now")
    assert kept() == []
    rows_by("now", "ToMe", "curve")
    assert kept() == [{"commit": "now", "method": "ToMe"}, {"commit": "now", "method": "curve"}]
    rows_by("then", "ToMe", "curve")
    assert kept() == [] and kept("curve") == [{"commit": "then", "method": "curve"}]
    with pytest.raises(ValueError, match="out.json was made with other settings; give another, or delete it"):
        kept(draws=5)
    monkeypatch.setattr(calibration, "environment", lambda: {"dirty": True})
    assert kept("curve") == []


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (invariance.main, ["--images", "0"], "invariance: --images 0 is too few; give 1 or more"),
        (adaptivity.main, ["--images", "0"], "adaptivity: --images and --test must be at least 1"),
        (calibration.main, ["--draws", "0"], "calibration: --draws, --images and --test must be at least 1"),
        (few_images.main, ["--sets", "0"], "few_images: --images and --sets must be at least 1, --test at least 2"),
        (few_images.main, ["--test", "1"], "few_images: --images and --sets must be at least 1, --test at least 2"),
        (calibration.main, ["--shares", "2"], "calibration: --shares want numbers between 0 and 1"),
        (calibration.main, ["--out", "/nowhere/out.json"], "calibration: --out /nowhere/out.json: its directory does"),
    ],
)
def test_bad_input(main, options, message, capsys):
    assert main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
