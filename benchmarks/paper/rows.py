"""The rows of a result, written to its file as they come, so that an interrupted run can go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atm_triton.env import environment, write_result


class Rows:
    """Of one experiment. Each row begins with its key: what tells it from the others.

    Args:
        path: of the JSON file.
        settings: what all rows have in common; a file of others is not gone on with.
        resume: whether the rows that the file holds are kept.

    Raises:
        ValueError: to resume a file that is of other settings, or another commit, or no result at all.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path = path
        own = environment()
        self.settings = json.loads(json.dumps(settings | {"commit": own["commit"], "atm_triton": own["atm_triton"]}))
        self.rows = self._held() if resume and path.exists() else []

    def _held(self) -> list[dict[str, Any]]:
        try:
            document = json.loads(self.path.read_text())
            settings, rows = dict(document["settings"]), list(document["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {self.path} is no result of this experiment; give another --out") from error
        different = [name for name, value in self.settings.items() if settings.get(name) != value]
        if different:
            raise ValueError(
                f"--resume: {self.path} was made with another {', another '.join(different)}; leave --resume out, or "
                "give another --out"
            )
        return rows

    def add(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of ``key``, measured unless it is at hand."""
        wanted = json.loads(json.dumps(key))
        known = [row for row in self.rows if {name: row.get(name) for name in wanted} == wanted]
        if known:
            return known[0]
        self.rows.append({**key, **measure()})
        write_result(self.path, self.result())
        return self.rows[-1]

    def result(self) -> dict[str, Any]:
        return {"settings": self.settings, "rows": self.rows}
