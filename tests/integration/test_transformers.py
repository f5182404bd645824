"""timm models in transformers' wrapper; the inner model is patched."""

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

from atm_triton import apply_patch, summary
from models import SHAPE, images, spread
from test_citizen import SAME, STATIC

shown = pytest.mark.works_with("transformers", "TimmWrapper: logits, hidden states, save_pretrained of a patched model")


def wrapped(cls):
    shape = {name: value for name, value in SHAPE.items() if name != "num_classes"}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=shape, num_labels=5)
    torch.manual_seed(0)
    model = cls(config).eval()
    spread(model.timm_model)
    return model


@shown
@pytest.mark.parametrize("adapt", SAME)
@pytest.mark.parametrize("cls", [TimmWrapperForImageClassification, TimmWrapperModel])
@torch.no_grad()
def test_timm_wrapper(cls, adapt, tmp_path):
    model, x = wrapped(cls), images()
    expected = model(pixel_values=x, output_hidden_states=True)
    apply_patch(model.timm_model, SAME[adapt])
    out = model(pixel_values=x, output_hidden_states=True)
    torch.testing.assert_close(out[0], expected[0], rtol=1e-6, atol=2e-6)
    for one, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()(pixel_values=x)
    torch.testing.assert_close(loaded[0], expected[0], rtol=0, atol=0)


@shown
def test_it_merges_in_the_wrapper():
    model, x = wrapped(TimmWrapperForImageClassification), images()
    apply_patch(model.timm_model, STATIC)
    loss = model(pixel_values=x, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert summary(model.timm_model).r == (3, 5, 2, 0)
    assert all(parameter.grad is not None for parameter in model.parameters())


@shown
def test_the_wrapper_itself_is_refused():
    with pytest.raises(TypeError, match="TimmWrapperForImageClassification cannot be merged"):
        apply_patch(wrapped(TimmWrapperForImageClassification), STATIC)
