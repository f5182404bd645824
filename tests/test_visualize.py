"""Which patches belong to one token, and pictures of it."""

import json
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import ATMConfig, apply_patch, summary
from atm_triton.cli import main
from atm_triton.measure.visualize import CELL, OUTLINE, Picture, draw, merge_map, paint, picture
from benchmarks.baselines import apply_baseline
from models import distilled, images, vit

STATIC = ATMConfig(adapt="static", schedule=(3, 5, 2, 4))
EASY = ATMConfig(alpha=0.5, theta_min=0.3, beta=0.05, adapt="image")


@pytest.mark.parametrize("config", [STATIC, EASY], ids=["static", "image"])
@pytest.mark.parametrize("make", [vit, distilled, lambda: vit(class_token=False, global_pool="avg")])
def test_the_map_counts_the_tokens_that_are_left(make, config):
    model, x = apply_patch(make(), config), images(1)
    maps = merge_map(model, x[0])
    model.forward_features(x)
    rows = [int(torch.as_tensor(n).max()) for n in summary(model).record.rows]
    assert [tuple(tokens.shape) for tokens in maps] == [(5, 5)] * 4
    assert [len(tokens.unique()) for tokens in maps] == [n - model.num_prefix_tokens for n in rows]
    for before, after in pairwise(maps):
        for token in before.unique():
            assert len(after[before == token].unique()) == 1  # merged patches stay together
    features = model.forward_features(x)[0, model.num_prefix_tokens :]
    for token in maps[-1].unique():
        alike = features[(maps[-1] == token).flatten()]
        assert torch.equal(alike, alike[:1].expand_as(alike))


def test_dropped_patches_are_told():
    model = apply_baseline(vit(), "evit", keep_rate=0.5, blocks=(1,), fuse_token=False)
    first, second, *_ = merge_map(model, images(1))
    assert (first >= 0).all() and int((second < 0).sum()) == 12
    row = picture(model, images(1)[0], (1, 2), "x")
    assert row.left == (25, 13)


def test_regions_are_painted_in_their_mean_colour_with_an_outline():
    seen = np.zeros((4, 6, 3))
    seen[:2, :2], seen[:2, 2:4], seen[:2, 4:], seen[2:] = 0.2, 0.6, 0.8, 1.0
    painted = paint(seen, torch.tensor([[0, 0, 1], [2, -1, 2]]))
    assert painted.shape == (2 * CELL, 3 * CELL, 3)
    middle = painted[CELL // 2 :: CELL, CELL // 2 :: CELL, 0]
    np.testing.assert_allclose(middle, [[0.4, 0.4, 0.8], [1, 0, 1]])
    assert tuple(painted[3, 2 * CELL]) == OUTLINE and tuple(painted[3, CELL]) != OUTLINE
    assert tuple(painted[CELL, 3]) == OUTLINE and tuple(painted[CELL + 3, 2 * CELL]) == OUTLINE


def test_pictures_say_tokens_and_cost(tmp_path):
    model = apply_patch(vit(), STATIC)
    rows = [picture(model, image, (1, 4), f"number {n}") for n, image in enumerate(images(2))]
    assert rows[0].left == (22, 15) and rows[0].gflops == summary(model).paper_gflops
    assert rows[0].panels[0].shape == (40, 40, 3) and rows[0].panels[1].shape == (5 * CELL, 5 * CELL, 3)
    draw(rows, tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size[0] > 300


def test_bad_calls():
    with pytest.raises(ValueError, match="VisionTransformer is not patched"):
        merge_map(vit(), images(1))
    model = apply_patch(vit(), STATIC)
    with pytest.raises(ValueError, match=r"image has shape \[3, 3, 40, 40\]; want one image"):
        merge_map(model, images())
    with pytest.raises(ValueError, match="block 5 is outside 1 .. 4"):
        picture(model, images(1)[0], (5,), "x")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 150, 3), dtype=np.uint8)).save(path)
    return path


def test_the_command_draws_any_image(tmp_path, photo, capsys):
    out, told = tmp_path / "out.png", tmp_path / "told.json"
    assert main(["visualize", str(photo), str(photo), "--out", str(out), "--json", str(told)]) == 0
    assert out.stat().st_size > 10_000 and "out.png written" in capsys.readouterr().out
    (first, second) = json.loads(told.read_text())["pictures"]
    assert first["blocks"] == [3, 6, 9, 12] and first["left"] == second["left"] and first["image"] == "photo.jpg"
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), weights)
    arguments = ["--model", "deit_tiny_patch16_224", "--checkpoint", str(weights)]
    arguments += ["--schedule", *["8"] * 12, "--blocks", "2", "11"]
    assert main(["visualize", str(photo), "--out", str(out), "--json", str(told), *arguments]) == 0
    assert json.loads(told.read_text())["pictures"][0]["left"] == [180, 108]


def test_no_outline_is_lost_where_a_picture_has_more_pixels_than_its_panel(tmp_path):
    painted = paint(np.zeros((224, 224, 3)), torch.arange(256).reshape(16, 16))
    draw([Picture(title="", gflops=1.0, blocks=(1,), left=(256,), panels=(painted, painted))], tmp_path / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    yellow = pixels[..., :2].min(2) - pixels[..., 2] > 40
    starts = (yellow[:, 1:] & ~yellow[:, :-1]).sum(1)  # of outlines, in each row of pixels
    assert starts.max() == 2 * 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg", "--out", "x.png"], "image none.jpg does not exist"),
        (["PHOTO", "--out", "x.txt"], "--out x.txt: want a name that ends in .png"),
        (["PHOTO", "--out", "none/x.png"], "--out none/x.png"),
        (["PHOTO", "--out", "x.png", "--blocks", "13"], "block 13 is outside 1 .. 12"),
        (["TEXT", "--out", "x.png"], "text.jpg is not a readable image"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    named = {"PHOTO": str(photo), "TEXT": "text.jpg"}
    assert main(["visualize", *(named.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("atm-triton: ") and message in error and "\n" not in error
