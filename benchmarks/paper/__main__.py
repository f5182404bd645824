"""``python -m benchmarks.paper NAME``: one of the paper's tables, as a JSON file and a Markdown table."""

import argparse
import sys
from pathlib import Path

from atm_triton.env import check_file, write_result
from atm_triton.errors import exit_code
from benchmarks.paper import flops

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = {"flops": flops}


def run(args: argparse.Namespace) -> None:
    out = args.out / f"paper_{args.name}.json"
    check_file("--out", out)
    result = args.experiment.measure()
    print(args.experiment.table(result))
    write_result(out, result)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.split(": ")[1])
    names = parser.add_subparsers(dest="name", required=True)
    for name, experiment in EXPERIMENTS.items():
        text = experiment.__doc__.splitlines()[0]
        options = names.add_parser(name, help=text, description=text)
        options.add_argument("--out", type=Path, default=RESULTS, help="the directory for the result")
        options.set_defaults(experiment=experiment)
    args = parser.parse_args(argv)
    return exit_code("benchmarks.paper", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
