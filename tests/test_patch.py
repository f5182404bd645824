"""apply_patch on every kind of timm VisionTransformer: nothing changes at r = 0, and merging keeps shapes right."""

import copy
import pickle
import threading
from dataclasses import replace
from functools import partial, wraps

import pytest
import timm
import torch
import torchvision
from timm.layers import Attention, GluMlp, HybridEmbed, SwiGLU, set_fused_attn
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.nn.utils import prune

from atm_triton import ATMBlock, ATMConfig, apply_patch, remove_patch, summary
from models import distilled, images, images_for, small, vit, with_lora


def vit_with_attention(dtype=torch.float32, **options):
    model = vit()
    for block in model.blocks:
        block.attn = Attention(32, 2, qkv_bias=True, **options)
    return model.to(dtype).eval()


def hybrid_stem():
    return partial(HybridEmbed, backbone=nn.Sequential(nn.Conv2d(3, 8, 8, stride=8)))


KINDS = {
    "plain": vit,
    "distilled": distilled,
    "layerscale": partial(vit, init_values=0.3),
    "qk_norm": partial(vit, qk_norm=True),
    "scale_norms": partial(vit, scale_attn_norm=True, scale_mlp_norm=True),
    "gated": partial(vit_with_attention, gated=True),
    "attn_dim": partial(vit_with_attention, attn_head_dim=24),
    "no_qkv_bias": partial(vit, qkv_bias=False, proj_bias=False),
    "no_prefix": partial(vit, class_token=False, global_pool="avg"),
    "registers4": partial(vit, reg_tokens=4, no_embed_class=True),
    "registers9": partial(vit, reg_tokens=9),
    "registers_no_class": partial(vit, class_token=False, reg_tokens=3, global_pool="avg"),
    "avg": partial(vit, global_pool="avg"),
    "avg_prefix": partial(vit, global_pool="avg", pool_include_prefix=True),
    "avg_norm": partial(vit, global_pool="avg", fc_norm=False),
    "avgmax": partial(vit, global_pool="avgmax"),
    "max": partial(vit, global_pool="max"),
    "map": partial(vit, class_token=False, global_pool="map"),
    "prr": partial(vit, global_pool="prr"),
    "pre_norm": partial(vit, pre_norm=True),
    "swiglu": partial(vit, mlp_layer=SwiGLU),
    "glu": partial(vit, mlp_layer=GluMlp),
    "dynamic": partial(vit, dynamic_img_size=True),
    "deit3": partial(vit, no_embed_class=True, init_values=0.3),
    "registers8": partial(vit, reg_tokens=8),
    "siglip": partial(vit, class_token=False, global_pool="map", num_classes=0),
    "hybrid": lambda dtype=torch.float32: vit(dtype=dtype, patch_size=1, embed_layer=hybrid_stem()),
    "384 pixels": partial(vit, img_size=384, patch_size=16),
    "patch 14": partial(vit, img_size=70, patch_size=14),
    "mae": partial(small, "vit_base_patch16_224", global_pool="avg"),
    "lvvit_t": partial(small, "lvvit_t"),
    "lvvit_s": partial(small, "lvvit_s"),
    "lvvit_s, class head": partial(small, "lvvit_s", aux_eval=False),
    "t2t_vit_t_14": partial(small, "t2t_vit_t_14"),
    "t2t_vit_14": partial(small, "t2t_vit_14"),
    "no_head": partial(vit, num_classes=0),
    "no_pool": partial(vit, global_pool="", num_classes=0),
}
STATIC = ATMConfig(adapt="static", schedule=(3, 5, 2, 4))
NOTHING = ATMConfig(adapt="static", schedule=(0,) * 4)
EASY = ATMConfig(alpha=0.5, theta_min=0.3, beta=0.05)
IMAGE = replace(EASY, adapt="image")

every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@every_kind
def test_r_0_changes_no_logit(make):
    model = make(dtype=torch.float64)
    x = images_for(model, dtype=torch.float64)
    before = model(x)
    for config in (
        NOTHING,
        ATMConfig(alpha=1.0, beta=0.0, theta_min=1.0),
        ATMConfig(alpha=1.0, beta=0.0, theta_min=1.0, adapt="image"),
        ATMConfig(schedule=(0,) * 4, adapt="static", split_depth=4),
    ):
        apply_patch(model, config)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
        assert summary(model).r == (0,) * 4


