"""Rows of a result, written to a file as they are measured, so that an interrupted run can be resumed."""

import json
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atm_triton.measure.provenance import environment, write_result

SAME = ("commit", "dirty", "atm_triton", "torch", "cpu", "gpu")  # of the environment: the same for all rows of a file
FREE = ("device", "thresholds")  # settings that may change when a result is replaced


class Rows:
    """The rows of one experiment. Each row begins with its key, which identifies it. A progress bar counts them.

    Args:
        path: the JSON file. It stays unchanged until :meth:`finish`; meanwhile rows go to PATH.partial.
        settings: what all rows have in common. A file with other settings is not resumed, and is replaced only if
            nothing but FREE differs.
        resume: whether to keep the rows of PATH.partial or, without it, those of the file.
        same: the fields of the environment that all rows share.

    Raises:
        ValueError: the file to resume has other settings, is of another commit or is no result; or, without ``resume``,
            a result with other settings or an interrupted run is in the way.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool, same: tuple[str, ...] = SAME) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        own = environment()
        self.settings = json.loads(json.dumps(settings | {name: own[name] for name in same}))
        self.rows, self._broken = [], set()
        self.broken: Callable[[], set[str]] = set  # paths of images that could not be read
        held = next((file for file in (self.partial, path) if file.exists()), None)
        if resume and held is not None:
            self._go_on(held)
        elif held is not None:
            self._check_replaced(held)
        self.bar = tqdm(desc=path.stem, unit="row", disable=None)

    def expect(self, number: int) -> None:
        """Set the number of rows, at most, for the progress bar."""
        self.bar.total = number
        self.bar.refresh()

    def _go_on(self, path: Path) -> None:
        try:
            document = json.loads(path.read_text())
            settings, broken = dict(document["settings"]), set(document["not_read"])
            rows = [dict(row) for row in document["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {path} is no result of this experiment; give another --out") from error
        different = [name for name, value in self.settings.items() if settings.get(name) != value]
        if different:
            raise ValueError(
                f"--resume: {path} was made with another {', another '.join(different)}; leave --resume out, or "
                "give another --out"
            )
        self.rows, self._broken = rows, broken

    def _check_replaced(self, path: Path) -> None:
        if path == self.partial:
            raise ValueError(f"{path} is of a run that was interrupted; go on with --resume, or delete it")
        try:
            settings = dict(json.loads(path.read_text())["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of this experiment; give another --out, or delete it") from error
        names = self.settings.keys() - {*SAME, *FREE}
        different = sorted(name for name in names if name not in settings or settings[name] != self.settings[name])
        if different:
            raise ValueError(
                f"{path} is a result with another {', another '.join(different)}; give another --out, or delete it"
            )

    def add(
        self, key: dict[str, Any], measure: Callable[[], dict[str, Any]], broken: Set[str] = frozenset()
    ) -> dict[str, Any]:
        """Return the row of ``key``; measure it unless it is there already. ``broken``: paths of images that another
        process could not read for it."""
        self._broken |= broken
        self.bar.set_postfix(key)
        known = self._known(key)
        if not known:
            self.rows.append({**key, **measure()})
            write_result(self.partial, self.result())
        self.bar.update()
        return known[0] if known else self.rows[-1]

    def has(self, key: dict[str, Any]) -> bool:
        """Whether the row of ``key`` is there already."""
        return bool(self._known(key))

    def _known(self, key: dict[str, Any]) -> list[dict[str, Any]]:
        wanted = json.loads(json.dumps(key))
        return [row for row in self.rows if {name: row.get(name) for name in wanted} == wanted]

    def finish(self) -> dict[str, Any]:
        """Write the complete result to its file and return it."""
        self.bar.close()
        write_result(self.path, self.result())
        self.partial.unlink(missing_ok=True)
        return self.result()

    def result(self) -> dict[str, Any]:
        """The result so far. ``not_read``: images left out, including those of an interrupted run."""
        return {"settings": self.settings, "not_read": sorted(self._broken | self.broken()), "rows": self.rows}
