"""The table and the plot of the measurements of ``python -m benchmarks.photos``."""

import math
from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter
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


def by_crops(*results: dict[str, Any]) -> str:
    """What calibrated thresholds change, by the number of crops that they were calibrated on: a Markdown table. Two
    results are also compared at equal cost.

    Raises:
        ValueError: they differ in more than that number, so that their rows cannot be compared.
    """
    others = [{**result["settings"], "calibration_images": None} for result in results]
    if any(other != others[0] for other in others):
        raise ValueError("the results differ in more settings than calibration_images; measure them alike")
    found = [[row for row in result["rows"] if row["method"] == "atm, calibrated, image"] for result in results]
    crops = [result["settings"]["calibration_images"] for result in results]
    names = ("class_token", "patch_tokens")
    body = []
    for share in sorted(row["share"] for row in found[0]):
        for number, rows in zip(crops, found, strict=True):
            (row,) = (row for row in rows if row["share"] == share)
            changes = (f"{row[name]['mean']:.5f} ± {row[name]['se']:.5f}" for name in names)
            body.append([f"-{100 * share:.0f} %", f"{number} crops", f"{row['gflops']:.2f}", *changes])
    about = f"{results[0]['settings']['images']} other crops; asked"
    head = [about, "calibrated on", "GFLOPs", *(name.replace("_", " ") for name in names)]
    lines = [markdown(head, body)]
    ratios = [f"{ratio:.2f} (-{100 * share:.0f} %)" for share, ratio in _at_equal_cost(*found)] if found[1:] else []
    if ratios:
        of = f"{', '.join(ratios)} times as much as those from {crops[1]}"
        lines += ["", f"At equal cost, the thresholds from {crops[0]} crops change patch tokens {of}."]
    return "\n".join(lines)


def _at_equal_cost(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Each share, and the first rows' change of patch tokens divided by that of the second, at the cost of one of the
    two rows of that share; nothing where the other rows do not span it."""
    for one, other in zip(*(sorted(rows, key=itemgetter("share")) for rows in (first, second)), strict=True):
        seconds = interpolated(second, one["gflops"], "patch_tokens")
        firsts = interpolated(first, other["gflops"], "patch_tokens")
        if seconds is not None:
            yield one["share"], one["patch_tokens"]["mean"] / seconds
        elif firsts is not None:
            yield one["share"], firsts / other["patch_tokens"]["mean"]


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
