"""``python -m benchmarks.photos.unmerge``: what patch tokens gain if unmerging adds back what merging took from them.

With "nearest" a patch gets the value x'_slot of the token that it is part of. With "residual" its difference from the
mean of its slot at the time of the merge is added again: x_i + (x'_slot - mean). That is exact if the later blocks do
nothing, and costs a gather. Both are computed before the last norm. Models, settings and images are those of
``python -m benchmarks.photos``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton import ATMConfig
from atm_triton.block import ATMBlock
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.comparison import Measure
from atm_triton.measure.configurations import checksum
from atm_triton.measure.evaluate import share
from atm_triton.measure.provenance import check_file, check_outputs, write_result
from atm_triton.ops import unmerge
from atm_triton.packed import Assignment, Packed
from atm_triton.patch import install
from benchmarks import RESULTS
from benchmarks.paper.cells import markdown
from benchmarks.photos import __main__ as photographs
from benchmarks.photos.compare import Photos, told
from benchmarks.photos.weights import kept

WAYS = {"nearest": 0.0, "half the residual": 0.5, "residual": 1.0}  # the share of the residual that is added
METHODS = ("tome", "threshold, image", "atm, calibrated, image")


class KeepingBlock(ATMBlock):
    """A block that keeps each token's difference from its merged token, ``lost`` [T, C], and its slot, ``slots`` [T];
    None if nothing merged."""

    lost: Tensor | None = None
    slots: Tensor | None = None

    def merge(self, tokens: Packed, attended: Tensor, assignment: Assignment) -> tuple[Packed, Tensor]:
        merged, y = super().merge(tokens, attended, assignment)
        x = tokens.x + self.ls1(attended).flatten(0, -2)
        self.slots = assignment.slots
        self.lost = x - unmerge(merged.x, self.slots)
        return merged, y


def keeping(model: VisionTransformer, config: ATMConfig) -> VisionTransformer:
    """Patch a model in place with :class:`KeepingBlock`."""
    depth = len(model.blocks)

    def made(block: nn.Module, index: int) -> KeepingBlock:
        return KeepingBlock.of(block, config, index, depth, model.num_prefix_tokens)

    return install(model, made, config)


@torch.inference_mode()
def features(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """All N tokens [B, N, C] after the last norm, unmerged in each of :data:`WAYS`."""
    for block in model.blocks:
        block.lost = block.slots = None
    run = model._run(images, None, dense=True)
    B, N = len(images), model.blocks.last.tokens[0]
    where, lost = torch.arange(B * N), images.new_zeros(B * N, model.embed_dim)
    for block in model.blocks:
        if block.slots is not None:
            lost += block.lost[where]
            where = block.slots[where].long()
    x = run.tokens.x[where]
    return {way: model.norm(x + much * lost).unflatten(0, (B, N)) for way, much in WAYS.items()}


@torch.inference_mode()
def compared(photos: Photos, config: ATMConfig) -> dict[str, dict[str, Any]]:
    """Distance of patch tokens and error of saliency in each of :data:`WAYS`."""
    model = keeping(share(photos.model), config)
    measured: dict[str, list[tuple[Tensor, Tensor]]] = {way: [] for way in WAYS}
    for images, (_, patches, saliency) in zip(photos.test.split(photos.batch), photos.base, strict=True):
        for way, x in features(model, images).items():
            after = x[:, model.num_prefix_tokens :]
            error = (photos.decoder(after).squeeze(1) - saliency).double().abs().mean((1, 2))
            measured[way].append((Measure("dense").compared(patches, after)[0], error))
    both = {way: [torch.cat(column) for column in zip(*parts, strict=True)] for way, parts in measured.items()}
    names = ("patch_tokens", "saliency")
    return {
        way: {name: told(values, photos.photos) for name, values in zip(names, columns, strict=True)}
        for way, columns in both.items()
    }


def config_of(settings: dict[str, Any], depth: int) -> ATMConfig:
    """The configuration with which a row of ``benchmarks.photos`` was measured."""
    options = {"split_depth": depth, "cls_only_last": False}
    if "config" in settings:
        return ATMConfig(**settings["config"])
    if "theta" in settings:
        return ATMConfig(adapt=settings["adapt"], thresholds=(settings["theta"],) * depth, **options)
    return ATMConfig(adapt="static", schedule=(settings["r"],) * depth, **options)


def run(args: argparse.Namespace) -> None:
    check_outputs({"--out": args.out}, [args.of])
    check_file("--out", args.out)
    try:
        document = json.loads(args.of.read_text())
        given = document["settings"]
        rows = [row for row in document["rows"] if row["method"] in METHODS and "settings" in row]
        about = {name: given[name] for name in photographs.OF_SUBJECT}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--of {args.of} is no result of benchmarks.photos") from error
    for name, file in photographs.WEIGHTS.items():
        if given.get(name) != checksum(kept(file, args.weights)):
            raise ValueError(f"--of {args.of} was measured with another {file}; give its directory by --weights")
    photos = photographs.subject(argparse.Namespace(**about, weights=args.weights))
    new_rows = []
    for row in rows:
        ways = compared(photos, config_of(row["settings"], photos.depth))
        new_rows += [
            {"method": row["method"], "share": row["share"], "gflops": row["gflops"], "unmerge": way, **figures}
            for way, figures in ways.items()
        ]
    result = {"settings": given, "rows": new_rows}
    write_result(args.out, result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """A Markdown table of patch tokens and saliency, with a column for each way."""
    head = ["patch tokens, saliency", "GFLOPs", *WAYS]
    rows = {(row["method"], row["share"], row["unmerge"]): row for row in result["rows"]}
    body = []
    for method, saved in dict.fromkeys(key[:2] for key in rows):
        ways = [rows[method, saved, way] for way in WAYS]
        cells = [f"{row['patch_tokens']['mean']:.5f}, {row['saliency']['mean']:.5f}" for row in ways]
        body.append([f"{method}, -{100 * saved:.0f} % asked", f"{ways[0]['gflops']:.2f}", *cells])
    return markdown(head, body)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.photos.unmerge", description=__doc__.split("\n\n")[0].split(": ")[1])
    parser.add_argument("--of", type=Path, default=RESULTS / "photos.json", help="a result of benchmarks.photos")
    parser.add_argument("--weights", type=Path, help="a directory of them, instead of the fetched ones")
    parser.add_argument("--out", type=Path, default=RESULTS / "photos_unmerge.json")
    args = parser.parse_args(argv)
    return exit_code("benchmarks.photos.unmerge", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
