"""The options of the command line."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs

from atm_triton.cli.bad_input import Parser
from atm_triton.config import ADAPT, BACKENDS
from atm_triton.measure.models import DIGITS
from atm_triton.training.recipe import AMP, SCHEDULES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SPLITS = ("test", "calibration", "train")
USUAL_ADAPT = "image"  # predictions change least and do not depend on the rest of the batch
BENCH_ADAPT = "batch"  # the short run of `make bench`; "image" times a DeiT-S on large batches too, which takes minutes
GFLOPS = "in GFLOPs per image: 1e9 multiply-accumulates"
BACKEND_HELP = "Triton kernels or plain torch (default: auto, the kernels where they run)"
EXAMPLES = {  # one per command
    "bench": "atm-triton bench --model deit_small_patch16_224 --batch-size 64 --schedule 8 8 8 8 8 8 8 8 8 8 8 8",
    "eval": "atm-triton eval --model deit_small_patch16_224 --pretrained --data imagenet/val --max-gflops 3.3",
    "calibrate": "atm-triton calibrate --model vit_small_patch16_224 --checkpoint mine.safetensors "
    "--model-kwargs num_classes=7 --data photos --max-gflops 3.3 --out mine.json",
    "finetune": "atm-triton finetune --model deit_small_patch16_224 --pretrained --data imagenet --max-gflops 2.6 "
    "--device cuda --amp bfloat16 --out deit-s",
    "visualize": "atm-triton visualize photos/a/0.jpg --out merged.png",
    "env": "atm-triton env --json env.json",
}


class _Arguments(ParseKwargs):
    """timm's NAME=VALUE, with an error if there is no value."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                raise argparse.ArgumentError(self, f"{value!r} is not NAME=VALUE")
        super().__call__(parser, namespace, values, option)


def parser(commands: Mapping[str, Callable[[argparse.Namespace], Any]]) -> argparse.ArgumentParser:
    """A parser for ``commands`` by name. A command's docstring is its help; the command itself is stored as ``run``."""
    made: argparse.ArgumentParser = Parser(
        prog="atm-triton", description="Adaptive token merging for Vision Transformers."
    )
    subparsers = made.add_subparsers(dest="command", required=True)
    model, merging, out, measure = model_options(), _merging(USUAL_ADAPT), _out(), _measure()
    parents = {
        "bench": [
            model,
            data_options(usual="64; 8 for random images"),
            _merging(BENCH_ADAPT, ", which keeps the run short (image takes minutes)"),
            out,
        ],
        "eval": [model, data_options(), measure, merging, out],
        "calibrate": [model, data_options("images anywhere in it"), measure, out],
        "finetune": [
            model,
            data_options(),
            _merging(USUAL_ADAPT, at_cost="; with --recalibrate, the cost that thresholds are found for"),
            out,
        ],
        "visualize": [model, merging, out],
    }
    own = {
        "bench": _bench,
        "eval": _eval,
        "calibrate": _calibrate,
        "finetune": _finetune,
        "visualize": _visualize,
    }
    for name, run in commands.items():
        sub = subparsers.add_parser(
            name,
            parents=parents.get(name, [out]),
            help=run.__doc__,
            description=run.__doc__,
            epilog=f"example: {EXAMPLES[name]}",
        )
        own.get(name, lambda _: None)(sub)
        sub.set_defaults(run=run)
    return made


def model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--model", default=DIGITS, help="digits (default), or a ViT of timm's or the paper's by name")
    options.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=_Arguments,
        metavar="NAME=VALUE",
        help="arguments of the model's function, such as num_classes=7",
    )
    options.add_argument("--checkpoint", type=Path, help="weights to load (safetensors or .pth)")
    options.add_argument("--pretrained", action="store_true", help="download timm's published weights")
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="where the model runs (default: cuda if there is a GPU)",
    )
    options.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of weights and images (default: float32); bfloat16 and float16 are for a GPU, float64 for exact sums",
    )
    return options


