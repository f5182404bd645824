"""Fine-tuning with merging: gradients, several processes, interrupted runs, the command, and bad input."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import loops
from atm_triton import ATMConfig, apply_patch
from atm_triton.cli import main
from atm_triton.measure.images import open_images
from atm_triton.training.finetune import Training
from atm_triton.training.folder import RunFolder
from atm_triton.training.images import TrainDigits, TrainFolder, passes, steps_per_epoch
from atm_triton.training.recipe import Recipe
from finetuning import CASES, CONFIGS, EASY, RECIPE, Noisy, Pictures, new, of_its_own, train
from models import distilled, images_for, small, vit
from processes import python

HERE = Path(__file__).parent
PLAIN = replace(RECIPE, mixup=0.0, cutmix=0.0, smoothing=0.0, ema=None, clip_grad=None)
F64 = torch.float64


def same(one, other):
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(out):
    """The rows of the log without times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# --------------------------------------------------------------------------------------------------- gradients


def logits_in_loops(model, x, adapt):
    """Logits, and how many tokens merge in each block for each batch or image that decides its own count."""

    def r(block, pairs, most):
        if adapt == "static":
            return min((5, 3, 2)[block - 1], most)
        theta = loops.theta(block, **EASY)
        counts = [sum(similarity >= theta for similarity, _ in own.values()) for own in pairs]
        return min(sum(counts) // len(counts), most)

    parts = x.split(1) if adapt == "image" else [x]
    done = [loops.logits(model, part, r, 2, True) for part in parts]
    return torch.cat([logits for logits, *_ in done]), [taken for *_, taken in done]


@pytest.mark.parametrize("adapt", CONFIGS)
def test_the_gradients_of_a_step_are_those_of_the_loops(adapt):
    """The step has two passes of four images, in float64, with smoothed labels."""
    still = {"proj_drop_rate": 0.0, "drop_path_rate": 0.0}
    model, twin, own = new(**still), new(**still), Pictures().batches()[:2]
    training = Training(model, replace(PLAIN, smoothing=0.1), 1)
    training.merge_by(CONFIGS[adapt])
    row = training.advance(own)
    loss, merged = 0.0, []
    for x, labels in own:
        logits, taken = logits_in_loops(twin, x, adapt)
        loss = loss + F.cross_entropy(logits, labels, label_smoothing=0.1) / len(own)
        merged += taken
    loss.backward()
    assert all(sum(taken[:2]) > 0 for taken in merged)
    assert len(merged) == (8 if adapt == "image" else 2)
    assert adapt != "image" or len(set(map(tuple, merged))) > 1  # images differ
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-10)
    for ours, parameter in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=0, atol=1e-8)
        assert parameter.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["lvvit_t", "t2t_vit_t_14", "distilled", "pooled"])
def test_every_parameter_of_other_models_is_trained(kind):
    """The statistics of norms must also change in the model itself, not in a copy."""
    if kind == "distilled":
        model = distilled()
    else:
        model = vit(global_pool="avg") if kind == "pooled" else small(kind)
    recipe = replace(RECIPE, lr=1e-2)
    training = Training(model, recipe, 1)
    training.merge_by(ATMConfig(adapt="static", schedule=(2,) * len(model.blocks)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training.advance([(images_for(model, 4), torch.arange(4)) for _ in range(2)])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == frozen
    assert any("running" in name for name in before) == (kind == "lvvit_t")


def test_two_small_passes_are_one_large_one():
    """This holds for "image", where an image's merging does not depend on the batch."""
    results = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        recipe = replace(PLAIN, batch_size=batch_size, accumulate=accumulate)
        model = new(proj_drop_rate=0.0, drop_path_rate=0.0)
        training = Training(model, recipe, 1)
        training.merge_by(CONFIGS["image"])
        x, labels = Pictures().x[:8], Pictures().labels[:8]
        training.advance(list(zip(x.split(batch_size), labels.split(batch_size), strict=True)))
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_checkpointing_changes_no_gradient():
    """With dropout, a recomputed block must draw the same random numbers."""
    results = []
    for again in (False, True):
        training = Training(model := new(), replace(RECIPE, grad_checkpointing=again), 1)
        training.merge_by(CONFIGS["image"])
        training.advance(Pictures().batches()[:2])
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("amp", "near"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_16_bits_train_as_float32_does(amp, near):
    still, done = {"proj_drop_rate": 0.0, "drop_path_rate": 0.0}, {}
    for kind in (None, amp):
        training = Training(model := new(torch.float32, **still), replace(PLAIN, amp=kind), 10)
        training.merge_by(ATMConfig(adapt="static", schedule=(0, 0, 0)))  # 16 bits would merge different tokens
        training.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=kind == "float16")
        done[kind] = training.advance(Pictures().batches()[:2]) | {"gradient": [p.grad for p in model.parameters()]}
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert done[amp]["loss"] != done[None]["loss"]
    assert done[amp]["loss"] == pytest.approx(done[None]["loss"], rel=near)
    ours, exact = (torch.cat([g.flatten() for g in done[kind]["gradient"]]) for kind in (amp, None))
    assert (ours - exact).norm() < 2 * near * exact.norm()


def test_a_loss_that_is_scaled_too_far_leaves_the_weights():
    """A float16 step that overflows is skipped and the scale halved; if that does not help, training ends."""
    training = Training(model := new(torch.float32), replace(RECIPE, amp="float16"), 10)
    training.merge_by(CONFIGS["static"])
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**60})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert training.advance(Pictures().batches()[:2])["grad_norm"] is None
    assert same(model.state_dict(), before) and training.scaler.get_scale() == 2.0**59
    model.blocks[0].attn.qkv.weight.register_hook(lambda gradient: gradient * math.nan)
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**-21})
    with pytest.raises(ValueError, match="the gradient of step 2 is nan: training ends, and the last checkpoint is"):
        training.advance(Pictures().batches()[:2])
    assert same(model.state_dict(), before)


