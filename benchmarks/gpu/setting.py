"""What all stages share: the device, whether sizes are tiny, and random tensors as a block has them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

SECONDS = 450  # for a whole run; optional comparisons and the sanitizer get what is left
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The setting of a run. ``out``: the folder for files; ``save``: writes what has been measured so far; ``started``:
    monotonic time."""

    device: torch.device
    tiny: bool
    out: Path
    save: Callable[[], None]
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: T, tiny: T) -> T:
        return tiny if self.tiny else full

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        """The seconds that are left, at least 0."""
        return max(SECONDS - self.seconds(), 0.0)

    def has(self, seconds: float, of: float = SECONDS) -> bool:
        """Whether ``seconds`` are left of the first ``of`` of the run."""
        return self.seconds() + seconds <= of


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def qkv(T: int, H: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [H, T, d], normally distributed: views of one product, as a block has them."""
    return torch.randn(T, 3, H, d, dtype=dtype, device=device).permute(1, 2, 0, 3).unbind(0)


def some_sizes(T: int, device: torch.device, most: int = 4) -> Tensor:
    """Random sizes [T], float32 whole numbers from 1 to ``most``."""
    return torch.randint(1, most + 1, (T,), device=device).float()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}"
