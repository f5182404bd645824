"""No thresholds, no merging: where they come from when nobody gives them, and who is refused."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import ATMBlock, ATMConfig, apply_patch, summary
from atm_triton.cli import main
from atm_triton.config import REMEDY
from atm_triton.evaluate import evaluate
from atm_triton.inputs import open_model
from atm_triton.operating_points import PAPER_NAMES
from models import images_for, small, vit

DEIT = "deit_small_patch16_224"
AS_FINE_TUNED = {"global_pool": "avg", "num_classes": 1000}
TINY_SHAPE = {"depth": 2, "embed_dim": 48, "num_heads": 2}


def made(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


@pytest.mark.parametrize("name", PAPER_NAMES)
def test_a_model_of_the_papers_tables_takes_its_preset(name):
    model = made(name, **(AS_FINE_TUNED if name.endswith(".mae") else {}))
    preset = ATMConfig.preset(name)
    for config in (None, ATMConfig(adapt="image", backend="reference", engine=False)):
        taken = apply_patch(model, config).blocks.config  # patched anew the second time
        assert (taken.alpha, taken.beta, taken.theta_min) == (preset.alpha, preset.beta, preset.theta_min)
        assert taken.source == f"{preset.source}; taken for a {name} whose weights were not looked at"
        assert taken.proportional_attention is not name.endswith(".mae")
    assert (taken.adapt, taken.backend, taken.engine) == ("image", "reference", False)


def test_the_summary_says_which_thresholds_were_taken():
    model = apply_patch(timm.create_model("deit_tiny_patch16_224").eval())
    with torch.inference_mode():
        model(images_for(model, 1))
    assert f"\nmerges by: {ATMConfig.preset('DeiT-T').source}; taken for a deit_tiny_patch16_224" in str(summary(model))
    apply_patch(model, ATMConfig(adapt="static", schedule=(3,) * 12))
    with torch.inference_mode():
        model(images_for(model, 1))
    assert "merges by" not in str(summary(model))


def test_the_models_random_numbers_stay_as_they_were():
    model = made(DEIT)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    apply_patch(model)
    assert torch.equal(torch.rand(3), expected)


OTHERS = {
    "a model of one's own": (vit, "VisionTransformer: the paper has none"),
    "an own backbone": (lambda: small("lvvit_s"), "lvvit_s: the paper's are for another shape"),
    "another depth": (lambda: made(DEIT, depth=10), f"{DEIT}: the paper's are for another shape"),
    "another width": (lambda: made(DEIT, embed_dim=192), "for another shape"),
    "other heads": (lambda: made(DEIT, num_heads=12), "for another shape"),
    "other classes": (lambda: made(DEIT, num_classes=10), "for another shape"),
    "larger images": (lambda: made(DEIT, img_size=384), "for another shape"),
    "qk-norm": (lambda: made(DEIT, qk_norm=True), "for another shape"),
    "another pool": (lambda: made(DEIT, global_pool="avg", fc_norm=False), "for another shape"),
    "MAE without a head": (lambda: made("vit_base_patch16_224.mae"), "mae: the paper's are for another shape"),
    "distilled": (lambda: made("deit_small_distilled_patch16_224"), "VisionTransformerDistilled: the paper has none"),
    "supervised ViT": (lambda: made("vit_base_patch16_224"), "VisionTransformer: the paper has none"),
    "DINO": (lambda: made("vit_base_patch16_224.dino", num_classes=1000), "the paper has none"),
    "DINOv2": (lambda: made("vit_small_patch14_dinov2"), "the paper has none"),
    "the digits": (open_model, "VisionTransformer: the paper has none"),
    "weights of a file": (lambda: made(DEIT, pretrained_cfg_overlay={"file": "mine.pth"}), "for other weights"),
    "weights of a hub": (lambda: made(DEIT, pretrained_cfg_overlay={"hf_hub_id": "me/mine"}), "for other weights"),
    "another tag": (lambda: made(DEIT, pretrained_cfg_overlay={"tag": "mine"}), "for other weights"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_every_other_model_is_refused_without_thresholds(make, message):
    model = make()
    with pytest.raises(ValueError, match=f"^no thresholds for this .*{message}; {REMEDY}$"):
        apply_patch(model, ATMConfig(adapt="image"))
    assert type(model).__name__ in ("VisionTransformer", "VisionTransformerDistilled", "LVViT")
    with pytest.raises(ValueError, match="no thresholds for this"):
        evaluate(model, [], None, base=[])


def test_a_block_alone_wants_thresholds():
    for config in (None, ATMConfig(adapt="image")):
        with pytest.raises(ValueError, match=f"^the configuration has no thresholds; {REMEDY}$"):
            ATMBlock(32, 2, block_index=0, depth=4, config=config)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for index in range(2):
        pixels = torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / "cat" / f"{index}.jpg")
    return tmp_path / "images"


def checkpoint(path, name, **options):
    save_file(timm.create_model(name, **options).state_dict(), path)
    return str(path)


def test_eval_names_the_thresholds_that_it_takes(tmp_path, folder, capsys):
    name = "deit_tiny_patch16_224"
    given = ["eval", "--model", name, "--checkpoint", checkpoint(tmp_path / "mine.safetensors", name)]
    out = tmp_path / "eval.json"
    assert main([*given, "--data", str(folder), "--workers", "0", "--json", str(out)]) == 0
    config, preset = json.loads(out.read_text())["config"], ATMConfig.preset(name)
    assert (config["alpha"], config["beta"], config["theta_min"]) == (preset.alpha, preset.beta, preset.theta_min)
    said = f'adapt="batch"; {preset.source}; taken for a {name} whose weights were not looked at\n'
    assert said in capsys.readouterr().out


def test_a_changed_preset_is_no_longer_the_papers(tmp_path, folder, capsys):
    name = "deit_tiny_patch16_224"
    given = ["eval", "--model", name, "--checkpoint", checkpoint(tmp_path / "mine.safetensors", name)]
    merging = ["--max-gflops", "1.0", "--alpha", "0.999"]
    assert main([*given, "--data", str(folder), "--workers", "0", *merging]) == 0
    assert 'adapt="batch"\n' in capsys.readouterr().out


@pytest.mark.parametrize("command", ["eval", "bench", "visualize"])
def test_the_command_line_refuses_a_model_without_thresholds(command, tmp_path, folder, capsys):
    name, shape = "vit_small_patch16_224", [f"{key}={value}" for key, value in TINY_SHAPE.items()]
    weights = checkpoint(tmp_path / "mine.safetensors", name, **TINY_SHAPE)
    given = ["--model", name, "--checkpoint", weights, "--model-kwargs", *shape]
    image = str(next(folder.rglob("*.jpg")))
    own = {"visualize": ["--out", str(tmp_path / "x.png"), "--", image]}.get(command, ["--data", str(folder)])
    assert main([command, *given, *own]) == 2
    error = capsys.readouterr().err
    assert error == f"atm-triton: no thresholds for this VisionTransformer: the paper has none; {REMEDY}\n"


def test_weights_that_the_digits_thresholds_are_not_of_are_refused(tmp_path, capsys):
    save_file(open_model().state_dict(), tmp_path / "mine.safetensors")
    assert main(["eval", "--checkpoint", str(tmp_path / "mine.safetensors"), "--limit", "3"]) == 2
    assert "no thresholds for this VisionTransformer" in capsys.readouterr().err


def test_random_weights_take_no_thresholds_in_a_bench(folder, capsys):
    assert main(["bench", "--model", "deit_tiny_patch16_224", "--data", str(folder)]) == 2
    assert "deit_tiny_patch16_224 would have random weights: give --checkpoint FILE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", '{"adapt": "image"}', '{"config": {}}'])
def test_a_file_without_thresholds_is_refused(text, tmp_path, capsys):
    path = tmp_path / "empty.json"
    path.write_text(text)
    assert main(["eval", "--limit", "3", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"atm-triton: --config {path} has no thresholds; {REMEDY}\n"
