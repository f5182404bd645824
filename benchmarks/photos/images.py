"""Crops of the colour photographs that scikit-learn, scikit-image and matplotlib ship, or a user's own images.

Crops to calibrate on and crops to measure on come from different photographs. ``python -m benchmarks.photos.images``
writes crops to a directory, for commands that need one.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.images import TRANSFORM, open_images
from atm_triton.measure.models import data_config

PHOTOS = {  # split: name, the package that ships the photograph, and its path there
    "calibration": {
        "china": ("sklearn", "datasets/images/china.jpg"),
        "astronaut": ("skimage", "data/astronaut.png"),
        "coffee": ("skimage", "data/coffee.png"),
        "motorcycle": ("skimage", "data/motorcycle_left.png"),
    },
    "test": {
        "flower": ("sklearn", "datasets/images/flower.jpg"),
        "chelsea": ("skimage", "data/chelsea.png"),
        "rocket": ("skimage", "data/rocket.jpg"),
        "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    },
}
SOURCES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "matplotlib": "matplotlib"}
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # a crop's share of the area, and its width by its height


def photo(split: str, name: str) -> Path:
    """The path of a photograph, found without importing its package.

    Raises:
        FileNotFoundError: the package is not installed, or no longer ships the photograph.
    """
    package, inside = PHOTOS[split][name]
    spec = find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{SOURCES[package]}, which ships the photograph {name}, is not installed; pip install -e '.[photos]', or "
            "give your own images by --data and --calibration-data"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise FileNotFoundError(
            f"this version of {SOURCES[package]} ships no {inside}; give --data and --calibration-data"
        )
    return path


def box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """The box (left, upper, right, lower) of a random crop of an image that is not very elongated."""
    while True:
        area, ratio = rng.uniform(*SCALE) * width * height, math.exp(rng.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h


def cropped(split: str, count: int, side: tuple[int, int], seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
    """Yield random crops of the photographs of a split in turn, with their names, resized to [H, W], half of them
    mirrored. A larger ``count`` begins with the same crops."""
    photos = {name: Image.open(photo(split, name)).convert("RGB") for name in PHOTOS[split]}
    for number in range(count):
        rng = random.Random(f"{split} {seed} {number}")
        name = list(photos)[number % len(photos)]
        crop = photos[name].resize(side[::-1], Image.Resampling.BICUBIC, box=box(rng, *photos[name].size))
        yield name, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def crops(model: VisionTransformer, split: str, count: int, seed: int = 0) -> Tensor:
    """The crops of :func:`cropped`, normalised as the model takes images, [count, C, H, W]."""
    config = data_config(model)
    to_tensor = create_transform(**{name: config[name] for name in TRANSFORM})
    made = cropped(split, count, tuple(config["input_size"][1:]), seed)
    return torch.stack([to_tensor(crop) for _, crop in made])


def opened(model: VisionTransformer, split: str, count: int, data: str | None, option: str) -> Tensor:
    """Open ``count`` images [count, C, H, W], spread over a whole directory. Without a directory they are crops.

    Raises:
        ValueError: the directory has fewer images; OSError: the directory or the photographs are missing.
    """
    if data is None:
        return crops(model, split, count)
    loader = open_images(model, data, limit=count, labelled=False, lenient=True)
    batches = [images for images, _ in loader]
    images = torch.cat(batches) if batches else torch.empty(0)
    if len(images) < count:
        broken = f" ({len(loader.broken)} cannot be read)" if loader.broken else ""
        raise ValueError(
            f"{option} {data} has {len(images)} images that can be read, not {count}{broken}; ask for fewer"
        )
    return images


def write(args: argparse.Namespace) -> None:
    """Write crops as PNG files, in a folder for each photograph."""
    if args.images < 1 or args.side < 1:
        raise ValueError(f"--images {args.images} --side {args.side}; give 1 or more")
    if args.out.exists():
        raise FileExistsError(f"--out {args.out} exists already; name a new directory")
    for number, (name, crop) in enumerate(cropped(args.split, args.images, (args.side, args.side))):
        (args.out / name).mkdir(parents=True, exist_ok=True)
        crop.save(args.out / name / f"{number:04d}.png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.photos.images", description="Write crops of photographs.")
    parser.add_argument("--split", choices=PHOTOS, default="test", help="which photographs (test)")
    parser.add_argument("--images", type=int, default=64, help="how many (64)")
    parser.add_argument("--side", type=int, default=224, help="pixels (224)")
    parser.add_argument("--out", type=Path, required=True, help="a directory that is not there yet")
    args = parser.parse_args(argv)
    return exit_code("benchmarks.photos.images", lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
