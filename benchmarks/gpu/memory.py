"""Memory: match grows with N, not with its square."""

from typing import Any

import torch

from atm_triton import ops
from atm_triton.measure.throughput import peak_memory
from atm_triton.packed import Images
from benchmarks.gpu import StageError
from benchmarks.gpu.setting import Setting, qkv

ROOM = 1.5  # the memory may grow by this many times linear growth


def run(setting: Setting, section: dict[str, Any], _: dict[str, Any]) -> None:
    H, d = setting.pick((6, 64), (1, 16))
    rows = section["rows"] = []
    for N in setting.pick((1024, 4096, 16384), (260, 520)):
        keys, images = qkv(N, H, d, torch.float16, setting.device)[1], Images.of(1, N, setting.device)

        def match(keys: torch.Tensor = keys, images: Images = images) -> None:
            ops.match(keys, None, images, 1, False, 0.5, "triton")

        match()
        rows.append({"N": N, "bytes": peak_memory(match, setting.device)})
    before, after = rows[-2:]
    growth, most = after["bytes"] / before["bytes"], ROOM * after["N"] / before["N"]
    section |= {"growth": growth, "below": most}
    if not growth < most:
        raise StageError(
            f"from N={before['N']} to {after['N']} the memory of match grows {growth:.2f} times, not < {most}"
        )
