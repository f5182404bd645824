"""Draw handwritten digits on 112 x 112 canvases, from empty to cluttered, always the same for the same seed.

The digits are the 1,797 8 x 8 scans of scikit-learn's ``load_digits`` (E. Alpaydin, C. Kaynak, Optical Recognition of
Handwritten Digits, UCI, CC BY 4.0), kept in ``source.safetensors``. They are split by scan: a scan of the test split is
never drawn in training or calibration, neither as the digit to read nor as a distractor.

Every image has a complexity c, uniform in [0, 1]. c < 0.15 is a flat background; a smooth gradient comes from there on,
texture in patches from 0.35, up to six half digits as distractors from 0.4; sensor noise grows with c throughout.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

SOURCE = Path(__file__).parent / "source.safetensors"
SPLITS = {"train": (0, 1300), "calibration": (1300, 1400), "test": (1400, 1797)}  # scans, after a fixed shuffle
CANVAS = 112  # px, the side of an image
MAX_DISTRACTORS = 6
_CHUNK = 64  # images that share a random generator: the first n images do not depend on how many are drawn


@dataclass(frozen=True)
class Digits:
    """Drawn digits. ``images`` uint8 [n, 1, side, side]; ``labels`` int64 [n], 0-9; ``complexity`` float32 [n] in [0,
    1]; ``ink`` float32 [n, 1, side, side]: the share of each pixel that the digit covers, in [0, 1], without
    distractors."""

    images: torch.Tensor
    labels: torch.Tensor
    complexity: torch.Tensor
    ink: torch.Tensor


def source(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of a split: float32 [n, 8, 8] in [0, 1] and int64 [n] labels."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    scans = load_file(SOURCE)
    order = torch.randperm(len(scans["labels"]), generator=torch.Generator().manual_seed(0))
    chosen = order[slice(*SPLITS[split])]
    return scans["images"][chosen].float() / 16, scans["labels"][chosen].long()


def render(split: str, count: int, seed: int = 0, side: int = CANVAS) -> Digits:
    """Draw ``count`` images of a split, ``side`` px wide.

    Example:
        >>> render("test", 2).images.shape
        torch.Size([2, 1, 112, 112])
    """
    if count < 1:
        raise ValueError(f"count={count} draws nothing; ask for 1 image or more")
    glyphs, labels = source(split)
    numbers = tqdm(range(-(-count // _CHUNK)), desc="draw digits", unit="chunk", delay=2, disable=None, leave=False)
    chunks = [_render_chunk(glyphs, labels, seed, number, side) for number in numbers]
    names = (field.name for field in fields(Digits))
    return Digits(**{name: torch.cat([getattr(chunk, name) for chunk in chunks])[:count] for name in names})


def _render_chunk(glyphs: torch.Tensor, labels: torch.Tensor, seed: int, chunk: int, side: int) -> Digits:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + chunk)
    complexity = _uniform(generator, _CHUNK)
    level = 0.25 + 0.5 * _uniform(generator, _CHUNK, 1, 1, 1)
    canvas = level + _gradient(generator, complexity, side) + _texture(generator, complexity, side)
    polarity = torch.where(_uniform(generator, _CHUNK, 1, 1, 1) < level, -1.0, 1.0)  # darker on light, lighter on dark
    contrast = polarity * (0.22 + 0.35 * _uniform(generator, _CHUNK, 1, 1, 1))
    canvas = canvas + contrast * _distractors(generator, glyphs, complexity, side)

    chosen = torch.randint(len(glyphs), (_CHUNK,), generator=generator)
    ink = _place(generator, glyphs[chosen], side, smallest=22, largest=72, turn=0.2)
    canvas = canvas * (1 - ink) + (level + contrast) * ink
    noise = torch.randn(_CHUNK, 1, side, side, generator=generator)
    canvas = canvas + noise * (0.008 + 0.03 * complexity).view(-1, 1, 1, 1)
    images = (canvas * 255).round().clamp(0, 255).to(torch.uint8)
    return Digits(images=images, labels=labels[chosen], complexity=complexity, ink=ink)


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator)


def _ramp(complexity: torch.Tensor, start: float) -> torch.Tensor:
    """A factor [n, 1, 1, 1] that is 0 up to ``start`` and then grows to 1."""
    return ((complexity - start) / (1 - start)).clamp(min=0).view(-1, 1, 1, 1)


def _smooth(grid: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)


def _gradient(generator: torch.Generator, complexity: torch.Tensor, side: int) -> torch.Tensor:
    grid = _uniform(generator, _CHUNK, 1, 3, 3) - 0.5
    return 0.35 * (0.3 + 0.7 * _ramp(complexity, 0.15)) * _smooth(grid, side) * (complexity > 0.15).view(-1, 1, 1, 1)


def _texture(generator: torch.Generator, complexity: torch.Tensor, side: int) -> torch.Tensor:
    coarse = _smooth(torch.randn(_CHUNK, 1, side // 8, side // 8, generator=generator), side)
    fine = _smooth(torch.randn(_CHUNK, 1, side // 4, side // 4, generator=generator), side)
    mask = torch.sigmoid(8 * (_smooth(_uniform(generator, _CHUNK, 1, 4, 4), side) - 0.45))
    return 0.13 * _ramp(complexity, 0.35) * mask * (0.7 * coarse + 0.5 * fine)


def _distractors(generator: torch.Generator, glyphs: torch.Tensor, complexity: torch.Tensor, side: int) -> torch.Tensor:
    """The ink of up to six half digits per image."""
    ink = torch.zeros(_CHUNK, 1, side, side)
    number = (_ramp(complexity, 0.4).flatten() * (MAX_DISTRACTORS + 0.5)).round()
    for k in range(MAX_DISTRACTORS):
        halves = glyphs[torch.randint(len(glyphs), (_CHUNK,), generator=generator)].clone()
        cut = torch.randint(4, (_CHUNK,), generator=generator)
        halves[cut == 0, :4] = 0
        halves[cut == 1, 4:] = 0
        halves[cut == 2, :, :4] = 0
        halves[cut == 3, :, 4:] = 0
        strength = 0.35 + 0.45 * _uniform(generator, _CHUNK, 1, 1, 1)
        layer = _place(generator, halves, side, smallest=20, largest=50, turn=0.8) * strength
        ink = torch.where((number > k).view(-1, 1, 1, 1), torch.maximum(ink, layer), ink)
    return ink


def _place(
    generator: torch.Generator, glyphs: torch.Tensor, side: int, smallest: float, largest: float, turn: float
) -> torch.Tensor:
    """Each glyph once, at a random size (px), place and angle (within +-``turn`` radians): ink [n, 1, side, side]."""
    size = smallest + (min(largest, 0.9 * side) - smallest) * _uniform(generator, _CHUNK)
    angle = turn * (2 * _uniform(generator, _CHUNK) - 1)
    centre = (side - size).view(-1, 1) * (_uniform(generator, _CHUNK, 2) - 0.5) * 2 / side  # in [-1, 1]
    zoom = side / size
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    rotation = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
    shift = -(rotation @ centre.unsqueeze(2))
    grid = F.affine_grid(torch.cat([rotation, shift], dim=2), [_CHUNK, 1, side, side], align_corners=False)
    ink = F.grid_sample(glyphs.unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return ((ink - 0.25) / 0.4).clamp(0, 1)  # a crisp stroke from a blurred 8 x 8 scan
