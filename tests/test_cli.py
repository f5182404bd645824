"""The command line on small inputs, and bad input: one line, exit code 2."""

import json
import os
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from atm_triton import ATMConfig, apply_patch
from atm_triton.cli import main, report
from atm_triton.cli.bad_input import exit_code
from atm_triton.cli.commands import COMMANDS
from atm_triton.cli.options import parser
from atm_triton.config import REMEDY
from atm_triton.digits.model import IMAGE_CONFIG
from atm_triton.flops import cost, scheduled
from atm_triton.measure.configurations import digits_config
from atm_triton.measure.evaluate import evaluate
from atm_triton.measure.images import open_image, open_images
from atm_triton.measure.models import data_config, open_model
from atm_triton.measure.provenance import check_file, write_result
from atm_triton.measure.throughput import constant_r
from benchmarks import zoo
from benchmarks.paper import __main__ as paper
from benchmarks.paper.__main__ import EXPERIMENTS
from models import vit
from processes import Forking, python

FEW = ["--limit", "20", "--batch-size", "10"]
ONE_STEP = ("--accumulate", "1", "--epochs", "1")
TINY = ("--model", "deit_tiny_patch16_224")
CURVE = ("--alpha", "0.95", "--beta", "0.04", "--theta-min", "0.9")


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of three classes with two images each."""
    for name in ("cat", "dog", "eel"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            pixels = torch.randint(0, 255, (300, 200, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.jpg")
    return tmp_path / "images"


def weights(path, name="deit_tiny_patch16_224", **options):
    save_file(timm.create_model(name, **options).state_dict(), path)
    return str(path)


def test_eval_on_digits(tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert main(["eval", *FEW, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    overall = result["evaluation"]["overall"]
    assert overall["images"] == 20 and overall["top1"] > 60
    assert len(result["evaluation"]["deciles"]) == 10 and len(result["evaluation"]["tokens"]) == 12
    kept = [decile["own_tokens"] for decile in result["evaluation"]["deciles"]]
    assert kept == sorted(kept)
    assert result["environment"]["torch"] == version("torch") and result["environment"]["utc"]
    printed = capsys.readouterr().out
    assert "decile 10" in printed and f"{100 * result['evaluation']['saved']:.1f} % of the MACs saved" in printed


def test_eval_on_a_folder_with_a_checkpoint(tmp_path, folder, capsys):
    checkpoint = weights(tmp_path / "deit.safetensors")
    arguments = ["eval", "--model", "deit_tiny_patch16_224", "--checkpoint", checkpoint, "--data", str(folder)]
    assert main([*arguments, "--workers", "0", "--max-gflops", "1.0"]) == 0
    said = capsys.readouterr().out
    assert "no top-1: it needs one folder for each class" in said
    assert 'adapt="batch"; paper, Table' in said  # the paper's point has one r per batch


def test_eval_of_the_papers_other_backbones(tmp_path, folder, capsys):
    """With the class head alone, with the auxiliary head, and with averaged tokens; arguments reach the model's
    function."""
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 2}
    options = [f"{name}={value}" for name, value in shape.items()]
    common = ["--data", str(folder), "--workers", "0", "--alpha", "0.9", "--beta", "0.04", "--theta-min", "0.5"]
    for model, own, said in (
        ("lvvit_s", {}, "logits: class head and half the maximum"),
        ("lvvit_s", {"aux_eval": False}, "logits: class head alone (aux_eval=False)"),
        ("t2t_vit_t_14", {}, ""),
        ("t2t_vit_t_14", {"img_size": 64}, ""),
        ("vit_base_patch16_224.mae", {"global_pool": "avg", "num_classes": 7}, ""),
    ):
        checkpoint = weights(tmp_path / "weights.safetensors", model, **shape, **own)
        given = [*options, *(f"{name}={value}" for name, value in own.items())]
        out = tmp_path / "eval.json"
        arguments = ["eval", "--model", model, "--model-kwargs", *given, "--checkpoint", checkpoint, *common]
        assert main([*arguments, "--json", str(out)]) == 0
        assert said in capsys.readouterr().out
        result = json.loads(out.read_text())
        assert result["model_kwargs"] == {**shape, **own}
        assert result["config"]["proportional_attention"] is (own.get("global_pool") != "avg")


def test_images_have_the_channels_of_the_model(tmp_path, folder, capsys):
    """timm's settings for the weights have three. Grey images are normalised by the average of the three."""
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 64}
    model = timm.create_model(TINY[1], **shape, in_chans=1)
    (grey,) = open_image(model, next(folder.rglob("*.jpg")))
    colours = open_image(timm.create_model(TINY[1], **shape), next(folder.rglob("*.jpg")))
    config = data_config(model)
    assert config["input_size"] == (1, 64, 64)
    assert config["mean"] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert config["std"] == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))
    luma = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * colours).sum(0)
    assert (grey - luma).abs().max() < 0.2
    for channels in (1, 4):
        given = [f"{name}={value}" for name, value in {**shape, "in_chans": channels}.items()]
        own = weights(tmp_path / f"{channels}.safetensors", **shape, in_chans=channels)
        arguments = [*TINY, "--model-kwargs", *given]
        assert main(["bench", *arguments, "--batch-size", "1", "--repeats", "1"]) == 0
        arguments += ["--checkpoint", own, *CURVE, "--data", str(folder), "--workers", "0"]
        assert main(["eval", *arguments]) == (0 if channels == 1 else 2)
    *_, error = capsys.readouterr().err.splitlines()  # after warnings
    assert error == "atm-triton: the model takes images of 4 channels; image files have 1 or 3"
    assert main(["eval", "--schedule", *["1"] * 12, "--model-kwargs", "in_chans=3"]) == 2
    assert "the digits are 1 x 112 x 112, the model takes 3 x 112 x 112" in capsys.readouterr().err


