"""The table and the plot of the measurements of ``python -m benchmarks.photos``."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import markdown
from benchmarks.paper.figure4 import DASHES, draw
from benchmarks.photos.compare import MEASURES
from benchmarks.photos.methods import LINES, METHODS

LABELS = {
    "class_token": "class token, 1 - cosine",
    "patch_tokens": "patch tokens, 1 - cosine",
    "saliency": "saliency, mean difference",
}


def table(result: dict[str, Any]) -> str:
    """A Markdown table with a row for each method at each cost: mean and standard error, the worst image for the class
    token, and how many times less class and patch tokens change than with ToMe's constant r at the cost of the row."""
    count = max((row["images"] for row in result["rows"] if "images" in row), default=0)
    names = ["class token", "its worst", "patch tokens", "saliency", "less than ToMe"]
    head = [f"{count} images", "asked", "GFLOPs", *names]
    body = []
    for share in sorted({row["share"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["share"] == share]
        for row in sorted(rows, key=lambda row: METHODS.index(row["method"])):
            first = [row["method"], f"-{100 * share:.0f} %"]
            if "missing" in row:
                body.append([*first, row["missing"], *[""] * 5])
                continue
            cells = [_cell(row[name]) for name in MEASURES]
            less = ", ".join(less_than_tome(result, row, name) for name in MEASURES[:2])
            worst = f"{row['class_token']['worst']:.4f}"
            body.append([*first, f"{row['gflops']:.2f}", cells[0], worst, *cells[1:], less])
    return markdown(head, body)


def less_than_tome(result: dict[str, Any], row: dict[str, Any], name: str) -> str:
    """How many times less a measure changes than with ToMe at that cost; "-" if ToMe was not measured on both sides."""
    tome = [one for one in result["rows"] if one["method"] == "tome" and "settings" in one]
    at = None if row[name] is None else interpolated(tome, row["gflops"], name)
    return "-" if at is None else f"{at / row[name]['mean']:.2f}"


def interpolated(rows: list[dict[str, Any]], gflops: float, name: str) -> float | None:
    """A measure's mean at a cost between those of the rows, its logarithm interpolated linearly; None beyond."""
    points = sorted((row["gflops"], math.log(row[name]["mean"])) for row in rows)
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= gflops <= high:
            return math.exp(at_low + (at_high - at_low) * (gflops - low) / (high - low))
    return None


def _cell(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "n/a: dropped patches have no token"
    return f"{figures['mean']:.4f}" + ("" if figures["se"] is None else f" ± {figures['se']:.4f}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot each measure against GFLOPs in a panel of its own, with a line for each method. A method with several
    settings has one line: at each cost the setting whose class token changes least."""
    lines = {}
    for name, (style, of) in LINES.items():
        rows = [row for row in result["rows"] if row["method"] in of and "settings" in row]
        costs = {row["share"]: [other for other in rows if other["share"] == row["share"]] for row in rows}
        lines[name] = (
            style,
            [_point(min(found, key=lambda row: row["class_token"]["mean"])) for found in costs.values()],
        )
    draw(lines, LABELS, MEASURES, path, DASHES)


def _point(row: dict[str, Any]) -> dict[str, Any]:
    return {"gflops": row["gflops"]} | {name: row[name] and row[name]["mean"] for name in MEASURES}
