"""Crops of the colour photographs that scikit-learn, scikit-image and matplotlib ship, or a user's own images.

Those to calibrate on and those to measure on come from different photographs.
"""

import math
import random
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.measure.images import TRANSFORM, open_images
from atm_triton.measure.models import data_config

PHOTOS = {  # split: a name, the package that ships it, and where
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
    """Where a photograph lies; its package is not imported.

    Raises:
        FileNotFoundError: the package is not installed, or no longer ships it.
    """
    package, inside = PHOTOS[split][name]
    spec = find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{SOURCES[package]}, which ships the photograph {name}, is not installed; pip install -e '.[photos]', or "
            "give images of yours by --data and --calibration-data"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise FileNotFoundError(
            f"this version of {SOURCES[package]} ships no {inside}; give --data and --calibration-data"
        )
    return path


def box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """A random crop: left, upper, right, lower."""
    while True:
        area, ratio = rng.uniform(*SCALE) * width * height, math.exp(rng.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h


def crops(model: VisionTransformer, split: str, count: int, seed: int = 0) -> Tensor:
    """Random crops as the model takes images, [count, C, H, W], of the photographs of a split in turn; half of them
    mirrored. The first of a larger count are the same."""
    config = data_config(model)
    side = config["input_size"][1:]
    to_tensor = create_transform(**{name: config[name] for name in TRANSFORM})
    photos = [Image.open(photo(split, name)).convert("RGB") for name in PHOTOS[split]]
    made = []
    for number in range(count):
        rng = random.Random(f"{split} {seed} {number}")
        whole = photos[number % len(photos)]
        crop = whole.resize(side[::-1], Image.Resampling.BICUBIC, box=box(rng, *whole.size))
        made.append(to_tensor(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop))
    return torch.stack(made)


def opened(model: VisionTransformer, split: str, count: int, data: str | None, option: str) -> Tensor:
    """``count`` images of a directory, spread over all of it, or without one crops, [count, C, H, W].

    Raises:
        ValueError: fewer images than that; OSError: no directory, or photographs that are not there.
    """
    if data is None:
        return crops(model, split, count)
    loader = open_images(model, data, limit=count, labelled=False, lenient=True)
    batches = [images for images, _ in loader]
    found = torch.cat(batches) if batches else torch.empty(0)
    if len(found) < count:
        broken = f" ({len(loader.broken)} cannot be read)" if loader.broken else ""
        raise ValueError(
            f"{option} {data} has {len(found)} images that can be read, not {count}{broken}; ask for fewer"
        )
    return found