def data_options(directory: str = "one folder of images for each class", usual: str = "64") -> argparse.ArgumentParser:
    """The options of images. ``directory``: what a directory of them holds; ``usual``: the batch size if none is
    given."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--data", help=f"digits, or a directory with {directory}")
    options.add_argument("--batch-size", type=int, help=f"images per batch ({usual})")
    return options


def _measure() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("what is compared (default: logits; without a head, the pooled feature)")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--dense", action="store_true", help="compare patch tokens, for a model whose patch tokens are read"
    )
    one.add_argument(
        "--sigmoid", action="store_true", help="compare labels that do not exclude one another, each through a sigmoid"
    )
    return options


def _merging(usual_adapt: str, why: str = "", at_cost: str = "") -> argparse.ArgumentParser:
    """The options of merging. ``usual_adapt``: the way to adapt if neither --adapt nor the thresholds' source decides
    it; ``why``: the reason, if it differs from the other commands'; ``at_cost``: what else --max-gflops means."""
    options = argparse.ArgumentParser(add_help=False)
    options.set_defaults(usual_adapt=usual_adapt)
    group = options.add_argument_group("merging (default: thresholds of the paper's tables, or the digits' own)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--config", type=Path, help="a JSON file of ATMConfig, or a result file that holds one")
    one.add_argument(
        "--max-gflops", type=float, help=f"the paper's best operating point at this cost, {GFLOPS}{at_cost}"
    )
    one.add_argument(
        "--top1-drop", type=float, help="the paper's cheapest operating point at this loss of top-1, in points"
    )
    one.add_argument("--schedule", type=int, nargs="+", metavar="R", help='r for each block: adapt="static"')
    text = f"""how many tokens merge: by each image's own count (image), one r per batch (batch), or a --schedule
        (static). Default: {usual_adapt}{why}; the paper's points use batch, and a --config keeps its own"""
    group.add_argument("--adapt", choices=ADAPT, help=text)
    group.add_argument("--alpha", type=float, help="threshold of the first block; give --beta and --theta-min too")
    group.add_argument("--beta", type=float, help="how fast the threshold falls with depth")
    group.add_argument("--theta-min", type=float, help="lowest threshold")
    group.add_argument(
        "--split-depth",
        type=int,
        help="number of first blocks that group tokens alternately; later ones group by size (3/4 of the depth)",
    )
    group.add_argument("--backend", default="auto", choices=BACKENDS, help=BACKEND_HELP)
    group.add_argument(
        "--proportional-attention",
        action=argparse.BooleanOptionalAction,
        help="add log n to the attention scores of a token of n patches, or not",
    )
    group.add_argument(
        "--all-tokens-last",
        action="store_true",
        help="the last block computes all tokens, even if only the class token is read",
    )
    return options


def _out() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--json", type=Path, help="write what was measured, with versions, machine and command")
    return options


def _bench(options: argparse.ArgumentParser) -> None:
    options.add_argument("--batches", type=int, help="batches of images that one turn runs (2)")
    options.add_argument("--repeats", type=int, default=25, help="turns; in each every variant runs once (25)")
    options.add_argument("--plot", type=Path, help="write a bar chart (PNG)")


def _eval(options: argparse.ArgumentParser) -> None:
    options.add_argument("--split", default="test", choices=SPLITS, help="which images of the digits (test)")
    options.add_argument("--limit", type=int, help="number of images, taken evenly from all of a folder")
    _workers(options)


def _calibrate(options: argparse.ArgumentParser) -> None:
    wish = options.add_mutually_exclusive_group(required=True)
    wish.add_argument("--max-gflops", type=float, help=f"the least change at this cost, {GFLOPS}")
    wish.add_argument(
        "--max-kl",
        type=float,
        help="the least cost at this mean KL(unmerged || merged) of the class probabilities, in nats",
    )
    wish.add_argument("--min-agreement", type=float, help="the least cost at which this share keep their class, 0 to 1")
    wish.add_argument("--max-distance", type=float, help="of features: the least cost at this mean of 1 - cosine")
    wish.add_argument("--max-distance-p99", type=float, help="of features: the same at its 99th percentile")
    text = f"each image's own count (image), one r per batch (batch), or a given r (static). Default: {USUAL_ADAPT}"
    options.add_argument("--adapt", default=USUAL_ADAPT, choices=ADAPT, help=text)
    options.add_argument("--max-merging-blocks", type=int, help="merge in no more blocks than these; each takes time")
    options.add_argument("--images", type=int, default=256, help="how many to calibrate on, spread over the data (256)")
    options.add_argument(
        "--split", default="calibration", choices=SPLITS, help="which images of the digits (calibration)"
    )
    options.add_argument("--out", type=Path, required=True, help="where the configuration goes (JSON, a new file)")
    options.add_argument("--seed", type=int, default=0, help="seed of the search (0)")
    options.add_argument("--backend", default="auto", choices=BACKENDS, help=BACKEND_HELP)
    _workers(options)


