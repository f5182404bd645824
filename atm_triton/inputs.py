"""Models and images by name: the digits that come with the package, or timm's models and folders of images."""

import hashlib
import json
import random
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_loader, create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from atm_triton.config import REMEDY, ATMConfig
from atm_triton.digits import model as digits_model
from atm_triton.digits.render import render
from atm_triton.distributed import own_images
from atm_triton.measure import Measure, measure_of
from atm_triton.models import load_checkpoint
from atm_triton.patch import check_model

DIGITS = "digits"
TRANSFORM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # of an image for a model
TEST_IMAGES = 4000  # of the digits' test split, where no limit is given


def open_model(
    name: str = DIGITS, checkpoint: Path | None = None, pretrained: bool = False, **model_kwargs: Any
) -> VisionTransformer:
    """A model in eval mode.

    Args:
        name: "digits", or any name of timm's or of :mod:`atm_triton.models`.
        checkpoint: weights to load into it (safetensors, or a .pth file of tensors alone).
        pretrained: download timm's published weights. With neither of the two, weights are random but the digits'.
        model_kwargs: of the model's function, as ``global_pool="avg"``.

    Raises:
        ValueError: an unknown name, or weights that do not fit; OSError: a file that cannot be read; TypeError: a model
            that cannot be merged.
    """
    own = {"pretrained", "checkpoint_path", "features_only"} & model_kwargs.keys()
    if own:
        raise ValueError(f"model argument {own.pop()}: give a checkpoint, or ask for pretrained weights, by itself")
    _check_name(name)
    if name == DIGITS:
        name, pretrained = digits_model.NAME, checkpoint is None
    if pretrained:
        with torch.device("meta"):
            check_model(_made(name, **model_kwargs))  # before weights are downloaded
    model = _made(name, pretrained=pretrained, **model_kwargs)
    check_model(model)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def _made(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # an unknown tag, no network, no such file; an argument that some layer takes amiss
        reason = str(error) or f"{type(error).__name__}, with {arguments}"
        raise ValueError(f"model {name!r} cannot be made: {reason}") from error


def check_weights(name: str, checkpoint: Path | None, pretrained: bool) -> None:
    """Refuse a model by name that is unknown, or whose weights would be random."""
    _check_name(name)
    if name != DIGITS and checkpoint is None and not pretrained:
        raise ValueError(f"{name} would have random weights: give --checkpoint FILE or --pretrained")


def _check_name(name: str) -> None:
    if name != DIGITS and not timm.is_model(name.split(".")[0]):
        close = ", ".join(get_close_matches(name, [DIGITS, *timm.list_models()], n=3))
        raise ValueError(f"model {name!r} is unknown to timm" + (f"; did you mean {close}?" if close else ""))


def data_config(model: VisionTransformer) -> dict[str, Any]:
    """How timm makes images for a model: of the size that it was made for, else as its weights were trained."""
    config = resolve_model_data_config(model)
    size = getattr(model.patch_embed, "img_size", None)
    return config if size is None else {**config, "input_size": (config["input_size"][0], *size)}


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; give cpu")


def digits_config(adapt: str = "batch") -> ATMConfig:
    """The thresholds chosen for the digits model on its calibration split, for "batch" or for "image"."""
    path = digits_model.IMAGE_CONFIG if adapt == "image" else digits_model.CONFIG
    return ATMConfig.from_json(path.read_text())


def read_config(path: Path, model: str, model_kwargs: dict[str, Any], checkpoint: Path | None) -> ATMConfig:
    """The configuration in a JSON file of :class:`ATMConfig`'s, or of a result that holds one, for a model by name with
    the weights of a file, or with its own.

    Raises:
        OSError: no such file; ValueError: it holds none, or one that was calibrated for another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} is no file; atm-triton calibrate makes one")
    try:
        text = path.read_text()
        config = ATMConfig.from_json(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not config.has_thresholds:
        raise ValueError(f"--config {path} has no thresholds; {REMEDY}")
    document = json.loads(text)
    made = document.get("model"), document.get("model_kwargs") or {}
    if made[0] is not None and made != (model, model_kwargs):
        of, here = (f"{name} {kwargs or ''}".strip() for name, kwargs in (made, (model, model_kwargs)))
        raise ValueError(f"--config {path} was calibrated for {of}, not for {here}; calibrate anew")
    if "checkpoint_sha256" in document and document["checkpoint_sha256"] != checksum(checkpoint):
        raise ValueError(f"--config {path} was calibrated for other weights, {document.get('weights')}; calibrate anew")
    return config


def promised_measure(path: Path | None, model: VisionTransformer) -> Measure | None:
    """The measure by which the file of a calibration promises; None of a file that promises nothing.

    Raises:
        ValueError: it does not fit the model.
    """
    document = {} if path is None else json.loads(path.read_text())
    promise = document.get("promise")
    if promise is None:
        return None
    try:
        promised = Measure(promise.get("measure", "softmax"))  # older files compared nothing else
        fitting = measure_of(model, promised.name == "dense", promised.name == "sigmoid")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if promised != fitting:
        raise ValueError(f"--config {path} compared {promised}; of this model that is {fitting}; calibrate anew")
    return promised


def checksum(checkpoint: Path | None) -> str | None:
    """What tells a file of weights from others; None for a model's own."""
    if checkpoint is None:
        return None
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} is no file")
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest()


