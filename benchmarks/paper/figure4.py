"""Accuracy against FLOPs, ATM ("batch" and "image") beside all methods of benchmarks/baselines.

At each share of the model's FLOPs every method takes the setting whose cost comes closest, all with the last block for
the class token alone; beside it stands the cost with a last block that computes all its tokens and merges none (MCTF
fuses there before attention). Neither changes a logit. ATM's thresholds are those of --config (the digits: of
``python -m benchmarks.calibration``), of the nearest cost and scaled to this one; no method sees a label. The products
of the matching are in no cost.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import about, changed, markdown, percent
from benchmarks.paper.methods import STYLES, measured_at
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, check_shares, shares

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)  # saved
PANELS = (
    ("top1", "top-1, %"),
    ("agreement", "agreement with the unpatched model, %"),
    ("kl", "KL(unpatched || merged), nats"),
    ("distance", "1 - cosine of the features"),
)


def arguments() -> argparse.ArgumentParser:
    return shares(SHARES)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return check_shares(args.shares)


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    rows.expect(len(args.shares) * len(STYLES))
    for share in args.shares:
        for method in STYLES:
            key = {"method": method, "share": share}
            rows.add(key, lambda method=method, share=share: measured_at(subject, method, subject.goal(share)))


def table(result: dict[str, Any]) -> str:
    """In Markdown: top-1 and KL at each share, or the distance of features."""
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
    """Top-1, agreement and KL against GFLOPs."""
    draw(result["rows"], STYLES, path)


def draw(rows: list[dict[str, Any]], styles: dict[str, str], path: Path) -> None:
    """A line for each method in each of :data:`PANELS` that a row has."""
    from matplotlib.figure import Figure

    measured = [row["overall"] for row in rows if "overall" in row]
    shown = [(name, label) for name, label in PANELS if any(quality.get(name) is not None for quality in measured)]
    figure = Figure(figsize=(4.5 * max(len(shown), 1), 3.8), layout="constrained")
    panels = figure.subplots(1, max(len(shown), 1), squeeze=False)[0]
    for panel, (name, label) in zip(panels, shown, strict=False):
        for method, style in styles.items():
            of_method = [row["overall"] for row in rows if row["method"] == method and "overall" in row]
            of_method.sort(key=lambda quality: quality["gflops"])
            if of_method and all(quality.get(name) is not None for quality in of_method):
                at = [quality["gflops"] for quality in of_method]
                panel.plot(at, [q[name] for q in of_method], style, label=method, markersize=4)
        panel.set_xlabel("GFLOPs an image")
        panel.set_ylabel(label)
    panels[-1].set_yscale("log")
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=150)