# --------------------------------------------------------------------------------------- the recipe, and the images


def test_the_recipe_is_the_papers():
    """The paper's appendix: 30 epochs, no warm-up, cosine from 2e-5 to 3e-6; the rest is DeiT's."""
    recipe, model = Recipe(), new()
    optimizer = recipe.optimizer(model)
    schedule = recipe.schedule(optimizer, 10)
    rates = []
    for step in range(300):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([3e-6 + 0.5 * (2e-5 - 3e-6) * (1 + math.cos(math.pi * t / 300)) for t in range(300)])
    assert rates[0] == pytest.approx(2e-5) and rates[-1] == pytest.approx(3e-6, rel=1e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.05 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {n for n, p in model.named_parameters() if p.dim() > 1 and n not in ("pos_embed", "cls_token")}
    mixing = recipe.mixing(5)
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.label_smoothing) == (0.8, 1.0, 0.1)


@pytest.mark.parametrize("sched", ["cosine", "poly", "tanh"])
def test_every_schedule_ends_where_it_is_to(sched):
    recipe = Recipe(sched=sched, lr=1e-3, min_lr=1e-5, epochs=4, warmup_epochs=1)
    optimizer = recipe.optimizer(new())
    schedule, rates = recipe.schedule(optimizer, 50), []
    for step in range(200):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6) and rates[-1] == pytest.approx(1e-5, abs=2e-5)
    assert rates[:50] == sorted(rates[:50]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[25] == pytest.approx(0.5e-3, rel=0.01) and rates[50] > 0.7e-3


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("adahessian", "opt='adahessian' wants second derivatives, which the"),
        ("fusedadam", "opt='fusedadam' cannot"),
    ],
)
def test_an_optimiser_that_cannot_run_is_named(opt, message):
    with pytest.raises(ValueError, match=message):
        Recipe(opt=opt).optimizer(new())


def test_every_image_is_seen_once_an_epoch_in_another_order():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 21

        def __getitem__(self, at):
            return at

    recipe = Recipe(batch_size=4, accumulate=2)
    seen = [[pair for step in passes(Numbers(), recipe, e, 0, 0, False) for pair in step] for e in (0, 1)]
    orders = [torch.cat([numbers for _, numbers in epoch]).tolist() for epoch in seen]
    assert all(len(order) == len(set(order)) == 16 for order in orders) and orders[0] != orders[1]
    rest = [numbers for step in passes(Numbers(), recipe, 1, 1, 0, False) for _, numbers in step]
    assert torch.cat(rest).tolist() == orders[1][8:]
    assert steps_per_epoch(Numbers(), recipe) == 2


def test_digits_are_drawn_anew_for_each_epoch():
    digits = TrainDigits(8, seed=0)
    first, second, again = (torch.stack([digits[epoch, n][0] for n in range(8)]) for epoch in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)
    other = TrainDigits(8, seed=1)
    assert not torch.equal(first[0], other[0, 0][0])


# ------------------------------------------------------------------------------------- several processes, and resuming