class DigitImages(Dataset):
    """Rendered digits as the digits model takes them: normalised float32 [1, 112, 112], and the label."""

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
    """An image file upright and in 8 bits, of mode "L" or "RGB". Pillow would cut wider values off at 255.

    Raises:
        ValueError: its values are of no known range.
    """
    opened = Image.open(path)
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and opened.format == "PNG"):
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError(f"its pixels, of Pillow's mode {upright.mode}, have no known range; save it with 8 or 16 bits")
    return upright.convert(mode)


class NamedImages(ImageFolder):
    """torchvision's ImageFolder, whose errors say which file is to blame; grey for a model of one channel. ``lenient``:
    an image that cannot be read is (None, its path) instead. ``spare``: samples to take others from."""

    def __init__(self, root: str, channels: int) -> None:
        self.mode, self.lenient, self.spare = "L" if channels == 1 else "RGB", False, []
        super().__init__(root, loader=self.open)

    def open(self, path: str) -> Image.Image:
        return _picture(path, self.mode)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int | str]:
        return self.read(*self.samples[index])

    def read(self, path: str, label: int) -> tuple[Tensor | None, int | str]:
        try:
            return self.transform(self.open(path)), label
        except Exception as error:
            if self.lenient:
                return None, path
            raise ValueError(f"{path} is no readable image: {error}") from error


class AnyImages(NamedImages):
    """All images below a directory, however deep, in the order of their paths."""

    @staticmethod
    def find_classes(directory: str) -> tuple[list[str], dict[str, int]]:
        return ["none"], {"none": 0}

    @staticmethod
    def make_dataset(directory: str, *_: object, **__: object) -> list[tuple[str, int]]:
        return [(str(p), 0) for p in sorted(Path(directory).rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS]


class ReadableImages:
    """Batches of a :class:`NamedImages` loader without the images that cannot be read, then as many others, as far as
    there are spare ones. ``broken``: the paths of those that cannot be read, as far as they have been met."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.dataset, self.broken = loader, loader.dataset, set()

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
        for first in range(0, len(others), self.loader.batch_size):
            yield default_collate(others[first : first + self.loader.batch_size])

    def _others(self, missing: int) -> list[tuple[Tensor, int]]:
        others, spare = [], self.dataset.spare
        for sample in random.Random(0).sample(spare, len(spare)):
            if len(others) == missing:
                break
            row = self.dataset.read(*sample)
            if row[0] is None:
                self.broken.add(row[1])
            else:
                others.append(row)
        return others

    @staticmethod
    def collate(rows: list[tuple[Tensor | None, int | str]]) -> tuple[Tensor, Tensor, list[str]]:
        good = [row for row in rows if row[0] is not None]
        images, labels = default_collate(good) if good else (torch.empty(0), torch.empty(0))
        return images, labels, [path for image, path in rows if image is None]


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
    """Batches of (images [B, C, H, W], labels [B]), in the order of the folder, as the model wants them.

    Args:
        data: "digits", or a directory with one folder of images a class (as ImageNet's validation set).
        split: of the digits: "train", "calibration" or "test".
        limit: as many images as this, of a directory spread over all of it.
        labelled: False: a directory may hold its images in any way, and what stands for labels means nothing.
        dealt: of several processes each gets its own batches.
        lenient: leave out what cannot be read, as :class:`ReadableImages`, where it would else be an error; where a
            limit and no label is asked for, others of the directory take its place.

    Raises:
        ValueError: bad numbers, or digits for a model of another shape; OSError: a directory without images.
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
    return ReadableImages(loader) if lenient else loader


def open_image(model: VisionTransformer, path: Path) -> Tensor:
    """One image file as the model takes it, [C, H, W].

    Raises:
        OSError: no such file; ValueError: no readable image.
    """
    config = data_config(model)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        opened = _picture(path, "L" if config["input_size"][0] == 1 else "RGB")
    except Exception as error:
        raise ValueError(f"{path} is no readable image: {error}") from error
    return create_transform(**{name: config[name] for name in TRANSFORM})(opened)


def _folders(data: str, channels: int) -> "NamedImages":
    try:
        dataset = NamedImages(data, channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"directory {data} holds no folders of images, one a class: {error}") from error
    return dataset


def _anywhere(data: str, channels: int) -> "AnyImages":
    dataset = AnyImages(data, channels)
    if not dataset.samples:
        raise FileNotFoundError(f"directory {data} holds no images: want files that end in {', '.join(IMG_EXTENSIONS)}")
    return dataset


def labels_fit(loader: DataLoader, model: VisionTransformer) -> bool:
    """Whether the labels are the model's classes: a folder for each of them, or the digits."""
    classes = getattr(loader.dataset, "classes", range(10))
    return len(classes) == model.num_classes
