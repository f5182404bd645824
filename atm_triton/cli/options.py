"""The options of the command line."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs

from atm_triton.cli.command import Parser
from atm_triton.config import ADAPT, BACKENDS
from atm_triton.measure.models import DIGITS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SPLITS = ("test", "calibration", "train")


class _Arguments(ParseKwargs):
    """timm's NAME=VALUE, with an error where there is no value."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                raise argparse.ArgumentError(self, f"{value!r} is no NAME=VALUE")
        super().__call__(parser, namespace, values, option)


def parser(commands: Mapping[str, Callable[[argparse.Namespace], Any]]) -> argparse.ArgumentParser:
    """Of ``commands`` by name; a docstring is a command's help, and what it is becomes ``run``."""
    made: argparse.ArgumentParser = Parser(
        prog="atm-triton", description="Adaptive token merging for Vision Transformers."
    )
    subparsers = made.add_subparsers(dest="command", required=True)
    model, data, merging, out, measure = model_options(), data_options(), _merging(), _out(), _measure()
    parents = {
        "bench": [model, data, merging, out],
        "eval": [model, data, measure, merging, out],
        "calibrate": [model, data, measure, out],
        "visualize": [model, merging, out],
    }
    own = {"bench": _bench, "eval": _eval, "calibrate": _calibrate, "visualize": _visualize}
    for name, run in commands.items():
        sub = subparsers.add_parser(name, parents=parents.get(name, [out]), help=run.__doc__, description=run.__doc__)
        own.get(name, lambda _: None)(sub)
        sub.set_defaults(run=run)
    return made


def model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--model", default=DIGITS, help="digits (default), or any ViT of timm's or the paper's")
    options.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=_Arguments,
        metavar="NAME=VALUE",
        help="of the model's function, as global_pool=avg",
    )
    options.add_argument("--checkpoint", type=Path, help="weights to load (safetensors or .pth)")
    options.add_argument("--pretrained", action="store_true", help="download timm's published weights")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="float32", choices=DTYPES)
    return options


def data_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    text = "digits, or a directory with one folder of images a class (to calibrate: with images anywhere)"
    options.add_argument("--data", help=text)
    options.add_argument("--batch-size", type=int, help="images a batch (64; 8 for random images)")
    return options


def _measure() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("what is compared (default: what the head says, or without one its pool)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--dense", action="store_true", help="patch tokens, unmerged: they are what is read")
    one.add_argument("--sigmoid", action="store_true", help="labels that do not exclude one another")
    return options


def _merging() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("merging (default: thresholds of the paper's tables, or the digits' own)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--config", type=Path, help="a JSON file of ATMConfig, or a result file that holds one")
    one.add_argument("--max-gflops", type=float, help="the paper's best operating point at this cost")
    one.add_argument("--top1-drop", type=float, help="the paper's cheapest operating point at this loss, in points")
    one.add_argument("--schedule", type=int, nargs="+", metavar="R", help='r for each block: adapt="static"')
    group.add_argument("--adapt", choices=ADAPT, help="one r a batch (default), each image its own, or a --schedule")
    group.add_argument("--alpha", type=float, help="threshold of the first block; with the next two")
    group.add_argument("--beta", type=float, help="decay rate of the threshold")
    group.add_argument("--theta-min", type=float, help="lowest threshold")
    group.add_argument("--split-depth", type=int, help="blocks that group alternately (3/4 of the depth)")
    group.add_argument("--backend", default="auto", choices=BACKENDS)
    group.add_argument(
        "--proportional-attention", action=argparse.BooleanOptionalAction, help="log n in the attention scores or not"
    )
    group.add_argument("--all-tokens-last", action="store_true", help="the last block computes every token")
    return options


def _out() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--json", type=Path, help="write what was measured, with versions, machine and command")
    return options


def _bench(options: argparse.ArgumentParser) -> None:
    options.add_argument("--batches", type=int, help="batches of images that one turn runs (2)")
    options.add_argument("--repeats", type=int, default=25, help="turns (25)")
    options.add_argument("--plot", type=Path, help="write a bar chart (PNG)")


def _eval(options: argparse.ArgumentParser) -> None:
    options.add_argument("--split", default="test", choices=SPLITS, help="of the digits")
    options.add_argument("--limit", type=int, help="as many images; of a folder spread over all of it")
    _workers(options)


def _calibrate(options: argparse.ArgumentParser) -> None:
    wish = options.add_mutually_exclusive_group(required=True)
    wish.add_argument("--max-gflops", type=float, help="the least change at this cost of an image")
    wish.add_argument("--max-kl", type=float, help="the least cost at this KL divergence, in nats")
    wish.add_argument("--min-agreement", type=float, help="the least cost at which this share keep their class, 0 to 1")
    wish.add_argument("--max-distance", type=float, help="of features: the least cost at this mean of 1 - cosine")
    wish.add_argument("--max-distance-p99", type=float, help="of features: the same at its 99th percentile")
    options.add_argument("--adapt", default="image", choices=ADAPT, help="who decides how much merges (image)")
    options.add_argument("--max-merging-blocks", type=int, help="merge in no more blocks than these; each takes time")
    options.add_argument(
        "--images", type=int, default=1024, help="how many to calibrate on, spread over the data (1024)"
    )
    options.add_argument("--split", default="calibration", choices=SPLITS, help="of the digits")
    options.add_argument("--out", type=Path, required=True, help="where the configuration goes (JSON)")
    options.add_argument("--seed", type=int, default=0, help="of the search (0)")
    options.add_argument("--backend", default="auto", choices=BACKENDS)
    _workers(options)


def _visualize(options: argparse.ArgumentParser) -> None:
    options.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, a row each")
    options.add_argument("--out", type=Path, required=True, help="where the pictures go (PNG, PDF or SVG)")
    options.add_argument("--blocks", type=int, nargs="+", help="after which, from 1 (four of them)")


def _workers(options: argparse.ArgumentParser) -> None:
    default = min(4, os.cpu_count() or 1)
    options.add_argument("--workers", type=int, default=default, help="processes that load images")
