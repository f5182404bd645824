"""What other libraries do to a patched model: ``python -m benchmarks.integration``.

It runs every test marked ``works_with(library, what)``, including those in ``tests/integration``, and writes what
passed, with the libraries' versions, for the table in ``docs/works-with.md``.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from atm_triton.cli.bad_input import Parser
from atm_triton.measure.provenance import write_result
from benchmarks import RESULTS

TESTS = Path(__file__).parents[1] / "tests"


class Shown:
    """A pytest plugin that notes the collected tests and every test that did not pass."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], None] = {}
        self.not_passed: list[str] = []

    @pytest.hookimpl(trylast=True)  # after -m has deselected the others
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.rows.update({mark.args: None for mark in item.iter_markers("works_with")})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.not_passed.append(report.nodeid)


def table(result: dict[str, Any]) -> str:
    """A row for each library: its version, and what the tests show."""
    shown: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        shown.setdefault((row["library"], row["version"]), []).append(row["what"])
    lines = ["| library | version | shown |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {of} | {'; '.join(what)} |" for (name, of), what in shown.items()])


def main(tests: Path = TESTS, path: Path = RESULTS / "integration.json") -> int:
    """Run the marked tests in ``tests``; write ``path`` if all passed and none was skipped. Returns the exit code."""
    shown = Shown()
    everywhere = ["-o", "norecursedirs=.*", str(tests)]  # also in tests/integration
    code = pytest.main(["-q", "-m", "works_with", "--durations", "10", *everywhere], plugins=[shown])
    if code or shown.not_passed or not shown.rows:
        print("not written: " + (", ".join(shown.not_passed) or "nothing was tested"), file=sys.stderr)
        return int(code) or 1
    rows = [{"library": library, "version": version(library), "what": what} for library, what in sorted(shown.rows)]
    write_result(path, {"rows": rows})
    return 0


if __name__ == "__main__":
    Parser(prog="python -m benchmarks.integration", description=__doc__.split("\n\n")[1]).parse_args()
    sys.exit(main())
