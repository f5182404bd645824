"""Provides the images to train on, dealt out so that only the seed decides what a step sees.

Random numbers are drawn anew for each image of each epoch, and for each pass of each step, from the seed and these
numbers only. So the result does not depend on how many processes train or load, and a run can be resumed at any step.
"""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atm_triton.measure.distributed import own
from atm_triton.measure.images import DigitImages, NamedImages
from atm_triton.measure.models import data_config
from atm_triton.training.recipe import Recipe

AUTO_AUGMENT, COLOR_JITTER, ERASING = "rand-m9-mstd0.5-inc1", 0.3, 0.25  # DeiT's
ORDER, IMAGE, PASS = range(3)  # what a random number is for


def seed_all(*numbers: int) -> None:
    """Seed Python, NumPy and torch with all these numbers together."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class TrainImages(Dataset[tuple[Tensor, int]]):
    """Images and labels, indexed by (epoch, number). ``settings``: what distinguishes them from others, as JSON."""

    settings: dict[str, Any]

    def __len__(self) -> int:
        raise NotImplementedError


class TrainDigits(TrainImages):
    """``count`` digits of the training split, drawn anew for each epoch: float32 [1, 112, 112] and the label, indexed
    by (epoch, number)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.drawn: tuple[int, DigitImages] | None = None  # of the last epoch
        self.settings = {"images": count}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = at
        if self.drawn is None or self.drawn[0] != epoch:
            seed = int(np.random.SeedSequence([self.seed, IMAGE, epoch]).generate_state(1)[0])
            self.drawn = epoch, DigitImages("train", self.count, seed)
        return self.drawn[1][number]


class TrainFolder(TrainImages):
    """The images of a folder of classes, augmented by timm like DeiT's: float32 [C, H, W] and the label, indexed by
    (epoch, number). Files are read in the same way as for an evaluation.

    Args:
        model: the model that they are prepared for.
        root: a directory with one folder of images per class.
        auto_augment, color_jitter, erasing: arguments of timm's ``create_transform``; "" or 0 for none.
        seed: seed of the augmentation.

    Raises:
        FileNotFoundError: the directory does not exist or holds no folders of images; ValueError: it has only one
            class, or not as many as the model, or the augmentation is unknown.
    """

    def __init__(
        self,
        model: VisionTransformer,
        root: Path,
        seed: int,
        auto_augment: str = AUTO_AUGMENT,
        color_jitter: float = COLOR_JITTER,
        erasing: float = ERASING,
    ) -> None:
        config = data_config(model)
        self.images, self.seed = class_folders(root, config["input_size"][0]), seed
        check_classes(self.images.classes, root, model.num_classes)
        of_model = {name: config[name] for name in ("input_size", "interpolation", "mean", "std")}
        try:
            self.images.transform = create_transform(
                **of_model,
                is_training=True,
                auto_augment=auto_augment or None,
                color_jitter=color_jitter or None,
                re_prob=erasing,
                re_mode="pixel",
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"auto_augment={auto_augment!r} is unknown to timm; try {AUTO_AUGMENT}") from error
        _keep_some_bits(self.images.transform)
        paths = "\n".join(str(Path(path).relative_to(root)) for path, _ in self.images.samples)
        augmentation = {"auto_augment": auto_augment, "color_jitter": color_jitter, "erasing": erasing}
        names = hashlib.sha256(paths.encode()).hexdigest()
        self.settings = {"images": len(self), "names_sha256": names, **augmentation}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int]:
        seed_all(self.seed, IMAGE, *at)
        return self.images.readable(*self.images.samples[at[1]])


def _keep_some_bits(transform: Any) -> None:
    """Make timm's posterize return a black image if it is to keep 0 bits, which its strongest magnitude asks for.
    Pillow before 13 did so; Pillow 13 raises."""
    for step in transform.transforms:
        ops = [*getattr(step, "ops", ()), *(op for own in getattr(step, "policy", ()) for op in own)]
        for op in ops:
            if getattr(op, "aug_fn", None) is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image, bits: int, **options: Any) -> Image:
    return posterize(image, bits, **options) if bits > 0 else new_image(image.mode, image.size)


def class_folders(root: Path, channels: int) -> NamedImages:
    if not root.is_dir():
        raise FileNotFoundError(f"directory {root} does not exist; training wants one folder of images for each class")
    try:
        return NamedImages(str(root), channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"directory {root} has no labels: want one folder of images a class; {error}"
        ) from error


def check_classes(classes: list[str], root: Path, number: int) -> None:
    if len(classes) == 1:
        raise ValueError(
            f"directory {root} holds one class, {classes[0]}: there is nothing to tell apart; give two or more"
        )
    if len(classes) != number:
        raise ValueError(
            f"directory {root} holds {len(classes)} classes, the model has {number}: add or remove folders, "
            f"or give --model-kwargs num_classes={len(classes)} and weights for that"
        )


def steps_per_epoch(images: TrainImages, recipe: Recipe) -> int:
    """The number of whole steps in an epoch. The images left over, which differ from epoch to epoch, are not used.

    Raises:
        ValueError: there are too few images for one step.
    """
    steps = len(images) // recipe.images_per_step
    if steps == 0:
        each = f"{recipe.accumulate} passes of {recipe.batch_size}"
        raise ValueError(
            f"{len(images)} images are fewer than a step takes, {each}; give smaller batches or more images"
        )
    return steps


def passes(
    images: TrainImages, recipe: Recipe, epoch: int, first: int, workers: int, pin_memory: bool
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each step of an epoch, from step ``first`` on, the passes of this process: (images [B, C, H, W], labels
    [B])."""
    steps = steps_per_epoch(images, recipe)
    seed = int(np.random.SeedSequence([recipe.seed, ORDER, epoch]).generate_state(1)[0])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    order = order[: steps * recipe.images_per_step].view(steps, recipe.accumulate, recipe.batch_size)
    mine = [[(epoch, number) for number in batch] for step in order[first:].tolist() for batch in own(step)]
    loader = iter(DataLoader(images, batch_sampler=mine, num_workers=workers, pin_memory=pin_memory))
    a_step = len(own(range(recipe.accumulate)))
    for _ in range(first, steps):
        yield [next(loader) for _ in range(a_step)]
