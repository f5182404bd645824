"""Table 3: the splitting depth, from 0 (size-distinctive groups in all blocks) to L (alternate groups in all).

The thresholds stay the same, so the cost differs a little, as in the paper.
"""

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.paper.cells import about, changed, drop, markdown, saved
from benchmarks.paper.methods import measured, of_config
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options


def arguments() -> argparse.ArgumentParser:
    return options(choosing=False)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {}


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    configs = subject.configs
    rows.expect(len(configs) * (subject.depth + 1))
    for adapt, given in configs.items():
        for split in range(subject.depth + 1):
            config = replace(given, split_depth=split)
            title = f"{adapt}, splitting depth {split}"
            rows.add(
                {"adapt": adapt, "split_depth": split},
                lambda config=config, title=title: measured(subject, of_config(config), title),
            )


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [f"{about(result['rows'])}: splitting depth", "adapt", "GFLOPs", "saved", "top-1", "agreement", "KL"]
    body = []
    for row in result["rows"]:
        quality = row["overall"]
        figures = [f"{quality['gflops']:.4f}", saved(row), drop(row)]
        body.append([str(row["split_depth"]), row["adapt"], *figures, *changed(quality, digits=2)])
    return markdown(head, body)
