"""Counters and graph tools that trace or hook a model: right for "static", refused if they would freeze counts."""

import pytest
import thop
from fvcore.nn import FlopCountAnalysis
from torch.utils.tensorboard import SummaryWriter

from atm_triton import ATMConfig, apply_patch, summary
from models import images, vit

STATIC = ATMConfig(adapt="static", schedule=(3, 5, 2, 4))
IMAGE = ATMConfig(adapt="image", thresholds=(0.5, 0.3, 0.2, None))
REFUSED = "torch.jit.trace"


def counted(model):
    counter = FlopCountAnalysis(model, images(1)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.total()


@pytest.mark.works_with("fvcore", 'FlopCountAnalysis of adapt="static": what merging saves is seen; "image" is refused')
def test_the_counter_of_fvcore():
    model = vit()
    whole = counted(model)
    merged = counted(apply_patch(model, STATIC))
    model(images(1))
    saved = summary(model).cost
    assert 0 < merged < whole
    assert merged / whole == pytest.approx(float(saved.macs / counted_by_us(vit())), rel=0.1)
    with pytest.raises(ValueError, match=REFUSED):
        counted(apply_patch(vit(), IMAGE))


def counted_by_us(model):
    apply_patch(model, ATMConfig(adapt="static", schedule=(0,) * 4, cls_only_last=False))
    model(images(1))
    return summary(model).cost.macs


@pytest.mark.works_with("tensorboard", 'SummaryWriter.add_graph of adapt="static"; "image" is refused')
def test_the_graph_of_tensorboard(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(apply_patch(vit(), STATIC), images(2))
        with pytest.raises(ValueError, match=REFUSED):
            writer.add_graph(apply_patch(vit(), IMAGE), images(2))
    assert any(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


@pytest.mark.works_with("thop", "profile in all three ways to adapt: its hooks see the tokens that are there")
@pytest.mark.parametrize("config", [STATIC, IMAGE, ATMConfig(thresholds=(0.5, 0.3, 0.2, None))], ids=lambda c: c.adapt)
def test_the_counter_of_thop(config):
    x = images(2)
    (whole, _), (merged, _) = (
        thop.profile(model, (x,), verbose=False) for model in (vit(), apply_patch(vit(), config))
    )
    assert 0 < merged < whole
