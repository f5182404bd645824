"""What an experiment measures: a model, images to choose settings by, and images to judge by."""

import argparse
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atm_triton import ATMConfig
from atm_triton.calibration.calibrate import LEAST_IMAGES
from atm_triton.cli.options import DTYPES, data_options, model_options
from atm_triton.flops import cost, unmerged
from atm_triton.measure.configurations import checksum
from atm_triton.measure.evaluate import Evaluation, evaluate, unpatched_answers
from atm_triton.measure.images import labels_fit, open_images
from atm_triton.measure.models import DIGITS, check_device, check_weights, data_config, open_model
from atm_triton.transformer import leading_tokens
from benchmarks.model_with_images import BATCH_SIZE, ModelWithImages
from benchmarks.paper.thresholds import Thresholds

CHOOSE_BY = 512  # images at most
USUAL = 0.45  # share of the FLOPs saved


def options(choosing: bool = True, config: bool = True) -> argparse.ArgumentParser:
    """The options of an experiment that runs a model. ``choosing``: whether it chooses settings; ``config``: whether
    the user gives it thresholds for ATM."""
    parser = argparse.ArgumentParser(add_help=False, parents=[model_options(), data_options()])
    parser.add_argument("--limit", type=int, help="number of images to judge by, spread over all of them")
    if choosing:
        text = "a directory of images to choose settings by (the digits: their own split)"
        parser.add_argument("--choose-by", help=text)
    if config:
        text = 'thresholds for ATM, from "atm-triton calibrate"; of several files, the nearest in cost is used'
        parser.add_argument("--config", type=Path, nargs="+", metavar="FILE", help=text)
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds of the same run")
    return parser


def shares(default: tuple[float, ...], config: bool = True) -> argparse.ArgumentParser:
    """The options of an experiment that compares at given costs."""
    parser = argparse.ArgumentParser(add_help=False, parents=[options(config=config)])
    parser.add_argument("--shares", type=float, nargs="+", default=list(default), help="of the FLOPs to save")
    return parser


def check_shares(given: list[float]) -> dict[str, Any]:
    if any(not 0 < share < 1 for share in given):
        raise ValueError("--shares want numbers between 0 and 1")
    if len(set(given)) < len(given):
        raise ValueError("--shares wants each share once")
    return {"shares": given}


class Subject(ModelWithImages):
    """The model and images that the options name. Unreadable images are left out; ``broken`` has their paths."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_device(args.device)
        self.data, self._limit = args.data or DIGITS, args.limit
        self._opened = {"workers": args.workers, "device": args.device, "lenient": True}
        self.thresholds = Thresholds.asked(args) if hasattr(args, "config") else None
        model = open_model(args.model, args.checkpoint, args.pretrained, **args.model_kwargs)
        self.model = model.to(args.device, DTYPES[args.dtype])
        if self.thresholds is not None:
            self.thresholds.check_depth(self.depth)
        test, loader = self.in_batches(batch_size(args)), []
        self._loaders = [test]
        if hasattr(args, "choose_by"):
            loader = self._to_choose_by(args.choose_by or DIGITS, batch_size(args))
        super().__init__(self.model, loader, list(test) if self.data == DIGITS else test)
        self.labelled = labels_fit(test, self.model)
        self.classes = getattr(getattr(test, "dataset", None), "classes", None)

    def _to_choose_by(self, chosen: str, batch_size: int) -> list[Any]:
        opened = open_images(self.model, chosen, "calibration", CHOOSE_BY, batch_size, labelled=False, **self._opened)
        loader = list(opened)
        if sum(len(batch[0]) for batch in loader) < LEAST_IMAGES:
            raise ValueError(f"--choose-by {chosen}: give {LEAST_IMAGES} or more images to choose settings by")
        self._loaders.append(opened)
        return loader

    @staticmethod
    def settings(args: argparse.Namespace) -> dict[str, Any]:
        """The settings that identify a run. Raises ValueError for options that contradict each other."""
        check_weights(args.model, args.checkpoint, args.pretrained)
        names = ("model", "model_kwargs", "pretrained", "limit", "dtype", "device")
        about = {name: getattr(args, name) for name in names}
        about |= {"data": args.data or DIGITS, "batch_size": batch_size(args)}
        if hasattr(args, "choose_by"):
            _check_choosing(args.data or DIGITS, args.choose_by)
            about["choose_by"] = args.choose_by or DIGITS
        about["checkpoint"] = None if args.checkpoint is None else str(args.checkpoint)
        if args.checkpoint is not None and args.checkpoint.is_file():  # a missing file is refused later
            about["checkpoint_sha256"] = checksum(args.checkpoint)
        return about | ({"thresholds": Thresholds.asked(args).to_list()} if hasattr(args, "config") else {})

    @property
    def merging(self) -> int:
        """The number of blocks that may merge: all but a last block that computes the leading tokens alone."""
        return self.depth - (leading_tokens(self.model) is not None)

    @property
    def configs(self) -> dict[str, ATMConfig]:
        """The thresholds nearest to a usual cost, by way to adapt; for experiments that do not compare costs."""
        shape = data_config(self.model)["input_size"]
        usual = (1 - USUAL) * cost(self.model, unmerged(self.model, shape)).paper_gflops
        return {adapt: self.thresholds.of_either(adapt, usual) for adapt in ("batch", "image")}

    @property
    def broken(self) -> set[str]:
        return {path for loader in self._loaders for path in getattr(loader, "broken", ())}

    @cached_property
    def base(self) -> list[Tensor]:
        logits = unpatched_answers(self.model, self.test, measure=self.measure)
        self._check_read(len(logits))
        return logits

    def images(self) -> Iterator[Tensor]:
        """Yield batches of the images to judge by."""
        number = 0
        for images, _ in self.test:
            number += 1
            yield images
        self._check_read(number)

    def _check_read(self, batches: int) -> None:
        if batches == 0:
            raise ValueError(f"--data {self.data}: none of its images can be read")

    def in_batches(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The images to judge by in batches of another size."""
        return open_images(self.model, self.data, "test", self._limit, batch_size, **self._opened)

    def image(self) -> Tensor:
        """One image [1, C, H, W], to count FLOPs with."""
        return self.loader[0][0][:1].to(next(self.model.parameters()))

    def in_other_batches(self, batch_size: int, config: ATMConfig, title: str) -> Evaluation:
        batches = list(self.in_batches(batch_size)) if self.data == DIGITS else self.in_batches(batch_size)
        if self.data == DIGITS:
            base = list(torch.cat(self.base).split(batch_size))
        else:
            base = unpatched_answers(self.model, batches, f"unpatched, {title}")
        return evaluate(self.model, batches, config, base, self.labelled, title)


def batch_size(args: argparse.Namespace) -> int:
    return BATCH_SIZE if args.batch_size is None else args.batch_size


def _check_choosing(data: str, chosen: str | None) -> None:
    if data != DIGITS and chosen is None:
        raise ValueError("--choose-by DIR: give images to choose settings by, other than those of --data")
    if chosen is not None and overlap(data, chosen):
        raise ValueError(f"--choose-by {chosen} holds images of --data: choose settings by others")


def overlap(data: str, chosen: str) -> bool:
    """Whether the directories are the same or one contains the other."""
    if DIGITS in (data, chosen):
        return False
    one, other = Path(data).resolve(), Path(chosen).resolve()
    return one == other or one in other.parents or other in one.parents
