"""Does an image's result depend on its batch? ``python -m benchmarks.invariance``, on the digits.

The same test images run alone and in batches of several sizes, in order and shuffled, with one r per batch and with one
r per image. What merges (the assignments), the class and the logits are compared with those of each image alone.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from atm_triton import ATMBlock, ATMConfig
from atm_triton.block import Step
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.configurations import digits_config
from atm_triton.measure.evaluate import share
from atm_triton.measure.images import open_images
from atm_triton.measure.models import check_device, open_model
from atm_triton.measure.provenance import check_file, write_result
from atm_triton.packed import Packed
from atm_triton.patch import install

RESULT = Path(__file__).parent / "results" / "digits_invariance.json"
BATCH_SIZES = (7, 64, 256)
Outcome = tuple[Tensor, list[bytes]]  # logits [n, classes]; the slots of each image in all blocks, as bytes


class KeepingBlock(ATMBlock):
    """A block that keeps the slots of each image's tokens, numbered from the image's first slot."""

    slots: list[Tensor]

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        left = super().forward_packed(tokens, step)
        slots = torch.arange(len(tokens.x)) if step.slots is None else step.slots.cpu().long()
        self.slots = [image - image[0] for image in slots.split(tokens.images.lengths.tolist())]
        return left


def keeping(model: nn.Module, config: ATMConfig) -> nn.Module:
    depth, P = len(model.blocks), model.num_prefix_tokens
    return install(share(model), lambda block, index: KeepingBlock.of(block, config, index, depth, P), config)


@torch.inference_mode()
def outcome(model: nn.Module, images: Tensor, order: Tensor, batch_size: int) -> Outcome:
    """Run the images in batches of this size and order. Returns the outcome in the original order of the images."""
    logits, merged = [], []
    for chosen in tqdm(order.split(batch_size), desc=f"batches of {batch_size}", unit="batch", disable=None):
        logits.append(model(images[chosen]).float().cpu())
        slots = [block.slots for block in list(model.blocks)[:-1]]  # the last computes the class token alone
        merged += [b"".join(of[i].numpy().tobytes() for of in slots) for i in range(len(chosen))]
    back = order.argsort()
    return torch.cat(logits)[back], [merged[i] for i in back.tolist()]


def compared(alone: Outcome, other: Outcome) -> dict[str, Any]:
    (logits, merged), (others, other_merged) = alone, other
    return {
        "other_assignments": sum(a != b for a, b in zip(merged, other_merged, strict=True)),
        "other_predictions": (logits.argmax(1) != others.argmax(1)).sum().item(),
        "logits_differ_by": (logits - others).abs().max().item(),
    }


def measure(count: int, device: str) -> list[dict[str, Any]]:
    model = open_model().to(device)
    images = torch.cat([x for x, _ in open_images(model, split="test", limit=count)]).to(device)
    in_order, shuffled = torch.arange(count), torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rows = []
    for adapt in ("batch", "image"):
        config = digits_config(adapt)
        merging = keeping(model, config)
        alone = outcome(merging, images, in_order, 1)
        for batch_size in BATCH_SIZES:
            for name, order in (("in order", in_order), ("shuffled", shuffled)):
                compared_to_alone = compared(alone, outcome(merging, images, order, batch_size))
                rows.append({"adapt": adapt, "batch_size": batch_size, "order": name, **compared_to_alone})
        rows[-1]["config"] = asdict(config)
    return rows


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    if args.images < 1:
        raise ValueError(f"--images {args.images} is too few; give 1 or more")
    check_file("--out", args.out)
    write_result(args.out, {"images": args.images, "rows": measure(args.images, args.device)})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="test images (1000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    return exit_code("invariance", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
