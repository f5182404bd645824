"""Calibration: what it finds, promises and refuses, and that it goes on where it was interrupted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import ATMConfig, Target, apply_patch, calibrate
from atm_triton.calibration import calibrate as calibrating
from atm_triton.calibration import fitting, progress, search
from atm_triton.calibration.calibrate import Promise, split_images
from atm_triton.calibration.costs import Costs
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.fitting import Fitting, Plan
from atm_triton.calibration.measuring import Mean, Measured, Meter
from atm_triton.calibration.resume import Notes
from atm_triton.calibration.search import Search
from atm_triton.cli import commands, main
from atm_triton.cli.report import calibration_table
from atm_triton.flops import cost, unmerged
from atm_triton.measure.comparison import Measure
from atm_triton.measure.configurations import checksum
from atm_triton.measure.evaluate import evaluate
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from models import distilled, images, small, vit

SOFTMAX = Measure("softmax")
SMALL = {"LEVELS": (1 / 8, 1 / 2), "CURVES": ((0.0, 1.0),), "STEPS": 4}


@pytest.fixture
def small_search(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(search, name, value)


@pytest.fixture
def loader():
    """Batches of images from flat to noisy, without labels."""
    noise = torch.linspace(0.02, 1, 96)[torch.randperm(96), None, None, None]
    return [(x, None) for x in (0.3 + noise * images(96)).split(24)]


def whole(model):
    return cost(model, unmerged(model, (3, 40, 40))).paper_gflops


def calibrated(model, loader, adapt="image", **target):
    return calibrate(model, loader, Target(**target), adapt, progress=False)


@pytest.mark.parametrize("adapt", ["image", "batch", "static"])
def test_the_goal_is_met_and_the_promise_is_what_an_evaluation_finds(adapt, loader, small_search):
    model = vit()
    goal = 0.8 * whole(model)
    calibration = calibrated(model, loader, adapt, max_gflops=goal)
    assert calibration.config.adapt == adapt and calibration.images == 96
    assert ATMConfig.from_json(calibration.config.to_json()) == calibration.config
    assert calibration == calibrated(model, loader, adapt, max_gflops=goal)

    parts, _ = split_images(loader, calibration.seed)
    assert [sum(map(len, batches)) for batches in parts.values()] == [36, 36, 24]
    assert set(parts) == {"fit", "choose", "promise"}
    seen = Meter(model, parts, {}).mean(calibration.config, ("fit", "choose"))
    assert seen.gflops == pytest.approx(goal, rel=0.02)
    outcome = evaluate(model, [(x, torch.zeros(len(x))) for x in parts["promise"]], calibration.config, labelled=False)
    promise = calibration.promise
    assert promise.gflops == pytest.approx(outcome.overall.gflops) and promise.kl == pytest.approx(outcome.overall.kl)
    assert 100 * promise.agreement == pytest.approx(outcome.overall.agreement) and promise.images == 24
    assert (promise.kl_se is None) == (adapt == "batch") and promise.agreement_se > 0  # the images are one batch
    assert (f"KL {promise.kl:.3g} ±" in calibration_table(calibration, calibration.images)) == (adapt != "batch")


def test_no_image_is_in_two_parts(loader):
    parts, number = split_images(loader, seed=3)
    rows = torch.cat([x for batches in parts.values() for x in batches]).flatten(1)
    assert number == len(rows) == len(rows.unique(dim=0)) == 96
    assert not torch.equal(rows, torch.cat([x for x, _ in loader]).flatten(1))  # in random order


def test_the_search_is_better_than_a_plain_shape(loader, small_search):
    """In a model whose first block must not merge, the search merges in the other blocks."""
    model = vit(depth=6)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight *= 6
    parts, _ = split_images(loader, 0)
    meter = Meter(model, parts, {"cls_only_last": True, "backend": "auto"})
    goal = 0.75 * whole(model)
    chosen = calibrated(model, loader, "static", max_gflops=goal).config
    plain = [ATMConfig(adapt="static", schedule=(r,) * 6, split_depth=6) for r in range(12)]
    means = [meter.mean(config, ("fit", "choose", "promise")) for config in (chosen, *plain)]
    better, worse = means[0], next(mean for mean in means[1:] if mean.gflops <= goal)
    assert better.gflops <= goal * 1.01 and better.divergence < worse.divergence


@pytest.mark.parametrize("adapt", ["image", "batch", "static"])
def test_a_limit_on_the_change(adapt, loader, small_search):
    model = vit()
    parts, _ = split_images(loader, 0)
    meter, costs = Meter(model, parts, {}), Costs(model, (3, 40, 40), True)
    for name, limit in (("max_kl", 0.012), ("min_agreement", 0.9)):
        calibration = calibrated(model, loader, adapt, **{name: limit})
        seen = meter.mean(calibration.config, ("fit", "choose"))
        share, n = seen.agreement, seen.images
        most = seen.divergence + 2 * seen.divergence_se
        assert most <= limit if name == "max_kl" else share - 2 * (share * (1 - share) / n) ** 0.5 >= limit
        assert seen.gflops < costs.highest - 0.02 * costs.unmerged  # it merges
        if (name, adapt) == ("max_kl", "image"):
            assert most > 0.8 * limit  # it uses most of what is allowed


@pytest.mark.parametrize("adapt", ["image", "static"])
def test_few_blocks_merge(adapt, loader, small_search):
    model = vit(depth=8)
    target = Target(max_gflops=0.85 * whole(model))
    config = calibrate(model, loader, target, adapt, max_merging_blocks=2, progress=False).config
    merging = [bool(of_block) for of_block in (config.schedule if adapt == "static" else config.thresholds)]
    assert 1 <= sum(merging) <= 2


def hooked():
    """A model whose second block and its norm are changed by hooks."""
    model = vit()
    model.blocks[1].register_forward_hook(lambda module, args, out: 1.5 * out)
    model.blocks[1].norm1.register_forward_hook(lambda module, args, out: 0.7 * out)
    return model


def test_hooks_that_a_fitting_pass_would_not_call_are_refused(loader):
    for name in ("", "blocks", "blocks.1"):
        model = vit()
        handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: None)
        with pytest.raises(ValueError, match=f"{name or 'the model'} has hooks that a calibration would not call"):
            calibrated(model, loader, "image", max_gflops=0.6 * whole(model))
        handle.remove()
        if name != "blocks.1":
            model.get_submodule(name).register_forward_hook(lambda module, args, out: None)
            with pytest.raises(ValueError, match="has hooks"):
                calibrated(model, loader, "image", max_gflops=0.6 * whole(model))


def fitted(model, loader, adapt, plan, *parts, measure=None, **settings):
    split, _ = split_images(loader, 0)
    meter = Meter(model, split, settings, measure)
    costs = Costs(model, tuple(loader[0][0].shape[1:]), settings.get("cls_only_last", True))
    return Fitting(meter, costs, adapt).run(plan, *parts), meter


@pytest.mark.parametrize(
    ("model", "measure", "cls_only_last"),
    [
        (vit(), None, True),
        (vit(), None, False),
        (vit(), Measure("dense"), False),
        (distilled(), None, True),
        (vit(class_token=False, global_pool="avg"), None, True),
        (vit(reg_tokens=3, qk_norm=True, init_values=0.5), None, True),
        (hooked(), None, True),
    ],
    ids=["class", "all tokens", "dense", "distilled", "pooled", "registers", "hooked"],
)
@pytest.mark.parametrize("adapt", ["image", "batch", "static"])
def test_a_fitting_pass_merges_what_is_wanted_and_measures_what_an_evaluation_does(
    model, measure, cls_only_last, adapt, loader
):
    wanted = (2.5, 0.0, 1.25, 2.0)
    plan, parts = Plan(wanted, split_depth=2), ("fit", "choose")
    candidate, meter = fitted(model, loader, adapt, plan, *parts, measure=measure, cls_only_last=cls_only_last)
    merging = Costs(model, (3, 40, 40), cls_only_last).merging
    merged = candidate.mean.merged
    if adapt == "image":
        assert merged[:merging] == pytest.approx(wanted[:merging], abs=1 / 72)
    else:  # whole numbers; rounding carries over to the next block
        assert sum(merged) == pytest.approx(sum(wanted[:merging]), abs=1)
    assert merged[1] == 0 and merged[merging:] == (0.0,) * (4 - merging)
    if adapt != "static":
        assert candidate.config.thresholds[1] is None
    measured = meter.mean(candidate.config, parts)
    for name in ("gflops", "divergence", "agreement", "p99", "change", "merged"):
        if getattr(measured, name) is not None:
            assert getattr(candidate.mean, name) == pytest.approx(getattr(measured, name), rel=1e-5, abs=1e-9), name


def test_a_pass_that_begins_in_the_midst_gives_the_same(loader, monkeypatch):
    model = vit()
    split, _ = split_images(loader, 0)
    costs, last = Costs(model, (3, 40, 40), True), Plan((2.0, 3.0, 4.0))
    plans = [last, replace(last, counts=(2.0, 3.0, 1.0)), replace(last, counts=(2.0, 1.0, 4.0))]
    plans += [replace(last, split_depth=1), replace(last, counts=(1.0, 3.0, 4.0))]
    for memory in (2**31, 1):  # enough for all blocks, then for none
        monkeypatch.setattr(fitting, "MEMORY", memory)
        meter = Meter(model, split, {})
        kept = Fitting(meter, costs, "image")
        kept.run(last, "fit")
        kept.keep()
        for plan in plans:
            assert kept.run(plan, "fit") == Fitting(Meter(model, split, {}), costs, "image").run(plan, "fit")
        begun = meter.images
        kept.run(replace(last, counts=(2.0, 3.0, 2.0)), "fit")
        assert meter.images - begun == 36 * (0.5 if memory > 1 else 1)


@pytest.mark.parametrize("model", [vit(), distilled(), vit(class_token=False, global_pool="avg")])
@pytest.mark.parametrize("cls_only_last", [True, False])
def test_the_foretold_cost_of_a_schedule_is_the_measured_one(model, cls_only_last, loader):
    costs = Costs(model, (3, 40, 40), cls_only_last)
    assert costs.unmerged == pytest.approx(whole(model))
    for schedule in ((0, 0, 0, 0), (3, 1, 2, 5), (25, 25, 25, 25)):
        config = ATMConfig(adapt="static", schedule=schedule, cls_only_last=cls_only_last)
        measured = Meter(model, {"part": [loader[0][0]]}, {}).mean(config, ("part",))
        assert costs.of_schedule(schedule) == pytest.approx(measured.gflops)


def searching(model, loader, adapt="image", most=None):
    split, _ = split_images(loader, 0)
    costs = Costs(model, (3, 40, 40), True)
    return Search(Fitting(Meter(model, split, {}), costs, adapt), True, most, 0, lambda least: None)


def test_plans_to_begin_with_meet_the_goal(loader):
    model = vit(depth=6)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight *= 6
    for adapt in ("image", "batch", "static"):
        starts = searching(model, loader, adapt).starts(0.75 * whole(model))
        assert all(start.mean.gflops == pytest.approx(0.75 * whole(model), rel=0.03) for start in starts)
        families = [start.plan.family for start in starts]
        if adapt == "static":
            assert set(families) == {"free"} and len(families) >= 4
        else:
            assert families.count("free") == 2 and families.count("curve") >= 2
    allotted = searching(model, loader).allotted(0.75 * whole(model))
    assert allotted[0] < min(allotted[1:3])  # merging in the first block changes most


def test_one_r_per_block_begins_with_the_counts_of_curves(loader):
    model, goal = vit(depth=6), 0.75 * whole(vit(depth=6))
    image, static = searching(model, loader), searching(model, loader, "static")
    even = image.settled(image.plan(image.costs.scaled([1.0] * image.costs.merging, goal)), goal)
    starts = [start.mean.merged for start in static.starts(goal)]
    close = search.CLOSE * image.costs.unmerged
    curves = [curve for curve in image.curves(goal, even) if abs(curve.mean.gflops - goal) < close]
    assert curves
    for curve in curves:
        apart = [max(abs(a - b) for a, b in zip(curve.mean.merged, start, strict=True)) for start in starts]
        assert min(apart) <= 1.5


@pytest.mark.parametrize("adapt", ["image", "static"])
def test_the_chosen_plan_is_also_tried_with_idle_first_blocks(adapt, loader, monkeypatch):
    """It wins where merging in the first blocks changes much, here in a search that starts with even counts alone."""
    model, goal = vit(depth=6), 0.8 * whole(vit(depth=6))
    with torch.no_grad():
        model.blocks[0].attn.proj.weight *= 6
    some = searching(model, loader, adapt)
    even = some.settled(some.plan(some.costs.scaled([1.0] * some.costs.merging, goal)), goal)
    monkeypatch.setattr(some, "starts", lambda goal: [even])
    monkeypatch.setattr(search, "STEPS", 0)
    found = some.run(goal)
    sixth, quarter = some.better(some.late(even.plan), even, goal)
    assert even.mean.merged[0] > 0 == sixth.mean.merged[0] == quarter.mean.merged[1] < sixth.mean.merged[1]
    assert found.plan.counts[0] == 0 and found.mean.gflops == pytest.approx(goal, rel=0.03)
    curve = replace(even.plan, thresholds=search.eq1(0.1, 1.0, 3.0, 5))
    assert curve.without(2).thresholds == (None, None, *curve.thresholds[2:])


def test_a_curve_is_the_papers():
    thetas = search.eq1(0.01, 1.0, 6.0, 11)
    assert thetas[0] == 0.99 and min(thetas) == thetas[-1] == thetas[7] == 0.9 and thetas[5] > 0.9
    assert search.eq1(0.3, 2.0, 1.0, 3)[1] == -1.0  # never lower


def test_a_changed_plan_costs_as_much(loader):
    model, goal = vit(depth=8), 0.8 * whole(vit(depth=8))
    for most in (None, 2):
        searched = searching(model, loader, most=most)
        start = searched.starts(goal)[0]
        for _ in range(12):
            plan = searched.changed(start, goal)
            assert plan.family == "free" and sum(r > 0 for r in plan.counts) <= (most or 8)
            assert searched.fitting.run(plan, "fit").mean.gflops == pytest.approx(goal, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "target: got nothing; want one of max_gflops, max_kl, min_agreement, max_distance, max_distance_p99"),
        ({"max_kl": 1.0, "max_gflops": 1.0}, "target: got max_gflops, max_kl; want one of"),
        ({"max_kl": -1.0}, "target: max_kl=-1.0 is out of range; give one above 0"),
        ({"max_gflops": float("inf")}, "target: max_gflops=inf is out of range"),
        ({"min_agreement": 1.5}, "target: min_agreement=1.5 is out of range; give one above 0 up to 1"),
    ],
)
def test_bad_targets(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Target(**arguments)


def test_bad_input(loader):
    model, target = vit(), Target(max_kl=0.1)
    with pytest.raises(ValueError, match="^48 images are too few to calibrate on; give 64 or more$"):
        calibrate(model, loader[:2], target)
    with pytest.raises(ValueError, match="^0 images are too few"):
        calibrate(model, [], target)
    with pytest.raises(ValueError, match="^adapt='all' is unknown; choose one of batch, image, static$"):
        calibrate(model, loader, target, "all")
    with pytest.raises(TypeError, match="ResNet cannot be merged"):
        calibrate(timm.create_model("resnet18"), loader, target)
    with pytest.raises(ValueError, match="the model is patched already: remove_patch"):
        calibrate(apply_patch(vit(), ATMConfig(thresholds=(0.9,) * 4)), loader, target)
    with pytest.raises(ValueError, match="the model is in training mode: call model.eval"):
        calibrate(vit().train(), loader, target)
    with pytest.raises(ValueError, match="^max_merging_blocks=0 is too small; give 1 or more$"):
        calibrate(model, loader, target, max_merging_blocks=0)
    lowest = Costs(model, (3, 40, 40), True).lowest(None)
    with pytest.raises(ValueError, match="^max_gflops=1e-05 is below .*, the lowest that .*; ask for more$") as refused:
        calibrated(model, loader, max_gflops=1e-5)
    assert lowest <= float(str(refused.value).split()[3].rstrip(",")) < 1.001 * lowest
    one_block = Costs(model, (3, 40, 40), True).lowest(1)
    with pytest.raises(ValueError, match="is below .*, the lowest that merging"):
        calibrate(model, loader, Target(max_gflops=0.99 * one_block), max_merging_blocks=1)
    with pytest.raises(ValueError, match="^max_gflops=1: the model costs .* without merging; ask for less$"):
        calibrated(model, loader, max_gflops=1)
    with pytest.raises(ValueError, match="^images of batch 0 hold NaN or infinity"):
        calibrate(model, [torch.full((64, 3, 40, 40), torch.nan)], target)
    with pytest.raises(TypeError, match=r"^loader: got torch.uint8 \[64, 3, 40, 40\]; want batches of images"):
        calibrate(model, [torch.zeros(64, 3, 40, 40, dtype=torch.uint8)], target)
    with pytest.raises(TypeError, match="^loader: got dict; want batches of images"):
        calibrate(model, [{"images": images(64)}], target)
    for shape in ((64, 1, 40, 40), (64, 3, 44, 40)):
        with pytest.raises(ValueError, match="^images .* do not fit the model: .*; want its channels and size$"):
            calibrate(model, [torch.zeros(shape)], target)


def test_where_nothing_can_merge_it_is_said_before_the_search():
    wishes = (Target(max_kl=0.1), Target(max_gflops=0.0001), Target(min_agreement=0.9))
    alone = "^no block can merge: the last, here the only one, computes the class token alone$"
    one_patch = "^images of one patch token have nothing to merge; give larger ones$"
    for depth, side, message in ((1, 40, alone), (4, 8, one_patch)):
        loader, model = images(96, side=side).split(24), vit(depth=depth, img_size=side)
        for target in wishes:
            with pytest.raises(ValueError, match=message):
                calibrate(model, loader, target, progress=False)


def test_a_model_of_one_block_that_serves_all_its_tokens(loader, small_search):
    model = vit(depth=1, global_pool="avg", class_token=False)
    goal = 0.9 * whole(model)
    assert calibrated(model, loader, max_gflops=goal).promise.gflops == pytest.approx(goal, rel=0.05)


def test_one_image_over_and_over_is_refused():
    one = images(1)
    noisy = (one + 1e-3 * images(96)).split(24)
    alike = "^the images are one image, 96 times: no pixel differs by 1% of the contrast; give images as the model will"
    with pytest.raises(ValueError, match=alike):
        calibrate(vit(), noisy, Target(max_kl=0.1), progress=False)


def test_a_cost_between_the_steps_is_refused_in_words(small_search):
    """The images are so similar, and their tokens so few, that the cost changes in large steps."""
    model = vit(img_size=24, depth=2)
    alike = (images(1, side=24) + 0.02 * images(96, side=24)).split(24)
    goal = 0.635 * cost(model, unmerged(model, (3, 24, 24))).paper_gflops
    with pytest.raises(UnreachableError, match="GFLOPs: the cost changes in large steps, because the images are"):
        calibrate(model, alike, Target(max_gflops=goal), "static", progress=False)


def test_a_change_that_even_one_merge_exceeds_is_refused_in_words(loader, small_search):
    with pytest.raises(
        UnreachableError, match=r"the target cannot be met: even merging almost nothing gives KL [\d.]+e-\d+, agreement"
    ):
        calibrated(vit(), loader, max_kl=1e-300)


def test_a_search_that_finds_nothing_leaves_nothing(small_search, tmp_path, capsys):
    shape = {"img_size": 24, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model = small("vit_tiny_patch16_224", **shape)
    goal = 0.635 * cost(model, unmerged(model, (3, 24, 24))).paper_gflops
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "photos").mkdir()
    for number in range(64):
        noise = torch.randint(0, 255, (24, 24, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "photos" / f"{number}.png")
    before = set(tmp_path.iterdir())
    named = ["--model", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "mine.safetensors"), "--model-kwargs"]
    named += [f"{name}={value}" for name, value in {**shape, "num_classes": 5}.items()]
    reading = ["--data", str(tmp_path / "photos"), "--workers", "0", "--adapt", "static", "--out"]
    assert main(["calibrate", *named, "--max-gflops", f"{goal:.7f}", *reading, str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "GFLOPs: the cost changes in large steps" in error and set(tmp_path.iterdir()) == before


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path, loader, small_search, monkeypatch):
    model, target = vit(), Target(max_gflops=0.8 * whole(vit()))
    path, passes, count, stop_at = tmp_path / "out.json.partial", [], Meter.count, 20

    def failing(self, images):
        passes.append(images)
        if len(passes) == stop_at:
            raise StoppedError
        count(self, images)

    def noted(model):
        with Notes(path) as notes:
            return calibrate(model, loader, target, notes=notes, progress=False)

    monkeypatch.setattr(Meter, "count", failing)
    with pytest.raises(StoppedError):
        noted(model)
    path.write_text(path.read_text() + '["fit None')  # as if killed in the middle of a line
    with pytest.raises(ValueError, match="from another calibration that was interrupted; delete it, or choose another"):
        noted(vit())
    done, stop_at = stop_at - 1 - 3, None  # without the passes of the unmerged model
    passes.clear()
    calibration = noted(model)
    resumed = len(passes)
    passes.clear()
    fresh = calibrate(model, loader, target, progress=False)
    assert replace(calibration, passes=fresh.passes) == fresh and resumed == len(passes) - done


def test_a_known_mean_is_not_measured_again(loader):
    meter = Meter(vit(), {"part": [loader[0][0]]}, {})
    config = ATMConfig(adapt="static", schedule=(2,) * 4)
    first = meter.mean(config, ("part",))
    assert isinstance(first, Mean) and meter.mean(config, ("part",)) == first
    assert meter.images == 2 * 24  # without and with merging


def test_the_error_of_a_cost_that_batches_share():
    gflops = torch.tensor([1.0, 1, 1, 3, 3, 3]).double()
    same = torch.ones(6).double()
    alone, shared = (Promise.of(Measured(gflops, gflops, same, same), SOFTMAX, size) for size in (1, 3))
    assert shared.gflops == alone.gflops == 2
    assert shared.gflops_se == pytest.approx(1.0) and alone.gflops_se == pytest.approx((6 / 5 / 6) ** 0.5)


def test_the_error_knows_of_hard_images_that_were_seen():
    even, same = torch.tensor([1.0, 1.0, 1.0, 1.2]).double(), torch.ones(4).double()
    few = Measured(same, even, same, same)
    hard = Measured(same, torch.tensor([1.0, 1, 1, 9]).double(), same, same)
    alone, together = (Promise.of(few, SOFTMAX, seen=seen) for seen in ([], [hard]))
    reversed_ = Promise.of(hard, SOFTMAX, seen=[few])
    assert alone.kl == together.kl == pytest.approx(1.05)
    assert alone.kl_se == pytest.approx(0.1 / 4**0.5)
    assert together.kl_se == pytest.approx(torch.cat([few.divergence, hard.divergence]).std().item() / 4**0.5)
    assert reversed_.kl_se == Promise.of(hard, SOFTMAX).kl_se


def test_a_target_that_may_not_hold_is_doubted():
    promise = Promise(100, 1.0, 0.1, 0.02, 0.01, 0.99, 0.02)
    assert Target(max_gflops=1).doubt(promise) is None and Target(max_kl=0.03).doubt(promise) is None
    assert Target(max_gflops=0.9).doubt(promise) == "1 GFLOPs are above 0.9"
    assert Target(max_kl=0.01).doubt(promise) == "KL 0.02 is above 0.01"
    assert Target(min_agreement=0.995).doubt(promise) == "agreement 0.99 is below 0.995"
    assert Target(min_agreement=0.985).doubt(promise) == "agreement is known to 0.02 on 100 images"
    assert Target(min_agreement=0.9).doubt(promise) is None
    whole = replace(promise, agreement=1.0)
    assert Target(min_agreement=1.0).doubt(whole) == "agreement is known to 0.02 on 100 images"


def test_the_promise_is_of_images_that_nothing_else_saw(loader, small_search, monkeypatch):
    measure, run, seen = Meter.measure, Fitting.run, []

    def measured(self, config, part):
        seen.append(part)
        return measure(self, config, part)

    def fitted(self, plan, *parts):
        seen.extend(parts)
        return run(self, plan, *parts)

    monkeypatch.setattr(Meter, "measure", measured)
    monkeypatch.setattr(Fitting, "run", fitted)
    calibrated(vit(), loader, max_gflops=0.8 * whole(vit()))
    assert seen.count("promise") == 1 and seen[-1] == "promise" and {"fit", "choose"} < set(seen)


def test_a_damaged_file_of_measurements_is_named(tmp_path):
    path = tmp_path / "out.json.partial"
    for text, message in (
        ("no json\n", "is damaged"),
        ("[" * 100_000 + "\n", "is damaged"),
        ("{}\n", "holds no measurements"),
    ):
        path.write_text(text)
        with (
            pytest.raises(ValueError, match=f"^{path} {message}.*delete it, or choose another --out$"),
            Notes(path) as n,
        ):
            n.belong([1.0])
        assert path.read_text() == text


def randomised(model):
    torch.nn.init.normal_(model.head.weight)
    return model


def test_the_command(tmp_path, small_search, monkeypatch, capsys):
    for name, value in {"LEVELS": (1 / 4,), "STEPS": 1}.items():
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(calibrating, "MOST", {"fit": 12, "choose": 12})
    out = tmp_path / "digits.json"
    arguments = ["--images", "64", "--adapt", "image", "--out", str(out)]
    assert main(["calibrate", "--max-gflops", "0.25", *arguments]) == 0
    said = capsys.readouterr().out
    assert "on 16 images that the search did not see" in said and "fewer than" not in said
    document = json.loads(out.read_text())
    assert document["model"] == document["data"] == "digits" and document["images"] == 64
    assert document["transform"]["input_size"] == [1, 112, 112] and document["environment"]["torch"]
    assert document["promise"]["gflops"] == pytest.approx(0.25, rel=0.1) and document["promise"]["gflops_se"] > 0
    assert not Path(f"{out}.partial").exists()
    assert main(["eval", "--config", str(out), "--limit", "4"]) == 0
    out.write_text(json.dumps(document | {"model": "deit_tiny_patch16_224"}))
    assert main(["eval", "--config", str(out), "--limit", "4"]) == 2
    assert "was calibrated for deit_tiny_patch16_224, not for digits; calibrate anew" in capsys.readouterr().err
    weights = {name: tmp_path / f"{name}.safetensors" for name in ("mine", "other")}
    for path in weights.values():
        save_file(randomised(open_model()).state_dict(), path)
    out.write_text(json.dumps(document | {"weights": "mine", "checkpoint_sha256": checksum(weights["mine"])}))
    for path, code in ((weights["mine"], 0), (weights["other"], 2)):
        assert main(["eval", "--config", str(out), "--limit", "4", "--checkpoint", str(path)]) == code
    assert main(["eval", "--config", str(out), "--limit", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("was calibrated for other weights, mine; calibrate anew") == 2


def tiny(directory):
    """The options of a command for a small model with its own weights."""
    changes = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64, "num_classes": 5}
    weights = directory / "tiny.safetensors"
    save_file(randomised(timm.create_model("vit_tiny_patch16_224", **changes)).state_dict(), weights)
    given = [f"{name}={value}" for name, value in changes.items()]
    return ["--model", "vit_tiny_patch16_224", "--model-kwargs", *given, "--checkpoint", str(weights)]


def pictures(directory, count):
    directory.mkdir()
    for number in range(count):
        pixels = torch.randint(0, 255, (64, 64), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(directory / f"{number:02}.png")
    return directory


def test_a_broken_image_is_left_out_and_named(tmp_path, small_search, capsys):
    broken = pictures(tmp_path / "images", 70) / "03.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "found.json"
    options = [*tiny(tmp_path), "--data", str(broken.parent), "--batch-size", "16", "--workers", "0", "--out", str(out)]
    assert main(["calibrate", "--max-gflops", "0.0005", "--adapt", "batch", *options]) == 0
    said = capsys.readouterr().out
    assert f"1 image could not be read and was left out: {broken}\n" in said
    assert "on 69 images, fewer than --images 256: there are no more" in said
    document = json.loads(out.read_text())
    assert document["images"] == 69 and document["not_read"] == [str(broken)]
    assert f"on 69 images of {broken.parent} in batches of 16: promised" in document["config"]["source"]


def test_others_take_the_place_of_images_that_cannot_be_read(tmp_path, small_search, capsys):
    images = pictures(tmp_path / "images", 81)
    chosen = [int(number * 81 / 64) for number in range(64)]
    left = sorted({*range(81)} - {*chosen})
    broken = [images / f"{number:02}.png" for number in (chosen[5], chosen[40], *left[:15])]
    for path in broken:
        path.write_bytes(b"no image")
    out = tmp_path / "found.json"
    options = [*tiny(tmp_path), "--data", str(images), "--images", "64", "--batch-size", "16", "--workers", "2"]
    options += ["--max-gflops", "0.0005", "--out", str(out)]
    assert main(["calibrate", *options]) == 0
    named = capsys.readouterr().out.splitlines()[0]
    document = json.loads(out.read_text())
    assert document["images"] == 64 and f": {', '.join(document['not_read'])}" in named
    assert {str(path) for path in broken[:2]} <= {*document["not_read"]} <= {*map(str, broken)}
    (images / f"{left[-1]:02}.png").write_bytes(b"no image")
    out.unlink()
    before = set(tmp_path.iterdir())
    assert main(["calibrate", *options]) == 2
    assert "63 images are too few to calibrate on" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_no_image_takes_the_place_of_one_to_judge_by(tmp_path):
    model = open_model()
    for number in range(9):
        Image.fromarray(torch.zeros(112, 112, dtype=torch.uint8).numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    folder = tmp_path / "all" / "class"
    folder.mkdir(parents=True)
    for path in tmp_path.glob("*.png"):
        path.rename(folder / path.name)
    for labelled, number in ((True, 2), (False, 3)):
        loader = open_images(model, str(tmp_path / "all"), limit=3, batch_size=2, labelled=labelled, lenient=True)
        for _ in range(2):
            batches = list(loader)
            assert sum(len(images) for images, _ in batches) == number and len(batches[0][0]) == 1
        assert loader.broken == {str(folder / "0.png")}


def test_two_calibrations_do_not_write_one_file(tmp_path, capsys, monkeypatch):
    """Neither while the first runs, nor between its last measurement and its result, nor after that."""
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "--max-gflops", "0.25", "--images", "64", "--out", "out.json"]
    with Notes(Path("out.json.partial")) as notes:
        assert main(command) == 2
        assert (
            "out.json.partial is being written by another run; wait, or choose another --out" in capsys.readouterr().err
        )
        notes.belong([1.0])
        notes.add("a", [2.0])
    with Notes(Path("out.json.partial")) as notes:
        notes.belong([1.0])
        assert notes.get("a") == [2.0]
        notes.over = True
        Path("out.json.partial").unlink()  # by somebody else
    assert not list(tmp_path.iterdir())
    Path("out.json").write_text("a result")
    assert main(command) == 2
    assert capsys.readouterr().err == "atm-triton: --out out.json exists already; delete it, or choose another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_result_written_while_another_run_began_stays(tmp_path, capsys, monkeypatch):
    """The second run has looked for a result in vain, and gets hold of the notes when the first has let go of them."""
    out, opened = tmp_path / "out.json", commands.open_model

    def slowly(*arguments, **options):
        out.write_text("a result")
        return opened(*arguments, **options)

    monkeypatch.setattr(commands, "open_model", slowly)
    assert main(["calibrate", "--max-gflops", "0.25", "--images", "64", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err and out.read_text() == "a result"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def bad(*arguments):
    return pytest.param(list(arguments[:-1]), arguments[-1], id=" ".join(arguments[:-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad("--max-gflops", "-1", "target: max_gflops=-1.0 is out of range"),
        bad("--max-gflops", "0.01", "max_gflops=0.01 is below 0.0"),
        bad("--max-gflops", "4", "max_gflops=4: the model costs 0.327 without merging"),
        bad("--max-kl", "0.1", "--images", "20", "20 images are too few to calibrate on; give 64 or more"),
        bad("--max-kl", "1", "--out", "/nowhere/out.json", "--out /nowhere/out.json: its directory does not exist"),
        bad("--max-kl", "1", "--data", "missing", "directory missing does not exist"),
        bad("--max-kl", "1", "--data", ".", "directory . holds no images: want files that end in .jpg"),
        bad("--max-kl", "1", "--model", "deit_tiny_patch16_224", "would have random weights: give --checkpoint FILE"),
        bad("--max-kl", "1", "--model", "resnet18", "--checkpoint", "x", "ResNet cannot be merged"),
    ],
)
def test_bad_input_of_the_command(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "--images", "64", "--out", "out.json", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("atm-triton: ") and message in error[0], error
    assert not list(tmp_path.iterdir())  # nor anything that would block a second try


def test_groups_and_attention_are_tried_too(loader):
    searched, goal = searching(vit(), loader), 0.8 * whole(vit())
    start, tried = searched.starts(goal)[0], []
    run = searched.fitting.run
    searched.fitting.run = lambda plan, *parts: tried.append(plan) or run(plan, *parts)
    for other in searched.better(searched.grouped(start.plan), start, goal):
        assert other.mean.change < start.mean.change * 1.5 and other.plan in tried
    assert {(plan.split_depth, plan.proportional_attention) for plan in tried} == {(4, True), (1, True), (None, False)}


def test_large_sets_are_not_fitted_to_as_a_whole(monkeypatch):
    monkeypatch.setattr(calibrating, "MOST", {"fit": 20, "choose": 10})
    parts, number = split_images([images(80, side=8)], 0)
    assert [sum(map(len, batches)) for batches in parts.values()] == [20, 10, 20] and number == 80


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.Progress(10, True) as bar:
        for _ in range(3):
            bar.update(4)
        bar.set_postfix_str("least KL 0.1", refresh=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("calibrate: 4 of 10 image passes, ") and lines[0].endswith(" left")
    assert lines[-1].startswith("calibrate: 12 of 12 image passes, ") and lines[-1].endswith(", least KL 0.1")
    with progress.Progress(10, False) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", [{"max_kl": 0.02}, {"min_agreement": 0.9}, {"max_gflops": 0.8}])
def test_the_number_of_passes_is_estimated(target, loader, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    model = vit()
    if "max_gflops" in target:
        target = {"max_gflops": 0.8 * whole(model)}
    passes = calibrate(model, loader, Target(**target)).passes
    first = capsys.readouterr().err.splitlines()[0]
    assert int(first.split(" of ")[1].split()[0]) == pytest.approx(passes, rel=0.25)
