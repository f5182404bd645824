"""Accuracy against FLOPs, ATM ("batch" and "image") beside all methods of benchmarks/baselines.

At each share of the model's FLOPs every method takes the setting whose cost comes closest. For all methods the last
block computes the class token alone; the table also has the cost with a last block that computes all its tokens and
merges none (MCTF fuses there before attention). Neither changes a logit. ATM's thresholds come from --config (the
digits: from ``python -m benchmarks.calibration``): those of the nearest cost, scaled to this one. No method sees a
label. No cost includes the products of the matching.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import about, changed, markdown, percent
from benchmarks.paper.methods import LINES, METHODS, measured_at
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, check_shares, shares

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)  # saved
PANELS = {
    "top1": "top-1, %",
    "agreement": "agreement, %",
    "kl": "KL(unmerged || merged), nats",
    "distance": "1 - cosine of the features",
}
LOGARITHMIC = ("kl", "distance")
DASHES = "solid: each image its own count\ndashed: one for all images of a batch"


def arguments() -> argparse.ArgumentParser:
    return shares(SHARES)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return check_shares(args.shares)


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    rows.expect(len(args.shares) * len(METHODS))
    for share in args.shares:
        for method in METHODS:
            key = {"method": method, "share": share}
            rows.add(key, lambda method=method, share=share: measured_at(subject, method, subject.goal(share)))


def table(result: dict[str, Any]) -> str:
    """A Markdown table of top-1 and KL at each share, or of the distance of features."""
    at = sorted({row["share"] for row in result["rows"]})
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    by_key = {(row["method"], row["share"]): row for row in result["rows"]}
    head = [f"{about(result['rows'])}: top-1, KL at", *(f"-{100 * share:.0f} %" for share in at)]
    return markdown(head, [[name, *(_cell(by_key.get((name, share))) for share in at)] for name in names])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured yet"
    if "missing" in row:
        return row["missing"]
    quality, whole = row["overall"], row["gflops_unpatched"]
    saved, without = (100 * (1 - cost / whole) for cost in (quality["gflops"], row["gflops_all_tokens_last"]))
    return f"{percent(quality['top1'])}, {changed(quality)[1]} (-{saved:.1f} %; all tokens last -{without:.1f} %)"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot top-1, agreement and KL against GFLOPs. A method with several published settings has one line: at each cost
    the setting that changes least."""
    lines = {name: (style, [least(rows) for rows in _costs(result, of)]) for name, (style, of) in LINES.items()}
    draw(lines, PANELS, LOGARITHMIC, path, DASHES)


def _costs(result: dict[str, Any], of: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """The measured outcomes of some settings, grouped by cost."""
    by_share: dict[float, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["method"] in of and "overall" in row:
            by_share.setdefault(row["share"], []).append(row["overall"])
    return list(by_share.values())


def least(qualities: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome with the least change: by KL, or by the distance of features for a model without a head."""
    return min(qualities, key=lambda quality: quality["distance"] if quality["kl"] is None else quality["kl"])


def draw(
    lines: dict[str, tuple[str, list[dict[str, Any]]]],
    panels: dict[str, str],
    logarithmic: Sequence[str],
    path: Path,
    note: str = "",
) -> None:
    """Draw a panel for each measure that a point has, against GFLOPs, and a legend with ``note`` as its title. A line
    is a matplotlib style and its points."""
    from matplotlib.figure import Figure

    points = [point for _, of_line in lines.values() for point in of_line]
    shown = [name for name in panels if any(point.get(name) is not None for point in points)]
    rows = len(shown) // 2 + 1
    figure = Figure(figsize=(7, 2.9 * rows), layout="constrained")
    cells = list(figure.subplots(rows, 2, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for name, cell in zip(shown, cells, strict=False):
        for label, (style, of_line) in lines.items():
            known = sorted((point["gflops"], point[name]) for point in of_line if point.get(name) is not None)
            if known:
                (handles[label],) = cell.plot(*zip(*known, strict=True), style, label=label, markersize=4)
        cell.set_xlabel("GFLOPs per image")
        cell.set_ylabel(panels[name] + (" (log scale)" if name in logarithmic else ""), fontsize=9)
        if name in logarithmic:
            cell.set_yscale("log")
    for cell in cells[len(shown) :]:
        cell.set_axis_off()
    handles = {label: handles[label] for label in lines if label in handles}
    cells[len(shown)].legend(handles.values(), handles.keys(), loc="center", frameon=False, title=note)
    figure.savefig(path, dpi=150)
