"""What is compared for a model (classes, labels, one logit, features or patch tokens), and that all commands agree."""

import json
import math
import re
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import AttentionPoolLatent

from atm_triton import ATMConfig, Target, apply_patch, calibrate
from atm_triton.calibration.calibrate import Promise, split_images
from atm_triton.calibration.measuring import Meter
from atm_triton.calibration.resume import Notes
from atm_triton.cli import main
from atm_triton.cli.report import calibration_table, evaluation_table
from atm_triton.flops import cost, unmerged
from atm_triton.measure.comparison import MEASURES, Measure, measure_of, percentile
from atm_triton.measure.evaluate import evaluate, unpatched_answers
from models import distilled, images, small, vit
from test_calibrate import calibrated, loader, small_search, whole  # noqa: F401 (fixtures)

MODELS = {  # a model, the request, and the name of the measure that fits
    "classes": (vit, {}, "softmax"),
    "labels": (vit, {"sigmoid": True}, "sigmoid"),
    "one logit": (lambda: vit(num_classes=1), {}, "sigmoid"),
    "no head": (lambda: vit(num_classes=0), {}, "pooled"),
    "no head, averaged": (lambda: vit(num_classes=0, global_pool="avg", class_token=False), {}, "pooled"),
    "patch tokens": (lambda: vit(num_classes=0, reg_tokens=2), {"dense": True}, "dense"),
    "patch tokens beside a head": (vit, {"dense": True}, "dense"),
}
EVERY = pytest.mark.parametrize(("make", "asked", "name"), MODELS.values(), ids=MODELS)
MERGING = ATMConfig(adapt="image", thresholds=(0.5, 0.3, 0.2, None))


def answers(model, asked, x):
    """The model's answers for one image at a time, as a caller reads them."""
    with torch.inference_mode():
        outs = [model.forward_features(i[None])[0] if "dense" in asked else model(i[None])[0] for i in x]
    return [out[model.num_prefix_tokens :] if "dense" in asked else out for out in outs]


def by_hand(name, before, after):
    """Divergence and agreement of one image, written out."""
    if name == "softmax":
        p, q = (torch.softmax(logits.double(), 0).tolist() for logits in (before, after))
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return kl, float(p.index(max(p)) == q.index(max(q)))
    if name == "sigmoid":
        kl, same = 0.0, 0
        for b, a in zip(before.tolist(), after.tolist(), strict=True):
            p, q = 1 / (1 + math.exp(-b)), 1 / (1 + math.exp(-a))
            kl += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            same += (p > 0.5) == (q > 0.5)
        return kl / len(before), same / len(before)
    rows = [(before, after)] if name == "pooled" else list(zip(before, after, strict=True))
    distances = []
    for b, a in rows:
        b, a = b.double().tolist(), a.double().tolist()
        dot = sum(x * y for x, y in zip(b, a, strict=True))
        distances.append(1 - dot / math.sqrt(sum(x * x for x in b) * sum(y * y for y in a)))
    return sum(distances) / len(distances), None


@EVERY
def test_an_evaluation_equals_what_is_written_out(make, asked, name):
    model, x = make(), images(12)
    measure = measure_of(model, **asked)
    assert measure.name == name
    config = replace(MERGING, cls_only_last=name != "dense")
    outcome = evaluate(model, [(b, None) for b in x.split(5)], config, labelled=False, title=None, measure=measure)
    before = answers(model, asked, x)
    after = answers(apply_patch(model, config), asked, x)
    divergences, agreements = zip(*(by_hand(name, b, a) for b, a in zip(before, after, strict=True)), strict=True)
    quality, mean = outcome.overall, sum(divergences) / 12
    assert outcome.measure == name and quality.gflops < outcome.gflops_unpatched and mean > 1e-3
    if measure.of_features:
        assert quality.distance == pytest.approx(mean, rel=1e-4)
        assert quality.distance_p99 == pytest.approx(max(divergences), rel=1e-4)
        assert quality.kl is quality.kl_se is quality.agreement is None
    else:
        assert quality.kl == pytest.approx(mean, rel=1e-3)
        assert quality.agreement == pytest.approx(100 * sum(agreements) / 12)
        assert quality.distance is quality.distance_p99 is None
    assert ("99th %ile" in evaluation_table(outcome)) == measure.of_features


