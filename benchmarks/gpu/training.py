"""Training: time and memory of a step, forward and backward, of timm, of ours and of ours in plain torch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

from atm_triton.config import ATMConfig
from atm_triton.measure.evaluate import share
from atm_triton.measure.throughput import keep_freed_memory, peak_memory, time_in_turn
from atm_triton.patch import apply_patch
from benchmarks.gpu.models import NAMES, TINY_SIDE, fitted
from benchmarks.gpu.setting import Setting

BATCH, R, REPEATS = 128, 8, 9
CASTS = {"float32": None, "bfloat16 autocast": torch.bfloat16}


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    keep_freed_memory()
    shape = setting.pick({}, {"img_size": TINY_SIDE, "embed_dim": 32, "depth": 3, "num_heads": 2})
    with torch.device(setting.device):
        model = timm.create_model(NAMES["DeiT-S"], **shape).eval()
        images = torch.randn(setting.pick(BATCH, 2), 3, *model.patch_embed.img_size)
    r = setting.pick(R, 1)
    static = ATMConfig(adapt="static", schedule=(r,) * len(model.blocks), backend="triton")
    ours = {
        "ATM static": static,
        "ATM image": fitted(model, images, "image", r * len(images)),
        "ATM static, plain torch": replace(static, backend="reference"),
    }
    models = {"timm": model} | {name: apply_patch(share(model), config) for name, config in ours.items()}
    section |= {"batch": len(images), "r": r, "rows": []}
    for cast, dtype in setting.pick(CASTS, {"float32": None}).items():
        section["rows"] += measure(models, images, cast, dtype, setting)


def measure(
    models: dict[str, nn.Module], images: Tensor, cast: str, dtype: torch.dtype | None, setting: Setting
) -> list[dict[str, Any]]:
    steps: dict[str, Callable[[], Any]] = {
        name: partial(step, model.train(), images, dtype) for name, model in models.items()
    }
    seconds = time_in_turn(steps, setting.pick(REPEATS, 1), setting.device)
    return [
        {
            "model": "DeiT-S",
            "dtype": cast,
            "name": name,
            "milliseconds": 1e3 * median(seconds[name]),
            "peak_mib": peak_memory(call, setting.device) / 2**20,
        }
        for name, call in steps.items()
    ]


def step(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> None:
    """One step, forward and backward, with gradients enabled even if the timer disables them; gradients are dropped."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            loss = model(images).float().square().mean()
        loss.backward()
    model.zero_grad(set_to_none=True)
