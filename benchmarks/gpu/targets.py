"""Targets: what was wanted, what was measured, and whether that is enough. A missed one is a result, not a failure."""

import operator
from typing import Any

from benchmarks.gpu.setting import Setting

Rows = list[dict[str, Any]]


def run(setting: Setting, section: dict[str, Any], results: dict[str, Any]) -> None:
    kernels = results.get("kernels", {}).get("rows", [])
    engine = results.get("engine", {}).get("rows", [])
    section["rows"] = [*of_engine(engine), *of_kernels(kernels)]


def target(what: str, value: float | None, compare: str, wanted: float) -> dict[str, Any]:
    """``met`` is None where nothing was measured."""
    enough = {"<=": operator.le, ">=": operator.ge}[compare]
    met = None if value is None else enough(value, wanted)
    return {"target": what, "value": value, "compare": compare, "wanted": wanted, "met": met}


def pick(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    """The first row with these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def of_kernels(rows: Rows) -> Rows:
    """Of the first rows (the largest batch, DeiT-S): time over that of the bytes at the measured copy bandwidth."""
    targets = []
    for operation, most in (("match", 1.5), ("add_merge_norm", 1.3)):
        row = pick(rows, operation=operation)
        what = f"{operation}: time over that of its bytes" + (f", B={row['B']} {row['dtype']}" if row else "")
        targets.append(target(what, 1 / row["of_copy"] if row else None, "<=", most))
    return targets


def of_engine(rows: Rows) -> Rows:
    """Of every way to adapt, without torch.compile."""
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