def test_two_processes_train_as_one(tmp_path):
    """The cases have mixup, dropout, drop path, averaged weights and a clipped gradient. The processes also check what
    they must refuse."""
    done = python(HERE / "finetuning.py", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == len(CASES)  # only one process reports
    for name, options in CASES.items():
        train(tmp_path / "one" / name, **options())
        one, two = (torch.load(tmp_path / which / name / "checkpoint.pt") for which in ("one", "two"))
        for part in ("model", "model_ema"):
            for key, value in one[part].items():
                near = 1e-6 if name == "float32" else 1e-9
                torch.testing.assert_close(two[part][key], value, rtol=0, atol=near)
        for a, b in zip(rows(tmp_path / "one" / name), rows(tmp_path / "two" / name), strict=True):
            assert a == pytest.approx(b, abs=1e-5 if name == "float32" else 1e-9)
        moved = (one["model"]["head.weight"] - new().head.weight).abs().max()
        assert moved > 1e-3


def test_a_method_of_its_own_is_asked_before_each_step_and_goes_on_to_the_bit(tmp_path):
    """The method's parameter stays fixed for the first half of the steps and then learns at its own rate."""
    whole, result = train(tmp_path / "whole", **of_its_own())
    assert result["config"] is None and result["after"]["tokens"] == (26, 21, 18)
    gate = whole.blocks[1].gate.detach()
    state = torch.load(tmp_path / "whole" / "checkpoint.pt")
    assert torch.equal(state["model"]["blocks.1.gate"], gate) and gate.abs().max() > 1e-3
    assert state["optimizer"]["param_groups"][1]["lr"] == 10 * state["optimizer"]["param_groups"][0]["lr"]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", pictures=Pictures(raises=25), save_every=1, **of_its_own())
    half = torch.load(tmp_path / "part" / "checkpoint.pt")
    assert half["step"] == 3 and half["model"]["blocks.1.gate"].abs().min() > 0
    part, _ = train(tmp_path / "part", resume=True, save_every=1, **of_its_own())
    assert same(part.state_dict(), whole.state_dict()) and rows(tmp_path / "part") == rows(tmp_path / "whole")
    first = Training(new_model := new(), RECIPE, 2, Noisy(new_model))
    first.merge_by(None)
    first.advance(Pictures().batches()[:2])
    assert not new_model.blocks[1].gate.any()


def test_a_run_that_is_killed_goes_on_to_the_bit(tmp_path):
    done = python(HERE / "finetuning.py", tmp_path / "killed", 28)  # before the second half of the fourth step
    assert done.returncode == -9
    whole, _ = train(tmp_path / "whole", CONFIGS["static"])
    assert rows(tmp_path / "killed/static")[-1]["step"] == 3
    resumed, result = train(tmp_path / "killed/static", CONFIGS["static"], resume=True, save_every=1)
    assert same(resumed.state_dict(), whole.state_dict()) and not same(resumed.state_dict(), new().state_dict())
    one, other = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed/static"))
    assert same(one["model_ema"], other["model_ema"])
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed/static")
    assert [row["epoch"] for row in result["epochs"]] == [0, 1, 2]


@pytest.fixture(scope="module", params=["batch", "image"])
def whole_run(request, tmp_path_factory):
    """A way to adapt, the model after a run that nothing interrupts, and the rows of its log."""
    out = tmp_path_factory.mktemp("whole")
    whole, _ = train(out, CONFIGS[request.param])
    return request.param, whole.state_dict(), rows(out)


@pytest.mark.parametrize("at", [3, 16, 21, 31])
def test_an_interrupted_run_goes_on_to_the_bit(at, whole_run, tmp_path):
    """Interruptions are within an epoch, at its end, and when the log is ahead of the checkpoint."""
    adapt, weights, log = whole_run
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", CONFIGS[adapt], pictures=Pictures(raises=at))
    part, _ = train(tmp_path / "part", CONFIGS[adapt], resume=True)
    assert same(part.state_dict(), weights)
    assert rows(tmp_path / "part") == log


def test_a_configuration_or_what_finds_it_is_wanted(tmp_path):
    with pytest.raises(ValueError, match="there is no config, and no recalibrate that finds one; give one of them"):
        train(tmp_path, None)
    with pytest.raises(ValueError, match="recalibrate wants two things: how often, in the recipe, and what finds"):
        train(tmp_path, None, recalibrate=lambda model: CONFIGS["image"])
    assert not list(tmp_path.iterdir())


def test_a_scaled_loss_and_a_schedule_with_warm_up_go_on_to_the_bit(tmp_path):
    recipe = replace(RECIPE, amp="float16", warmup_epochs=1, grad_checkpointing=True)
    with pytest.raises(KeyboardInterrupt):
        part = new(torch.float32)
        train(tmp_path / "part", CONFIGS["image"], recipe, Pictures(raises=20), part, save_every=1)
    states = {}
    for name, resume in (("part", True), ("whole", False)):
        model, _ = train(tmp_path / name, CONFIGS["image"], recipe, model=new(torch.float32), resume=resume)
        states[name] = model.state_dict()
    assert same(states["part"], states["whole"])
    one, other = (torch.load(tmp_path / name / "checkpoint.pt")["scaler"] for name in states)
    assert one == other and one["scale"] < 2.0**16  # it has dropped
    rates = [row["lr"] for row in rows(tmp_path / "whole") if "lr" in row]
    assert rates[0] == pytest.approx(1e-6) and rates[1] > rates[0] and rates[2] > rates[3]


def test_thresholds_are_found_anew(tmp_path):
    """They are found for the current weights of the unpatched model, and an interrupted run finds the same ones."""
    calibrated, recipe = [], replace(RECIPE, recalibrate=1)

    def recalibrate(model):
        assert type(model).__name__ == "VisionTransformer" and not model.training
        weight = model.head.weight.detach().clone()
        calibrated.append(weight)
        return ATMConfig(adapt="static", schedule=(int(1e6 * weight.abs().sum().item()) % 4 + 1, 2, 0))

    whole, result = train(tmp_path / "whole", None, recipe, recalibrate=recalibrate)
    assert len(calibrated) == 2 and not torch.equal(*calibrated)  # before each of the two epochs
    r = int(1e6 * calibrated[1].abs().sum().item()) % 4 + 1
    assert result["config"]["schedule"] == (r, 2, 0)
    assert result["after"]["tokens"] == (26, 26 - r, 24 - r)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", None, recipe, Pictures(raises=28), recalibrate=recalibrate, save_every=1)
    part, again = train(tmp_path / "part", None, recipe, recalibrate=recalibrate, resume=True)
    assert same(part.state_dict(), whole.state_dict()) and again["config"] == result["config"]


# ----------------------------------------------------------------------------------------------------- the command

SHAPE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
MODEL = ["--model", "deit_tiny_patch16_224", "--model-kwargs", *(f"{name}={value}" for name, value in SHAPE.items())]
SCHEDULE = ["--schedule", "4", "0"]
SMALL = ["--batch-size", "4", "--accumulate", "2", "--epochs", "2", "--workers", "0"]
FEW_DIGITS = ["--images", "16", "--limit", "8", "--batch-size", "4", "--accumulate", "2", "--epochs", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What :func:`place` holds."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("made")
    for part, count in (("train", 22), ("val", 4)):
        for colour, name in enumerate(("cat", "dog", "eel")):
            (directory / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 120, (40, 50, 3), dtype=torch.uint8)
                pixels[..., colour] += 100
                Image.fromarray(pixels.numpy()).save(directory / "data" / part / name / f"{number}.png")
    save_file(timm.create_model("deit_tiny_patch16_224", **SHAPE).state_dict(), directory / "w.safetensors")
    return directory


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A directory with weights and with folders of images in three colours, to train on and to evaluate on."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetuning(*options):
    """The arguments of ``finetune`` on the folder of images."""
    return ["finetune", *MODEL, "--checkpoint", "w.safetensors", "--data", "data", *SMALL, *options]


def the_line(arguments, capsys):
    """Run the command, which must fail, and return the single line of its error."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line]
    (line,) = (line for line in lines if "of the tokens are gone" not in line)  # but for a warning before it
    return line.removeprefix("atm-triton: ")


def test_the_digits_end_to_end(tmp_path, capsys):
    out, files = tmp_path / "run", {name: tmp_path / name for name in ("r.json", "p.png")}
    options = ["--json", str(files["r.json"]), "--plot", str(files["p.png"]), "--ema", "0.5"]
    assert main(["finetune", *FEW_DIGITS, "--adapt", "image", "--out", str(out), *options]) == 0
    result, given = (json.loads(path.read_text()) for path in (out / "result.json", files["r.json"]))
    assert result.keys() == given.keys() and result["environment"]["torch"]
    assert result["before"]["overall"]["gflops"] < 0.8 * result["before"]["gflops_unpatched"]
    assert result["after"]["overall"]["images"] == result["after_ema"]["overall"]["images"] == 8
    assert result["settings"]["mixup"] == 0 and result["settings"]["drop_path_rate"] == 0 and result["seconds"] > 0
    assert Image.open(files["p.png"]).size[0] > 500
    printed = capsys.readouterr().out
    assert "epoch 0/1: top-1" in printed and "epoch 1/1: loss" in printed and "averaged weights" in printed
    _, first, second, after = rows(out)
    assert (first["step"], second["step"]) == (1, 2) and first["lr"] == pytest.approx(2e-5)
    assert after["train_loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    capsys.readouterr()
    for weights, after in (("model", "after"), ("ema", "after_ema")):
        arguments = ["eval", "--checkpoint", str(out / f"{weights}.safetensors"), "--limit", "8"]
        arguments += ["--config", str(out / "result.json"), "--json", str(tmp_path / "e.json")]
        assert main(arguments) == 0
        assert 'adapt="image"; found before fine-tuning: ' in capsys.readouterr().out
        assert json.loads((tmp_path / "e.json").read_text())["evaluation"] == result[after]
    save_file(load_file(out / "model.safetensors") | {"norm.bias": torch.ones(96)}, out / "other.safetensors")
    assert main(["eval", "--checkpoint", str(out / "other.safetensors"), "--config", str(out / "result.json")]) == 2


def test_the_weights_load_into_the_unpatched_model(place):
    assert main(finetuning(*SCHEDULE, "--lr", "0.01", "--min-lr", "0.001", "--out", "run")) == 0
    model = timm.create_model("deit_tiny_patch16_224", **SHAPE).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(load_file("run/model.safetensors"))
    assert not same(model.state_dict(), before)
    batches = open_images(model, "data/val", batch_size=4)
    with torch.inference_mode():
        right = sum((model(x).argmax(1) == labels).sum().item() for x, labels in batches)
        merged = apply_patch(model, ATMConfig(adapt="static", schedule=(4, 0)))
        right_merged = sum((merged(x).argmax(1) == labels).sum().item() for x, labels in batches)
    after = json.loads(Path("run/result.json").read_text())["after"]["overall"]
    assert after["top1_unpatched"] == pytest.approx(100 * right / 12)
    assert after["top1"] == pytest.approx(100 * right_merged / 12)
    settings = json.loads(Path("run/result.json").read_text())["settings"]
    assert settings["auto_augment"] == "rand-m9-mstd0.5-inc1" and settings["drop_path_rate"] == 0.1
    assert settings["mixup"] == 0.8 and settings["images"] == 66


def test_a_cost_means_the_papers_points_after_fine_tuning(place):
    assert main(finetuning("--max-gflops", "1", "--epochs", "1", "--out", "run")) == 0
    source = json.loads(Path("run/result.json").read_text())["config"]["source"]
    assert source.startswith(
        "paper, Table A3, DeiT-T, fine-tuned, alpha 0.995, beta 0.025, theta_min 0.895: 0.96 GFLOPs"
    )
    assert source.endswith("; this deit_tiny_patch16_224 has another shape or other weights")


def test_augmentation_does_not_depend_on_who_loads(place):
    model = timm.create_model("deit_tiny_patch16_224", **SHAPE)
    recipe, every = Recipe(batch_size=4, accumulate=2), []
    for workers in (0, 2):
        images = TrainFolder(model, Path("data/train"), seed=3)
        steps = [step for epoch in (0, 1) for step in passes(images, recipe, epoch, 0, workers, False)]
        every.append(torch.stack([x for step in steps for x, _ in step]))
    assert torch.equal(*every)
    again = TrainFolder(model, Path("data/train"), seed=4)
    assert not torch.equal(images[0, 0][0], images[1, 0][0]) and not torch.equal(images[0, 0][0], again[0, 0][0])


@pytest.mark.parametrize("auto_augment", ["rand-m10-n6-inc1", "original-mstd0.5"])
def test_the_strongest_augmentation_reads_every_image(place, auto_augment):
    """This includes posterising to 0 bits, which Pillow 13 refuses."""
    model = timm.create_model("deit_tiny_patch16_224", **SHAPE)
    images = TrainFolder(model, Path("data/train"), seed=0, auto_augment=auto_augment)
    for epoch in range(2):
        assert all(images[epoch, number][0].isfinite().all() for number in range(len(images)))


def test_the_command_goes_on_with_its_own_run(place, capsys):
    assert main(finetuning(*SCHEDULE, "--out", "run", "--save-every", "1")) == 0
    weights = Path("run/model.safetensors").read_bytes()
    Path("run/model.safetensors").unlink()
    assert main(finetuning(*SCHEDULE, "--out", "run", "--resume", "--workers", "1")) == 0  # the run is complete already
    assert Path("run/model.safetensors").read_bytes() == weights
    kept = Path("run/checkpoint.pt").read_bytes()
    for options, message in (
        ([*SCHEDULE, "--resume", "--lr", "1e-4"], "--resume: lr is 0.0001, the run in run had 2e-05; go on with its"),
        (
            ["--schedule", "3", "0", "--resume"],
            "--resume: merging.schedule is [3, 0], the run in run had [4, 0]; go on",
        ),
        ([*SCHEDULE, "--resume", "--epochs", "3"], "--resume: epochs is 3, the run in run had 2"),
        (SCHEDULE, "--out run holds checkpoint.pt, log.jsonl, model.safetensors, result.json of another run; give"),
    ):
        assert the_line(finetuning(*options, "--out", "run"), capsys).startswith(message)
    Path("data/train/cat/0.png").rename("data/train/cat/99.png")
    assert the_line(finetuning(*SCHEDULE, "--out", "run", "--resume"), capsys).startswith("--resume: names_sha256 is")
    assert Path("run/checkpoint.pt").read_bytes() == kept


def test_a_run_that_finds_thresholds_goes_on_with_its_way_to_adapt(place, capsys):
    """The command's default matches the run, and naming another way to adapt is refused."""
    options = ["--epochs", "1", "--recalibrate", "1", "--max-gflops", "1.1e-4", "--calibration-images", "64"]
    assert main(finetuning(*options, "--out", "run")) == 0
    assert main(finetuning(*options, "--out", "run", "--resume", "--adapt", "image")) == 0
    line = the_line(finetuning(*options, "--out", "run", "--resume", "--adapt", "batch"), capsys)
    assert line.startswith('--resume: adapt is "batch", the run in run had "image"')


def test_thresholds_are_found_for_a_cost(place, capsys):
    """``calibrate`` finds them before the first epoch."""
    options = ["--epochs", "1", "--recalibrate", "1", "--max-gflops", "1.1e-4", "--calibration-images", "64"]
    assert main(finetuning(*options, "--out", "run")) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["before"]["gflops_unpatched"] > 1.15e-4
    assert result["after"]["overall"]["gflops"] == pytest.approx(1.1e-4, rel=0.03)
    assert result["config"]["adapt"] == "image" and result["settings"]["merging"] is None
    for more, message in (
        (["--split-depth", "1"], "--split-depth has no effect here; leave it out"),
        (["--calibration-images", "20"], "20 images are too few to calibrate on"),
        (["--max-gflops", "1"], "max_gflops=1: the model costs"),
    ):
        assert the_line(finetuning(*options, *more, "--out", "other"), capsys).startswith(message)
    line = the_line(finetuning("--recalibrate", "1", *SCHEDULE, "--out", "other"), capsys)
    assert line == "--recalibrate 1 wants a cost to find thresholds for: give --max-gflops"


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_loss_that_is_not_finite_ends_it(place, capsys):
    """The checkpoint that remains has finite weights."""
    options = [*SCHEDULE, "--opt", "sgd", "--lr", "1e30", "--min-lr", "1e30", "--mixup", "0", "--cutmix", "0"]
    kept = "training ends, and the last checkpoint is kept; begin anew in another --out with a lower lr, or with clip"
    line = the_line(finetuning(*options, "--out", "run"), capsys)
    assert line.startswith(f"the loss of step 2 is nan: {kept}")
    often = the_line(finetuning(*options, "--out", "often", "--save-every", "1"), capsys)
    assert often.startswith(f"the answers after step 1 are not finite: {kept}")
    for out in ("run", "often"):
        state = torch.load(f"{out}/checkpoint.pt")
        assert state["step"] == 0 and same(state["model"], load_file("w.safetensors"))
        assert not Path(out, "model.safetensors").exists()


def test_a_full_disk_leaves_what_was_saved(tmp_path):
    """The disk fills up between two checkpoints; once there is room the run can be resumed."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CONFIGS["static"], pictures=Pictures(raises=20), save_every=1)
    held = (tmp_path / "checkpoint.pt").read_bytes()
    unfinished = tmp_path / "checkpoint.pt.unfinished"
    unfinished.symlink_to("/dev/full")
    why = r"checkpoint.pt cannot be written \(No space left on device\); what was saved before is kept"
    with pytest.raises(OSError, match=why):
        train(tmp_path, CONFIGS["static"], resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == held and not unfinished.exists()
    resumed, _ = train(tmp_path, CONFIGS["static"], resume=True)
    whole, _ = train(tmp_path / "whole", CONFIGS["static"])
    assert same(resumed.state_dict(), whole.state_dict())


def test_two_runs_do_not_write_one_directory(place, capsys):
    """Neither a new run nor one that goes on, before the other has written anything."""
    with RunFolder(Path("run"), {}).held():
        for more in ([], ["--resume"]):
            line = the_line(finetuning(*SCHEDULE, "--epochs", "1", "--out", "run", *more), capsys)
            assert line == "run is being written by another run; wait, or choose another --out"
    assert not list(Path("run").iterdir())


def test_a_full_disk_is_one_line(place, capsys):
    Path("run").mkdir()
    Path("run/checkpoint.pt.unfinished").symlink_to("/dev/full")
    line = the_line(finetuning(*SCHEDULE, "--epochs", "1", "--out", "run"), capsys)
    assert line.startswith("run/checkpoint.pt cannot be written (No space left on device)")
    assert not list(Path("run").iterdir())  # so that it can start again
    Path("run/model.safetensors.unfinished").symlink_to("/dev/full")
    line = the_line(finetuning(*SCHEDULE, "--epochs", "1", "--out", "run"), capsys)
    assert line.startswith("run/model.safetensors cannot be written (No space left on device); what was saved before")
    assert torch.load("run/checkpoint.pt")["step"] == 8
    assert main(finetuning(*SCHEDULE, "--epochs", "1", "--out", "run", "--resume")) == 0
    assert Path("run/model.safetensors").exists()


BAD = {
    "no labels": (["--data", "flat", "--val-data", "data/val"], "directory flat has no labels: want one folder of"),
    "one class": (
        ["--data", "one", "--val-data", "data/val"],
        "directory one holds one class, cat: there is nothing to tell",
    ),
    "two classes": (
        ["--data", "two", "--val-data", "data/val"],
        "directory two holds 2 classes, the model has 3:",
    ),
    "other classes": (["--data", "renamed"], "directories renamed/train and renamed/val hold different classes;"),
    "no val": (["--data", "two"], "directory two/train does not exist: want two/train and two/val, or --val-data"),
    "no such val": (["--val-data", "missing"], "directory missing does not exist"),
    "itself": (
        ["--data", "data/val", "--val-data", "data/val"],
        "--val-data data/val are the images to train on",
    ),
    "no head": (["--model-kwargs", "num_classes=0"], "checkpoint w.safetensors does not fit this VisionTransformer"),
    "another shape": (["--model-kwargs", "depth=3"], "checkpoint w.safetensors does not fit this VisionTransformer: "),
    "broken weights": (["--checkpoint", "data/val/cat/0.png"], "checkpoint data/val/cat/0.png holds no weights that"),
    "no weights": (["--checkpoint", "missing"], "checkpoint missing is not a file"),
    "few images": (
        ["--batch-size", "68", "--accumulate", "1"],
        "66 images are fewer than a step takes, 1 passes of 68",
    ),
    "odd batch": (["--batch-size", "3"], "batch_size=3: mixup pairs images; give an even number, or mixup 0"),
    "epochs": (["--epochs", "0"], "epochs=0 is out of range; give 1 or more"),
    "lr": (["--lr", "0"], "lr=0.0 is out of range; give above 0"),
    "nan": (["--lr", "nan"], "lr=nan is out of range; give above 0"),
    "min lr": (["--lr", "1e-6"], "min_lr=3e-06 is above lr=1e-06; lower it"),
    "warm-up": (["--warmup-epochs", "2"], "warmup_epochs=2 of 2 epochs leave none; give fewer"),
    "drop path": (["--drop-path", "1.5"], "--drop-path 1.5 is out of range; give 0 or more, below 1"),
    "drop path below 0": (["--drop-path", "-0.5"], "--drop-path -0.5 is out of range; give 0 or more, below 1"),
    "drop path of the model": (
        ["--model-kwargs", "drop_path_rate=2"],
        "drop_path_rate of --model-kwargs 2 is out of range; give 0 or more, below 1",
    ),
    "erasing": (["--erasing", "7"], "--erasing 7.0 is out of range; give 0 to 1"),
    "erasing nan": (["--erasing", "nan"], "--erasing nan is out of range; give 0 to 1"),
    "colour": (["--color-jitter", "-1", "--auto-augment", ""], "--color-jitter -1.0 is out of range; give 0 or more"),
    "colour beside a policy": (["--color-jitter", "0.9"], "--color-jitter has no effect beside a policy; give"),
    "idle": (["--calibration-images", "70"], "--calibration-images has no effect here; leave it out"),
    "ema": (["--ema", "1"], "ema=1.0 is out of range; give 0 or more, below 1"),
    "opt": (["--opt", "adamz"], "opt='adamz' is unknown; choose one of"),
    "policy": (["--auto-augment", "rant-m9"], "auto_augment='rant-m9' is unknown to timm; try rand-m9-mstd0.5"),
    "16 bits": (["--dtype", "bfloat16"], "weights of torch.bfloat16 are too coarse to be trained: take float32, and"),
    "no run": (["--resume"], "--resume: run/checkpoint.pt does not exist; leave --resume out to begin"),
    "digits alone": (["--images", "30"], "--images has no effect here; leave it out"),
    "drop path twice": (
        ["--drop-path", "0.1", "--model-kwargs", "drop_path_rate=0.1"],
        "--drop-path and --model-kwargs drop",
    ),
    "in the data": (
        ["--out", "data/train/run"],
        "--out data/train/run lies in data, where images are read from",
    ),
    "an input": (["--checkpoint", "old/model.safetensors", "--out", "old"], "--out (model.safetensors) old/model.safe"),
    "a file": (["--out", "old/model.safetensors"], "--out old/model.safetensors is a file; name a directory"),
    "twice": (["--json", "run/result.json"], "--out (result.json) and --json are one file"),
    "plot": (["--plot", "p.foo"], "--plot p.foo: want a name that ends in .png, .pdf or .svg"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_lost(options, message, place, capsys):
    folders = {"flat": [], "one": ["cat"], "two": ["cat", "dog"], "renamed/train": ["ant", "bee", "cow"], "old": []}
    for root, names in folders.items():
        Path(root).mkdir(parents=True)
        for name in names:
            Path(root, name).symlink_to(place / "data/train" / (name if root != "renamed/train" else "eel"))
    Path("renamed/val").symlink_to(place / "data/val")
    Path("flat/0.png").write_bytes(Path("data/val/cat/0.png").read_bytes())
    Path("old/model.safetensors").write_bytes(Path("w.safetensors").read_bytes())
    Path("run").mkdir()
    held = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    if "--model-kwargs" in options:  # the shape, with these values replaced
        options = [*options, *(f"{name}={value}" for name, value in SHAPE.items() if not options[-1].startswith(name))]
    assert the_line(finetuning(*SCHEDULE, "--out", "run", *options), capsys).startswith(message)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == held


def test_bad_input_of_the_digits(tmp_path, capsys):
    everything = "the configuration merges everything: of 196 patch tokens 1.0 enter the last block; raise the thresh"
    for options, message in (
        (["--alpha", "-1", "--beta", "0", "--theta-min", "-1"], everything),
        (["--schedule", *["98"] * 12], everything),
        (["--erasing", "0.1"], "--erasing has no effect here; leave it out"),
        (["--val-data", "x"], "--val-data has no effect here; leave it out"),
        (["--images", "0"], "--images 0 is too small; give 1 or more"),
        (["--images", "7"], "7 images are fewer than a step takes, 2 passes of 4; give smaller batches or more"),
        (
            ["--model", "deit_tiny_patch16_224"],
            "deit_tiny_patch16_224 would have random weights: give --checkpoint",
        ),
    ):
        line = the_line(["finetune", *FEW_DIGITS, *options, "--out", str(tmp_path / "run")], capsys)
        assert line.startswith(message)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_refused(content, place, capsys):
    assert main(finetuning(*SCHEDULE, "--epochs", "1", "--out", "run")) == 0
    path = Path("run/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    line = the_line(finetuning(*SCHEDULE, "--epochs", "1", "--out", "run", "--resume"), capsys)
    assert line == "--resume: run/checkpoint.pt is not a readable checkpoint of a fine-tuning"


def test_a_damaged_log_is_refused(tmp_path):
    train(tmp_path, CONFIGS["static"])
    (tmp_path / "log.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"--resume: \S+log.jsonl is damaged: .*; delete it, and the log begins here"):
        train(tmp_path, CONFIGS["static"], resume=True)


def test_a_model_of_another_shape_does_not_go_on(tmp_path):
    train(tmp_path, CONFIGS["static"])
    with pytest.raises(ValueError, match=r"the checkpoint is of another model or recipe: size mismatch for \S+"):
        train(tmp_path, CONFIGS["static"], model=new(num_classes=6), resume=True)


def test_what_cannot_be_trained_is_named():
    frozen = new().requires_grad_(False)
    for model, message in (
        (frozen, "no parameter of the model is trained"),
        (new(num_classes=0), "the model has 0 classes: training with labels wants a head of two or more"),
        (new(torch.float16), "weights of torch.float16 are too coarse"),
    ):
        with pytest.raises(ValueError, match=message):
            Training(model, RECIPE, 1)
