"""Images by name: the digits that come with the package, or folders of image files."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_loader, create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from atm_triton.digits import model as digits_model
from atm_triton.digits.render import render
from atm_triton.measure.distributed import own_images
from atm_triton.measure.models import DIGITS, data_config

TRANSFORM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # of timm's data config
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the channels that a model takes
TEST_IMAGES = 4000  # how many images of the digits' test split to take if no limit is given


class DigitImages(Dataset):
    """Rendered digits with their labels, as the digits model takes them: normalised float32 [1, 112, 112]."""

    def __init__(self, split: str, count: int, seed: int = 0) -> None:
        self.digits = render(split, count, seed)
        config = timm.get_pretrained_cfg(digits_model.NAME)
        self.mean, self.std = config.mean[0], config.std[0]

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (self.digits.images[index].float() / 255 - self.mean) / self.std
        return image, int(self.digits.labels[index])


def _picture(path: str | Path, mode: str) -> Image.Image:
    """Read an image file, upright and in 8 bits, in mode "L" or "RGB". Pillow alone would clip wider values at 255.

    Raises:
        ValueError: the range of its values is unknown.
    """
    opened = Image.open(path)
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and opened.format == "PNG"):
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError(f"its pixels, of Pillow's mode {upright.mode}, have no known range; save it with 8 or 16 bits")
    return upright.convert(mode)


def _mode(channels: int) -> str:
    if channels not in MODES:
        raise ValueError(f"the model takes images of {channels} channels; image files have 1 or 3")
    return MODES[channels]


class NamedImages(ImageFolder):
    """torchvision's ImageFolder with errors that name the bad file; images are grey if the model has one channel.
    ``lenient``: return the path of an image that cannot be read instead of raising. ``spare``: samples that may replace
    unreadable ones."""

    def __init__(self, root: str, channels: int) -> None:
        self.mode, self.lenient = _mode(channels), False
        self.spare: list[tuple[str, int]] = []
        super().__init__(root, loader=self.open)

    def open(self, path: str) -> Image.Image:
        return _picture(path, self.mode)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        return self.read(*self.samples[index])

    def read(self, path: str, label: int) -> tuple[Tensor, int] | str:
        try:
            return self.readable(path, label)
        except ValueError:
            if self.lenient:
                return path
            raise

    def readable(self, path: str, label: int) -> tuple[Tensor, int]:
        """Read an image; raise ValueError if it cannot be read, even if ``lenient``."""
        try:
            return self.transform(self.open(path)), label
        except Exception as error:
            raise ValueError(f"{path} is not a readable image: {error}") from error


class AnyImages(NamedImages):
    """All images below a directory, however deep, in the order of their paths."""

    @staticmethod
    def find_classes(directory: str) -> tuple[list[str], dict[str, int]]:
        return ["none"], {"none": 0}

    @staticmethod
    def make_dataset(directory: str, *_: object, **__: object) -> list[tuple[str, int]]:
        return [(str(p), 0) for p in sorted(Path(directory).rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS]


class ReadableImages:
    """Batches of a :class:`NamedImages` loader without the images that cannot be read, followed by spare ones in their
    place, if there are any. ``broken``: the paths of the unreadable images met so far."""

    def __init__(self, loader: DataLoader, dataset: NamedImages, batch_size: int) -> None:
        self.loader, self.dataset, self.batch_size = loader, dataset, batch_size
        self.broken: set[str] = set()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        missing = 0
        for images, labels, broken in self.loader:
            self.broken.update(broken)
            missing += len(broken)
            if len(images):
                yield images, labels
        others = self._others(missing)
        for first in range(0, len(others), self.batch_size):
            yield default_collate(others[first : first + self.batch_size])

    def _others(self, missing: int) -> list[tuple[Tensor, int]]:
        spare = self.dataset.spare
        others: list[tuple[Tensor, int]] = []
        for sample in random.Random(0).sample(spare, len(spare)):
            if len(others) == missing:
                break
            row = self.dataset.read(*sample)
            if isinstance(row, str):
                self.broken.add(row)
            else:
                others.append(row)
        return others

    @staticmethod
    def collate(rows: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
        good = [row for row in rows if not isinstance(row, str)]
        images, labels = default_collate(good) if good else (torch.empty(0), torch.empty(0))
        return images, labels, [row for row in rows if isinstance(row, str)]


def open_images(
    model: VisionTransformer,
    data: str = DIGITS,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    labelled: bool = True,
    dealt: bool = False,
    lenient: bool = False,
) -> DataLoader | ReadableImages:
    """Batches of (images [B, C, H, W], labels [B]) in the order of the folder, prepared for the model.

    Args:
        data: "digits", or a directory with one folder of images per class (like ImageNet's validation set).
        split: the split of the digits: "train", "calibration" or "test".
        limit: how many images to take; from a directory they are spread evenly over all of it.
        labelled: False: the directory may have any layout, and the labels mean nothing.
        dealt: give each process only its own batches.
        lenient: leave unreadable images out (:class:`ReadableImages`) instead of raising. With a limit, without labels
            and not ``dealt``, other images of the directory replace them.

    Raises:
        ValueError: a number is too small, or digits for a model of another shape; OSError: no images in the directory.
    """
    for name, number, least in (("batch size", batch_size, 1), ("limit", limit, 1), ("workers", workers, 0)):
        if number is not None and number < least:
            raise ValueError(f"{name} {number} is too small; give {least} or more")
    config = data_config(model)
    if data == DIGITS:
        if tuple(config["input_size"]) != (1, 112, 112):
            shape = " x ".join(map(str, config["input_size"]))
            raise ValueError(f"the digits are 1 x 112 x 112, the model takes {shape}: give it a directory of images")
        digits = DigitImages(split, limit or TEST_IMAGES)
        mine = Subset(digits, own_images(len(digits), batch_size)) if dealt else digits
        return DataLoader(mine, batch_size=batch_size)
    if not Path(data).is_dir():
        why = "is a file; name the one that it lies in" if Path(data).is_file() else "does not exist"
        raise FileNotFoundError(f"directory {data} {why}")
    dataset = (_folders if labelled else _anywhere)(data, config["input_size"][0])
    if limit is not None and limit < len(dataset.samples):
        every = len(dataset.samples) / limit
        chosen = [int(number * every) for number in range(limit)]
        if not labelled and not dealt:
            rest = sorted({*range(len(dataset.samples))} - {*chosen})
            dataset.spare = [dataset.samples[number] for number in rest]
        dataset.samples = [dataset.samples[number] for number in chosen]
    if dealt:
        dataset.samples = [dataset.samples[i] for i in own_images(len(dataset.samples), batch_size)]
    dataset.lenient = lenient
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        is_training=False,
        use_prefetcher=False,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=device != "cpu",
        collate_fn=ReadableImages.collate if lenient else None,
        **{name: config[name] for name in TRANSFORM},
    )
    return ReadableImages(loader, dataset, batch_size) if lenient else loader


def open_image(model: VisionTransformer, path: Path) -> Tensor:
    """Open an image file and prepare it for the model, [C, H, W].

    Raises:
        OSError: no such file; ValueError: no readable image.
    """
    config = data_config(model)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist; give the path of an image file")
    mode = _mode(config["input_size"][0])
    try:
        opened = _picture(path, mode)
    except Exception as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    return create_transform(**{name: config[name] for name in TRANSFORM})(opened)


def _folders(data: str, channels: int) -> "NamedImages":
    try:
        dataset = NamedImages(data, channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"directory {data} must hold one folder of images per class: {error}") from error
    return dataset


def _anywhere(data: str, channels: int) -> "AnyImages":
    dataset = AnyImages(data, channels)
    if not dataset.samples:
        raise FileNotFoundError(f"directory {data} holds no images: want files that end in {', '.join(IMG_EXTENSIONS)}")
    return dataset


def labels_fit(loader: DataLoader | ReadableImages, model: VisionTransformer) -> bool:
    """Whether the labels can be the model's classes: there are as many folders, or digits, as classes."""
    classes = getattr(loader.dataset, "classes", range(10))
    return len(classes) == model.num_classes
