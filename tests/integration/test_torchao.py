"""Layers that torchao quantises by replacing weights with its own tensor class."""

import copy

import pytest
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from atm_triton import apply_patch, remove_patch
from models import images
from test_citizen import SAME, assert_quantised_alike, new

CONFIGS = [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig]


def quantised(model, config):
    quantize_(model, config())
    return model


@pytest.mark.works_with("torchao", "quantize_ to int8 (weights; weights and activations), before and after patching")
@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("adapt", SAME)
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_int8(config, adapt, patched_first):
    x = images()
    exact, expected = new().float()(x), quantised(new().float(), config)(x)
    if patched_first:
        ours = quantised(apply_patch(new().float(), SAME[adapt]), config)
    else:
        ours = apply_patch(quantised(new().float(), config), SAME[adapt])
    twin = copy.deepcopy(ours)
    assert_quantised_alike(ours(x), expected, exact)
    assert torch.equal(twin(x), ours(x))
    assert torch.equal(remove_patch(ours)(x), expected)
