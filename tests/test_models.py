"""LV-ViT, T2T-ViT and MAE: shapes, keys and values of the published models, their checkpoints, and merging."""

import copy
import math
import pickle
import re
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from timm.models import group_parameters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atm_triton import ATMConfig, apply_patch, remove_patch, summary
from atm_triton.flops import cost, scheduled, unmerged
from atm_triton.models import LVViT, T2TViT, load_checkpoint
from models import distilled, images_for, small, vit

IMAGE = (3, 224, 224)


def meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


PUBLISHED = [  # name, class, state dict entries, parameters, trained parameters, MACs, the paper's GFLOPs
    ("lvvit_t", LVViT, 160, 8_534_720, 8_534_720, 2_868_017_664, "2.87"),
    ("lvvit_s", LVViT, 204, 26_151_824, 26_151_824, 6_551_485_440, "6.57"),
    ("lvvit_m", LVViT, 248, 55_830_544, 55_830_544, 12_678_045_696, "12.74"),
    ("t2t_vit_t_14", T2TViT, 184, 21_541_070, 21_465_422, 6_088_721_920, "6.09"),
    ("t2t_vit_t_19", T2TViT, 239, 39_172_942, 39_084_686, 9_784_935_552, "9.79"),
    ("t2t_vit_14", T2TViT, 188, 21_545_550, 21_465_806, 4_783_468_544, "4.79"),
    ("t2t_vit_19", T2TViT, 243, 39_177_422, 39_085_070, 8_479_682_176, "8.48"),
]


@pytest.mark.parametrize(("name", "cls", "entries", "parameters", "trained", "macs", "gflops"), PUBLISHED)
def test_shapes_and_costs_are_the_published_ones(name, cls, entries, parameters, trained, macs, gflops):
    model = meta(name)
    assert type(model) is cls and len(model.state_dict()) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    whole = cost(model, unmerged(model, IMAGE))
    assert whole.macs == macs and f"{whole.paper_gflops:.2f}" == gflops


BLOCK = {
    "norm1.weight": "D", "norm1.bias": "D", "attn.qkv.weight": "3D D", "attn.proj.weight": "D D", "attn.proj.bias": "D",
    "norm2.weight": "D", "norm2.bias": "D", "mlp.fc1.weight": "3D D", "mlp.fc1.bias": "3D", "mlp.fc2.weight": "D 3D",
    "mlp.fc2.bias": "D",
}  # fmt: skip
TRUNK = {"cls_token": "1 1 D", "pos_embed": "1 197 D", "norm.weight": "D", "norm.bias": "D"}
HEADS = {"head.weight": "1000 D", "head.bias": "1000"}
CONV_STEM = {
    "conv1.weight": "64 3 7 7", "conv2.weight": "64 64 3 3", "conv3.weight": "64 64 3 3", "proj.weight": "D 64 8 8",
    "proj.bias": "D",
    **{f"bn{n}.{key}": "64" for n in (1, 2, 3) for key in ("weight", "bias", "running_mean", "running_var")},
    **{f"bn{n}.num_batches_tracked": "" for n in (1, 2, 3)},
}  # fmt: skip
TRANSFORMER = {
    "norm1.weight": "c", "norm1.bias": "c", "attn.qkv.weight": "192 c", "attn.proj.weight": "64 64",
    "attn.proj.bias": "64", "norm2.weight": "64", "norm2.bias": "64", "mlp.fc1.weight": "64 64", "mlp.fc1.bias": "64",
    "mlp.fc2.weight": "64 64", "mlp.fc2.bias": "64",
}  # fmt: skip
PERFORMER = {
    "w": "32 64", "kqv.weight": "192 c", "kqv.bias": "192", "proj.weight": "64 64", "proj.bias": "64",
    "norm1.weight": "c", "norm1.bias": "c", "norm2.weight": "64", "norm2.bias": "64", "mlp.0.weight": "64 64",
    "mlp.0.bias": "64", "mlp.2.weight": "64 64", "mlp.2.bias": "64",
}  # fmt: skip


