"""Figure 5: schedules of merging: a constant, rising or falling r, one threshold, thresholds that fall with depth.

All have alternate groups in every block and, as in the paper, one r per batch (adapt="batch"). As in the paper, a
rising r grows by one from block to block and a falling r shrinks by one. Thresholds that fall with depth are the
paper's curve (Eq. 1). The paper swept its three parameters; here random curves are drawn at each cost, and the one that
changes the images to choose by least is taken.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.paper import figure4
from benchmarks.paper.methods import (
    Way,
    constant_threshold,
    measured_at,
    nearest,
    of_baseline,
    of_config,
)
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, check_shares, shares

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
DRAWS = 24  # curves
STYLES = {  # in the colours of ToMe, of a single threshold and of ATM
    "constant r": "C1s--",
    "increasing r": "C1^:",
    "decreasing r": "C1v-.",
    "constant threshold": "C2v--",
    "layer-dependent thresholds": "C0o--",
}


def arguments() -> argparse.ArgumentParser:
    return shares(SHARES, config=False)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return check_shares(args.shares) | {"draws": DRAWS}


def schedule(subject: Subject, name: str, goal: float) -> Way | None:
    """The schedule of this name with settings at a cost; None if no setting comes close."""
    if name == "constant threshold":
        return constant_threshold(subject, "batch", goal)
    if name == "layer-dependent thresholds":
        return of_config(subject.best_curve("batch", goal, DRAWS, split_depth=subject.depth))
    slope = {"constant r": 0, "increasing r": 1, "decreasing r": -1}[name]
    depth = subject.depth
    ramps = [[max(first + slope * block, 0) for block in range(depth)] for first in range(1 - depth, subject.costs.N)]
    return nearest(subject, [of_baseline("tome", r=ramp) for ramp in ramps if any(ramp)], goal)


def row(subject: Subject, name: str, share: float) -> dict[str, Any]:
    """The row of a schedule at a cost, or the reason why there is none."""
    return measured_at(subject, name, subject.goal(share), schedule)


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    rows.expect(len(args.shares) * len(STYLES))
    for share in args.shares:
        for name in STYLES:
            rows.add({"method": name, "share": share}, lambda name=name, share=share: row(subject, name, share))


table = figure4.table


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot top-1, agreement and KL against GFLOPs."""
    rows = [row for row in result["rows"] if "overall" in row]
    lines = {name: (style, [row["overall"] for row in rows if row["method"] == name]) for name, style in STYLES.items()}
    figure4.draw(lines, figure4.PANELS, figure4.LOGARITHMIC, path)
