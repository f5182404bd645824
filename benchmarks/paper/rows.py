"""The rows of a result, written to a file beside it as they come, so that an interrupted run can go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atm_triton.env import environment, write_result

SAME = ("commit", "dirty", "atm_triton", "torch", "cpu", "gpu")  # of the environment, in every row of a file


class Rows:
    """Of one experiment. Each row begins with its key: what tells it from the others. A bar counts them.

    Args:
        path: of the JSON file, which stays as it is until :meth:`finish`; meanwhile rows go to PATH.partial.
        settings: what all rows have in common; a file of others is not gone on with.
        resume: whether the rows that PATH.partial holds, or else the file, are kept.

    Raises:
        ValueError: to resume a file that is of other settings, or another commit, or no result at all.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        own = environment()
        self.settings = json.loads(json.dumps(settings | {name: own[name] for name in SAME}))
        held = next((file for file in (self.partial, path) if resume and file.exists()), None)
        self.rows = [] if held is None else self._held(held)
        self.bar = tqdm(desc=path.stem, unit="row", disable=None)

    def expect(self, number: int) -> None:
        """So many rows, or fewer."""
        self.bar.total = number
        self.bar.refresh()

    def _held(self, path: Path) -> list[dict[str, Any]]:
        try:
            document = json.loads(path.read_text())
            settings, rows = dict(document["settings"]), list(document["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {path} is no result of this experiment; give another --out") from error
        different = [name for name, value in self.settings.items() if settings.get(name) != value]
        if different:
            raise ValueError(
                f"--resume: {path} was made with another {', another '.join(different)}; leave --resume out, or "
                "give another --out"
            )
        return rows

    def add(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of ``key``, measured unless it is at hand."""
        self.bar.set_postfix(key)
        self.bar.update()
        wanted = json.loads(json.dumps(key))
        known = [row for row in self.rows if {name: row.get(name) for name in wanted} == wanted]
        if known:
            return known[0]
        self.rows.append({**key, **measure()})
        write_result(self.partial, self.result())
        return self.rows[-1]

    def finish(self, **about: Any) -> dict[str, Any]:
        """The whole result, written to its file."""
        self.bar.close()
        write_result(self.path, self.result() | about)
        self.partial.unlink(missing_ok=True)
        return self.result() | about

    def result(self) -> dict[str, Any]:
        return {"settings": self.settings, "rows": self.rows}
