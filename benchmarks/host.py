"""What a pass costs the host, without a GPU: ``python -m benchmarks.host``.

Our kernels' launches are counted but left out, so that the time is that of Python, torch's dispatcher and our own code.
It times a pass of timm's model, of the blocks, and of the engine once it has captured all its graphs, in each way to
adapt, in turn.

- *meta*: DeiT-S at batch 64 on meta tensors; every image merges eight tokens per block. Torch infers shapes of meta
  tensors in Python, for most operations more slowly than it would dispatch them. That favours our passes,
  whose launches are left out.
- *small*: twelve blocks of 24 channels and 17 tokens on the CPU; every image merges one token per block. There, as on a
  GPU, an operation costs the host little more than its dispatch.

Where the blocks launch kernels, Triton's own share of each launch comes on top.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from triton.runtime.jit import JITFunction

from atm_triton import ATMConfig, apply_patch, ops
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.graphs import Mailbox, Replays
from atm_triton.measure.provenance import check_file, write_result

RESULT = Path(__file__).parent / "results" / "host.json"
R = {"meta": 8, "small": 1}  # tokens that every image merges per block
WAYS = ("timm", "blocks", "engine")
ADAPT = ("static", "batch", "image")


class Launches:
    """Counts the launches that it replaces."""

    number = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.number += 1


class Arrived(Mailbox):
    """A mailbox whose counts are on the host already: ``r`` for each image."""

    def __init__(self, B: int, r: int) -> None:
        self.counts = [r] * B

    def send(self, counts: Tensor) -> None:
        pass

    def receive(self) -> list[int]:
        return self.counts


class Played(Replays):
    """Graphs whose replay does nothing."""

    def __init__(self, device: torch.device, r: int) -> None:
        super().__init__(device)
        self.r = r

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        out = run()
        return lambda: out

    def mailbox(self, B: int) -> Mailbox:
        return Arrived(B, self.r)


@contextmanager
def without_launches(kind: str) -> Iterator[Launches]:
    """Treat tensors as if they were on a GPU, count launches instead of running kernels, and let the host read the same
    r everywhere. Memory that the kernels would write is 0, so that it can serve as indices."""
    launches = Launches()
    takes = {"explain": lambda *_: ("triton", "timed"), "_on_kernels": lambda _: True, "interpreting": lambda: True}
    with (
        patch.object(JITFunction, "run", launches),
        patch.multiple(ops, **takes, read=lambda copy: torch.full(copy[0].shape, R[kind], device="cpu")),
        patch.object(torch, "empty", torch.empty if kind == "meta" else torch.zeros),
    ):
        yield launches


def models(kind: str) -> tuple[dict[str, VisionTransformer], Tensor]:
    """Make timm's model, the patched models by name, and images for them."""
    device = "meta" if kind == "meta" else "cpu"
    shape = {} if kind == "meta" else {"img_size": 64, "embed_dim": 24, "num_heads": 3}
    B, side = (64, 224) if kind == "meta" else (1, 64)

    def new() -> VisionTransformer:
        with torch.device(device):
            return timm.create_model("deit_small_patch16_224", **shape).eval()

    made = {"timm": new()}
    for adapt in ADAPT:
        r = R[kind]  # thresholds do not matter: the host reads this r for any of them
        merging = {"schedule": (r,) * 12} if adapt == "static" else {"thresholds": (0.9,) * 12}
        for way in ("blocks", "engine"):
            model = apply_patch(new(), ATMConfig(adapt=adapt, engine=way == "engine", backend="triton", **merging))
            model.engine.make_replays = lambda device: Played(device, R[kind])
            made[f"{way}, {adapt}"] = model
    return made, torch.zeros(B, 3, side, side, device=device)


@torch.inference_mode()
def measure(kind: str, repeats: int) -> list[dict[str, Any]]:
    """Time each way to run a pass. A row has the median and the quartiles in microseconds, the ratio to timm's median,
    and the number of launches."""
    made, x = models(kind)
    launched, times = {}, {name: [] for name in made}
    with without_launches(kind) as launches:
        for name, model in made.items():
            for _ in range(3):
                launches.number = 0
                model(x)
            launched[name] = launches.number
            engine = name.startswith("engine")
            if name != "timm" and (model.blocks.last.way == "engine") != engine:
                raise RuntimeError(f"{name} was run by {model.blocks.last.way}")
        for _ in range(repeats):
            for name, model in made.items():
                start = time.perf_counter()
                model(x)
                times[name].append(1e6 * (time.perf_counter() - start))
    whole = statistics.median(times["timm"])
    rows = []
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        row = {"tensors": kind, "way": name, "us": middle, "quartiles": [low, high], "of_timm": middle / whole}
        rows.append(row | {"launches": launched[name]})
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| tensors | a pass by | host, us | of timm's | launches of ours |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['tensors']} | {row['way']} | {row['us']:.0f} | {row['of_timm']:.2f} | {row['launches']} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    check_file("--json", args.json)
    if args.repeats < 2:
        raise ValueError(f"--repeats {args.repeats} is too few; give 2 or more")
    torch.set_num_threads(1)
    rows = [row for kind in R for row in measure(kind, args.repeats)]
    result = {"repeats": args.repeats, "rows": rows}
    print(table(result))
    write_result(args.json, result)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="the figures")
    parser.add_argument("--repeats", type=int, default=50, help="passes of each")
    args = parser.parse_args(argv)
    return exit_code("host", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
