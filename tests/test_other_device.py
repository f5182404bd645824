"""What runs on a GPU runs on a device that is not the CPU, with the values of the CPU."""

import re
from pathlib import Path

import pytest
import torch

from atm_triton import ATMConfig, apply_patch
from atm_triton.measure.evaluate import evaluate
from atm_triton.training.finetune import Training
from atm_triton.training.recipe import Recipe
from benchmarks.baselines import BASELINES, TRAINED, baseline
from models import vit
from other_device import other_device

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
STEP = Recipe(epochs=1, batch_size=4, accumulate=1, mixup=0.0, cutmix=0.0)
SETTINGS = {
    "ats": {"M": 6, "blocks": (1, 3)},
    "dtome": {"thresholds": (0.9, 0.8, 0.8, 0.8)},
    "iared2": {"blocks": (0, 2), "keep_rates": (0.9, 0.5), "heads": 2},
    "avit": {"gate_scale": 2.0, "gate_center": 1.5},
    "tome": {"r": 3},
    "tofu": {"r": 3},
    "mctf": {"r": 4},
    "pitome": {"ratio": 0.9},
    "threshold": {"theta": 0.5, "adapt": "image"},
    **{name: {"keep_rate": 0.6, "blocks": (1, 2)} for name in ("evit", "dynamicvit", "evovit", "zero_tprune")},
    "bat": {"keep_rate": 0.6, "blocks": (1, 2), "share": 0.5, "neighbours": 2},
}
CONFIGS = {adapt: ATMConfig(adapt=adapt, thresholds=(0.6,) * 4) for adapt in ("batch", "image")}
CONFIGS["static"] = ATMConfig(adapt="static", schedule=(2, 2, 2, 1))


def model(depth=4):
    torch.manual_seed(0)
    return vit(embed_dim=16, img_size=32, depth=depth)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)) for _ in range(2)]


def evaluated(how, at=None, depth=4):
    one = model(depth) if at is None else model(depth).to(at)
    return evaluate(one, batches(), how(one), title=None)


@pytest.mark.parametrize("name", [*BASELINES, *CONFIGS])
def test_a_method_is_evaluated_as_on_the_cpu(name, monkeypatch):
    def how(_):
        return CONFIGS[name] if name in CONFIGS else baseline(name, **SETTINGS.get(name, {})).apply

    here = evaluated(how)
    with other_device(monkeypatch) as device:
        there = evaluated(how, device)
    assert there.tokens == here.tokens and there.overall.own_tokens == here.overall.own_tokens
    assert there.overall.kl == pytest.approx(here.overall.kl, rel=1e-5) and here.overall.kl > 1e-6


@pytest.mark.parametrize("name", ["EverySecond", "EverySecondDropped"])
def test_a_method_of_the_page_is_evaluated_as_on_the_cpu(name, monkeypatch):
    page = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]:
        exec(code, page)

    def how(_):
        return lambda model: apply_patch(model, block_class=page[name])

    here = evaluated(how, depth=5)  # the last block computes the class token alone; the plans are for block 3
    with other_device(monkeypatch) as device:
        there = evaluated(how, device, depth=5)
    assert there.tokens == here.tokens and here.tokens[-1] < here.tokens[0]
    assert there.overall.kl == pytest.approx(here.overall.kl, rel=1e-5) and here.overall.kl > 1e-6


@pytest.mark.parametrize("name", [*dict.fromkeys((*TRAINED, "evit", "tome", "mctf")), *CONFIGS])
def test_a_method_is_trained_as_on_the_cpu(name, monkeypatch):
    def trained(at=None):
        one = model() if at is None else model().to(at)
        method = None if name in CONFIGS else baseline(name, **SETTINGS.get(name, {})).learning(one)
        training = Training(one, STEP if method is None else method.recipe(STEP), 2, method)
        training.merge_by(CONFIGS.get(name))
        steps = [training.advance([batch]) for batch in batches()]
        return steps, evaluate(one, batches(), training.patch, title=None)

    steps, after = trained()
    with other_device(monkeypatch) as device:
        steps_there, after_there = trained(device)
    for step, step_there in zip(steps, steps_there, strict=True):
        assert step_there == pytest.approx(step, rel=1e-5)
    assert after_there.tokens == after.tokens and after_there.overall.kl == pytest.approx(after.overall.kl, rel=1e-5)


def test_the_other_device_refuses_what_a_gpu_refuses(monkeypatch):
    x = torch.arange(6.0).view(2, 3)
    with other_device(monkeypatch) as device:
        y = x.to(device)
        assert y.device == device and (y + 1).device == device and torch.zeros(2, device=device).device == device
        assert (y * 2).cpu().tolist() == (x * 2).tolist() and y.sum().item() == 15.0
        assert y[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]  # an index may lie on the CPU
        assert (y * torch.tensor(2.0)).device == device
        for mixed in (
            lambda: y + x,
            lambda: x[y.long()],
            lambda: torch.stack([y, x]),
            lambda: torch.cat([x, y]),
            lambda: torch.stack([y.sum(), x.sum()]),
            lambda: y.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
            lambda: y.index_put((torch.tensor([0]),), torch.ones(1, 3)),
        ):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                mixed()