@EVERY
def test_merging_nothing_changes_nothing(make, asked, name):
    model = make()
    nothing = ATMConfig(adapt="static", schedule=(0,) * 4, cls_only_last=False)
    batches = [(images(6), None)]
    quality = evaluate(model, batches, nothing, labelled=False, title=None, measure=measure_of(model, **asked)).overall
    assert (quality.kl if quality.distance is None else quality.distance) == pytest.approx(0, abs=1e-10)
    assert quality.agreement in (100, None) and (quality.distance_p99 or 0) < 1e-10


def test_one_logit_is_no_class():
    """A softmax over one logit would give full agreement and a KL of 0, whatever merges."""
    model = vit(num_classes=1)
    everything = ATMConfig(adapt="image", thresholds=(-1.0,) * 3 + (None,))
    quality = evaluate(model, [(images(40), None)], everything, labelled=False, title=None).overall
    assert quality.kl > 0.01 and quality.agreement < 99


def test_a_calibration_of_one_logit_does_not_merge_everything(loader, small_search):  # noqa: F811
    calibration = calibrated(vit(num_classes=1), loader, max_kl=1e-5)
    assert any(theta is not None and theta > -1 for theta in calibration.config.thresholds)
    assert calibration.promise.measure == "sigmoid" and 0 < calibration.promise.kl < 1e-3


@EVERY
@pytest.mark.parametrize("adapt", ["image", "static"])
def test_the_promise_is_what_an_evaluation_finds(make, asked, name, adapt, loader, small_search):  # noqa: F811
    model = make()
    goal = 0.75 * whole(model)
    calibration = calibrate(model, loader, Target(max_gflops=goal), adapt, progress=False, **asked)
    promise, (parts, _) = calibration.promise, split_images(loader, 0)
    batches = [(x, None) for x in parts["promise"]]
    measure = Measure(promise.measure)
    outcome = evaluate(model, batches, calibration.config, labelled=False, title=None, measure=measure)
    quality = outcome.overall
    assert promise.measure == outcome.measure == name and promise.gflops == pytest.approx(quality.gflops)
    assert promise.gflops == pytest.approx(goal, rel=0.05)
    for column in ("kl", "distance", "distance_p99"):
        assert getattr(promise, column) == pytest.approx(getattr(quality, column))
    assert promise.agreement == (None if measure.of_features else pytest.approx(quality.agreement / 100))
    assert calibration.config.cls_only_last == (name != "dense")
    assert f"compared: {measure}" in calibration_table(calibration, calibration.images)


@pytest.mark.parametrize(
    ("model", "asked", "limit"),
    [
        ({"num_classes": 0}, {}, {"max_distance": 0.01}),
        ({"num_classes": 0}, {}, {"max_distance_p99": 0.02}),
        ({"num_classes": 0}, {"dense": True}, {"max_distance": 0.02}),
        ({"num_classes": 1}, {}, {"min_agreement": 0.9}),
        ({}, {"sigmoid": True}, {"max_kl": 0.01}),
    ],
    ids=str,
)
def test_a_limit_is_kept_on_the_images_that_the_search_sees(model, asked, limit, loader, small_search):  # noqa: F811
    model = vit(**model)
    calibration = calibrate(model, loader, Target(**limit), progress=False, **asked)
    ((name, value),) = limit.items()
    measuring = Meter(model, split_images(loader, 0)[0], {}, measure_of(model, **asked))
    seen = measuring.mean(calibration.config, ("fit", "choose"))
    column = {"min_agreement": "agreement", "max_distance_p99": "p99"}.get(name, "divergence")
    assert (getattr(seen, column) - value) * (-1 if name == "min_agreement" else 1) <= 0
    assert seen.gflops < whole(model)