@pytest.mark.parametrize("adapt", ["static", "image"])
@every_kind
def test_merging_fits_and_is_taken_away_again(make, adapt):
    model = make()
    x = images_for(model)
    keys, logits, features = list(model.state_dict()), model(x), model.forward_features(x)
    own = (type(model), model.blocks, list(model.blocks))
    apply_patch(model, STATIC if adapt == "static" else IMAGE)
    assert list(model.state_dict()) == keys
    assert isinstance(model, VisionTransformer)
    assert model(x).shape == logits.shape and model(x).isfinite().all()
    assert not torch.equal(model(x), logits)
    assert model.forward_features(x).shape == features.shape
    assert sum(summary(model).r) > 0
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("qkv.weight"))
    remove_patch(model)
    assert (type(model), model.blocks, list(model.blocks)) == own
    assert torch.equal(model(x), logits)


@every_kind
def test_intermediates_are_those_of_the_unpatched_model_in_shape(make):
    model = make()
    x = images_for(model)
    options = [
        {},
        {"indices": 2, "norm": True, "return_prefix_tokens": True},
        {"indices": [0, 2], "stop_early": True, "output_fmt": "NLC"},
        {"intermediates_only": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ]
    before = [model.forward_intermediates(x, **option) for option in options]
    layers = model.get_intermediate_layers(x, n=2, reshape=True)
    for config in (STATIC, IMAGE):
        apply_patch(model, config)
        for option, expected in zip(options, before, strict=True):
            assert shapes(model.forward_intermediates(x, **option)) == shapes(expected)
        assert shapes(model.get_intermediate_layers(x, n=2, reshape=True)) == shapes(layers)
    apply_patch(model, NOTHING)
    for option, expected in zip(options, before, strict=True):
        torch.testing.assert_close(model.forward_intermediates(x, **option), expected, rtol=0, atol=1e-5)


def shapes(result):
    if isinstance(result, torch.Tensor):
        return result.shape
    if isinstance(result, dict):
        return {key: shapes(value) for key, value in result.items()}
    return [shapes(value) for value in result]


@pytest.mark.parametrize("kind", ["no_prefix", "avg", "avg_norm", "avg_prefix", "max", "avgmax", "map", "prr"])
def test_pools_see_every_original_token(kind):
    """If only exact duplicates merge and attention adds log n, no logit changes."""
    model = KINDS[kind](dtype=torch.float64)
    with torch.no_grad():
        model.pos_embed.zero_()
    x = images(dtype=torch.float64)
    x = x[:, :, :8].repeat(1, 1, 5, 1)  # every row of patches repeats the first
    before = model(x)
    for adapt in ("batch", "image"):
        only_equal = {"thresholds": (1 - 1e-9,) * 4, "split_depth": 4}
        apply_patch(model, ATMConfig(**only_equal, adapt=adapt, proportional_attention=True))
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)
        assert sum(summary(model).r) >= 12


def test_merged_tokens_share_their_features():
    model, x = vit(), images()
    apply_patch(model, STATIC)
    tokens = model.forward_features(x)
    assert len(tokens[0].unique(dim=0)) == 26 - 3 - 5 - 2  # the last block computes the class token alone
    torch.testing.assert_close(model.forward_head(tokens), model(x), rtol=0, atol=1e-5)


def test_cls_only_last_changes_no_logit():
    for make in (vit, distilled, KINDS["registers4"]):
        model, x = make(dtype=torch.float64), images(dtype=torch.float64)
        every = apply_patch(model, ATMConfig(adapt="static", schedule=(3, 5, 2, 4), cls_only_last=False))(x)
        alone = apply_patch(model, STATIC)(x)
        torch.testing.assert_close(alone, every, rtol=0, atol=1e-12)
        assert summary(model).record.rows[-1] == (2 if make is distilled else 1)


def test_fused_and_unfused_agree():
    fused = vit()
    set_fused_attn(False)
    try:
        unfused = vit()
    finally:
        set_fused_attn(True)
    unfused.load_state_dict(fused.state_dict())
    x = images()
    for config in (STATIC, NOTHING):
        a, b = apply_patch(fused, config)(x), apply_patch(unfused, config)(x)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not unfused.blocks[0].attn.fused_attn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "qk_norm", "distilled"])
