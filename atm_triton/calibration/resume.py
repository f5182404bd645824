"""Keeps measurements in a file, one per line, so that they survive an interrupted run."""

import json
import math
from pathlib import Path
from typing import Any

from atm_triton.measure.distributed import from_first, rank
from atm_triton.measure.provenance import lock


class Notes:
    """Lists of numbers or None, each under a name. Under torchrun only the first process reads and writes the file; all
    processes know what it read. As a context manager it holds the file, so that no other calibration writes there, and
    in the end removes one that is empty or ``over``: nothing is left to continue.

    Args:
        path: the file; None: nothing is kept.

    Raises:
        ValueError: another process is writing the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._file = path, None
        if path is not None and rank() == 0:
            self._file = path.open("a")
            lock(self._file.fileno(), path)
        self._known: dict[str, list[Any]] = {}
        self.over = False

    def __enter__(self) -> "Notes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None and self._file is not None:
            empty = self._file.tell() == 0
            self._file.close()
            if self.over or empty:
                self._path.unlink(missing_ok=True)

    def belong(self, mark: list[float]) -> None:
        """Read what an interrupted calibration has left. ``mark``: numbers that identify the model and the images; the
        file's own must equal them to 1e-5, relative.

        Raises:
            ValueError: the file belongs to another model or other images, or is damaged.
        """
        lines = from_first([] if self._path is None or self._file is None else _lines(self._path))
        if not lines:
            lines = [mark]
        elif len(lines[0]) != len(mark) or not all(map(_close, lines[0], mark)):
            raise ValueError(
                f"{self._path} is from another calibration that was interrupted; delete it, or choose another --out"
            )
        self._known = {name: values for name, *values in lines[1:]}
        if self._file is not None:
            self._file.truncate(0)
        self._write(*lines)

    def get(self, name: str) -> list[Any] | None:
        return self._known.get(name)

    def add(self, name: str, values: list[Any]) -> None:
        self._known[name] = values
        self._write([name, *values])

    def _write(self, *lines: list) -> None:
        if self._file is None:
            return
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()


def _lines(path: Path) -> list[list]:
    """The complete lines of the file; the last one may be cut short."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, or choose another --out") from error
    if not all(isinstance(line, list) and line for line in lines):
        raise ValueError(f"{path} holds no measurements; delete it, or choose another --out")
    return lines


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)