@pytest.mark.parametrize(
    ("make", "asked", "target", "message"),
    [
        (lambda: vit(num_classes=0), {}, {"max_kl": 0.1}, "max_kl does not fit what is compared, the pooled"),
        (
            lambda: vit(num_classes=0),
            {},
            {"min_agreement": 0.9},
            "min_agreement does not fit what is compared, the",
        ),
        (vit, {"dense": True}, {"max_kl": 0.1}, "max_kl does not fit what is compared, the patch tokens, un"),
        (
            vit,
            {},
            {"max_distance": 0.1},
            "max_distance does not fit what is compared, logits of",
        ),
        (
            vit,
            {"sigmoid": True},
            {"max_distance_p99": 0.1},
            "max_distance_p99 does not fit what is compared, lo",
        ),
    ],
)
def test_a_target_that_does_not_fit_names_those_that_do(make, asked, target, message, loader):  # noqa: F811
    fitting = "max_kl, min_agreement" if message.startswith("max_d") else "max_distance, max_distance_p99"
    with pytest.raises(ValueError, match=f"^target: {re.escape(message)}.*; give {fitting} or max_gflops$"):
        calibrate(make(), loader, Target(**target), progress=False, **asked)


def test_what_fits_no_measure_is_refused():
    with pytest.raises(ValueError, match=r"^sigmoid compares logits, but the model has no head \(num_classes=0\);"):
        measure_of(vit(num_classes=0), sigmoid=True)
    with pytest.raises(ValueError, match="^dense compares patch tokens and sigmoid the labels of a head; give one of"):
        measure_of(vit(), dense=True, sigmoid=True)
    unpooled = vit(num_classes=0, global_pool="")
    with pytest.raises(ValueError, match="^the model answers with 26 unpooled tokens per image: ask for"):
        measure_of(unpooled)
    assert measure_of(unpooled, dense=True).name == "dense"
    with pytest.raises(ValueError, match="^measure 'cosine' is unknown; want one of softmax, sigmoid, pooled, dense$"):
        Measure("cosine")


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        ("vit_medium_patch32_clip_224.tinyclip_laion400m", {}, "pooled"),
        ("vit_medium_patch32_clip_224.tinyclip_laion400m", {"num_classes": 10}, "softmax"),
        ("vit_base_patch32_clip_224.laion2b_ft_in1k", {}, "softmax"),
        ("vit_base_mci_224.apple_mclip", {}, "pooled"),
        ("vit_pe_core_tiny_patch16_384.fb", {}, "pooled"),
        ("vit_base_patch16_224.augreg_in21k", {}, "softmax"),
    ],
)
def test_the_embedding_of_a_clip_model_names_no_class(model, options, name):
    with torch.device("meta"):
        made = timm.create_model(model, **options)
    assert measure_of(made).name == name
    assert measure_of(made, sigmoid=True).name == "sigmoid"


def test_the_head_decides_and_not_what_the_model_says_of_it():
    """Users replace heads after a model is made."""
    model = vit(num_classes=1000)
    model.head = torch.nn.Linear(32, 1)
    assert measure_of(model).name == "sigmoid"
    model.head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    assert measure_of(model).name == "softmax"
    for head in (torch.nn.Identity(), torch.nn.Sequential(), torch.nn.Dropout(0.1)):
        model.head = head
        assert measure_of(model).name == "pooled"
    model.head = torch.nn.Flatten()  # without weights, but who knows what it answers
    assert measure_of(model).name == "softmax"
    assert measure_of(distilled()).name == "softmax" and measure_of(distilled(num_classes=0)).name == "pooled"
    for name in ("lvvit_s", "t2t_vit_t_14"):
        assert measure_of(small(name)).name == "softmax" and measure_of(small(name, num_classes=1)).name == "sigmoid"
    pooled = vit(global_pool="map", class_token=False)
    assert isinstance(pooled.attn_pool, AttentionPoolLatent) and measure_of(pooled).name == "softmax"
    assert measure_of(timm.create_model("deit_tiny_patch16_224", num_classes=0)).name == "pooled"


def test_no_top_1_where_the_model_has_no_classes():
    for model, asked in ((vit(num_classes=1), {}), (vit(num_classes=0), {}), (vit(), {"sigmoid": True})):
        batches = [(images(8), torch.zeros(8, dtype=torch.int64))]
        outcome = evaluate(model, batches, MERGING, title=None, measure=measure_of(model, **asked))
        assert outcome.overall.top1 is outcome.top1_drop_se is None


def test_answers_at_hand_give_the_same_as_answers_on_the_way():
    model, batches = vit(num_classes=0), [(images(4), None), (images(3), None)]
    base = unpatched_answers(model, batches, None)
    given = evaluate(model, batches, MERGING, base, labelled=False, title=None)
    assert given == evaluate(model, batches, MERGING, labelled=False, title=None)


