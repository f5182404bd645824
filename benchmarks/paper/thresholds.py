"""ATM's thresholds for an experiment: from one or more calibrations, each for the cost that it promises."""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atm_triton import ATMConfig
from atm_triton.measure.configurations import read_config
from atm_triton.measure.models import DIGITS
from benchmarks import RESULTS

OF_DIGITS = RESULTS / "digits_calibration.json"  # from python -m benchmarks.calibration


@dataclass(frozen=True)
class Calibrated:
    """Thresholds and the GFLOPs that they promise; None if they promise none."""

    config: ATMConfig
    gflops: float | None


@dataclass(frozen=True)
class Thresholds:
    """Calibrations of one model, at one cost or several."""

    given: list[Calibrated]

    @classmethod
    def asked(cls, args: argparse.Namespace) -> "Thresholds":
        """The thresholds of --config; without it, those of the digits.

        Raises:
            ValueError, OSError: a file holds no thresholds for this model, or --config is missing and needed.
        """
        if not args.config:
            if args.model != DIGITS or args.checkpoint is not None or args.model_kwargs:
                raise ValueError(
                    f"--config FILE: give ATM's thresholds for {args.model}; atm-triton calibrate finds them"
                )
            return cls.of_digits()
        given = [_of_file(path, args) for path in args.config]
        for path, one in zip(args.config, given, strict=True):
            if one.gflops is None and len(given) > 1:
                raise ValueError(f"--config {path} promises no cost; give it alone, or files of atm-triton calibrate")
        return cls(given)

    @classmethod
    def of_digits(cls, path: Path = OF_DIGITS) -> "Thresholds":
        """The thresholds that ``python -m benchmarks.calibration`` found."""
        try:
            rows = [row for row in json.loads(path.read_text())["rows"] if row["method"] == "calibrated"]
            rows = [row for row in rows if row["adapt"] != "static" and "share" in row]
            if {row["adapt"] for row in rows} != {"batch", "image"}:
                raise ValueError("rows are missing")
            return cls([Calibrated(ATMConfig.from_json(json.dumps(row)), row["promise"]["gflops"]) for row in rows])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result of benchmarks.calibration; make it anew, or give --config"
            ) from error

    def near(self, adapt: str, gflops: float) -> ATMConfig | None:
        """The thresholds calibrated for this way to adapt at the nearest cost; None if there are none for it."""
        own = [one for one in self.given if one.config.adapt == adapt]
        return min(own, key=lambda one: abs((one.gflops or gflops) - gflops)).config if own else None

    def of_either(self, adapt: str, gflops: float) -> ATMConfig:
        """As :meth:`near`, with the thresholds of the other way to adapt if there are none for this one."""
        other = "batch" if adapt == "image" else "image"
        return self.near(adapt, gflops) or replace(self.near(other, gflops), adapt=adapt)

    def check_depth(self, depth: int) -> None:
        for one in self.given:
            one.config.check_depth(depth)

    def to_list(self) -> list[dict[str, Any]]:
        return [asdict(one) for one in self.given]


def _of_file(path: Path, args: argparse.Namespace) -> Calibrated:
    config = read_config(path, args.model, args.model_kwargs, args.checkpoint)
    if config.adapt == "static":
        raise ValueError(f"--config {path} is a schedule; want thresholds")
    promise = json.loads(path.read_text()).get("promise") or {}
    return Calibrated(config, promise.get("gflops"))