def published_keys(D, depth, stem):
    """The names and shapes of an official state dict."""
    keys = {**TRUNK, **HEADS, **{f"blocks.{i}.{key}": shape for i in range(depth) for key, shape in BLOCK.items()}}
    if stem is None:
        keys |= {f"patch_embed.{key}": shape for key, shape in CONV_STEM.items()}
        keys |= {"aux_head.weight": "1000 D", "aux_head.bias": "1000"}
    else:
        for number, c in ((1, "147"), (2, "576")):
            part = {k: re.sub(r"\bc\b", c, shape) for k, shape in stem.items()}
            keys |= {f"tokens_to_token.attention{number}.{k}": shape for k, shape in part.items()}
        keys |= {"tokens_to_token.project.weight": "D 576", "tokens_to_token.project.bias": "D"}
    sizes = {"D": D, "3D": 3 * D}
    return {key: tuple(sizes.get(n) or int(n) for n in shape.split()) for key, shape in keys.items()}


@pytest.mark.parametrize(
    ("name", "D", "depth", "stem"),
    [
        ("lvvit_t", 240, 12, None),
        ("lvvit_m", 512, 20, None),
        ("t2t_vit_t_14", 384, 14, TRANSFORMER),
        ("t2t_vit_19", 448, 19, PERFORMER),
    ],
)
def test_state_dicts_have_the_published_keys(name, D, depth, stem):
    shapes = {key: tuple(value.shape) for key, value in meta(name).state_dict().items()}
    assert shapes == published_keys(D, depth, stem)


def layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def trunk(x, state, depth, heads, skip_lam):
    """Class token, positions, blocks and norm, written from the description of the architecture."""
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1) + state["pos_embed"]
    B, N, D = x.shape
    for i in range(depth):
        y = linear(layer_norm(x, state, f"blocks.{i}.norm1"), state, f"blocks.{i}.attn.qkv")
        q, k, v = y.reshape(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * (D // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).reshape(B, N, D), state, f"blocks.{i}.attn.proj") / skip_lam
        y = linear(layer_norm(x, state, f"blocks.{i}.norm2"), state, f"blocks.{i}.mlp.fc1")
        x = x + linear(F.gelu(y), state, f"blocks.{i}.mlp.fc2") / skip_lam
    return layer_norm(x, state, "norm")


@pytest.mark.parametrize(("name", "skip_lam"), [("lvvit_t", 1), ("lvvit_s", 2)])
def test_lvvit_is_as_described(name, skip_lam):
    model = small(name, torch.float64)
    for number in (1, 2, 3):  # as in a trained model
        bn = getattr(model.patch_embed, f"bn{number}")
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), bn.bias.data.normal_()
    x, state = images_for(model, dtype=torch.float64), model.state_dict()
    y = x
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        weight, bn = state[f"patch_embed.conv{number}.weight"], f"patch_embed.bn{number}"
        y = F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)
        named = (state[f"{bn}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias"))
        mean, var, scale, shift = named
        y = ((y - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
    y = F.conv2d(y, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    y = trunk(y.flatten(2).transpose(1, 2), state, 4, 2, skip_lam)
    alone = linear(y[:, 0], state, "head")
    whole = alone + 0.5 * linear(y[:, 1:], state, "aux_head").max(dim=1).values
    assert model.aux_eval
    torch.testing.assert_close(model(x), whole, rtol=0, atol=1e-9)
    model.aux_eval = False
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-9)
    assert not torch.allclose(alone, whole, atol=0.1)


def token_transformer(x, state, name):
    dim = x.shape[-1]
    q, k, v = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv").split(64, dim=-1)
    attended = (q @ k.transpose(1, 2) * dim**-0.5).softmax(-1) @ v
    x = v + linear(attended, state, f"{name}.attn.proj")
    y = F.gelu(linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + linear(y, state, f"{name}.mlp.fc2")


def token_performer(x, state, name):
    k, q, v = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.kqv").split(64, dim=-1)

    def phi(t):
        return torch.exp(t @ state[f"{name}.w"].T - (t * t).sum(-1, keepdim=True) / 2) / math.sqrt(32)

    scores = phi(q) @ phi(k).transpose(1, 2)  # the linear form never writes these out
    attended = scores @ v / (scores.sum(-1, keepdim=True) + 1e-8)
    x = v + linear(attended, state, f"{name}.proj")
    y = F.gelu(linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.0"))
    return x + linear(y, state, f"{name}.mlp.2")


@pytest.mark.parametrize(("name", "attend"), [("t2t_vit_t_14", token_transformer), ("t2t_vit_14", token_performer)])
def test_t2t_vit_is_as_described(name, attend):
    model = small(name, torch.float64)
    x, state = images_for(model, dtype=torch.float64), model.state_dict()
    y = F.unfold(x, 7, stride=4, padding=2).transpose(1, 2)
    y = attend(y, state, "tokens_to_token.attention1").transpose(1, 2).reshape(3, 64, 16, 16)
    y = F.unfold(y, 3, stride=2, padding=1).transpose(1, 2)
    y = attend(y, state, "tokens_to_token.attention2").transpose(1, 2).reshape(3, 64, 8, 8)
    y = linear(F.unfold(y, 3, stride=2, padding=1).transpose(1, 2), state, "tokens_to_token.project")
    logits = linear(trunk(y, state, 4, 2, 1)[:, 0], state, "head")
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-7 if attend is token_performer else 1e-9)


def test_the_positions_of_t2t_vit_are_sinusoids():
    model = timm.create_model("t2t_vit_t_14", depth=1)
    assert not model.pos_embed.requires_grad and model.pos_embed.shape == (1, 197, 384)
    for p, j in ((0, 0), (1, 0), (1, 1), (196, 382), (196, 383), (57, 100)):
        angle = p / 10000 ** (2 * (j // 2) / 384)
        assert model.pos_embed[0, p, j] == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-7)


DUPLICATED = {
    "deit": vit,
    "distilled": distilled,
    "layerscale": lambda dtype: vit(dtype=dtype, init_values=0.3),
    "registers": lambda dtype: vit(dtype=dtype, reg_tokens=4),
    "siglip": lambda dtype: vit(dtype=dtype, class_token=False, global_pool="map"),
    "mae": lambda dtype: small("vit_base_patch16_224", dtype, global_pool="avg"),
    "lvvit_t": lambda dtype: small("lvvit_t", dtype),
    "lvvit_s": lambda dtype: small("lvvit_s", dtype),
    "lvvit_s, class head": lambda dtype: small("lvvit_s", dtype, aux_eval=False),
    "t2t_vit_t_14": lambda dtype: small("t2t_vit_t_14", dtype),
    "t2t_vit_14": lambda dtype: small("t2t_vit_14", dtype),
}


@pytest.mark.parametrize("adapt", ["batch", "image"])
@pytest.mark.parametrize("make", DUPLICATED.values(), ids=DUPLICATED)
def test_merging_exact_duplicates_is_lossless(make, adapt):
    """Attention adds log n. Tokens come in pairs here, whatever the stem makes of neighbours."""
    model = make(dtype=torch.float32)
    x = images_for(model)
    patches = model.patch_embed.num_patches // 2 * 2
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = 0

    def pairs(_, args, tokens):
        return torch.cat([tokens[:, :patches:2].repeat_interleave(2, dim=1), tokens[:, patches:]], dim=1)

    model.patch_embed.register_forward_hook(pairs)
    before = model(x)
    only_equal = {"alpha": 1 - 1e-6, "theta_min": 1 - 1e-6, "beta": 0.0}
    apply_patch(model, ATMConfig(**only_equal, split_depth=4, adapt=adapt, proportional_attention=True))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-4)
    assert sum(summary(model).r) >= patches // 2


def test_pools_weigh_merged_tokens_by_their_size():
    """An average weighs merged tokens by size; an attention pool adds the log of the size."""
    config = ATMConfig(adapt="static", schedule=(3, 5, 2, 4), proportional_attention=True)
    model = apply_patch(small("vit_base_patch16_224", torch.float64, global_pool="avg", fc_norm=False), config)
    x = images_for(model, dtype=torch.float64)
    tokens = model._run(x, None, dense=False).tokens
    kept, size = (tokens.images.shaped(rows)[:, 1:] for rows in (model.norm(tokens.x), tokens.sizes[:, None].double()))
    pooled = (kept * size).sum(1) / 16
    torch.testing.assert_close(model(x), model.head(pooled), rtol=0, atol=1e-12)

    model = apply_patch(vit(dtype=torch.float64, class_token=False, global_pool="map"), config)
    x = images_for(model, dtype=torch.float64)
    tokens = model._run(x, None, dense=False).tokens
    bias = tokens.images.shaped(tokens.sizes).double().log()[:, None, None, :]
    pooled = model.attn_pool(tokens.images.shaped(model.norm(tokens.x)), attn_mask=bias)
    torch.testing.assert_close(model(x), model.head(pooled), rtol=0, atol=1e-12)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(("name", "aux_eval"), [("lvvit_s", True), ("lvvit_s", False), ("t2t_vit_t_14", None)])
def test_macs_equal_torchs_counter(name, aux_eval, merged):
    set_fused_attn(False)
    try:
        model = small(name, **({} if aux_eval is None else {"aux_eval": aux_eval}))
    finally:
        set_fused_attn(True)
    apply_patch(model, ATMConfig(adapt="static", schedule=(3, 2, 2, 1) if merged else (0,) * 4))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images_for(model, batch=1))
    s = summary(model)
    assert counter.get_total_flops() // 2 == s.macs + s.cost.matching
    scheduled_cost = cost(model, scheduled(model, (3, 64, 64), model.blocks.config.schedule, True))
    assert scheduled_cost == s.cost


def test_the_papers_count_of_lvvit_splits_where_tokens_merge():
    """A block of s tokens costs s (10 h^2 + 2 h s + 10 s H + 49 h): attention before the merge, MLP after it."""
    model = meta("lvvit_s", aux_eval=False)
    h, H = 384, 6
    stem = 112**2 * (147 * 64 + 2 * 9 * 64 * 64 + 64 * h)
    whole = stem + 16 * 197 * (10 * h**2 + 2 * h * 197 + 10 * 197 * H + 49 * h)
    assert cost(model, unmerged(model, IMAGE)).paper == whole
    less = cost(model, scheduled(model, IMAGE, (5,) + (0,) * 15, cls_only_last=False)).paper
    first = 197 * (4 * h**2 + 2 * h * 197 + 10 * 197 * H + 11 * h) + 192 * (6 * h**2 + 38 * h)
    others = 15 * 192 * (10 * h**2 + 2 * h * 192 + 10 * 192 * H + 49 * h)
    assert less == stem + first + others


def test_the_summary_says_which_logits_of_lvvit_it_saw():
    model = apply_patch(small("lvvit_s"), ATMConfig(adapt="static", schedule=(3, 2, 2, 1)))
    x = images_for(model)
    model(x)
    assert str(summary(model)).endswith("auxiliary head over patch tokens (aux_eval=True)")
    assert summary(model).record.leading is None and summary(model).r == (3, 2, 2, 1)
    model.aux_eval = False
    model(x)
    assert str(summary(model)).endswith("logits: class head alone (aux_eval=False)")
    assert summary(model).record.leading == 1 and summary(model).r == (3, 2, 2, 0)


def test_mae_attends_without_log_n_unless_told():
    model = small("vit_base_patch16_224", global_pool="avg")
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= model.state_dict().keys()
    assert "norm.weight" not in model.state_dict()
    schedule = {"adapt": "static", "schedule": (3, 2, 2, 1)}
    x = images_for(model)
    logits = {}
    for said in (None, False, True):
        logits[said] = apply_patch(model, ATMConfig(**schedule, proportional_attention=said))(x)
    assert torch.equal(logits[None], logits[False]) and not torch.allclose(logits[None], logits[True], atol=1e-4)
    for other in (vit(), vit(class_token=False, global_pool="avg"), small("lvvit_s")):
        assert apply_patch(other, ATMConfig(**schedule)).blocks.config.proportional_attention is True


def test_a_new_classifier_of_lvvit_has_a_new_auxiliary_head():
    model = small("lvvit_s", torch.float64)
    model.reset_classifier(7)
    x = images_for(model, dtype=torch.float64)
    assert model(x).shape == (3, 7) and model.aux_head.weight.shape == (7, 32)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])


