"""Costs: they equal the paper's baselines to the printed digit and torch's counter to the integer."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atm_triton import ATMConfig, apply_patch, summary
from atm_triton.flops import cost, scheduled, unmerged
from models import distilled, images, vit, with_lora


@pytest.fixture
def unfused():
    """Write attention out, because torch's counter does not see fused attention."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.mark.parametrize(
    ("name", "gflops", "macs"),
    [
        ("deit_tiny_patch16_224", "1.25", 1_253_683_200),
        ("deit_small_patch16_224", "4.60", 4_598_882_304),
        ("deit_base_patch16_224", "17.57", 17_563_828_224),
    ],
)
def test_unmerged_deit_is_the_papers(name, gflops, macs):
    model = meta(name)
    whole = cost(model, unmerged(model, (3, 224, 224)))
    assert f"{whole.paper_gflops:.2f}" == gflops
    assert whole.macs == macs


@pytest.mark.parametrize(("r", "gmacs"), [(8, 3.416), (11, 2.986), (13, 2.703), (16, 2.291)])
def test_tome_on_deit_s(r, gmacs):
    model = meta("deit_small_patch16_224")
    record = scheduled(model, (3, 224, 224), (r,) * 12, cls_only_last=False)
    assert round(cost(model, record).macs / 1e9, 3) == gmacs


def test_the_class_token_alone_saves_what_the_paper_drops():
    """The MLP rows of the last block save 4.6, 5.0 and 5.3 %; its queries and projections save more."""
    for name, share in (("tiny", 4.6), ("small", 5.0), ("base", 5.3)):
        model = meta(f"deit_{name}_patch16_224")
        whole = cost(model, unmerged(model, (3, 224, 224))).macs
        mlp = 8 * 196 * model.embed_dim**2
        assert round(100 * mlp / whole, 1) == share
        alone = cost(model, scheduled(model, (3, 224, 224), (0,) * 12, cls_only_last=True)).macs
        queries = 196 * (2 * model.embed_dim**2 + 2 * 197 * model.embed_dim)
        assert whole - alone == mlp + queries


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("last", [True, False], ids=["cls-only-last", "all-tokens-last"])
@pytest.mark.parametrize(
    "make",
    [
        vit,
        distilled,
        lambda: vit(global_pool="avg", class_token=False),
        lambda: vit(reg_tokens=4, qk_norm=True),
        lambda: vit(dynamic_img_size=True, num_heads=4),
        lambda: vit(global_pool="map", class_token=False),
        lambda: vit(global_pool="prr"),
        lambda: vit(global_pool=""),
    ],
    ids=["plain", "distilled", "avg", "registers", "dynamic", "map", "prr", "none"],
)
def test_macs_equal_torchs_counter(unfused, make, last, merged):
    model = make()
    schedule = (3, 5, 2, 4) if merged else (0,) * 4
    apply_patch(model, ATMConfig(adapt="static", schedule=schedule, cls_only_last=last))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images(1))
    s = summary(model)
    assert counter.get_total_flops() // 2 == s.macs + s.cost.matching
    if not merged:
        assert s.cost.matching == 0


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_adapters_are_counted_as_torch_counts_them(unfused, part):
    model = apply_patch(vit(), ATMConfig(adapt="static", schedule=(3, 5, 2, 4)))
    for block in model.blocks:
        parent = block.get_submodule(part.split(".")[0])
        setattr(parent, part.split(".")[1], with_lora(block.get_submodule(part)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images(1))
    s = summary(model)
    assert counter.get_total_flops() // 2 == s.macs + s.cost.matching


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
def test_quantised_layers_are_counted_or_refused():
    model = apply_patch(vit(), ATMConfig(adapt="static", schedule=(3, 5, 2, 4)))
    model(images(1))
    expected = summary(model).macs
    for block in model.blocks:
        torch.ao.quantization.quantize_dynamic(block.mlp, {torch.nn.Linear}, torch.qint8, inplace=True)
    assert type(model.blocks[0].mlp.fc1) is not torch.nn.Linear
    model(images(1))
    assert summary(model).macs == expected
    torch.ao.quantization.quantize_dynamic(model, {"head"}, torch.qint8, inplace=True)
    model(images(1))
    with pytest.raises(TypeError, match="forward_head cannot run on meta tensors, for example because it is quantised"):
        summary(model)


@pytest.mark.parametrize("last", [True, False], ids=["cls-only-last", "all-tokens-last"])
@pytest.mark.parametrize("schedule", [(3, 5, 2, 4), (0, 99, 99, 99)], ids=["some", "most"])
@pytest.mark.parametrize(
    "make", [vit, distilled, lambda: vit(class_token=False, global_pool="avg")], ids=["plain", "distilled", "avg"]
)
def test_planned_is_what_happens(make, schedule, last):
    expected = scheduled(make(), (3, 40, 40), schedule, last)
    model = apply_patch(make(), ATMConfig(adapt="static", schedule=schedule, cls_only_last=last))
    model(images(1))
    assert replace(model.blocks.last, counts=expected.counts) == expected


def test_the_summary_prints_and_adds_up():
    model = apply_patch(vit(), ATMConfig(adapt="static", schedule=(3, 5, 2, 4)))
    model(images(2))
    s = summary(model)
    assert s.tokens == (26, 23, 18, 16) and s.r == (3, 5, 2, 0)
    assert s.macs == s.cost.stem + sum(s.cost.blocks) + s.cost.head
    assert s.saved == 1 - s.macs / s.unmerged.macs and 0.3 < s.saved < 0.6
    lines = str(s).splitlines()
    assert lines[1].split()[:4] == ["1", "26", "3", "23"] and lines[4].split()[:4] == ["4", "16", "0", "1"]
    assert f"{100 * s.saved:.1f} % of the MACs saved" in lines[-2] and 0 < s.saved_by_merging <= s.saved
    last = f" (all tokens last: {100 * s.saved_by_merging:.1f} %)"
    assert lines[-2].endswith(last if s.record.leading is not None else "saved")
    assert lines[-1] == f"run by: {s.way}"


def test_counting_leaves_the_model_and_the_random_numbers_alone():
    model = vit(drop_rate=0.5)
    model.patch_embed.norm = torch.nn.BatchNorm1d(25)
    apply_patch(model, ATMConfig(adapt="static", schedule=(3, 5, 2, 4))).train()
    model(images(2))
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    summary(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
