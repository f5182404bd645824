"""The rendered digits and the model that comes with the package."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

from atm_triton import ATMConfig, apply_patch, summary
from atm_triton.digits.model import CHECKPOINT, CONFIG, NAME
from atm_triton.digits.render import SOURCE, SPLITS, render, source
from atm_triton.flops import cost, unmerged
from benchmarks.digits import train as training
from benchmarks.digits.train import STAGES, train


def test_the_scans_are_scikit_learns():
    ours, theirs = load_file(SOURCE), load_digits()
    assert torch.equal(ours["images"].double(), torch.tensor(theirs.images))
    assert torch.equal(ours["labels"].long(), torch.tensor(theirs.target))


def test_no_scan_is_in_two_splits():
    ranges = [set(range(*bounds)) for bounds in SPLITS.values()]
    assert sum(map(len, ranges)) == len(set.union(*ranges)) == 1797
    assert [len(source(split)[1]) for split in SPLITS] == [1300, 100, 397]


def test_rendering_is_the_same_every_time_and_for_every_count():
    whole, part = render("test", 130, seed=5), render("test", 70, seed=5)
    for field in ("images", "labels", "complexity", "ink"):
        assert torch.equal(getattr(whole, field)[:70], getattr(part, field))
    assert not torch.equal(render("test", 70, seed=6).images, part.images)
    assert whole.images.shape == (130, 1, 112, 112) and whole.images.dtype == torch.uint8
    assert render("train", 3, side=40).images.shape == (3, 1, 40, 40)


def test_complexity_is_what_it_says():
    digits = render("test", 2000)
    assert 0.45 < digits.complexity.mean() < 0.55 and digits.complexity.min() < 0.01 and digits.complexity.max() > 0.99
    off_digit = torch.where(digits.ink == 0, digits.images.float(), torch.nan).flatten(1)
    spread = torch.tensor([row[~row.isnan()].std() for row in off_digit])
    easy, hard = digits.complexity < 0.15, digits.complexity > 0.85
    assert spread[easy].max() < 4 and spread[hard].min() > 10  # a flat background, and a busy one
    assert digits.labels.bincount().min() > 150  # all digits are about equally frequent


@pytest.mark.parametrize(
    ("arguments", "message"), [(("all", 3), "split='all' is unknown"), (("test", 0), "count=0 draws nothing")]
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(*arguments)


@pytest.fixture(scope="module")
def answered():
    """Images as the model takes them, their labels, and the model's answers."""
    digits = render("test", 256)
    x = (digits.images.float() / 255 - 0.5) / 0.25
    model = timm.create_model(NAME, pretrained=True).eval()
    with torch.inference_mode():
        return x, digits.labels, torch.cat([model(part) for part in x.split(64)]).argmax(1)


def test_the_model_is_timms_own_class_small_and_trained(answered):
    model = timm.create_model(NAME, pretrained=True).eval()
    assert type(model).__name__ == "VisionTransformer" and len(model.blocks) == 12
    assert CHECKPOINT.stat().st_size < 4e6
    whole = cost(model, unmerged(model, (1, 112, 112)))
    assert whole.macs == pytest.approx(0.352e9, rel=0.01)
    _, labels, answers = answered
    assert (answers == labels).float().mean() > 0.85


def test_its_configuration_merges_and_keeps_the_predictions(answered):
    config = ATMConfig.from_json(CONFIG.read_text())
    assert json.loads(CONFIG.read_text())["split"] == "calibration"
    model = timm.create_model(NAME, pretrained=True).eval()
    x, _, before = answered
    with torch.inference_mode():
        apply_patch(model, config)
        after = torch.cat([model(part) for part in x.split(64)]).argmax(1)
    assert (before == after).float().mean() >= 0.98
    assert summary(model).saved > 0.35


def test_training_takes_every_stage(monkeypatch):
    monkeypatch.setattr(training, "STAGES", tuple((side, 4, steps) for side, _, steps in STAGES))
    model, log = train(seed=0, device="cpu", scale=1e-4)
    assert type(model) is VisionTransformer and all(p.isfinite().all() for p in model.parameters())
    assert log[-1]["step"] == len(STAGES) and log[-1]["side"] == STAGES[-1][0]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (training.main, ["--scale", "0"], "train: --scale must be finite and above 0, got 0.0"),
        (training.main, ["--scale", "inf"], "train: --scale must be finite and above 0, got inf"),
        (training.main, ["--out", "no/model.safetensors"], "train: --out no/model.safetensors: its directory does not"),
    ],
)
def test_bad_input_to_the_scripts(main, arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(message) and "Traceback" not in error
