"""ATMConfig: fields out of range, JSON and the paper's presets."""

import math
from dataclasses import replace

import numpy as np
import pytest

from atm_triton import ATMConfig
from atm_triton.config import REMEDY
from atm_triton.operating_points import PAPER_NAMES, operating_points

BAD = [
    ({"alpha": 1.5}, ValueError, r"alpha must be a number in \[-1, 1\], got 1.5"),
    (
        {"alpha": 0.8, "beta": 0.0, "theta_min": 0.88},
        ValueError,
        "alpha=0.8 is below theta_min=0.88; raise alpha or lower theta_min",
    ),
    ({"alpha": "0.9"}, TypeError, r"alpha must be a number in \[-1, 1\], got '0.9'"),
    ({"alpha": math.nan}, ValueError, r"alpha must be a number in \[-1, 1\], got nan"),
    ({"beta": -0.1}, ValueError, r"beta must be a number in \[0, 1\], got -0.1"),
    ({"beta": 1.1}, ValueError, r"beta must be a number in \[0, 1\], got 1.1"),
    ({"beta": True}, TypeError, r"beta must be a number in \[0, 1\], got True"),
    ({"theta_min": -1.1}, ValueError, r"theta_min must be a number in \[-1, 1\], got -1.1"),
    ({"alpha": 0.9}, ValueError, "alpha without beta and theta_min; give all three of them, or thresholds"),
    ({"alpha": 0.9, "theta_min": 0.8}, ValueError, "alpha and theta_min without beta; give all three"),
    ({"beta": 0.04, "thresholds": (0.9,)}, ValueError, "beta without alpha and theta_min; give all three"),
    ({"split_depth": -1}, ValueError, "split_depth must be a whole number, 0 or more, got -1"),
    ({"split_depth": 2.0}, TypeError, "split_depth must be a whole number, 0 or more, got 2.0"),
    (
        {"adapt": "image", "schedule": (1,)},
        ValueError,
        "a schedule needs adapt=\"static\", got adapt='image'; leave one",
    ),
    ({"adapt": "token"}, ValueError, "adapt='token' is unknown; choose one of batch, image, static"),
    ({"adapt": "static"}, ValueError, 'adapt="static" needs a schedule, r for each block; give one'),
    ({"schedule": (1,)}, ValueError, "a schedule needs adapt=\"static\", got adapt='batch'; leave one"),
    ({"adapt": "static", "schedule": ()}, TypeError, r"schedule must be a list with one value per block, got \(\)"),
    ({"adapt": "static", "schedule": 8}, TypeError, "schedule must be a list with one value per block, got 8"),
    ({"adapt": "static", "schedule": (1, -2)}, ValueError, r"schedule\[1\] must be a whole number, 0 or more, got -2"),
    ({"adapt": "static", "schedule": (1, 0.5)}, TypeError, r"schedule\[1\] must be a whole number, 0 or more, got 0.5"),
    ({"adapt": "static", "schedule": (1,), "thresholds": (0.9,)}, ValueError, "leave thresholds out"),
    ({"thresholds": (0.9, 1.2)}, ValueError, r"thresholds\[1\] must be a number in \[-1, 1\], got 1.2"),
    ({"thresholds": 0.9}, TypeError, "thresholds must be a list with one value per block, got 0.9"),
    ({"proportional_attention": 1}, TypeError, "proportional_attention must be True or False, got 1"),
    ({"cls_only_last": None}, TypeError, "cls_only_last must be True or False, got None"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown; choose one of auto, triton, reference"),
    ({"engine": 1}, TypeError, "engine must be True or False, got 1"),
    ({"source": 3}, TypeError, "source must be a string, got 3"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD, ids=[str(fields) for fields, *_ in BAD])
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message) as caught:
        ATMConfig(**fields)
    assert "\n" not in str(caught.value)


def test_theta_follows_eq_1_and_thresholds_override_it():
    config = ATMConfig(alpha=0.99, beta=0.04, theta_min=0.88)
    assert [round(config.theta(block, 12), 4) for block in (1, 2, 3, 4, 12)] == [0.99, 0.9492, 0.9067, 0.88, 0.88]
    assert ATMConfig(alpha=0.9, theta_min=-1.0, beta=1.0).theta(700, 700) == -1.0
    given = ATMConfig(thresholds=[0.9, 0.8])
    assert given.thresholds == (0.9, 0.8) and given.theta(2, 2) == 0.8
    assert ATMConfig(thresholds=[None, 0.8]).theta(1, 2) is None
    with pytest.raises(ValueError, match="thresholds has 2 values for a model of 3 blocks"):
        given.theta(1, 3)
    for block in (0, 13):
        with pytest.raises(ValueError, match=f"block={block} is outside 1 .. 12; blocks count from 1"):
            config.theta(block, 12)
    with pytest.raises(ValueError, match=f"^the configuration has no thresholds; {REMEDY}$"):
        ATMConfig(adapt="image").theta(1, 12)


def test_what_says_how_much_merges():
    assert ATMConfig(0.9, 0.04, 0.8).has_thresholds and ATMConfig(thresholds=(None,)).has_thresholds
    assert ATMConfig(adapt="static", schedule=(0,)).has_thresholds
    assert not ATMConfig(adapt="image", backend="reference").has_thresholds


@pytest.mark.parametrize(("depth", "split"), [(12, 9), (16, 12), (20, 15), (14, 10), (1, 0)])
def test_the_last_quarter_groups_by_size(depth, split):
    assert [ATMConfig().groups_by_size(block, depth) for block in range(1, depth + 1)] == [
        block > split for block in range(1, depth + 1)
    ]
    assert not ATMConfig(split_depth=depth).groups_by_size(depth, depth)
    assert ATMConfig(split_depth=0).groups_by_size(1, depth)


def test_numbers_of_numpy_are_taken_as_pythons():
    config = ATMConfig(alpha=np.float32(0.5), beta=np.float32(0), theta_min=np.float64(0.25), split_depth=np.int64(3))
    assert (type(config.alpha), type(config.split_depth)) == (float, int)
    assert ATMConfig.from_json(config.to_json()) == config


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        ATMConfig().alpha = 0.5


@pytest.mark.parametrize(
    "config",
    [
        ATMConfig(),
        ATMConfig(adapt="static", schedule=[3, 0], split_depth=2, cls_only_last=False, source="mine"),
        ATMConfig(thresholds=(0.9, None), backend="reference", proportional_attention=False, engine=False),
    ],
)
def test_json_round_trip(config):
    assert ATMConfig.from_json(config.to_json()) == config
    assert ATMConfig.from_json(f'{{"config": {config.to_json()}, "model": "digits"}}') == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the configuration is not JSON"),
        ("[1]", "the configuration must be a JSON object, got '\\[1\\]'"),
        ('{"alfa": 0.9}', "the configuration has unknown fields: alfa"),
        ('{"alpha": 9}', r"alpha must be a number in \[-1, 1\], got 9"),
        ('{"alpha": 0.9}', "alpha without beta and theta_min"),
        ('{"config": 3}', "the configuration must be a JSON object"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        ATMConfig.from_json(text)


def test_the_papers_tables_are_whole():
    points = operating_points()
    assert len(points) == 186
    unmerged = {(p.model, p.gflops, p.top1) for p in points if p.alpha is None}
    assert ("DeiT-S", 4.6, 79.81) in unmerged and ("MAE", 17.57, 83.72) in unmerged
    assert {p.model for p in points} == set(PAPER_NAMES.values())
    merged = [p for p in points if p.alpha is not None]
    assert len(merged) == 174
    for p in merged:
        ATMConfig(alpha=p.alpha, beta=p.beta, theta_min=p.theta_min)


def test_presets():
    config = ATMConfig.preset("deit_small_patch16_224", max_gflops=3.3)
    assert (config.alpha, config.beta, config.theta_min) == (0.99, 0.04, 0.88)
    assert config.source == (
        "paper, Table A2, DeiT-S, alpha 0.99, beta 0.04, theta_min 0.88: 3.26 GFLOPs, 79.80 % top-1 on ImageNet-1k "
        "(unmerged 4.60, 79.81 %)"
    )
    lossless = "paper, Table A2, DeiT-S, alpha 0.99, beta 0.02, theta_min 0.875: 3.38 GFLOPs, 79.82 %"
    assert ATMConfig.preset("DeiT-S", top1_drop=0.0).source.startswith(lossless)
    assert ATMConfig.preset("deit_small_patch16_224.fb_in1k", max_gflops=3.3) == config
    tuned = ATMConfig.preset("deit-s", top1_drop=0.0, fine_tuned=True)
    assert tuned.source.startswith("paper, Table A3, DeiT-S, fine-tuned, alpha 1.0, beta 0.05, theta_min 0.855: 2.93")
    mae = ATMConfig.preset("vit_base_patch16_224.mae", top1_drop=0.1, backend="reference")
    assert not mae.proportional_attention and not mae.cls_only_last and mae.backend == "reference"
    assert "changed here" not in mae.source
    static = ATMConfig.preset("DeiT-S", max_gflops=3.3, adapt="image", engine=False)
    assert static == replace(config, adapt="image", engine=False, source=static.source)
    assert static.source == f"{config.source} (changed here: adapt; these figures no longer hold)"


def test_every_model_of_the_paper_has_a_preset():
    for ours, paper in PAPER_NAMES.items():
        assert ATMConfig.preset(ours, top1_drop=1.0) == ATMConfig.preset(paper, top1_drop=1.0)


def test_without_a_target_a_preset_loses_least():
    for name in PAPER_NAMES.values():
        drop = 0.05 if name in ("MAE", "LV-ViT-M") else 0.0  # the paper has no lossless point for these
        assert ATMConfig.preset(name) == ATMConfig.preset(name, top1_drop=drop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet50", 3.0), "the paper has no operating points for 'resnet50'; it has them for deit_tiny"),
        (
            ("vit_base_patch16_224", 3.0),
            "for 'vit_base_patch16_224'; .*; atm-triton calibrate finds thresholds",
        ),
        (("DeiT-S", 1.0), "the paper's points for DeiT-S go no lower than 2.56 GFLOPs; raise max_gflops=1.0"),
        (("DeiT-S", None, -0.5), "DeiT-S go no lower than a drop of -0.05; raise top1_drop=-0.5"),
        (("DeiT-S", 3.0, 0.0), "at most one of max_gflops and top1_drop"),
        (("LV-ViT-S", 5.0, None, True), "no fine-tuned points for 'LV-ViT-S'"),
    ],
)
def test_bad_presets(arguments, message):
    with pytest.raises(ValueError, match=message):
        ATMConfig.preset(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DeiT-S", "3.3"), "max_gflops must be a number, got '3.3'"),
        (("DeiT-S", None, float("nan")), "top1_drop must be a number, got nan"),
        ((3, 3.3), "name must be a model's name, timm's or the paper's, got 3"),
    ],
)
def test_presets_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        ATMConfig.preset(*arguments)