def test_evaluation_equals_a_count_by_hand():
    model = open_model()
    batches = list(open_images(model, limit=30, batch_size=10))
    config = digits_config()
    outcome = evaluate(model, batches, config)
    patched = apply_patch(open_model(), config)
    with torch.inference_mode():
        pairs = [(model(x), patched(x), labels) for x, labels in batches]
    right = sum((after.argmax(1) == labels).sum().item() for _, after, labels in pairs)
    agree = sum((after.argmax(1) == before.argmax(1)).sum().item() for before, after, _ in pairs)
    kl = sum(
        torch.nn.functional.kl_div(
            after.double().log_softmax(1), before.double().log_softmax(1), reduction="sum", log_target=True
        ).item()
        for before, after, _ in pairs
    )
    assert outcome.overall.top1 == pytest.approx(100 * right / 30)
    assert outcome.overall.agreement == pytest.approx(100 * agree / 30)
    assert outcome.overall.kl == pytest.approx(kl / 30, abs=1e-9)
    assert sum(decile.images for decile in outcome.deciles) == 30


def test_static_has_no_deciles():
    model = open_model()
    config = ATMConfig(adapt="static", schedule=(10,) * 12)
    outcome = evaluate(model, open_images(model, limit=20, batch_size=10), config)
    assert outcome.deciles == () and outcome.overall.own_tokens is None
    assert outcome.tokens[1] == 197 - 10


def test_bench(tmp_path, capfd):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--batches", "2", "--batch-size", "2", "--repeats", "2", "--json", str(out), "--plot", str(plot)]
    assert main(["bench", *arguments]) == 0
    cases = json.loads(out.read_text())["cases"]
    titles = [case["title"].split(",")[0] for case in cases]
    assert titles == ["digits", "deit_small_patch16_224"]
    assert "digits, its own weights, on digits: 2 batches of 2" in cases[0]["title"]
    assert "random weights, random images, batch 2, r = 8 in every block" in cases[1]["title"]
    for case in cases:
        names = [row["name"] for row in case["rows"]]
        assert names == ["timm", "free-merge bound", "ToMe", "ATM"]
        base, bound, tome, atm = case["rows"]
        assert base["speedup"] == 1 and bound["of_bound"] == 1 and len(atm["seconds"]) == 2
        assert atm["tokens"] == bound["tokens"] and atm["gflops"] == bound["gflops"] < base["gflops"]
        assert abs(tome["gflops"] - atm["gflops"]) < 0.05 * base["gflops"]
        assert all(row["peak_mib"] > 0 for row in case["rows"])
        assert atm["slowest"] <= atm["images_per_second"] <= atm["fastest"]
    assert Image.open(plot).size[0] > 500
    said = capfd.readouterr()
    assert "free-merge bound" in said.out and "Memory block" not in said.err


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], None),
        (["--no-proportional-attention"], "proportional_attention"),
        (["--adapt", "batch", "--config", str(IMAGE_CONFIG)], "adapt"),
        (["--split-depth", "2", "--all-tokens-last"], "split_depth, cls_only_last"),
        (["--backend", "reference", "--adapt", "image"], None),
    ],
)
def test_a_promise_is_of_what_it_was_made_for(options, changed, capsys):
    assert main(["eval", *FEW, *options]) == 0
    said = capsys.readouterr().out
    assert "; atm-triton calibrate, digits" in said
    assert ("these figures no longer hold" in said) == (changed is not None)
    assert changed is None or f" (changed here: {changed}; these figures no longer hold)\n" in said


