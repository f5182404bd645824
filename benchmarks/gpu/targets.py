"""Targets: the wanted value, the measured value, and whether it is met. A missed target is a result, not a failure."""

import operator
from typing import Any

from benchmarks.gpu.setting import Setting

Rows = list[dict[str, Any]]


def run(setting: Setting, section: dict[str, Any], results: dict[str, Any]) -> None:
    kernels = results.get("kernels", {}).get("rows", [])
    engine = results.get("engine", {}).get("rows", [])
    section["rows"] = [*of_engine(engine), *of_kernels(kernels)]


def target(what: str, value: float | None, compare: str, wanted: float) -> dict[str, Any]:
    """A row for one target; ``met`` is None if nothing was measured."""
    enough = {"<=": operator.le, ">=": operator.ge}[compare]
    met = None if value is None else enough(value, wanted)
    return {"target": what, "value": value, "compare": compare, "wanted": wanted, "met": met}


def pick(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    """The first row with these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def of_kernels(rows: Rows) -> Rows:
    """Targets for kernels, by the first rows (DeiT-S, largest batch): time over that of its bytes at copy bandwidth."""
    targets = []
    for operation, most in (("match", 1.5), ("add_merge_norm", 1.3)):
        row = pick(rows, operation=operation)
        what = f"{operation}: time over that of its bytes" + (f", B={row['B']} {row['dtype']}" if row else "")
        targets.append(target(what, 1 / row["of_copy"] if row else None, "<=", most))
    return targets


def of_engine(rows: Rows) -> Rows:
    """Targets for the engine in every way to adapt, from processes without torch.compile."""
    targets = []
    for row in rows:
        if row["session"] or "whole" not in row:
            continue
        name = f"engine, {row['name']}, {row['model']} B={row['batch']}"
        targets.append(target(f"{name}: time(timm) / time", row["of_timm"], ">=", 1.0))
        if row["batch"] >= 64:
            targets.append(target(f"{name}: time / time(one graph)", row["whole"], "<=", 1.1))
            targets.append(target(f"{name}: time(bound in one graph) / time", row["of_bound"], ">=", 0.97))
    return targets or [target("engine", None, ">=", 0.97)]
