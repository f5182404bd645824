"""Table 1, the stress test: the most that each method saves without a drop in accuracy.

For every method the range of costs, from the saving of the last block alone to -90 %, is bisected in the same number of
steps. Each step takes the setting closest to the middle, however far off, and judges it, as in the paper, by the labels
of the very images that are reported. This assumes that accuracy does not rise as the cost falls. The cheapest setting
without a drop counts.
"""

import argparse
import json
import math
from functools import partial
from typing import Any

from benchmarks.paper.cells import about, changed, drop, markdown, saved
from benchmarks.paper.methods import METHODS, at_cost, measured_at
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

STEPS, MOST = 6, 0.9  # steps of each search, and the largest share saved


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options()])
    parser.add_argument("--drop", type=float, default=0.0, help="points of top-1 that may be lost (0)")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    if not 0 <= args.drop < 100:
        raise ValueError(f"--drop {args.drop:g} is out of range; say how many points may be lost")
    return {"drop": args.drop, "steps": STEPS}


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    if not subject.labelled:
        raise ValueError(f"--data {subject.data}: top-1 needs one folder for each class of the model")
    rows.expect(len(METHODS) * STEPS)
    find = partial(at_cost, within=math.inf)
    for method in METHODS:
        low, high = 1 - subject.costs.highest / subject.costs.unmerged, MOST
        for _ in range(STEPS):
            share = (low + high) / 2
            key = {"method": method, "share": share}
            row = rows.add(key, lambda key=key: measured_at(subject, key["method"], subject.goal(key["share"]), find))
            low, high = (share, high) if _holds(row, args.drop) else (low, share)


def _holds(row: dict[str, Any], drop: float) -> bool:
    return "overall" in row and row["overall"]["top1"] >= row["overall"]["top1_unpatched"] - drop - 1e-9


def best(result: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """The row of each method that saves most without a drop; None if every row has a drop."""
    names = dict.fromkeys(row["method"] for row in result["rows"])
    holding = [row for row in result["rows"] if _holds(row, result["settings"]["drop"])]
    return {
        name: min(
            (row for row in holding if row["method"] == name), key=lambda row: row["overall"]["gflops"], default=None
        )
        for name in names
    }


def _none(method: str, result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["method"] == method]
    settings = {json.dumps(row["settings"]) for row in rows if "overall" in row}
    return f"none of {len(settings)} settings keeps top-1" if settings else rows[0]["missing"]


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [about(result["rows"]), "GFLOPs", "saved", "top-1", "agreement", "KL"]
    body = []
    for method, row in best(result).items():
        if row is None:
            body.append([method, _none(method, result), *[""] * 4])
            continue
        quality = row["overall"]
        body.append([method, f"{quality['gflops']:.3f}", saved(row), drop(row), *changed(quality)])
    return markdown(head, body)
