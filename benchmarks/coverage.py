"""How many lines of the package the tests run: ``make coverage VENV=.venv-3.12 PYTHON=python3.12``.

Lines count as run if the process of a test runs them, kernels by Triton's interpreter. Processes that tests start are
not followed. Before Python 3.12, line tracing makes the kernels seven times slower.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.provenance import check_file, write_result
from benchmarks import RESULTS

ROOT = Path(__file__).parents[1]
PACKAGES = ("atm_triton", "kernels")
LOW = 0.9  # a file of which the tests run less is named


def run_tests(arguments: list[str]) -> dict[str, Any]:
    """Run pytest with these arguments. Returns the files of coverage's report by name.

    Raises:
        ValueError: a test failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "coverage.json")
        command = [sys.executable, "-m", "pytest", "-q", *(f"--cov={package}" for package in PACKAGES)]
        core = {"COVERAGE_CORE": "sysmon"} if sys.version_info >= (3, 12) else {}
        own = os.environ | core | {"COVERAGE_FILE": str(Path(directory, "data"))}
        done = subprocess.run([*command, f"--cov-report=json:{report}", *arguments], cwd=ROOT, env=own)
        if done.returncode:
            raise ValueError(f"pytest ended with {done.returncode}; see the failures above")
        return json.loads(report.read_text())["files"]


def rows(files: dict[str, Any]) -> list[dict[str, Any]]:
    """For each file its number of statements, and the lines of those that no test runs."""
    return [
        {"file": name, "statements": of_file["summary"]["num_statements"], "missing": of_file["missing_lines"]}
        for name, of_file in sorted(files.items())
        if of_file["summary"]["num_statements"]
    ]


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table: a line for each folder, with the files of which the tests run little."""
    folders: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        folders[str(Path(row["file"]).parent)].append(row)
    lines = [
        f"| folder | statements | run by the tests | files below {LOW:.0%} | lines that no test runs, elsewhere |",
        "|---|---|---|---|---|",
    ]
    for folder, of_folder in folders.items():
        low = [row for row in of_folder if _share([row]) < LOW]
        named = [f"`{Path(row['file']).name}` {_share([row]):.0%}" for row in low]
        rest = [
            f"`{Path(row['file']).name}` {', '.join(map(str, row['missing']))}"
            for row in of_folder
            if row["missing"] and row not in low
        ]
        statements = sum(row["statements"] for row in of_folder)
        lines.append(
            f"| `{folder}` | {statements:,} | {_share(of_folder):.1%} | {', '.join(named) or '-'} "
            f"| {'; '.join(rest) or '-'} |"
        )
    whole = sum(row["statements"] for row in result["rows"])
    lines.append(f"| all | {whole:,} | {_share(result['rows']):.1%} | | |")
    return "\n".join(lines)


def _share(rows: list[dict[str, Any]]) -> float:
    return 1 - sum(len(row["missing"]) for row in rows) / sum(row["statements"] for row in rows)


def run(args: argparse.Namespace) -> None:
    check_file("--json", args.json)
    result = {"rows": rows(run_tests(args.pytest))}
    write_result(args.json, result)
    print(table(result))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "coverage.json", help="the figures")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --, as in -- -n 2")
    args = parser.parse_args(argv)
    return exit_code("coverage", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
