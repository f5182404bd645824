"""Turns the options of ``atm-triton finetune`` into a recipe, images and settings."""

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

from atm_triton.calibration.calibrate import Target, calibrate
from atm_triton.config import ATMConfig
from atm_triton.measure.configurations import checksum
from atm_triton.measure.images import ReadableImages, open_images
from atm_triton.measure.models import DIGITS
from atm_triton.measure.provenance import check_outputs
from atm_triton.training.folder import NAMES
from atm_triton.training.images import TrainDigits, TrainFolder, TrainImages
from atm_triton.training.recipe import Recipe

DIGITS_AN_EPOCH, CALIBRATION_IMAGES = 4096, 256
DROP_PATH = 0.1  # DeiT's
AUGMENTATION = ("auto_augment", "color_jitter", "erasing")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that have no effect, or whose output would replace an input.

    Raises:
        ValueError: the message names the option.
    """
    of_folders = ("val_data", *AUGMENTATION)
    idle: tuple[str, ...] = of_folders if _is_digits(args) else ("images",)
    if args.recalibrate is not None:
        idle += ("alpha", "beta", "theta_min", "split_depth")
        if args.max_gflops is None:
            raise ValueError(f"--recalibrate {args.recalibrate} wants a cost to find thresholds for: give --max-gflops")
    else:
        idle += ("calibration_images",)
    for name in idle:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect here; leave it out")
    for name in ("images", "save_every", "calibration_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; give 1 or more")
    if args.drop_path is not None and "drop_path_rate" in args.model_kwargs:
        raise ValueError("--drop-path and --model-kwargs drop_path_rate are the same setting; leave one out")
    _check_rates(args)
    _check_out(args)


def _check_rates(args: argparse.Namespace) -> None:
    given = {"drop_path_rate of --model-kwargs": args.model_kwargs.get("drop_path_rate"), "--drop-path": args.drop_path}
    for option, rate in given.items():
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"{option} {rate} is out of range; give 0 or more, below 1")
    if args.erasing is not None and not 0 <= args.erasing <= 1:
        raise ValueError(f"--erasing {args.erasing} is out of range; give 0 to 1")
    if args.color_jitter is not None and not 0 <= args.color_jitter < math.inf:
        raise ValueError(f"--color-jitter {args.color_jitter} is out of range; give 0 or more")
    if args.color_jitter and args.auto_augment != "":
        raise ValueError("--color-jitter has no effect beside a policy; give --auto-augment '' with it")


def _check_out(args: argparse.Namespace) -> None:
    out = args.out.resolve()
    inputs = [Path(p) for p in (args.checkpoint, args.config, args.data, args.val_data) if p not in (None, DIGITS)]
    for given in inputs:
        if given.is_dir() and given.resolve() in (out, *out.parents):
            raise ValueError(f"--out {args.out} lies in {given}, where images are read from; choose another")
    outputs = {f"--out ({name})": args.out / name for name in NAMES}
    outputs |= {f"--{name}": getattr(args, name) for name in ("json", "plot") if getattr(args, name) is not None}
    check_outputs(outputs, inputs)


def recipe_of(args: argparse.Namespace) -> Recipe:
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return Recipe.for_digits(**given) if _is_digits(args) else Recipe(**given)


def drop_path(args: argparse.Namespace) -> dict[str, float]:
    """The drop path rate as an argument of the model's function."""
    if "drop_path_rate" in args.model_kwargs:
        return {}
    baseline = 0.0 if _is_digits(args) else DROP_PATH
    return {"drop_path_rate": baseline if args.drop_path is None else args.drop_path}


def training_images(
    args: argparse.Namespace, model: VisionTransformer, recipe: Recipe
) -> tuple[TrainImages, DataLoader | ReadableImages]:
    """The images to train on and the images to evaluate on.

    Raises:
        OSError: a directory does not exist; ValueError: their classes differ.
    """
    reading = {"limit": args.limit, "batch_size": recipe.batch_size, "workers": args.workers, "device": args.device}
    if _is_digits(args):
        digits = TrainDigits(DIGITS_AN_EPOCH if args.images is None else args.images, recipe.seed)
        return digits, open_images(model, DIGITS, "test", dealt=True, **reading)
    train, judged = folders(args)
    augmentation = {name: getattr(args, name) for name in AUGMENTATION if getattr(args, name) is not None}
    images = TrainFolder(model, train, recipe.seed, **augmentation)
    validation = open_images(model, str(judged), dealt=True, **reading)
    if getattr(validation.dataset, "classes", None) != images.images.classes:
        raise ValueError(f"directories {train} and {judged} hold different classes; want the same folder names in both")
    return images, validation


def folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of images to train on and to evaluate on."""
    data = Path(args.data)
    train, judged = (data, Path(args.val_data)) if args.val_data is not None else (data / "train", data / "val")
    for path in (train, judged):
        if not path.is_dir():
            remedy = "" if args.val_data is not None else f": want {data}/train and {data}/val, or --val-data"
            raise FileNotFoundError(f"directory {path} does not exist{remedy}")
    if train.samefile(judged):
        raise ValueError(f"--val-data {judged} are the images to train on; give others to judge by")
    return train, judged


def workers(args: argparse.Namespace) -> int:
    """How many processes load training images. 0 for the digits: an epoch of them is drawn at once."""
    return 0 if _is_digits(args) else args.workers


def recalibration(args: argparse.Namespace, recipe: Recipe) -> Callable[[VisionTransformer], ATMConfig] | None:
    """A function that finds thresholds for --max-gflops, without labels, on the training images without augmentation
    (for the digits: on the calibration split). None without --recalibrate."""
    if args.recalibrate is None:
        return None
    target = Target(max_gflops=args.max_gflops)
    asked = {"adapt": args.adapt or args.usual_adapt, "backend": args.backend, "seed": recipe.seed}
    asked |= {"cls_only_last": not args.all_tokens_last, "proportional_attention": args.proportional_attention}
    data = DIGITS if _is_digits(args) else str(folders(args)[0])
    reading = {"batch_size": recipe.batch_size, "workers": args.workers, "device": args.device}

    def recalibrated(model: VisionTransformer) -> ATMConfig:
        loader = open_images(
            model, data, "calibration", args.calibration_images or CALIBRATION_IMAGES, labelled=False, **reading
        )
        return calibrate(model, loader, target, **asked).config

    return recalibrated


def settings(
    args: argparse.Namespace, recipe: Recipe, images: TrainImages, config: dict[str, Any] | None
) -> dict[str, Any]:
    """All settings that decide the result; a run can only be resumed with the same ones. Where it runs and how images
    are loaded are not among them."""
    of_run = ("model", "model_kwargs", "pretrained", "data", "val_data", "limit", "dtype", "max_gflops")
    names = (*of_run, "calibration_images", "all_tokens_last", "proportional_attention", "backend")
    given = {name: getattr(args, name) for name in names}
    given["adapt"] = None if args.recalibrate is None else args.adapt or args.usual_adapt  # else "merging" holds it
    given |= {"checkpoint_sha256": checksum(args.checkpoint), **drop_path(args), "merging": config}
    return given | recipe.to_dict() | images.settings


def _is_digits(args: argparse.Namespace) -> bool:
    return args.data in (None, DIGITS)