def test_patch_tokens_are_paid_for(loader, small_search):  # noqa: F811
    """The last block of a dense model computes all tokens; predicted, measured and promised costs all count that."""
    model = vit(num_classes=0)
    target = Target(max_gflops=0.97 * whole(model))  # above the cost if the last block computed the class token alone
    calibration = calibrate(model, loader, target, progress=False, dense=True)
    patched = apply_patch(vit(num_classes=0), calibration.config)
    patched.load_state_dict(model.state_dict())
    x = split_images(loader, 0)[0]["promise"][0]
    with torch.inference_mode():
        patched.forward_features(x)
    assert calibration.promise.gflops == pytest.approx(cost(patched, patched.blocks.last).paper_gflops)
    assert calibration.unmerged_gflops == pytest.approx(cost(model, unmerged(model, (3, 40, 40))).paper_gflops)


@pytest.mark.parametrize("name", MEASURES)
def test_answers_that_are_equal_have_equal_coordinates_and_no_others(name):
    measure, x = Measure(name), torch.randn(5, 7) if name != "dense" else torch.randn(5, 3, 7)
    same = {"softmax": x + 3, "sigmoid": x.clone()}.get(name, 3 * x)
    assert torch.allclose(measure.coordinates(x), measure.coordinates(same), atol=1e-6)
    assert measure.compared(x, same)[0].abs().max() < 1e-12
    assert (measure.coordinates(x) - measure.coordinates(x + torch.randn_like(x))).abs().max() > 0.1


def test_the_percentile_is_one_of_the_images():
    assert percentile(torch.arange(100).double()) == 99 and percentile(torch.arange(201).double()) == 198


def test_a_limit_on_distances_is_doubted():
    none = dict.fromkeys(("kl", "kl_se", "agreement", "agreement_se"))
    promise = Promise(300, 1.0, 0.1, **none, distance=0.02, distance_se=0.01, distance_p99=0.05, measure="pooled")
    assert Target(max_distance=0.02).doubt(promise) is Target(max_distance_p99=0.05).doubt(promise) is None
    assert Target(max_distance=0.01).doubt(promise) == "distance 0.02 is above 0.01"
    assert Target(max_distance_p99=0.04).doubt(promise) == "the distance's 99th percentile 0.05 is above 0.04"
    few = Promise(**{**vars(promise), "images": 100})
    of_the_worst = "the distance's 99th percentile is that of the worst of 100 images"
    assert Target(max_distance_p99=0.05).doubt(few) == of_the_worst and str(few).startswith("distance 0.02, 99th perce")


def test_notes_of_another_measure_are_not_gone_on_with(tmp_path, loader):  # noqa: F811
    """The notes are of the same logits, once by softmax and once by sigmoid."""
    model, parts = vit(), split_images(loader, 0)[0]
    with Notes(tmp_path / "x.partial") as notes:
        Meter(model, parts, {}).remember(notes)
    with pytest.raises(ValueError, match="is from another calibration that was interrupted"):
        with Notes(tmp_path / "x.partial") as notes:
            Meter(model, parts, {}, Measure("sigmoid")).remember(notes)


# ------------------------------------------------------------------------------------------------- the command line

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 2, "img_size": 64}
NAME = "vit_small_patch16_224"


@pytest.fixture
def photos(tmp_path):
    """A folder of 64 images, from plain to noisy."""
    for number in range(64):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 2 + 3 * number, (80, 80, 3))
        Image.fromarray((noise + 20).to(torch.uint8).numpy()).save(path)
    return tmp_path / "photos"


def given(tmp_path, photos, **changes):
    """The options that name a small model, its weights and its images."""
    shape, path = {**TINY, **changes}, tmp_path / "mine.safetensors"
    save_file(small(NAME, **shape).state_dict(), path)
    kwargs = ["--model-kwargs", *(f"{key}={value}" for key, value in shape.items())]
    reading = ["--workers", "0", "--batch-size", "16"]
    return ["--model", NAME, "--checkpoint", str(path), "--data", str(photos), *kwargs, *reading]