def test_figures_of_the_paper_are_for_its_models(tmp_path, folder, capsys):
    checkpoint = weights(tmp_path / "three.safetensors", num_classes=3)
    arguments = ["eval", *TINY, "--model-kwargs", "num_classes=3", "--checkpoint", checkpoint, "--data", str(folder)]
    assert main([*arguments, "--workers", "0", "--max-gflops", "0.9", "--limit", "2"]) == 0
    assert "; this deit_tiny_patch16_224 has another shape or other weights\n" in capsys.readouterr().out


def test_a_warning_is_a_line(capsys):
    with warnings.catch_warnings(action="always"):
        assert main(["eval", *FEW, "--schedule", "98", "49", "24", "12", "6", "3", "2", *["0"] * 5]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "of the tokens are gone" in line)
    assert line.startswith("atm-triton: ")


@pytest.mark.parametrize("cls_only_last", [True, False])
def test_the_constant_r_of_a_cost_is_the_nearest(cls_only_last):
    """The least of those that are as near."""
    model, shape = vit(), (3, 40, 40)
    macs = [cost(model, scheduled(model, shape, (r,) * 4, cls_only_last)).macs for r in range(14)]
    assert macs[-1] == macs[-2]  # nothing is left to merge
    for asked in (0, *macs, *(value + 1000 for value in macs), 2 * macs[0]):
        nearest = min(range(14), key=lambda r, asked=asked: abs(macs[r] - asked))
        assert constant_r(model, shape, asked, cls_only_last) == nearest


def test_bench_of_packed_images(tmp_path):
    """DeiT-S merges in each image as many tokens as the digits do; another row merges the same number in all images."""
    out, options = tmp_path / "bench.json", ["--batches", "1", "--batch-size", "2", "--repeats", "1"]
    assert main(["bench", "--adapt", "image", *options, "--json", str(out)]) == 0
    digits, deit = json.loads(out.read_text())["cases"]
    assert "deit_small_patch16_224, random weights, random images, counts of the digits, batch 2" in deit["title"]
    for case in (digits, deit):
        rows = {row["name"]: row for row in case["rows"]}
        beside = ['ATM, adapt="batch"'] if case is digits else []
        assert list(rows) == ["timm", "free-merge bound", "ToMe", "ATM", "one r per batch", *beside]
        assert rows["ATM"]["tokens"] == rows["free-merge bound"]["tokens"]
        assert abs(rows["ATM"]["gflops"] - rows["one r per batch"]["gflops"]) < 0.05 * rows["timm"]["gflops"]
    assert digits["config"]["adapt"] == deit["config"]["adapt"] == "image"
    assert digits["rows"][3]["tokens"] == deit["rows"][3]["tokens"]


