"""Table 2: accuracy of every method at matched FLOPs, for the model at hand."""

import argparse
from typing import Any

from benchmarks.paper.cells import about, changed, drop, markdown, saved
from benchmarks.paper.figure4 import measure, settings
from benchmarks.paper.subject import shares

SHARES = (0.35, 0.5)  # saved; the first is the paper's for DeiT-S

__all__ = ["arguments", "measure", "settings", "table"]


def arguments() -> argparse.ArgumentParser:
    return shares(SHARES)


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [about(result["rows"]), "method", "GFLOPs", "saved", "top-1", "agreement", "KL"]
    body = []
    for row in sorted(result["rows"], key=lambda row: row["share"]):
        first = [f"-{100 * row['share']:.0f} %", row["method"]]
        if "missing" in row:
            body.append([*first, row["missing"], *[""] * 4])
            continue
        quality = row["overall"]
        body.append([*first, f"{quality['gflops']:.3f}", saved(row), drop(row), *changed(quality)])
    return markdown(head, body)
