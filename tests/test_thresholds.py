"""Without thresholds nothing merges: where default ones come from, which models are refused, what is warned of."""

import json
import warnings

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import ATMBlock, ATMConfig, Target, apply_patch, calibrate, remove_patch, summary
from atm_triton.cli import main
from atm_triton.config import REMEDY
from atm_triton.measure.evaluate import evaluate
from atm_triton.measure.models import open_model
from atm_triton.operating_points import PAPER_NAMES
from models import images, images_for, small, vit

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
    source = f"{preset.source}; treated as a {name} whose weights were not checked"
    for config, note in (
        (None, ""),
        (ATMConfig(backend="reference", engine=False), ""),
        (ATMConfig(adapt="image", split_depth=2), " (changed here: split_depth, adapt; these figures no longer hold)"),
    ):
        taken = apply_patch(model, config).blocks.config  # patched anew the second time
        assert (taken.alpha, taken.beta, taken.theta_min) == (preset.alpha, preset.beta, preset.theta_min)
        assert taken.source == source + note
        assert taken.proportional_attention is not name.endswith(".mae")
        if config is not None:
            same = ("adapt", "split_depth", "backend", "engine")
            assert all(getattr(taken, field) == getattr(config, field) for field in same)


def test_attention_without_sizes_is_not_the_papers():
    model = made(DEIT)
    for field in ("proportional_attention", "cls_only_last"):
        source = apply_patch(model, ATMConfig(**{field: False})).blocks.config.source
        assert source.endswith(f" (changed here: {field}; these figures no longer hold)")


def test_the_summary_says_which_thresholds_were_taken():
    model = apply_patch(timm.create_model("deit_tiny_patch16_224").eval())
    with torch.inference_mode():
        model(images_for(model, 1))
    treated = f"\nmerges by: {ATMConfig.preset('DeiT-T').source}; treated as a deit_tiny_patch16_224"
    assert treated in str(summary(model))
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
    "another address": (lambda: made(DEIT, pretrained_cfg_overlay={"url": "https://mine/w.pth"}), "for other weights"),
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
    said = f'adapt="batch"; {preset.source}; treated as a {name} whose weights were not checked\n'
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


# ------------------------------------------------------------------------------------------------- what is warned of

MOST = {"thresholds": (-1.0,) * 8}
GONE = r"^\d+ % of the tokens are gone after 2 of 8 blocks, as with another model's thresholds: atm-triton eval "


@pytest.mark.parametrize(
    "config",
    [
        ATMConfig(**MOST),
        ATMConfig(**MOST, adapt="image"),
        ATMConfig(adapt="static", schedule=(13,) * 8),
    ],
    ids=lambda config: config.adapt,
)
def test_it_is_said_once_where_most_tokens_are_gone_early(config):
    model = apply_patch(vit(depth=8), config)
    with pytest.warns(UserWarning, match=GONE) as said:
        for _ in range(3):
            model(images())
            summary(model)
    assert len(said) == 1
    with pytest.warns(UserWarning, match=GONE):  # a patch of its own
        apply_patch(remove_patch(model), config).forward_features(images())


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 7])
def test_it_is_said_of_shallow_models_too(depth):
    """A quarter is less than two blocks there, which could not merge so many."""
    model = apply_patch(vit(depth=depth), ATMConfig(thresholds=(-1.0,) * depth, cls_only_last=False))
    with pytest.warns(UserWarning, match=rf"^\d+ % of the tokens are gone after 2 of {depth} blocks"):
        model(images())


def test_the_first_pass_of_the_engine_says_it_too():
    """On a GPU the user may never ask what merged."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = apply_patch(vit(depth=8).to(device), ATMConfig(**MOST, backend="triton"))
    with torch.inference_mode(), pytest.warns(UserWarning, match=GONE) as said:
        for _ in range(3):
            model(images(1).to(device))
            assert model.blocks.last.way == "engine"
        summary(model)
    assert [warning.category for warning in said].count(UserWarning) == 1


def test_the_engine_says_it_too_if_it_warmed_up_on_noise():
    """Of three passes over noise and two over a plain image the first, the second and the fourth are checked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = apply_patch(vit(depth=8).to(device), ATMConfig(thresholds=(0.9,) * 8, adapt="image", backend="triton"))
    noise, plain = (30 * images(1)).to(device), torch.full((1, 3, 40, 40), 1e3, device=device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", GONE)
        for _ in range(3):
            model(noise)
        with pytest.warns(UserWarning, match=GONE):
            model(plain)
        model(plain)
    assert model.blocks.last.way == "engine"


@pytest.mark.parametrize("r", [0, 7])
def test_what_is_left_elsewhere_is_not_warned_of(r):
    """7 of 26 tokens merge, then 7 of 19: 46 % are left after two blocks, and fewer later."""
    model = apply_patch(vit(depth=8), ATMConfig(adapt="static", schedule=(r,) * 8))
    with warnings.catch_warnings(action="error"):
        model(images())
        model(images(0))
        model(images()[:0])


def test_an_evaluation_says_it():
    batches = [(images(), torch.zeros(3))]
    with pytest.warns(UserWarning, match=GONE):
        evaluate(vit(depth=8), batches, ATMConfig(**MOST), title=None)


@pytest.fixture
def loader():
    noise = torch.linspace(0.02, 1, 96)[torch.randperm(96), None, None, None]
    return [(0.3 + noise * images(96))[i : i + 24] for i in range(0, 96, 24)]


def test_a_calibration_says_it_of_what_it_found_alone(loader, monkeypatch):
    from test_calibrate import SMALL

    for name, value in SMALL.items():
        monkeypatch.setattr("atm_triton.calibration.search." + name, value)
    with warnings.catch_warnings(action="error"):  # calibration tries to merge everything on the way
        calibrate(vit(depth=8), loader, Target(max_kl=1e-4), progress=False)
    with pytest.warns(UserWarning, match=GONE) as said:
        calibrate(vit(depth=8), loader, Target(max_kl=1e3), progress=False)
    assert len(said) == 1


def test_a_model_that_answers_all_images_alike_is_not_calibrated(loader):
    constant, saturated = vit(), vit()
    with torch.no_grad():
        constant.head.weight.zero_()
        saturated.head.bias[0] += 500  # logits differ, probabilities do not
    alike = "^the model answers all images alike, so no merging changes it; check images, weights and head$"
    for target in (Target(max_kl=0.1), Target(min_agreement=0.9), Target(max_gflops=0.0009)):
        for model in (constant, saturated):
            with pytest.raises(ValueError, match=alike):
                calibrate(model, loader, target, progress=False)
    with pytest.raises(
        ValueError, match="^the images are one image, 96 times: no pixel differs by 1% of the contrast;"
    ):
        calibrate(vit(), [loader[0][:1].expand(24, -1, -1, -1)] * 4, Target(max_kl=0.1), progress=False)


def test_blank_images_are_not_calibrated_on():
    blank = torch.linspace(-1, 1, 96)[:, None, None, None].expand(-1, 3, 40, 40)
    for images_ in (torch.zeros(96, 3, 40, 40), blank):
        with pytest.raises(ValueError, match="^the images are blank, each of one value throughout; give images as"):
            calibrate(vit(), images_.split(24), Target(max_kl=0.1), progress=False)
