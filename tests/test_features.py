"""Features, attention maps and Grad-CAM of a patched model; also the results of the examples in docs/features.md."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import create_feature_extractor as timm_extractor
from timm.utils.attention_extract import AttentionExtract
from torchvision.models.feature_extraction import create_feature_extractor

from atm_triton import ATMConfig, apply_patch
from atm_triton.measure.visualize import attention_maps, merge_map
from benchmarks.baselines import apply_baseline
from models import images, vit

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
CODE = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
STATIC = ATMConfig(adapt="static", schedule=(3, 5, 2, 4))
BATCH = ATMConfig(alpha=0.5, theta_min=0.3, beta=0.05)
MERGING = {"static": STATIC, "batch": BATCH, "image": replace(BATCH, adapt="image")}
NOTHING = replace(STATIC, schedule=(0,) * 4)
EQUAL = {"alpha": 0.99999, "beta": 0.0, "theta_min": 0.99999}


def striped(**changes):
    """A model without positions, and images whose patches are equal within a row, so that 5 of 25 differ."""
    model = vit(**changes)
    torch.nn.init.zeros_(model.pos_embed)
    rows = torch.randn(3, 3, 5, 8, 8).repeat_interleave(5, dim=2)
    return model, rows.unflatten(2, (5, 5)).permute(0, 1, 2, 4, 3, 5).reshape(3, 3, 40, 40)


def own_maps(model, x):
    """The softmaxes of an unpatched model, caught by hooks."""
    model, maps = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out.mean(1)))
    model(x)
    return maps


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg", "reg_tokens": 2}, {"init_values": 0.3}], ids=str)
@torch.no_grad()
def test_attention_maps_of_what_does_not_merge_are_the_models_own(changes):
    model, x = vit(**changes), images()
    expected = own_maps(model, x)
    for config in (NOTHING, ATMConfig(thresholds=(1.0,) * 4, adapt="image")):
        maps = attention_maps(apply_patch(copy.deepcopy(model), config), x)
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapt", ["batch", "image"])
@torch.no_grad()
def test_attention_maps_stay_where_equal_tokens_merge(adapt):
    model, x = striped()
    expected = own_maps(model, x)
    apply_patch(model, ATMConfig(**EQUAL, adapt=adapt, proportional_attention=True))
    for ours, theirs in zip(attention_maps(model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert len(merge_map(model, x[0])[2].unique()) < 15


@pytest.mark.parametrize("name", MERGING)
def test_attention_maps_leave_the_model_as_it_is(name):
    model, x = apply_patch(vit(), MERGING[name]), images()
    model.blocks[2].attn.fused_attn, model.blocks[2].attn.scale = False, 0.5
    before = model(x)
    maps = attention_maps(model, x)
    assert [tuple(each.shape) for each in maps] == [(3, 26, 26)] * 4
    for each in maps:
        torch.testing.assert_close(each.sum(-1), torch.ones(3, 26))
    maps[-1][:, 0, 1:].square().sum().backward()  # maps have gradients, for weighting by them
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert [block.attn.fused_attn for block in model.blocks] == [True, True, False, True]
    assert not any(block.attn.attn_drop._forward_hooks for block in model.blocks)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_tokens_that_were_dropped_neither_attend_nor_are_attended():
    model, x = vit(), images()
    apply_baseline(model, "evit", keep_rate=0.5, blocks=(1,), fuse_token=False)
    first, second, third, _ = attention_maps(model, x)
    for kept in (first, second):
        torch.testing.assert_close(kept.sum(-1), torch.ones(3, 26))
    dropped = torch.stack([merge_map(model, each)[1].flatten() < 0 for each in x])
    assert dropped.any(1).all()
    assert not third[:, 1:][dropped].any() and not third.mT[:, 1:][dropped].any()
    torch.testing.assert_close(third[:, 1:][~dropped].sum(-1), torch.ones(int((~dropped).sum())))


def test_attention_maps_want_a_patched_model_and_images():
    with pytest.raises(ValueError, match="VisionTransformer is not patched: apply_patch first"):
        attention_maps(vit(), images())
    for wrong in (torch.zeros(3, 40, 40), torch.zeros(0, 3, 40, 40)):
        with pytest.raises(ValueError, match=r"images has shape \[.*\]; want one image or more, \[B, C, H, W\]"):
            attention_maps(apply_patch(vit(), STATIC), wrong)


@pytest.mark.parametrize("extract", [create_feature_extractor, timm_extractor, AttentionExtract])
def test_what_traces_by_fx_is_told_what_to_take(extract):
    nodes = {AttentionExtract: {"method": "fx"}}.get(extract, {"return_nodes": ["blocks.0", "norm"]})
    with pytest.raises(TypeError, match=r"^torch.fx, .*cannot trace a patched model: .*; take forward"):
        extract(apply_patch(vit(), STATIC), **nodes)


@torch.no_grad()
def test_timms_extract_of_attention_sees_the_tokens_that_are_there():
    model, x = vit(), images()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = AttentionExtract(model, method="hook")(x)
    maps = AttentionExtract(apply_patch(copy.deepcopy(model), NOTHING), method="hook")(x)
    for name, theirs in expected.items():
        torch.testing.assert_close(maps[name], theirs[:, :, :1] if name.startswith("blocks.3") else theirs)
    maps = AttentionExtract(apply_patch(model, STATIC), method="hook")(x)
    assert [each.shape[-1] for each in maps.values()] == [26, 23, 18, 16]


@torch.no_grad()
def test_a_backbone_of_timms_is_made_first_and_patched_then():
    net, x = FeatureGetterNet(vit(), out_indices=[0, 2]), images()
    expected = net(x)
    apply_patch(net.model, replace(NOTHING, schedule=(0,) * 3))
    for ours, theirs in zip(net(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    apply_patch(net.model, replace(STATIC, schedule=(3, 5, 2)))
    assert [each.shape for each in net(x)] == [each.shape for each in expected]
    with pytest.raises(ValueError, match="remove_patch first, prune, then apply_patch again"):
        FeatureGetterNet(net.model, out_indices=[0])


@pytest.mark.parametrize("config", MERGING.values(), ids=MERGING)
@pytest.mark.parametrize("asks", ["logits", "features"])
def test_a_watched_last_norm_sees_all_tokens_where_all_are_asked_for(asks, config):
    model, x = vit(global_pool="avg", fc_norm=False), images()
    apply_patch(model, config)
    call = model if asks == "logits" else model.forward_features
    before, seen = call(x), []
    handle = model.norm.register_full_backward_hook(lambda _, grads, of_out: seen.append((*grads, *of_out)))
    out = call(x)
    torch.testing.assert_close(out, before, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert [tuple(each.shape) for each in seen[0]] == [(3, 26, 32)] * 2
    handle.remove()
    assert torch.equal(call(x), before)


def setting(model, x):
    return {"model": model, "images": x, "torch": torch, "P": model.num_prefix_tokens, "grid": (5, 5)}


def cam_of(model, x):
    """Grad-CAM of an unpatched model at the first norm of its last block."""
    seen = []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda _, args, out: seen.append(out))
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, logits.argmax()], seen)
    weights = gradient[0, 1:].mean(0)
    return (seen[0].detach()[0, 1:] @ weights).relu().view(5, 5)


@pytest.mark.parametrize("config", [NOTHING, ATMConfig(**EQUAL), ATMConfig(**EQUAL, adapt="image")])
def test_grad_cam_stays_where_nothing_or_equal_tokens_merge(config):
    (number,) = (number for number, code in enumerate(CODE) if "norm1" in code)
    model, x = striped()
    expected = [cam_of(model, image) for image in x.split(1)]
    names = setting(apply_patch(model, config), x)
    for theirs, image in zip(expected, x.split(1), strict=True):
        names["images"] = image
        exec(compile(CODE[number], "features.md", "exec"), names)
        torch.testing.assert_close(names["cam"], theirs, rtol=1e-3, atol=1e-5)
    assert torch.stack(expected).any()


@torch.no_grad()
def test_rollout_stays_where_equal_tokens_merge():
    (number,) = (number for number, code in enumerate(CODE) if "rollout" in code)
    model, x = striped()
    expected = torch.eye(26)
    for each in own_maps(model, x):
        expected = (each + torch.eye(26)) / 2 @ expected
    code = CODE[number].replace("197", "26")
    names = setting(apply_patch(model, ATMConfig(**EQUAL, adapt="image")), x)
    exec(compile(code, "features.md", "exec"), names)
    torch.testing.assert_close(names["relevance"], expected[:, 0, 1:].view(3, 5, 5), rtol=1e-3, atol=1e-6)


def test_attention_in_training_mode_is_refused():
    model = apply_patch(vit(), ATMConfig(adapt="static", schedule=(2,) * 4)).train()
    with pytest.raises(ValueError, match=r"in training mode, where dropout changes .*: model\.eval\(\)"):
        attention_maps(model, images())
