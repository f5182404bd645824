"""Table A1: the batch size, from 1 to 1024, with one r per batch and with each image's own count."""

import argparse
from typing import Any

import torch

from atm_triton import ATMConfig
from benchmarks.paper.cells import about, changed, drop, markdown, saved
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

SIZES = tuple(2**power for power in range(11))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options(choosing=False)])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="of a batch (1 to 1024)")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    if min(args.sizes) < 1 or len(set(args.sizes)) < len(args.sizes):
        raise ValueError("--sizes wants each size once, 1 or more")
    return {"sizes": args.sizes}


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    images = sum(len(batch) for batch in subject.base)
    configs = subject.configs
    rows.expect(len(args.sizes) * len(configs))
    for batch_size in sorted(args.sizes):
        if batch_size > images and batch_size > min(args.sizes):
            print(f"batches of {batch_size} and more are left out: there are {images} images")
            break
        for adapt, given in configs.items():
            key = {"adapt": adapt, "batch_size": batch_size}
            rows.add(key, lambda given=given, batch_size=batch_size: _outcome(subject, batch_size, given))


def _outcome(subject: Subject, batch_size: int, config: ATMConfig) -> dict[str, Any]:
    try:
        return subject.in_other_batches(batch_size, config, f"{config.adapt}, batches of {batch_size}").to_dict()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # the latter on a CPU
            return {"missing": "out of memory"}
        raise


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [f"{about(result['rows'])}: batch size", "adapt", "GFLOPs", "saved", "top-1", "agreement", "KL"]
    body = []
    for row in result["rows"]:
        first = [str(row["batch_size"]), row["adapt"]]
        if "missing" in row:
            body.append([*first, row["missing"], *[""] * 4])
            continue
        quality = row["overall"]
        figures = [f"{quality['gflops']:.4f}", saved(row), drop(row)]
        body.append([*first, *figures, *changed(quality, digits=2)])
    return markdown(head, body)
