"""Figure 6: the tokens that each block merges, at equal FLOPs: a constant r, one threshold, thresholds by depth.

As in the paper, thresholds give one r per batch (adapt="batch").
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.paper import figure5
from benchmarks.paper.cells import about, markdown, saved
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, shares

SHARES = (0.33,)  # as in the paper
COMPARED = ("constant r", "constant threshold", "layer-dependent thresholds")
COLOURS = [figure5.STYLES[name][:2] for name in COMPARED]

settings = figure5.settings


def arguments() -> argparse.ArgumentParser:
    return shares(SHARES, config=False)


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    rows.expect(len(args.shares) * len(COMPARED))
    for share in args.shares:
        for name in COMPARED:
            rows.add({"method": name, "share": share}, lambda name=name, share=share: _row(subject, name, share))


def _row(subject: Subject, name: str, share: float) -> dict[str, Any]:
    row = figure5.row(subject, name, share)
    if "overall" in row:
        row["merged"] = [before - after for before, after in pairwise(row["tokens"])]
    return row


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    blocks = range(1, max(len(row.get("merged", ())) for row in result["rows"]) + 1)
    head = [f"{about(result['rows'])}: tokens merged in block", "GFLOPs", "saved", *map(str, blocks)]
    body = []
    for row in result["rows"]:
        first = f"{row['method']}, -{100 * row['share']:.0f} %"
        if "missing" in row:
            body.append([first, row["missing"], *[""] * (len(blocks) + 1)])
        else:
            figures = [f"{row['overall']['gflops']:.3f}", saved(row)]
            body.append([first, *figures, *(f"{r:.1f}" for r in row["merged"])])
    return markdown(head, body)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot bars for each block, in a panel for each cost."""
    from matplotlib.figure import Figure

    costs = sorted({row["share"] for row in result["rows"]})
    figure = Figure(figsize=(6 * len(costs), 3.7), layout="constrained")
    for panel, share in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        rows = [row for row in result["rows"] if row["share"] == share and "merged" in row]
        for number, row in enumerate(rows):
            blocks = range(1, len(row["merged"]) + 1)
            colour = COLOURS[COMPARED.index(row["method"])]
            panel.bar([b + (number - 1) * 0.27 for b in blocks], row["merged"], 0.27, label=row["method"], color=colour)
            panel.set_xticks(blocks)
        panel.set_xlabel("block")
        panel.set_ylabel(f"tokens merged per image, -{100 * share:.0f} % FLOPs")
        if rows:
            panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(COMPARED), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