def test_images_of_another_size_are_refused():
    for name in ("lvvit_s", "t2t_vit_t_14"):
        with pytest.raises(ValueError, match="images of 64 x 48; the model takes 64 x 64"):
            small(name)(torch.zeros(1, 3, 64, 48))


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_load_as_they_were_published(tmp_path, wrap, prefix):
    state = {prefix + key: value for key, value in small("t2t_vit_t_14").state_dict().items()}
    path = tmp_path / "weights.pth.tar"
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, path)
    model = small("t2t_vit_t_14")
    assert load_checkpoint(model, path) is model
    assert all(torch.equal(value, state[prefix + key]) for key, value in model.state_dict().items())


def test_safetensors_load_into_the_models_own_dtype_also_when_patched(tmp_path):
    state = small("lvvit_s").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    model = apply_patch(small("lvvit_s", torch.float64), ATMConfig(thresholds=(0.9,) * 4))
    load_checkpoint(model, str(tmp_path / "weights.safetensors"))
    assert all(
        torch.equal(value, state[key].to(value.dtype)) for key, value in remove_patch(model).state_dict().items()
    )
    assert model.cls_token.dtype == torch.float64


def test_averaged_weights_where_the_authors_evaluate_them(tmp_path):
    for name, evaluated in (("lvvit_s", "state_dict"), ("t2t_vit_t_14", "state_dict_ema")):
        files = {wrap: small(name).state_dict() for wrap in ("state_dict", "state_dict_ema")}
        torch.save(files, tmp_path / "both.pth")
        for ema, wrap in ((None, evaluated), (True, "state_dict_ema"), (False, "state_dict")):
            model = load_checkpoint(small(name), tmp_path / "both.pth", ema=ema)
            assert torch.equal(model.head.weight, files[wrap]["head.weight"])


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def weights(model):
    """A copy of the model's state dict, to be damaged."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def spoilt(state):
    """Weights that do not fit, by what is wrong."""
    cls = state["cls_token"]
    without = {key: value for key, value in state.items() if key != "aux_head.weight"}
    return {
        "missing and unexpected": {**without, "neck.weight": cls.clone()},
        "size": weights(small("lvvit_s", img_size=96)),
        "another model": weights(small("t2t_vit_t_14")),
        "complex": {**state, "cls_token": cls + 0j},
    }


UNFIT = {
    "missing and unexpected": "aux_head.weight missing; neck.weight unexpected",
    "size": r"pos_embed is \[1, 37, 32\], want \[1, 17, 32\]",
    "another model": "and 19 more missing; tokens_to_token.* and 21 more unexpected",
    "complex": "holds no weights: want plain tensors by name",
}
UNREADABLE = {
    "no weights": ({"state_dict": {"epoch": 3}}, "holds no weights: want plain tensors by name"),
    "empty": ({}, "holds no weights: want plain tensors by name"),
    "list": ([1, 2], "holds no weights"),
    "sparse": ({"cls_token": torch.eye(3).to_sparse()}, "holds no weights: want plain tensors by name"),
    "meta": ({"cls_token": torch.empty(3, device="meta")}, "holds no weights: want plain tensors by name"),
    "evil": ({"state_dict": Evil()}, "it holds more than tensors .*exec.*, which would run code"),
}


def refused(path, message):
    model = small("lvvit_s")
    before = weights(model)
    with pytest.raises(ValueError, match=message) as caught, warnings.catch_warnings(action="error"):
        load_checkpoint(model, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and path.name in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("kind", "message"), UNFIT.items(), ids=UNFIT)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, kind, message, suffix):
    state, path = spoilt(weights(small("lvvit_s")))[kind], tmp_path / f"bad.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    refused(path, message)


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_without_plain_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", message)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_broken_files_are_refused(tmp_path, suffix):
    path, state = tmp_path / f"bad.{suffix}", weights(small("lvvit_s"))
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(path, "holds no weights that can be read")
    path.write_text("weights")
    refused(path, "holds no weights that can be read")
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))  # not torch's own format
    refused(path, "holds no weights that can be read" if suffix == "safetensors" else "it holds more than tensors")


def test_safetensors_may_have_the_prefix_too(tmp_path):
    state = weights(small("lvvit_s"))
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "weights.safetensors")
    model = load_checkpoint(small("lvvit_s"), tmp_path / "weights.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_averaged_weights_are_taken_where_there_are_no_others(tmp_path):
    state = weights(small("lvvit_s"))
    torch.save({"model_ema": state}, tmp_path / "ema.pth")
    assert torch.equal(load_checkpoint(small("lvvit_s"), tmp_path / "ema.pth").head.weight, state["head.weight"])


def test_a_model_without_memory_is_told_to_get_some(tmp_path):
    state = weights(small("lvvit_s"))
    torch.save(state, tmp_path / "weights.pth")
    model = meta("lvvit_s", img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    with pytest.raises(ValueError, match=r"this LVViT is on the meta device: model.to_empty"):
        load_checkpoint(model, tmp_path / "weights.pth")
    expected = small("lvvit_s")
    expected.load_state_dict(state)
    x = images_for(expected)
    for filled in (model.to_empty(device="cpu"), model):
        torch.testing.assert_close(load_checkpoint(filled, tmp_path / "weights.pth")(x), expected(x))


WRONG = [
    ("lvvit_s", {"global_pool": "avg"}, ValueError, "global_pool='avg': LV-ViT classifies from its class token"),
    ("lvvit_s", {"init_values": 0.1}, ValueError, "init_values=0.1: LV-ViT has no LayerScale"),
    ("lvvit_s", {"aux_eval": "false"}, TypeError, "aux_eval must be True or False, got 'false'"),
    ("lvvit_s", {"dynamic_img_size": True}, ValueError, "images of one size"),
    ("t2t_vit_t_14", {"img_size": 100}, ValueError, "one token for 16 x 16 pixels"),
    ("t2t_vit_t_14", {"patch_size": 8}, ValueError, "one token for 16 x 16 pixels"),
    ("t2t_vit_t_14", {"pos_embed": "none"}, ValueError, "T2T-ViT has sinusoids"),
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), WRONG)
def test_arguments_that_do_not_fit_are_refused(name, options, kind, message):
    with pytest.raises(kind, match=message):
        small(name, **options)


def test_the_size_may_change_but_not_the_patches():
    for name in ("lvvit_s", "t2t_vit_t_14"):
        model = apply_patch(small(name), ATMConfig(adapt="static", schedule=(3, 2, 2, 1)))
        model.set_input_size(96)
        assert model(images_for(model)).shape == (3, 5) and model.pos_embed.shape == (1, 37, 32)
        with pytest.raises(ValueError, match="patch_size=8: this stem has one token for 16 x 16"):
            model.set_input_size(patch_size=8)
    model = small("lvvit_s")
    with pytest.raises(ValueError, match="global_pool='avg'"):
        model.reset_classifier(3, "avg")


@pytest.mark.parametrize("name", ["lvvit_s", "t2t_vit_t_14", "t2t_vit_14"])
def test_the_models_are_timms_in_every_other_way(name):
    shape = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}
    there = timm.create_model(name, device="meta", dtype=torch.bfloat16, **shape)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in there.parameters())
    features = timm.create_model(name, features_only=True, **shape)
    assert [tuple(f.shape) for f in features(torch.zeros(1, 3, 64, 64))] == [(1, 32, 4, 4)] * 3
    model = apply_patch(small(name), ATMConfig(adapt="static", schedule=(3, 2, 2, 1))).train()
    model.set_grad_checkpointing()
    model(images_for(model)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.eval()
    x = images_for(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    groups = group_parameters(remove_patch(model), model.group_matcher())
    stem = min(groups)
    assert {n.split(".")[0] for n in groups[stem]} <= {"cls_token", "pos_embed", "patch_embed", "tokens_to_token"}
    assert any("attention1" in n or "conv1" in n for n in groups[stem])


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="checkpoint none.pth is not a file"):
        load_checkpoint(small("lvvit_s"), "none.pth")
