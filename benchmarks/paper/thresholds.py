"""ATM's thresholds for an experiment: of one or more calibrations, each for the cost that it promises."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atm_triton import ATMConfig
from atm_triton.inputs import DIGITS, read_config
from benchmarks.bench import RESULTS

OF_DIGITS = RESULTS / "digits_calibration.json"  # of python -m benchmarks.calibration


@dataclass(frozen=True)
class Calibrated:
    """Thresholds, and the GFLOPs that they promise; None if nothing is said of that."""

    config: ATMConfig
    gflops: float | None


class Thresholds:
    """What --config says, or without it the digits' calibrations at several costs.

    Raises:
        ValueError, OSError: files that hold no thresholds for this model, or none where they must be given.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if args.config:
            self.given = [_of_file(path, args) for path in args.config]
        elif args.model == DIGITS:
            self.given = of_digits(OF_DIGITS)
        else:
            raise ValueError(f"--config FILE: say ATM's thresholds for {args.model}; atm-triton calibrate finds them")
        silent = [number for number, one in enumerate(self.given) if one.gflops is None]
        if silent and len(self.given) > 1:
            name = args.config[silent[0]]
            raise ValueError(f"--config {name} promises no cost; give it alone, or files of atm-triton calibrate")

    def near(self, adapt: str, gflops: float) -> ATMConfig:
        """Those calibrated for a way to adapt, or if there are none for the other, at the nearest cost."""
        own = [one for one in self.given if one.config.adapt == adapt] or self.given
        nearest = min(own, key=lambda one: abs((one.gflops or gflops) - gflops))
        return replace(nearest.config, adapt=adapt)

    def check_depth(self, depth: int) -> None:
        for one in self.given:
            one.config.check_depth(depth)

    def to_list(self) -> Sequence[dict[str, Any]]:
        return [asdict(one) for one in self.given]


def _of_file(path: Path, args: argparse.Namespace) -> Calibrated:
    config = read_config(path, args.model, args.model_kwargs)
    if config.adapt == "static":
        raise ValueError(f"--config {path} is a schedule; want thresholds")
    return Calibrated(config, json.loads(path.read_text()).get("promise", {}).get("gflops"))


def of_digits(path: Path) -> list[Calibrated]:
    """Of a result of ``python -m benchmarks.calibration``."""
    try:
        rows = json.loads(path.read_text())["rows"]
        wanted = [row for row in rows if row["method"] == "calibrated" and row["adapt"] != "static" and "share" in row]
        return [Calibrated(ATMConfig.from_json(json.dumps(row)), row["promise"]["gflops"]) for row in wanted]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of benchmarks.calibration; make it anew, or give --config") from error
