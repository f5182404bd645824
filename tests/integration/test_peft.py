"""Adapters of peft, added before or after patching: at r = 0 the model equals the unpatched one with adapters."""

from functools import partial

import peft
import pytest
import torch

from atm_triton import apply_patch, remove_patch, summary
from models import images
from test_citizen import SAME, STATIC, assert_same, new

EVERY = ["qkv", "proj", "fc1", "fc2"]
ADAPTERS = {
    "LoRA": partial(peft.LoraConfig, r=4, target_modules=EVERY, modules_to_save=["head"], init_lora_weights=False),
    "DoRA": partial(peft.LoraConfig, r=4, target_modules=EVERY, use_dora=True, init_lora_weights=False),
    "IA3": partial(peft.IA3Config, target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False),
    "LoHa": partial(peft.LoHaConfig, r=4, target_modules=EVERY, init_weights=False),
    "OFT": partial(peft.OFTConfig, r=0, oft_block_size=4, target_modules=["qkv", "fc1"], init_weights=False),
}

shown = pytest.mark.works_with("peft", f"{', '.join(ADAPTERS)}, before and after patching: logits, gradients, merged")


def adapted(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config()).eval()


def with_adapter(config, same, patched_first):
    if patched_first:
        return adapted(apply_patch(new(), same), config)
    model = adapted(new(), config)
    apply_patch(model.base_model.model, same)
    return model


@shown
@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(config, same, patched_first):
    x, plain = images(dtype=torch.float64), adapted(new(), config)
    expected, bare = plain(x), new()(x)
    assert not torch.allclose(expected, bare, atol=1e-3)
    ours = with_adapter(config, same, patched_first)
    out = ours(x)
    assert_same(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (not one.requires_grad), name
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)
    with ours.disable_adapter(), plain.disable_adapter():
        assert_same(ours(x), plain(x))
    assert summary(ours.base_model.model).r == (0,) * 4
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)  # OFT merges in float32
    assert_same(merged(x), plain.merge_and_unload()(x))
    assert_same(remove_patch(merged)(x), merged(x))


@shown
@pytest.mark.parametrize("patched_first", [True, False])
def test_what_a_patched_model_has_learnt_is_the_unpatched_ones(patched_first, tmp_path):
    config, x = ADAPTERS["LoRA"], images(dtype=torch.float64)
    model = with_adapter(config, STATIC, patched_first).train()
    before = model(x).detach()
    model(x).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    assert model(x).square().mean() < before.square().mean()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(new(), tmp_path).eval()
    remove_patch(model.base_model.model)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-6, atol=1e-6)  # the files are float32
