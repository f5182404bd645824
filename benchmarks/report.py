"""All results on one page, and the tables of README and docs: ``python -m benchmarks.report``.

The page, ``benchmarks/results/REPORT.md``, holds the table and the plot of every file there, with the command, machine
and commit that made it. Nothing is measured, and nothing changes where no result did.
"""

import json
import sys
from pathlib import Path
from typing import Any

from atm_triton.cli.bad_input import Parser, exit_code
from benchmarks import pages
from benchmarks.paper.__main__ import EXPERIMENTS

PAGE = "REPORT.md"
INTRODUCTION = (
    "Every file of this directory with its table and plot, as far as it has them, and what made it: "
    "by `python -m benchmarks.report`."
)
OTHERS = {
    file: table
    for path, tables in pages.TABLES.items()
    for name, (table, files) in tables.items()
    for file in files
    if path != pages.README and name not in ("pays", "since", "slow-host")  # those are extracts
}  # than the paper's by their name


def page(directory: Path) -> str:
    """The whole page, in Markdown."""
    sections = [section(path) for path in sorted(directory.glob("*.json"))]
    return "\n\n".join(["# Results", INTRODUCTION, *sections]) + "\n"


def section(path: Path) -> str:
    """A file's title, where it comes from, its table, its plot and its pictures, as far as it has them."""
    try:
        document = json.loads(path.read_text())
        made = document["environment"]
        lines = [f"## {_title(path)}", f"`{path.name}`: {_made(made)}", *_table(path, document)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path}: is no result of this version ({error!r}); make it anew") from error
    plots = (path.with_name(f"{path.stem}{what}.png") for what in ("", "_pictures"))
    return "\n\n".join([*lines, *(f"![{plot.stem}]({plot.name})" for plot in plots if plot.exists())])


def _made(made: dict[str, Any]) -> str:
    where = made["gpu"] or made["cpu"]
    commit = (made["commit"] or "none")[:7] + (" and changes" if made["dirty"] else "")
    return f"`{made['command']}`, {where}, torch {made['torch']}, timm {made['timm']}, commit {commit}, {made['utc']}"


def _experiment(path: Path) -> Any | None:
    name = path.stem.rpartition("_")[2]
    return EXPERIMENTS.get(name)


def _title(path: Path) -> str:
    experiment = _experiment(path)
    if experiment is None:
        return path.stem.replace("_", " ")
    return f"{path.stem.rpartition('_')[0]}: {experiment.__doc__.splitlines()[0].rstrip('.')}"


def _table(path: Path, document: dict[str, Any]) -> list[str]:
    experiment = _experiment(path)
    if experiment is not None:
        return [experiment.table(document)]
    if path.name in OTHERS:
        return [OTHERS[path.name](document)]
    return []


def run() -> None:
    made = {pages.RESULTS / PAGE: page(pages.RESULTS), **pages.filled()}
    for path, text in made.items():
        path.write_text(text)
    print(f"written: {', '.join(map(str, made))}")


def main(argv: list[str] | None = None) -> int:
    Parser(prog="python -m benchmarks.report", description=__doc__.split(": ")[0]).parse_args(argv)
    return exit_code("benchmarks.report", run)


if __name__ == "__main__":
    sys.exit(main())
