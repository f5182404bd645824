"""ATM_TRITON_AUTOTUNE=1: look for configurations that are faster than those of the tables, and print them.

Beside every kernel stand its table, ``<kernel>_table``, from a shape to a configuration, and ``<kernel>_candidates``,
what a search may try instead. Off, which is the normal case, a launcher takes what the table says. On, the first launch
of every key, the table's arguments with sizes rounded up to powers of two, times all candidates and goes on with the
fastest; when Python ends, what was found is printed as lines for the tables.
"""

import atexit
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.errors import TritonError

Config = dict[str, int]
Launch = Callable[..., Any]  # takes a configuration by its names
RUNS = 3  # by the interpreter, whose times say little about a GPU


def switch(value: str | None) -> bool:
    """Whether the environment variable asks for a search."""
    if value not in (None, "", "0", "1"):
        raise ValueError(f"got ATM_TRITON_AUTOTUNE={value}; want 1 (search), 0 or nothing (take the tables)")
    return value == "1"


SEARCH = switch(os.environ.get("ATM_TRITON_AUTOTUNE"))


@dataclass(frozen=True)
class Found:
    """What a search found, in microseconds; infinite for a table's configuration that does not fit this chip."""

    name: str
    key: dict[str, Any]
    table: Config
    table_us: float
    best: Config
    best_us: float
    ran: int
    tried: int

    def line(self) -> str:
        key = " ".join(f"{name}={value}" for name, value in self.key.items())
        return (
            f"atm-triton tune: {self.name} {key}: table {json.dumps(self.table)} {self.table_us:.1f} us, "
            f"best {json.dumps(self.best)} {self.best_us:.1f} us ({self.ran} of {self.tried} ran)"
        )

    def entry(self) -> str:
        """Two lines for the body of the table."""
        tests = " and ".join(_test(name, value) for name, value in self.key.items())
        comment = f"{self.best_us:.1f} us, was {self.table_us:.1f}"
        return f"    if {tests}:  # {comment}\n        return {json.dumps(self.best)}"


def _test(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {'in' if isinstance(value, range) else '=='} {value}"


_found: dict[tuple, Found] = {}


def like(size: int) -> range:
    """The sizes that share a search with this one: those with the same next power of two."""
    top = triton.next_power_of_2(size)
    return range(top // 2 + 1, top + 1)


def every(**choices: Iterable[int]) -> list[Config]:
    """All combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def run(name: str, key: dict[str, Any], config: Config, candidates: Callable[[], list[Config]], launch: Launch) -> None:
    """Launch with the table's ``config``; where a search is asked for, with the fastest for this key."""
    launch(**(tuned(name, key, config, candidates(), launch) if SEARCH else config))


def tuned(name: str, key: dict[str, Any], config: Config, candidates: list[Config], launch: Launch) -> Config:
    """The fastest of the table's ``config`` and the ``candidates`` for this key: searched once a process.

    ``launch`` may be called any number of times, and what the last call wrote counts for nothing: the caller launches
    once more, with what is returned. While a CUDA graph is recorded nothing can be timed: a new key takes the table's.
    """
    at = (name, *key.items())
    if at not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return config
        if not _found:
            atexit.register(report)
        _found[at] = _search(name, key, config, candidates, launch)
        print(_found[at].line(), file=sys.stderr, flush=True)
    return _found[at].best


def report() -> None:
    """All that was found, table by table, ready to be pasted."""
    found = sorted(_found.values(), key=lambda found: found.name)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: interpreted"
    for name, entries in itertools.groupby(found, key=lambda found: found.name):
        print(f"# first in {name}_table: {where}, triton {triton.__version__}", file=sys.stderr)
        print("\n".join(entry.entry() for entry in entries), file=sys.stderr)


def _search(name: str, key: dict[str, Any], config: Config, candidates: list[Config], launch: Launch) -> Found:
    times, failures = [], []
    tried = [config, *(candidate for candidate in candidates if candidate != config)]
    for candidate in tried:
        try:
            times.append(_microseconds(launch, candidate))
        except (TritonError, RuntimeError) as error:
            if not _unfit(error):
                raise
            times.append(math.inf)
            failures.append(error)
    if len(failures) == len(tried):
        raise failures[0]
    best = min(range(len(tried)), key=times.__getitem__)  # of equal ones the first: the table's
    return Found(name, key, config, times[0], tried[best], times[best], len(tried) - len(failures), len(tried))


def _unfit(error: Exception) -> bool:
    """Whether a candidate does not compile or does not fit the chip; anything else is a fault to be seen."""
    return isinstance(error, TritonError) or "PassManager::run failed" in str(error)


def _microseconds(launch: Launch, config: Config) -> float:
    """The median time of a launch."""
    if not triton.knobs.runtime.interpret:
        return 1e3 * triton.testing.do_bench(partial(launch, **config), warmup=10, rep=50, return_mode="median")
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        launch(**config)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)
