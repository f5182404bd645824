"""What a training step keeps in memory for its backward pass: ``python -m benchmarks.kept_for_backward``.

It runs the forward pass of DeiT-S on one image on the CPU, our kernels by Triton's interpreter, and sums the bytes of
all memory that autograd holds afterwards, without the weights. On a GPU a step has the same tensors. Its peak is
higher, by gradients and by what the kernels that run at that time need.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import timm
from torch import nn

from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.config import ATMConfig
from atm_triton.measure.evaluate import share
from atm_triton.measure.provenance import check_file, write_result
from atm_triton.patch import apply_patch
from benchmarks import RESULTS

MODEL, R = "deit_small_patch16_224", 8
WAYS = {  # name: tokens that each block merges, and what computes attention with log n and the merge
    "ATM, r = 8": (R, "triton"),
    "ATM, r = 8, plain torch": (R, "reference"),
    "ATM, r = 0": (0, "triton"),
}


def kept_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """The bytes that a forward pass keeps for the backward pass, each piece of memory counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage  # kept, so that no other memory gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(images).sum()
    return sum(storage.nbytes() for at, storage in held.items() if at not in weights)


def measure() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    models = {"timm": model}
    for name, (r, backend) in WAYS.items():
        schedule = (r,) * len(model.blocks)
        models[name] = apply_patch(share(model), ATMConfig(adapt="static", schedule=schedule, backend=backend))
    of_timm = kept_bytes(model, images)
    rows = []
    for name, one in models.items():
        nbytes = kept_bytes(one, images)
        rows.append({"name": name, "mib": nbytes / 2**20, "of_timm": nbytes / of_timm})
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| DeiT-S, float32 | MiB per image kept for the backward pass | of timm's |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['mib']:.1f} | {row['of_timm']:.2f} |" for row in result["rows"]]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    check_file("--json", args.json)
    result = {"model": MODEL, "rows": measure()}
    print(table(result))
    write_result(args.json, result)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.kept_for_backward", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "kept_for_backward.json", help="the figures")
    args = parser.parse_args(argv)
    return exit_code("kept_for_backward", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