def test_eval_by_each_images_own_count(tmp_path):
    out = tmp_path / "eval.json"
    assert main(["eval", *FEW, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["config"] == json.loads(digits_config("image").to_json())
    easy, *_, hard = result["evaluation"]["deciles"]
    assert easy["gflops"] < hard["gflops"]


def test_bench_of_a_given_model_and_schedule(tmp_path, capsys):
    arguments = ["--model", "deit_tiny_patch16_224", "--batch-size", "1", "--repeats", "1"]
    arguments += ["--json", str(tmp_path / "bench.json")]
    assert main(["bench", *arguments, "--schedule", *["13"] * 12, "--split-depth", "12"]) == 0
    printed = capsys.readouterr().out
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert ("merging does not pay here: ATM has 0." in printed) == (case["rows"][3]["speedup"] < 1)
    assert "ToMe, r = 13" in printed and "random weights" in printed
    assert "197 184 171 158 145 132 119 106 93 80 67 54" in printed


def test_env(tmp_path, capsys):
    out = tmp_path / "env.json"
    assert main(["env", "--json", str(out)]) == 0
    assert "backend_reason" in capsys.readouterr().out
    facts = json.loads(out.read_text())["environment"]
    assert {"torch", "timm", "cpu", "commit", "dirty", "utc", "command"} <= facts.keys()


def test_bench_says_where_merging_does_not_pay():
    """It says so of the rows of ATM only, not of the bound or of other rows."""

    def rows(**speedups):
        names = {"timm": 1, "free-merge bound": 0.7, "ToMe": 0.6, "one r per batch": 0.5} | speedups
        return [{"name": name, "speedup": speedup} for name, speedup in names.items()]

    assert report.slower(rows(ATM=1.0)) is None
    assert report.slower(rows(ATM=0.831)) == (
        "merging does not pay here: ATM has 0.83 of timm's speed; it does with larger batches, models or images"
    )
    said = report.slower(rows(**{"ATM": 0.9, 'ATM, adapt="batch"': 0.8}))
    assert "ATM has 0.90 of timm's speed and ATM, adapt=\"batch\" has 0.80 of timm's speed; " in said


def help_of(run, command, capsys):
    with pytest.raises(SystemExit) as stop:
        run([command, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(command, capsys):
    said = help_of(main, command, capsys)
    program, *arguments = said.partition(" example: ")[2].split()
    assert "--json" in said and program == "atm-triton"
    assert command == "env" or ("where the model runs" in said and "of weights and images (default: float32)" in said)
    assert parser(COMMANDS).parse_args(arguments).command == command


ADAPT_OF = {"calibrate": "image", "eval": "image", "finetune": "image", "visualize": "image", "bench": "batch"}


@pytest.mark.parametrize(("command", "adapt"), ADAPT_OF.items())
def test_the_way_to_adapt_that_a_command_takes_is_in_its_help(command, adapt, capsys):
    """All commands have the same default except bench, because its run with "image" takes long."""
    said = help_of(main, command, capsys)
    assert f"(static). Default: {adapt}" in said
    assert ("which keeps the run short" in said) == (adapt != "image")
    assert set(COMMANDS) - set(ADAPT_OF) == {"env"} and ATMConfig().adapt == "batch"  # Python has the paper's default


@pytest.mark.parametrize("experiment", ["finetuned", "table4", "tableA3"])
def test_experiments_that_train_take_the_papers_way_to_adapt(experiment, capsys):
    assert "one r per batch, as in the paper, or by each image's own count (batch)" in help_of(
        paper.main, experiment, capsys
    )
    asked = EXPERIMENTS[experiment].arguments().parse_args([])
    assert asked.adapt == ["batch"]


@pytest.mark.parametrize(
    ("arguments", "adapt"),
    [
        (["eval", *FEW], "image"),
        (["eval", *FEW, *CURVE], "image"),
        (["eval", *FEW, *CURVE, "--adapt", "batch"], "batch"),
        (["eval", *FEW, "--schedule", *["9"] * 12], "static"),
        (["eval", *FEW, "--config", "batch.json"], "batch"),
        (["eval", *FEW, "--config", "batch.json", "--adapt", "image"], "image"),
        (["finetune", "--images", "2", "--limit", "2", "--batch-size", "2", *ONE_STEP, "--out", "run"], "image"),
        (["visualize", "digit.png", "--out", "merged.png"], "image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_how_a_command_adapts(arguments, adapt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("batch.json").write_text(digits_config("batch").to_json())
    Image.new("RGB", (112, 112), "white").save("digit.png")
    assert main(arguments) == 0
    assert f'adapt="{adapt}"' in capsys.readouterr().out


def bad(*arguments):
    return pytest.param(list(arguments[:-1]), arguments[-1], id=" ".join(arguments[:-1]) or "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad("eval", "--model", "deit_smal_patch16_224", "model 'deit_smal_patch16_224' is unknown to timm; did you"),
        bad("eval", "--model", "resnet18", "--checkpoint", "x", "ResNet cannot be merged"),
        bad("eval", "--model", "lvvit_x", "did you mean lvvit"),
        bad("eval", "--model-kwargs", "colour=red", "unexpected keyword argument 'colour'"),
        bad("eval", "--model-kwargs", "global_pool=mean", "model 'vit_digits_patch8_112' cannot be made: Only avg"),
        bad("eval", "--model-kwargs", "num_heads=0", "cannot be made: "),
        bad("eval", "--model-kwargs", "features_only=True", "model argument features_only"),
        bad("eval", *TINY, "--pretrained", "model 'deit_tiny_patch16_224' cannot be made"),
        bad("eval", *TINY, "deit_tiny_patch16_224 would have random weights: give --checkpoint FILE or --pretrained"),
        bad("eval", "--checkpoint", "missing.safetensors", "checkpoint missing.safetensors is not a file"),
        bad("eval", "--checkpoint", "no.pth", "--config", "pyproject.toml", "checkpoint no.pth is not a file"),
        bad("eval", "--data", "missing", "directory missing does not exist"),
        bad("eval", "--batch-size", "0", "batch size 0 is too small; give 1 or more"),
        bad("eval", "--limit", "0", "limit 0 is too small"),
        bad("eval", "--workers", "-1", "workers -1 is too small"),
        bad("eval", "--alpha", "1.5", "alpha must be a number in [-1, 1], got 1.5"),
        bad("eval", "--alpha", "0.9", "alpha without beta and theta_min; give all three of them, or thresholds"),
        bad(
            "eval",
            "--model-kwargs",
            "num_heads=4",
            f"no thresholds for this VisionTransformer: the paper has none; {REMEDY}",
        ),
        bad("eval", "--theta-min", "2", "theta_min must be a number in [-1, 1], got 2.0"),
        bad("eval", "--beta", "-1", "beta must be a number in [0, 1], got -1.0"),
        bad("eval", "--split-depth", "13", "split_depth=13 is beyond the model's 12 blocks"),
        bad("eval", "--schedule", "8", "schedule has 1 values for a model of 12 blocks"),
        bad("eval", "--schedule", "-8", "schedule[0] must be a whole number, 0 or more, got -8"),
        bad("eval", "--config", "missing.json", "--config missing.json is not a file; atm-triton calibrate makes one"),
        bad("eval", "--data", "pyproject.toml", "directory pyproject.toml is a file"),
        bad("eval", "--max-gflops", "3", "the paper has no operating points for 'digits'"),
        bad("eval", "--json", "/nowhere/out.json", "--json /nowhere/out.json: its directory does not exist"),
        bad("eval", "--backend", "triton", "--dtype", "float64", "--limit", "3", "or float32, not float64; or use"),
        bad("bench", "--repeats", "0", "--repeats and --batches must be at least 1"),
        bad("bench", "--batches", "0", "--repeats and --batches must be at least 1"),
        bad("bench", "--batch-size", "0", "batch size 0 is too small"),
        bad("bench", *TINY, "--batch-size", "0", "batch size 0 is too small"),
        bad("bench", "--model", "resnet18", "ResNet cannot be merged"),
        bad("bench", "--plot", "/nowhere/out.png", "--plot /nowhere/out.png: its directory does not exist"),
        bad("bench", *TINY, "--batches", "3", "runs on one random batch; give it --data DIR"),
        bad("bench", "--plot", "bars.foo", "--plot bars.foo: want a name that ends in .png, .pdf or .svg"),
        bad("eval", "--alpha", "0.9", "--schedule", *"8" * 12, "--alpha: no effect beside a schedule or thresholds"),
        bad("bench", *TINY, *CURVE, "thresholds mean nothing on random images: give deit_tiny"),
        bad("bench", *TINY, "--max-gflops", "1", "thresholds mean nothing on random images"),
        bad("bench", *TINY, "--adapt", "image", "thresholds mean nothing on random images: give deit_tiny"),
        bad("eval", "--json", ".", "--json . is a directory; name a file in it"),
        bad("eval", "--config", "pyproject.toml", "--config pyproject.toml: the configuration is not JSON"),
        bad("bench", *TINY, "--data", "digits", "the digits are 1 x 112 x 112, the model takes 3 x 224 x 224"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # a machine without a network
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("atm-triton: ") and message in error[0], error


BOTH = ["eval", "--max-gflops", "1", "--top1-drop", "0"]


@pytest.mark.parametrize("arguments", [[], ["evaluate"], ["eval", "--adapt"], ["eval", "--dtype", "x"], BOTH], ids=str)
def test_a_command_line_that_is_none(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("atm-triton") and error.count("\n") == 1 and "--help" in error


def test_an_error_of_the_command_line_is_one_process_to_say(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--limit", "x"])
    assert capsys.readouterr().err == ""


def test_too_little_memory_is_one_line(capsys):
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    assert exit_code("eval", run) == 2
    assert capsys.readouterr().err == "eval: out of memory on the GPU; give smaller batches\n"


def test_a_model_argument_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--model-kwargs", "aux"])
    assert capsys.readouterr().err.startswith("atm-triton eval: argument --model-kwargs: 'aux' is not NAME=VALUE;")


def failing(arguments, capsys):
    assert main(["eval", *TINY, *arguments, *CURVE]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0, error
    return error


def test_bad_files(tmp_path, folder, capsys):
    good = weights(tmp_path / "good.safetensors")
    small = weights(tmp_path / "small.safetensors", "deit_small_patch16_224")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    data = ["--data", str(folder), "--workers", "0"]
    error = failing([*data, "--checkpoint", small], capsys)
    assert "small.safetensors does not fit this VisionTransformer: " in error and "], want [" in error
    torch.save({"model": print}, tmp_path / "code.pth")  # a pickle that holds no weights
    for name in ("text.pth", "text.safetensors", "code.pth"):
        error = failing([*data, "--checkpoint", str(tmp_path / name)], capsys)
        assert f"{name} holds no weights that can be read" in error

    (tmp_path / "empty").mkdir()
    assert "empty" in failing(["--checkpoint", good, "--data", str(tmp_path / "empty")], capsys)
    (tmp_path / "empty" / "class").mkdir()
    assert "empty" in failing(["--checkpoint", good, "--data", str(tmp_path / "empty")], capsys)
    (folder / "dog" / "broken.jpg").write_bytes(b"no image")
    for workers in ("0", "2"):
        error = failing(["--checkpoint", good, "--data", str(folder), "--workers", workers], capsys)
        assert error.startswith("atm-triton: ") and "broken.jpg is not a readable image" in error


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert exit_code("program", interrupted) == 130
    assert capsys.readouterr().err == "program: interrupted\n"


def test_broken_weights(tmp_path, capsys):
    state = open_model().state_dict()
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    merging = ["--schedule", *["8"] * 12]
    assert main(["eval", "--checkpoint", str(tmp_path / "nan.safetensors"), "--limit", "3", *merging]) == 2
    assert "the unpatched model's answers of batch 0 hold NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_nan_images_end_a_command(command, capsys, monkeypatch):
    loader = [(torch.full((2, 1, 112, 112), torch.nan), torch.zeros(2))]
    monkeypatch.setattr("atm_triton.cli.commands.open_images", lambda *_, **__: loader)
    monkeypatch.setattr("atm_triton.cli.commands.labels_fit", lambda *_: True)
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert error == "atm-triton: images of batch 0 hold NaN or infinity; check the images and the weights\n"


def test_broken_weights_end_a_bench(tmp_path, capsys):
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    assert main(["bench", *TINY, "--checkpoint", str(tmp_path / "nan.safetensors"), "--batch-size", "1"]) == 2
    assert "the unpatched model's answers of batch 0 hold NaN" in capsys.readouterr().err


def test_the_digits_model_reads_a_folder_in_grey(folder, capsys):
    assert main(["eval", "--data", str(folder), "--workers", "0"]) == 0
    assert "no top-1" in capsys.readouterr().out


def test_options_reach_the_bench(tmp_path):
    arguments = ["--batch-size", "1", "--repeats", "1", "--all-tokens-last", "--no-proportional-attention"]
    assert main(["bench", *TINY, *arguments, "--json", str(tmp_path / "bench.json")]) == 0
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert not case["config"]["cls_only_last"] and not case["config"]["proportional_attention"]
    assert case["rows"][3]["gflops"] > 0.9 and case["rows"][2]["note"] == "r = 8"  # ToMe has the same conditions


def test_nan_images_are_refused():
    model = open_model()
    images = torch.randn(2, 1, 112, 112)
    images[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="images of batch 1 hold NaN or infinity"):
        evaluate(model, [(torch.randn(2, 1, 112, 112), torch.zeros(2)), (images, torch.zeros(2))], digits_config())
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(model, [], digits_config())


def test_a_single_field_leaves_the_digits_others(tmp_path):
    out = tmp_path / "eval.json"
    assert main(["eval", *FEW, "--split-depth", "7", "--json", str(out)]) == 0
    own = digits_config("image")
    changed = replace(
        own, split_depth=7, source=f"{own.source} (changed here: split_depth; these figures no longer hold)"
    )
    assert json.loads(out.read_text())["config"] == json.loads(changed.to_json())


def test_the_papers_curve_takes_the_place_of_the_digits_thresholds(tmp_path):
    out = tmp_path / "eval.json"
    assert main(["eval", *FEW, "--alpha", "0.999", "--beta", "0.04", "--theta-min", "0.99", "--json", str(out)]) == 0
    config = json.loads(out.read_text())["config"]
    assert config["alpha"] == 0.999 and config["theta_min"] == 0.99 and config["thresholds"] is None


def test_the_kernels_want_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = python("-m", "atm_triton", "eval", "--backend", "triton", "--limit", "3", "--device", "cpu")
    assert done.returncode == 2 and 'backend="triton" cannot run: tensors are on the CPU; move them' in done.stderr
    assert done.stderr.count("\n") == 1


def test_as_a_process():
    done = python("-m", "atm_triton", "eval", "--batch-size", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "atm-triton: batch size 0 is too small; give 1 or more\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "--checkpoint", "v.safetensors", "--out", "v.safetensors"], "--out v.safetensors would replace"),
        (["eval", "--config", "c.json", "--json", "linked.json"], "--json linked.json would replace what is read from"),
        (["eval", "--config", "c.json", "--json", "./c.json"], "--json c.json would replace what is read from c.json"),
        (
            ["visualize", "photos/in.png", "--out", "photos/in.png"],
            "--out photos/in.png would replace what is",
        ),
        (
            ["bench", "--data", "photos", "--plot", "photos/in.png"],
            "--plot photos/in.png would replace what",
        ),
        (["bench", "--json", "new.png", "--plot", "new.png"], "--json and --plot are one file, new.png"),
    ],
)
def test_no_input_is_replaced_and_no_result_lost(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    held = {name: name.encode() for name in ("v.safetensors", "c.json", "photos/in.png")}
    for name, content in held.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "linked.json").hardlink_to(tmp_path / "c.json")
    needs = ["--max-kl", "1"] if arguments[0] == "calibrate" else []
    assert main([*arguments, *needs]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"atm-triton: {message}")
    assert {name: (tmp_path / name).read_bytes() for name in held} == held and not (tmp_path / "new.png").exists()


# --------------------------------------------- errors that were tracebacks, or came only after all the work was done


def test_an_output_that_nobody_reads(tmp_path):
    """As after ``| head``: it is one line, and the result is written; a help that nobody reads is no error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Forking("timm", "timm.data", environment=environment) as forking:
        for buffering in ({}, {"PYTHONUNBUFFERED": "1"}):
            command = ["-m", "atm_triton", "env", "--json", tmp_path / f"{len(buffering)}.json"]
            done = forking.python(*command, reader=False, **buffering)
            assert done.returncode == 2
            assert done.stderr == "atm-triton: nobody reads the output any more (broken pipe)\n"
            assert "backend_reason" in json.loads(command[-1].read_text())
            done = forking.python("-m", "atm_triton", "eval", "--help", reader=False, **buffering)
            assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("opening", ["[", '{"config":'])
def test_a_file_of_brackets_is_no_configuration(opening, tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text(100_000 * opening)
    assert main(["eval", "--limit", "3", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"atm-triton: --config {path}: the configuration is not JSON: ") and error.count("\n") == 1


def calibrating(*options):
    return ["calibrate", "--max-gflops", "0.25", *options]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (calibrating("--out", "/proc/x.json"), "--out /proc/x.json cannot be written ("),
        (["eval", "--json", "/proc/x.json"], "--json /proc/x.json cannot be written ("),
        (["visualize", "--out", "/proc/x.png", "--", "x.jpg"], "--out /proc/x.png cannot be written ("),
        (["eval", "--json", "x" * 250 + ".json"], ".json cannot be written (File name too long); choose another"),
        (["eval", "--json", "/dev/null"], "--json /dev/null is not a regular file; choose another"),
        (calibrating("--out", "/dev/null"), "--out /dev/null is not a regular file; choose another"),
    ],
    ids=str,
)
def test_an_output_that_cannot_be_is_refused_before_anything_runs(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atm_triton.cli.commands.open_model", lambda *_, **__: pytest.fail("it has begun"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("atm-triton: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_looking_whether_an_output_can_be_written_leaves_what_is_there(tmp_path):
    (tmp_path / "x.json").write_text("x")
    for name in ("x.json", "y.json"):
        check_file("--json", tmp_path / name)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["x"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "x.json").write_text("x")
    (tmp_path / "link.json").symlink_to("x.json")
    write_result(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "x.json").read_text())["a"] == 1


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224"])
def test_a_class_is_refused_before_its_weights_are_downloaded(name, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for weights in (["--pretrained"], []):
        assert main(["eval", "--model", name, *weights]) == 2
        error = capsys.readouterr().err
        assert "cannot be merged: it is not of timm's VisionTransformer class" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("made", "asked", "remedy"),
    [
        ({"num_classes": 7}, [], "; give --model-kwargs num_classes=7 (in Python an argument of the model)\n"),
        ({"num_classes": 0}, [], "; give --model-kwargs num_classes=0 (in Python an argument of the model)\n"),
        ({"num_classes": 7}, ["num_classes=0"], "; give --model-kwargs num_classes=7 (in Python an argument of"),
        ({"num_classes": 7, "depth": 3}, [], "head.bias is [7], want [1000]\n"),
    ],
    ids=str,
)
def test_a_wrong_head_says_which_is_right(made, asked, remedy, tmp_path, capsys):
    checkpoint = weights(tmp_path / "mine.safetensors", **made)
    kwargs = ["--model-kwargs", *asked] if asked else []
    assert main(["eval", *TINY, "--checkpoint", checkpoint, *kwargs, "--data", "."]) == 2
    error = capsys.readouterr().err
    assert remedy in error and error.count("\n") == 1 and ("num_classes" in error) == ("depth" not in made)


def test_the_zoo_tells_what_it_does_without_doing_it(capsys, monkeypatch):
    monkeypatch.setattr(zoo, "classified", lambda: pytest.fail("it runs"))
    for arguments, code in ((["--help"], 0), (["--fast"], 2)):
        with pytest.raises(SystemExit) as stop:
            zoo.main(arguments)
        assert stop.value.code == code
    said = capsys.readouterr()
    assert "Which models of timm's VisionTransformer class can be merged" in said.out
    assert (
        said.err.startswith("python -m benchmarks.zoo: unrecognized arguments: --fast;") and said.err.count("\n") == 1
    )


# ---------------------------------------------------------------------------------------------- images of any kind


@pytest.fixture
def shades():
    """Pixels 0 to 254 of a smooth picture, uint8 [240, 320, 3]."""
    y, x = numpy.mgrid[:240, :320]
    return numpy.stack([x * 254 // 319, y * 254 // 239, (x + y) * 254 // 558], axis=2).astype(numpy.uint8)


KINDS = {  # how the image is saved, and by how much its values may change
    "palette.png": (lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE), 0.15),
    "alpha.png": (lambda image: image.convert("RGBA"), 0.01),
    "cmyk.jpg": (lambda image: image.convert("CMYK"), 0.06),
}


@pytest.mark.parametrize("name", KINDS)
def test_images_of_other_modes_are_the_same_picture(name, shades, tmp_path):
    model = timm.create_model("deit_tiny_patch16_224")
    made, moved = KINDS[name]
    Image.fromarray(shades).save(tmp_path / "plain.png")
    made(Image.fromarray(shades)).save(tmp_path / name)
    plain, other = (open_image(model, tmp_path / file) for file in ("plain.png", name))
    assert (plain - other).abs().mean() < moved


@pytest.mark.parametrize("channels", [1, 3])
def test_all_16_bits_of_an_image_are_read(channels, shades, tmp_path):
    model = open_model() if channels == 1 else timm.create_model("deit_tiny_patch16_224")
    grey = shades[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(numpy.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(numpy.uint16) * 257).save(tmp_path / "16.tif")
    narrow, *wide = (open_image(model, tmp_path / name) for name in ("8.png", "16.png", "16.tif"))
    assert narrow.std() > 0.1 and all(torch.equal(narrow, image) for image in wide)


def test_a_photograph_is_upright(shades, tmp_path):
    model, exif = timm.create_model("deit_tiny_patch16_224"), Image.Exif()
    exif[0x0112] = 6  # viewers turn it clockwise
    Image.fromarray(shades).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(numpy.rot90(shades, -1)).save(tmp_path / "upright.png")
    assert torch.equal(*(open_image(model, tmp_path / name) for name in ("turned.png", "upright.png")))
    (tmp_path / "a").mkdir()
    (tmp_path / "turned.png").rename(tmp_path / "a" / "turned.png")
    ((images, _),) = open_images(model, str(tmp_path / "a"), labelled=False)
    assert torch.equal(images[0], open_image(model, tmp_path / "upright.png"))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_values_of_no_known_range_are_refused(dtype, shades, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(shades[:, :, 0].astype(dtype)).save(tmp_path / "images" / name / "x.tif")
    assert main(["eval", "--data", str(tmp_path / "images"), "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert "have no known range; save it with 8 or 16 bits" in error and "x.tif" in error and error.count("\n") == 1


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (3, 500)], ids=str)
def test_an_image_of_any_size_is_read(size, tmp_path):
    Image.new("RGB", size, (200, 10, 30)).save(tmp_path / "x.png")
    assert open_image(timm.create_model("deit_tiny_patch16_224"), tmp_path / "x.png").shape == (3, 224, 224)