def test_16_bits_stay_near_float32(dtype, kind):
    model, x = KINDS[kind](), images()
    apply_patch(model, NOTHING)
    exact = model(x)
    half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    reference = remove_patch(model)(x.to(dtype))  # the error of 16 bits without merging
    slack = (reference.float() - exact).abs().max()
    assert (half.float() - exact).abs().max() <= 1.5 * slack
    apply_patch(model, STATIC)
    assert model(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "gated"])
def test_autocast(kind):
    model, x = KINDS[kind](), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        apply_patch(model, NOTHING)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    for config in (STATIC, IMAGE):
        apply_patch(model, config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            merged = model(x)
        assert merged.dtype == before.dtype and merged.isfinite().all()
        full = model(x)
        assert (merged.float() - full).abs().max() < 0.1 * full.abs().max() + 0.1


@pytest.mark.parametrize("config", [STATIC, IMAGE], ids=["static", "image"])
def test_gradient_checkpointing_changes_nothing(config):
    model, x = vit(), images()
    apply_patch(model, config).train()
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    for gradient, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [EASY, IMAGE], ids=["batch", "image"])
def test_training_with_drop_path_and_dropout(config):
    model, x = vit(drop_path_rate=0.5, attn_drop_rate=0.2, proj_drop_rate=0.2), images(16)
    apply_patch(model, config).train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("config", [EASY, IMAGE], ids=["batch", "image"])
def test_every_batch_size_runs(config):
    model = apply_patch(vit(), config)
    assert model(images(0)).shape == (0, 5)
    assert model(images(1)).shape == (1, 5)


def test_another_image_size():
    model = apply_patch(vit(dynamic_img_size=True), STATIC)
    assert model(images(side=64)).shape == (3, 5)
    assert summary(model).tokens[0] == 65
    assert model(images(side=8)).shape == (3, 5)  # a single patch: nothing to merge with
    assert summary(model).r == (0, 0, 0, 0)


def test_nan_images_give_nan_logits_for_themselves_alone():
    model, x = apply_patch(vit(), STATIC), images()
    alone = model(x)
    x[1] = float("nan")
    logits = model(x)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("config", [EASY, IMAGE], ids=["batch", "image"])
