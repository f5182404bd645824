"""The table and the plot of what ``python -m benchmarks.photos`` measures."""

from pathlib import Path
from typing import Any

from benchmarks.paper.cells import markdown
from benchmarks.photos.compare import MEASURES
from benchmarks.photos.methods import STYLES

LABELS = {
    "class_token": "class token, 1 - cosine",
    "patch_tokens": "patch tokens, 1 - cosine",
    "saliency": "saliency, mean absolute difference",
}


def table(result: dict[str, Any]) -> str:
    """In Markdown: a row for each method at each cost; mean and standard error, and of the class token the worst."""
    count = max((row["images"] for row in result["rows"] if "images" in row), default=0)
    head = [f"{count} images", "asked", "GFLOPs", "class token", "its worst", "patch tokens", "saliency"]
    body = []
    for share in sorted({row["share"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["share"] == share]
        for row in sorted(rows, key=lambda row: list(STYLES).index(row["method"])):
            first = [row["method"], f"-{100 * share:.0f} %"]
            if "missing" in row:
                body.append([*first, row["missing"], *[""] * 4])
                continue
            cells = [_cell(row[name]) for name in MEASURES]
            body.append([*first, f"{row['gflops']:.2f}", cells[0], f"{row['class_token']['worst']:.4f}", *cells[1:]])
    return markdown(head, body)


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return "n/a: dropped patches have no token"
    return f"{found['mean']:.4f}" + ("" if found["se"] is None else f" ± {found['se']:.4f}")


def plot(result: dict[str, Any], path: Path) -> None:
    """A panel for each measure, a line for each method, against GFLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(MEASURES))
    for panel, name in zip(panels, MEASURES, strict=True):
        for method, style in STYLES.items():
            rows = [row for row in result["rows"] if row["method"] == method and row.get(name) is not None]
            rows.sort(key=lambda row: row["gflops"])
            if rows:
                at = [row["gflops"] for row in rows]
                panel.plot(at, [row[name]["mean"] for row in rows], style, label=method, markersize=4)
        panel.set_xlabel("GFLOPs an image")
        panel.set_ylabel(LABELS[name])
        panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=150)
