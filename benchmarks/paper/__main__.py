"""``python -m benchmarks.paper NAME``: a table or figure of the paper, as JSON with a Markdown table or a plot."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.cli.report import left_out, need_matplotlib
from atm_triton.measure.provenance import check_file, write_result
from benchmarks import RESULTS
from benchmarks.paper import (
    figure2,
    figure4,
    figure5,
    figure6,
    figure7,
    finetuned,
    flops,
    points,
    table1,
    table2,
    table3,
    table4,
    table_a1,
    table_a3,
    theorem1,
)
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject

EXPERIMENTS = {  # those that run a model on images
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "tableA1": table_a1,
    "tablesA2-A5": points,
    "pointsA3": points,
    "table4": table4,
    "tableA3": table_a3,
    "figure2": figure2,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "figure7": figure7,
    "theorem1": theorem1,
    "finetuned": finetuned,
}


def run(args: argparse.Namespace) -> None:
    if args.name == "flops":
        out = args.out / "paper_flops.json"
        check_file("--out", out)
        result = flops.measure()
        print(flops.table(result))
        write_result(out, result)
        return
    out = args.out / f"{args.model}_{args.name}.json"
    check_file("--out", out)
    settings = args.experiment.settings(args)
    need_matplotlib()
    check_file("--out", out.with_suffix(".png"))
    rows = Rows(out, {**Subject.settings(args), **settings}, args.resume)
    subject = Subject(args)
    rows.broken = lambda: subject.broken
    args.experiment.measure(subject, rows, args)
    result = rows.finish()
    print(args.experiment.table(result))
    if hasattr(args.experiment, "plot"):
        args.experiment.plot(result, out.with_suffix(".png"))
    if result["not_read"]:
        print(left_out(result["not_read"]))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.paper", description=__doc__.split(": ")[1])
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    _add(names, "flops", flops, [])
    for name, experiment in EXPERIMENTS.items():
        options = _add(names, name, experiment, [experiment.arguments()])
        options.set_defaults(experiment=experiment)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", r"\d+ % of the tokens are gone")  # extreme settings are tried on purpose
    return exit_code("benchmarks.paper", lambda: run(args))


def _add(names: Any, name: str, experiment: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = experiment.__doc__.splitlines()[0]
    made = {"description": experiment.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    options = names.add_parser(name, help=text, parents=parents, **made)
    options.add_argument("--out", type=Path, default=RESULTS, help="the directory for the result")
    return options


if __name__ == "__main__":
    sys.exit(main())
