"""``python -m benchmarks.paper NAME``: a table or figure of the paper, as JSON with a Markdown table or a plot."""

import argparse
import sys
from pathlib import Path

from atm_triton.env import check_file, write_result
from atm_triton.errors import exit_code
from benchmarks.paper import figure4, figure7, flops

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = {"flops": flops, "figure4": figure4, "figure7": figure7}


def run(args: argparse.Namespace) -> None:
    out = args.out / f"{args.model if hasattr(args, 'model') else 'paper'}_{args.name}.json"
    check_file("--out", out)
    result = args.experiment.measure(args, out)
    print(args.experiment.table(result))
    write_result(out, result)
    if hasattr(args.experiment, "plot"):
        args.experiment.plot(result, out.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.split(": ")[1])
    names = parser.add_subparsers(dest="name", required=True)
    for name, experiment in EXPERIMENTS.items():
        text = experiment.__doc__.splitlines()[0]
        options = names.add_parser(name, help=text, description=text, parents=[experiment.arguments()])
        options.add_argument("--out", type=Path, default=RESULTS, help="the directory for the result")
        options.set_defaults(experiment=experiment)
    args = parser.parse_args(argv)
    return exit_code("benchmarks.paper", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