def test_two_threads_share_a_model(config):
    model = apply_patch(vit(), config).eval()
    batches = [images(batch) for batch in (1, 2, 3, 4, 5, 6)] * 5
    with torch.inference_mode():
        expected = [model(x) for x in batches]
    results = [[None] * len(batches) for _ in range(2)]

    def work(own):
        with torch.inference_mode():
            for index in range(len(batches)) if own == 0 else reversed(range(len(batches))):
                results[own][index] = model(batches[index])

    threads = [threading.Thread(target=work, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_patched_model_can_be_copied_and_pickled():
    model, x = apply_patch(distilled(), STATIC), images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.blocks[0].attn is not model.blocks[0].attn
        assert type(remove_patch(twin)).__name__ == "VisionTransformerDistilled"
        assert [type(block) for block in twin.blocks] == [Block] * 4


def test_patching_again_replaces_the_configuration():
    model, x = vit(), images()
    own = model.blocks
    apply_patch(apply_patch(model, EASY), STATIC)
    assert model.blocks.config == replace(STATIC, proportional_attention=True)
    once = model(x)
    assert torch.equal(once, apply_patch(model, STATIC)(x))
    assert remove_patch(model).blocks is own
    with pytest.raises(ValueError, match="VisionTransformer is not patched"):
        remove_patch(model)


def test_modes_and_moves_survive_the_patch():
    model = apply_patch(vit().train(), STATIC)
    assert model.blocks[0].training
    model.eval().double()
    remove_patch(model)
    assert not any(m.training for m in model.modules())
    assert model(images(dtype=torch.float64)).dtype == torch.float64


def test_a_new_classifier_on_a_patched_model():
    model = apply_patch(vit(), STATIC)
    model.reset_classifier(7)
    assert model(images()).shape == (3, 7)
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (3, 3)
    assert summary(model).record.rows[-1] == 26 - 3 - 5 - 2 - 4  # patch tokens are read: the last block merges


@pytest.mark.parametrize("adapt", ["static", "batch", "image"])
def test_log_n_is_settled_by_how_the_model_pools_when_it_runs(adapt):
    """The model behaves as if it had been patched with its present classifier; an explicit setting stays."""
    config, x = STATIC if adapt == "static" else replace(EASY, adapt=adapt), images()
    own = vit()
    patched = [
        apply_patch(copy.deepcopy(own), replace(config, proportional_attention=said)) for said in (None, True, False)
    ]
    unsaid, with_log_n, without = patched
    for pool, same in (("token", with_log_n), ("avg", without), ("max", with_log_n), ("avg", without)):
        for model in patched:
            model.global_pool = pool
        assert torch.equal(unsaid(x), same(x)) and not torch.equal(with_log_n(x), without(x)), pool
        assert torch.equal(unsaid.forward_features(x), same.forward_features(x))
        assert unsaid.blocks.config.proportional_attention is (pool != "avg")
    for model in patched:
        model.global_pool = "token"
        model.reset_classifier(3, "avg")
        model.head.load_state_dict(unsaid.head.state_dict())
    later = apply_patch(copy.deepcopy(remove_patch(copy.deepcopy(unsaid))), config)
    assert torch.equal(unsaid(x), later(x)) and torch.equal(unsaid(x), without(x))
    assert not torch.equal(unsaid(x), with_log_n(x))


def outcome(call, *arguments, **options):
    """What a call returns, or the type of its error."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("adapt", ["static", "batch", "image"])
@pytest.mark.parametrize(
    "options", [{}, {"dynamic_img_size": True}, {"dynamic_img_size": True, "dynamic_img_pad": True}], ids=str
)
@torch.no_grad()
def test_images_of_any_size_and_none_at_all_are_taken_where_timm_takes_them(options, adapt, batch):
    """timm refuses an empty batch if it resamples positions or reshapes features to images."""
    own = vit(**options)
    config = STATIC if adapt == "static" else replace(EASY, adapt=adapt)
    nothing = replace(STATIC, schedule=(0,) * 4) if adapt == "static" else ATMConfig(thresholds=(1.0,) * 4, adapt=adapt)
    merging, same = (apply_patch(copy.deepcopy(own), each) for each in (config, nothing))
    taken = 0
    for side in ((40, 40), (64, 48), (44, 40), (8, 8)):
        x = torch.randn(batch, 3, *side)
        for name, given in (
            ("forward", {}),
            ("forward_features", {}),
            ("forward_intermediates", {"indices": [1], "intermediates_only": True}),
            ("forward_intermediates", {"indices": [1], "intermediates_only": True, "output_fmt": "NLC"}),
        ):
            expected, equal, merged = (outcome(getattr(model, name), x, **given) for model in (own, same, merging))
            if isinstance(expected, type):
                assert equal is merged is expected
                continue
            taken += 1
            expected, equal, merged = (
                each[0] if isinstance(each, list) else each for each in (expected, equal, merged)
            )
            torch.testing.assert_close(equal, expected, rtol=1e-4, atol=1e-5)
            assert merged.shape == expected.shape
            if name == "forward":
                assert str(summary(merging)) and len(summary(merging).r) == 4
    assert taken or not batch


class Odd(VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x)


class SubBlock(Block):
    pass


REFUSED = {
    "no ViT": (lambda: timm.create_model("resnet18"), "ResNet cannot be merged: it is not of timm's VisionTransformer"),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer cannot be merged"),
    "eva": (
        lambda: timm.create_model("eva02_tiny_patch14_224"),
        "Eva cannot be merged: .*its keys are rotated",
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64),
        "VisionTransformer cannot be merged: .*class but of torchvision.models.vision_transformer$",
    ),
    "wrapper": (lambda: nn.DataParallel(vit()), "DataParallel cannot be merged: .*patch the bare model in it, module,"),
    "tower": (
        lambda: nn.ModuleDict({"text": nn.Linear(1, 1), "visual": nn.ModuleDict({"trunk": vit()})}),
        "but of torch.nn.modules.container; patch the bare model in it, visual.trunk, before compiling or wrapping it$",
    ),
    "parallel": (partial(vit, block_fn=ParallelScalingBlock), "ParallelScalingBlock: it has no point between"),
    "respost": (lambda: timm.create_model("vit_base_patch16_rpn_224", depth=1), "ResPostBlock: it normalises after"),
    "attention": (lambda: timm.create_model("vit_dlittle_patch16_reg1_gap_256", depth=1), "with DiffAttention"),
    "own block": (partial(vit, block_fn=SubBlock), "blocks.0 is a SubBlock: only Block of timm"),
    "own forward": (partial(vit, Odd), "Odd cannot be merged: it has a forward_features of its own"),
    "sequential": (lambda: nn.Sequential(vit()), "Sequential cannot be merged"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(make, message):
    model = make()
    kind, parameters = type(model), list(model.state_dict())
    with pytest.raises(TypeError, match=message) as caught:
        apply_patch(model)
    assert "\n" not in str(caught.value)
    assert type(model) is kind and list(model.state_dict()) == parameters


def set_forward(module):
    module.forward = lambda x, run=module.forward: 2 * run(x)


CHANGES = {
    "forward of an attention": (
        lambda m: set_forward(m.blocks[0].attn),
        "blocks.0 is a Block that has on attn a forward",
    ),
    "forward of a block": (lambda m: set_forward(m.blocks[3]), "blocks.3 is a Block that has on itself a forward"),
    "one block in two places": (
        lambda m: m.blocks.__setitem__(3, m.blocks[1]),
        "blocks.3 is a block that stands in another place too",
    ),
    "a model's own": (
        lambda m: setattr(m, "forward_features", lambda x: x),
        "cannot be merged: this one has a forward_features of its own, set on the object",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_would_no_longer_run_is_refused(change, message):
    model = vit()
    change(model)
    with pytest.raises(TypeError, match=message):
        apply_patch(model)
    assert type(model) is VisionTransformer


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def pruned(qkv):
    prune.l1_unstructured(qkv, "weight", 0.5)
    return qkv


def normed(qkv):
    nn.utils.weight_norm(qkv)
    qkv.weight_g.data *= 1.5
    return qkv


def offloaded(qkv):
    """Offload as accelerate does: the weight arrives when the module is called."""
    weight, run = nn.Parameter(qkv.weight.detach().clone()), qkv.forward
    qkv.weight = nn.Parameter(weight.to("meta"))

    def forward(x):
        qkv.weight = weight
        out = run(x)
        qkv.weight = nn.Parameter(weight.to("meta"))
        return out

    qkv.forward = forward
    return qkv


def quantised(qkv):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(qkv), {nn.Linear}, torch.qint8)[0]


def hooked(qkv):
    qkv.register_forward_hook(lambda module, args, out: 2 * out)
    return qkv


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [with_lora, pruned, normed, offloaded, quantised, hooked])
@pytest.mark.parametrize("make", [vit, partial(distilled, depth=4)])
@pytest.mark.parametrize("patched_first", [True, False])
def test_what_is_done_to_a_qkv_holds_in_the_last_block_too(make, change, patched_first):
    def changed(model):
        for block in model.blocks:
            block.attn.qkv = change(block.attn.qkv)
        return model.eval()

    model = make()
    x = images_for(model)
    expected = changed(copy.deepcopy(model))(x)
    ours = changed(apply_patch(model, NOTHING)) if patched_first else apply_patch(changed(model), NOTHING)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    if change in (with_lora, pruned, hooked):
        ours(x).sum().backward()
        for name, parameter in ours.blocks[-1].attn.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_scale_of_an_attention_is_read_where_timm_reads_it():
    x = images()
    for fused in (True, False):
        model = vit()
        for block in model.blocks:
            block.attn.fused_attn, block.attn.scale = fused, 0.7
        expected = model(x)
        torch.testing.assert_close(apply_patch(model, NOTHING)(x), expected, rtol=0, atol=1e-5)


def test_what_was_replaced_in_a_patched_block_stays_when_the_patch_goes():
    model, x = apply_patch(vit(), NOTHING), images()
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, nn.Linear(32, 32)).eval()
    model.blocks[2].norm2 = nn.Identity()
    model.blocks[3].ls1 = model.blocks[3].ls2 = Doubled()  # two names for one module
    expected, names = model(x), list(model.state_dict())
    for again in (apply_patch, remove_patch):
        again(model, NOTHING) if again is apply_patch else again(model)
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_other_bad_calls():
    model = vit()
    with pytest.raises(ValueError, match="schedule has 3 values for a model of 4 blocks"):
        apply_patch(model, ATMConfig(adapt="static", schedule=(1, 2, 3)))
    with pytest.raises(ValueError, match="split_depth=5 is beyond the model's 4 blocks"):
        apply_patch(model, ATMConfig(split_depth=5))
    with pytest.raises(TypeError, match="config is dict; want ATMConfig"):
        apply_patch(model, {"alpha": 0.9})
    assert type(model) is VisionTransformer
    with pytest.raises(ValueError, match="not patched: apply_patch first"):
        summary(model)
    apply_patch(model, EASY)
    with pytest.raises(ValueError, match="has not run all its blocks yet"):
        summary(model)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="a mask of N tokens does not fit"):
            call(images(), attn_mask=torch.zeros(26, 26))
    with pytest.raises(ValueError, match="remove_patch first, prune"):
        model.prune_intermediate_layers(1)
    with pytest.raises(ValueError, match="output_fmt='NHWC' is unknown"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_triton_is_refused_where_it_cannot_run():
    model = apply_patch(vit(dtype=torch.float64), replace(EASY, backend="triton"))
    with pytest.raises(ValueError, match="the kernels take float16, bfloat16 or float32, not float64; or use"):
        model(images(dtype=torch.float64))


def test_a_block_alone():
    config = EASY
    block = ATMBlock(32, 2, block_index=0, depth=4, config=config).eval()
    x, size = block(torch.randn(3, 26, 32))
    assert x.shape[1] < 26 and size.shape == x.shape[:2]
    assert size.sum(1).tolist() == [26.0] * 3
    later = ATMBlock(32, 2, block_index=3, depth=4, config=config, init_values=0.1, qk_norm=True).eval()
    assert later.by_size and not block.by_size
    y, grown = later(x, size)
    assert grown.sum(1).tolist() == [26.0] * 3 and y.shape[1] <= x.shape[1]
    with pytest.raises(ValueError, match="block_index=4 is outside 0 .. 3"):
        ATMBlock(32, 2, block_index=4, depth=4)


def test_a_pass_that_stops_early_is_not_summed_up():
    model, x = apply_patch(vit(), STATIC), images()
    model(x)
    model.forward_intermediates(x, indices=[1], stop_early=True)
    with pytest.raises(ValueError, match="has not run all its blocks yet"):
        summary(model)


class OwnHead(VisionTransformer):
    """A model that also classifies from a patch token."""

    def forward_head(self, x, pre_logits=False):
        return self.head(x[:, 0] + x[:, -1])


def test_a_head_of_its_own_gets_every_token():
    model, x = vit(OwnHead), images()
    before = model(x)
    apply_patch(model, NOTHING)
    torch.testing.assert_close(model(x), before)


def test_intermediates_are_contiguous_as_timms():
    model = apply_patch(vit(), STATIC)
    assert all(f.is_contiguous() for f in model.forward_intermediates(images(), intermediates_only=True))


def test_static_compiles_in_one_graph():
    model, x = vit(), images()
    apply_patch(model, STATIC)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_a_block_with_another_attention_is_refused():
    with pytest.raises(TypeError, match="attn_layer makes DiffAttention: only Attention of timm is supported"):
        ATMBlock(32, 2, block_index=0, depth=4, attn_layer="diff")


@pytest.mark.parametrize(
    ("of", "method"), [(VisionTransformer, "forward_features"), (Block, "forward"), (Attention, "forward")]
)
def test_a_method_of_timm_that_another_has_replaced_is_named(of, method, monkeypatch):
    monkeypatch.setattr(of, method, wraps(getattr(of, method))(lambda self, x, **_: x))
    with pytest.raises(TypeError, match=rf"{__name__} has replaced timm's {of.__name__}\.{method}"):
        apply_patch(vit(), ATMConfig(adapt="static", schedule=(0,) * 4))


def test_features_replaced_on_a_patched_model_are_not_passed_over():
    model = apply_patch(vit(), ATMConfig(adapt="static", schedule=(0,) * 4))
    model.forward_features = lambda x: x
    with pytest.raises(TypeError, match="forward_features was replaced on a patched model"):
        model(images())
