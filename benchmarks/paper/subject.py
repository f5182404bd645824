"""What an experiment measures: a model, images to choose settings by, and images to judge by."""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atm_triton import ATMConfig
from atm_triton.calibrate import LEAST_IMAGES
from atm_triton.evaluate import Evaluation, evaluate, unpatched_logits
from atm_triton.inputs import (
    DIGITS,
    check_device,
    digits_config,
    labels_fit,
    open_images,
    open_model,
    read_config,
)
from atm_triton.options import DTYPES, data_options, model_options
from benchmarks.bench import BATCH_SIZE, Bench

CHOOSE_BY = 512  # images


def options() -> argparse.ArgumentParser:
    """The options of every experiment that runs a model."""
    parser = argparse.ArgumentParser(add_help=False, parents=[model_options(), data_options()])
    parser.add_argument("--limit", type=int, help="judge by so many images, spread over all of them")
    parser.add_argument("--choose-by", help="a directory of images to choose settings by (the digits: their own split)")
    parser.add_argument("--config", type=Path, help='ATM\'s thresholds, of "atm-triton calibrate"')
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds of the same run")
    return parser


def shares(default: tuple[float, ...]) -> argparse.ArgumentParser:
    """The option of an experiment that compares at given costs."""
    parser = argparse.ArgumentParser(add_help=False, parents=[options()])
    parser.add_argument("--shares", type=float, nargs="+", default=list(default), help="of the FLOPs to save")
    return parser


def check_shares(given: list[float]) -> dict[str, Any]:
    if any(not 0 < share < 1 for share in given):
        raise ValueError("--shares want numbers between 0 and 1")
    if len(set(given)) < len(given):
        raise ValueError("--shares wants each share once")
    return {"shares": given}


class Subject(Bench):
    """What the options say. Images that cannot be read are left out, their paths are in ``broken``."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_device(args.device)
        self.data, self._limit = args.data or DIGITS, args.limit
        self._opened = {"workers": args.workers, "device": args.device, "lenient": True}
        self.configs = configurations(args)
        model = open_model(args.model, args.checkpoint, args.pretrained, **args.model_kwargs)
        self.model = model.to(args.device, DTYPES[args.dtype])
        for config in self.configs.values():
            config.check_depth(self.depth)
        chosen, size = args.choose_by or DIGITS, batch_size(args)
        choosing = open_images(self.model, chosen, "calibration", CHOOSE_BY, size, labelled=False, **self._opened)
        test = self.in_batches(size)
        loader = list(choosing)
        if sum(len(batch[0]) for batch in loader) < LEAST_IMAGES:
            raise ValueError(f"--choose-by {chosen}: give {LEAST_IMAGES} or more images to choose settings by")
        super().__init__(self.model, loader, list(test) if self.data == DIGITS else test)
        self.labelled = labels_fit(test, self.model)
        self._loaders = [opened for opened in (choosing, test) if hasattr(opened, "broken")]

    @staticmethod
    def settings(args: argparse.Namespace) -> dict[str, Any]:
        """What tells a run from another; refuses what cannot be meant."""
        if args.model != DIGITS and args.checkpoint is None and not args.pretrained:
            raise ValueError(f"{args.model} would have random weights: give --checkpoint FILE or --pretrained")
        if args.data not in (None, DIGITS) and args.choose_by is None:
            raise ValueError("--choose-by DIR: say by which images settings are chosen; others than those of --data")
        if args.choose_by is not None and _overlap(args.data or DIGITS, args.choose_by):
            raise ValueError(f"--choose-by {args.choose_by} holds images of --data: choose settings by others")
        about = {name: getattr(args, name) for name in ("model", "model_kwargs", "pretrained", "limit", "dtype")}
        about |= {"data": args.data or DIGITS, "choose_by": args.choose_by or DIGITS, "batch_size": batch_size(args)}
        about["checkpoint"] = None if args.checkpoint is None else str(args.checkpoint)
        return about | {"configs": {name: asdict(config) for name, config in configurations(args).items()}}

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def broken(self) -> set[str]:
        return {path for loader in self._loaders for path in loader.broken}

    @cached_property
    def base(self) -> list[Tensor]:
        logits = unpatched_logits(self.model, self.test)
        if not logits:
            raise ValueError(f"--data {self.data}: none of its images can be read")
        return logits

    def in_batches(self, size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The images to judge by in batches of another size."""
        return open_images(self.model, self.data, "test", self._limit, size, **self._opened)

    def image(self) -> Tensor:
        """One image [1, C, H, W], to count by."""
        return self.loader[0][0][:1].to(next(self.model.parameters()))

    def in_other_batches(self, size: int, config: ATMConfig, title: str) -> Evaluation:
        batches = list(self.in_batches(size)) if self.data == DIGITS else self.in_batches(size)
        if self.data == DIGITS:
            base = list(torch.cat(self.base).split(size))
        else:
            base = unpatched_logits(self.model, batches, f"unpatched, {title}")
        return evaluate(self.model, batches, config, base, self.labelled, title)


def batch_size(args: argparse.Namespace) -> int:
    return BATCH_SIZE if args.batch_size is None else args.batch_size


def _overlap(data: str, chosen: str) -> bool:
    """Whether one directory is the other, or lies in it."""
    if DIGITS in (data, chosen):
        return False
    one, other = Path(data).resolve(), Path(chosen).resolve()
    return one == other or one in other.parents or other in one.parents


def configurations(args: argparse.Namespace) -> dict[str, ATMConfig]:
    """ATM's thresholds for either way to adapt."""
    if args.config is not None:
        given = read_config(args.config, args.model, args.model_kwargs)
        if given.adapt == "static":
            raise ValueError(f"--config {args.config} is a schedule; want thresholds")
        return {adapt: replace(given, adapt=adapt) for adapt in ("batch", "image")}
    if args.model != DIGITS:
        raise ValueError(f"--config FILE: say ATM's thresholds for {args.model}; atm-triton calibrate finds them")
    return {adapt: digits_config(adapt) for adapt in ("batch", "image")}
