"""Digits: the trained model, where thresholds say how much merges: one r a batch, and each image its own."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atm_triton import ATMConfig
from atm_triton.evaluate import share
from atm_triton.flops import cost
from atm_triton.inputs import digits_config, open_images, open_model
from atm_triton.patch import apply_patch
from atm_triton.throughput import free_merge_bound, peak_memory, time_in_turn
from benchmarks.gpu import StageError
from benchmarks.gpu.models import rates, shuffled
from benchmarks.gpu.setting import Setting, short

REPEATS = 25
LOGITS = 1e-2  # relative distance by kernels and by reference: a count at its threshold may fall otherwise
TINY_DEPTH = 2


@torch.inference_mode()
def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    section |= {"rows": [], "left_out": []}
    for batch in setting.pick((256, 64), (1,)):
        images, labels = next(iter(open_images(open_model(), limit=batch, batch_size=batch)))
        for dtype in setting.pick((torch.float32, torch.bfloat16), (torch.float32,)):
            on_device = images.to(setting.device, dtype)
            section["rows"] += measure(on_device, labels.to(setting.device), setting)


def measure(images: Tensor, labels: Tensor, setting: Setting) -> list[dict[str, Any]]:
    """A row for each variant; ``right``: the share of the labels. Both backends must agree in float32."""
    dtype = images.dtype
    model, config = open_model().to(setting.device, dtype), replace(digits_config(), backend="triton")
    if setting.tiny:
        model.blocks = model.blocks[:TINY_DEPTH]
        config = ATMConfig(alpha=0.9, beta=0.04, theta_min=0.8, backend="triton")
    merging = {name: apply_patch(share(model), replace(config, adapt=name)) for name in ("batch", "image")}
    found = {"timm": model, **{f"ATM {name}": patched for name, patched in merging.items()}}
    logits = {name: call(images).double() for name, call in found.items()}
    record = merging["batch"].blocks.last
    found["free-merge bound"] = free_merge_bound(model, record, config)
    for name in merging if dtype == torch.float32 else ():
        by_reference = apply_patch(share(model), replace(config, adapt=name, backend="reference"))(images).double()
        error = ((logits[f"ATM {name}"] - by_reference).norm() / by_reference.norm()).item()
        if not error <= LOGITS:
            raise StageError(f"adapt={name!r}: float32 logits by the kernels are {error:.2g} from the reference's")
    runs = {name: lambda call=call: call(images) for name, call in found.items()}
    seconds = time_in_turn(shuffled(runs), setting.pick(REPEATS, 2), setting.device)
    rows = []
    for name in runs:
        row = {"model": "digits", "dtype": short(dtype), "batch": len(images), "name": name}
        row |= rates(seconds[name], len(images))
        if name in logits:
            row["right"] = (logits[name].argmax(1) == labels).double().mean().item()
        if name == "ATM batch":
            row |= {"tokens": record.tokens, "gflops": cost(model, record).paper_gflops}
        rows.append(row | {"peak_mib": peak_memory(runs[name], setting.device) / 2**20})
    return rows