def _finetune(options: argparse.ArgumentParser) -> None:
    text = "where log, checkpoints and weights go: a new directory, or with --resume that of the run"
    options.add_argument("--out", type=Path, required=True, help=text)
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options.add_argument("--val-data", help="images to judge by (of --data DIR: DIR/val beside DIR/train)")
    options.add_argument("--images", type=int, help="of the digits: how many to draw for each epoch (4096)")
    options.add_argument("--limit", type=int, help="number of images to judge by, taken evenly from all of a folder")
    options.add_argument(
        "--save-every", type=int, metavar="STEPS", help="also save within an epoch, not only at its end"
    )
    options.add_argument("--plot", type=Path, help="draw loss and accuracy by epoch (PNG, PDF or SVG)")
    _recipe(options.add_argument_group("recipe (default: the paper's, and for the rest DeiT's or the digits' own)"))
    _augmentation(options.add_argument_group("augmentation, of a folder (default: DeiT's)"))
    _workers(options)


def _recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, help="passes over the images (30)")
    group.add_argument("--accumulate", type=int, metavar="PASSES", help="batches per step, over all processes (4)")
    group.add_argument("--opt", help="an optimiser of timm's (adamw)")
    group.add_argument("--lr", type=float, help="learning rate at the start, whatever the batch (2e-5)")
    group.add_argument("--min-lr", type=float, help="learning rate at the end (3e-6)")
    group.add_argument("--sched", choices=SCHEDULES, help="how the learning rate falls (cosine)")
    group.add_argument("--warmup-epochs", type=int, help="epochs in which the rate rises from 1e-6 (0)")
    group.add_argument("--weight-decay", type=float, help="weight decay of matrices (0.05)")
    group.add_argument("--clip-grad", type=float, help="largest norm of the gradient (no limit)")
    group.add_argument("--smoothing", type=float, help="label smoothing (0.1; digits 0.05)")
    group.add_argument("--mixup", type=float, help="alpha of mixup (0.8; digits 0)")
    group.add_argument("--cutmix", type=float, help="alpha of cutmix (1.0; digits 0)")
    group.add_argument("--drop-path", type=float, help="rate of drop path (0.1; digits 0)")
    group.add_argument("--ema", type=float, metavar="DECAY", help="also average the weights (no)")
    group.add_argument("--amp", choices=AMP, help="compute in 16 bits, by autocast")
    group.add_argument("--grad-checkpointing", action="store_true", default=None, help="less memory, more time")
    text = "find thresholds for --max-gflops before the first epoch and after every so many; no labels are read"
    group.add_argument("--recalibrate", type=int, metavar="EPOCHS", help=text)
    group.add_argument("--calibration-images", type=int, help="how many to find them on (256)")
    group.add_argument("--seed", type=int, help="seed of all that is random (0)")


def _augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--auto-augment", help="a policy of timm's, or '' for none (rand-m9-mstd0.5-inc1)")
    group.add_argument("--color-jitter", type=float, help="strength of the jitter, if there is no policy (0.3)")
    group.add_argument("--erasing", type=float, help="share of images with a part erased (0.25)")


def _visualize(options: argparse.ArgumentParser) -> None:
    options.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, one row for each")
    options.add_argument("--out", type=Path, required=True, help="where the pictures go (PNG, PDF or SVG)")
    options.add_argument(
        "--blocks", type=int, nargs="+", help="draw the tokens after these blocks, counted from 1 (four of them)"
    )


def _workers(options: argparse.ArgumentParser) -> None:
    default = min(4, os.cpu_count() or 1)
    options.add_argument("--workers", type=int, default=default, help=f"processes that load images ({default})")