@pytest.mark.parametrize(
    ("head", "flag", "limit", "name"),
    [
        (0, [], ["--max-distance", "0.01"], "pooled"),
        (0, ["--dense"], ["--max-distance-p99", "0.2"], "dense"),
        (1, [], ["--max-kl", "0.001"], "sigmoid"),
        (4, ["--sigmoid"], ["--max-kl", "0.001"], "sigmoid"),
        (4, [], ["--max-gflops", "0.0015"], "softmax"),
    ],
)
def test_calibrate_and_eval_speak_of_one_measure(head, flag, limit, name, tmp_path, photos, small_search, capsys):  # noqa: F811
    common, out = given(tmp_path, photos, num_classes=head), tmp_path / "found.json"
    assert main(["calibrate", *common, *flag, *limit, "--images", "64", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["promise"]["measure"] == name and f"compared: {MEASURES[name]}" in printed
    assert f"promised {'distance' if head == 0 else 'KL'} " in document["config"]["source"]
    assert document["config"]["source"].endswith(f"({name})")
    assert main(["eval", *common, "--config", str(out), "--json", str(tmp_path / "eval.json")]) == 0
    evaluation = json.loads((tmp_path / "eval.json").read_text())["evaluation"]
    printed = capsys.readouterr().out
    assert evaluation["measure"] == name and f"compared: {MEASURES[name]}\n" in printed and "promised " in printed
    assert ("no top-1" in printed) == (name == "softmax")


def test_an_older_file_promises_by_softmax(tmp_path, photos, capsys):
    """Its promise names no measure, so its figures for one logit or for features are worthless."""
    promise = {"images": 16, "gflops": 0.002, "kl": 0.0, "agreement": 1.0}
    old = {"config": {"adapt": "image", "thresholds": [-1.0, -1.0, None]}, "promise": promise}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    for head, said in ((1, MEASURES["sigmoid"]), (0, MEASURES["pooled"])):
        assert main(["eval", *given(tmp_path, photos, num_classes=head), "--config", str(path)]) == 2
        wrong = f"--config {path} compared {MEASURES['softmax']}, but this model gives {said}; calibrate anew"
        assert capsys.readouterr().err == f"atm-triton: {wrong}\n"
    assert main(["eval", *given(tmp_path, photos, num_classes=4), "--config", str(path)]) == 0
    path.write_text(json.dumps(old | {"promise": promise | {"measure": "guess"}}))
    assert main(["eval", *given(tmp_path, photos, num_classes=4), "--config", str(path)]) == 2
    assert "old.json: measure 'guess' is unknown; want one of softmax" in capsys.readouterr().err
    for damaged in ([], 3, {"measure": []}):
        path.write_text(json.dumps(old | {"promise": damaged}))
        assert main(["eval", *given(tmp_path, photos, num_classes=4), "--config", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"atm-triton: --config {path}: ")


def test_eval_compares_what_is_asked_for(tmp_path, photos, capsys):
    common = [*given(tmp_path, photos, num_classes=4), "--schedule", "2", "2", "0"]
    for flag, name in (([], "softmax"), (["--sigmoid"], "sigmoid"), (["--dense"], "dense")):
        assert main(["eval", *common, *flag]) == 0
        assert f"compared: {MEASURES[name]}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["eval", *common, "--dense", "--sigmoid"])


def test_the_command_refuses_a_target_before_it_looks_for_images(tmp_path, capsys):
    common = [*given(tmp_path, tmp_path / "missing", num_classes=0), "--out", str(tmp_path / "x.json")]
    assert main(["calibrate", *common, "--min-agreement", "0.9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("atm-triton: target: min_agreement does not fit what is compared, the pooled feature")
    assert error.count("\n") == 1 and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(("classes", "last"), [(1, torch.nn.Sigmoid()), (5, torch.nn.Softmax(dim=1))], ids=["1", "5"])
def test_probabilities_are_no_logits(classes, last, loader, small_search):  # noqa: F811
    """As logits, all probabilities would lie on the same side of 0."""
    model = vit(num_classes=classes)
    model.head = torch.nn.Sequential(model.head, last)
    with pytest.raises(ValueError, match="lie in 0 .. 1, as probabilities do; want logits"):
        calibrate(model, loader, Target(min_agreement=0.9), progress=False)


def test_a_head_without_a_dimension_of_logits_is_named():
    model = vit(num_classes=1)
    model.head = torch.nn.Sequential(model.head, torch.nn.Flatten(0))
    with pytest.raises(ValueError, match=r"one number per image; want logits \[B, 1\]"):
        measure_of(model)
