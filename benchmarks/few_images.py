"""Calibrations from few images beside earlier ones from many: ``python -m benchmarks.few_images``, on the digits.

Each calibration of ``results/`` by an earlier search on 512 images is compared with several new ones for the same goal,
each on a different small set of images. All are judged on the test split as they are. Few images predict the cost less
exactly, so the new ones are also judged with the distances of their thresholds from 1 scaled until they cost as much on
the test split as the earlier one.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from atm_triton import ATMConfig, Target, calibrate
from atm_triton.calibration.costs import Costs
from atm_triton.calibration.fitting import Fitting, Plan
from atm_triton.calibration.measuring import Meter
from atm_triton.calibration.search import Search
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.measure.provenance import check_file, write_result
from benchmarks import RESULTS
from benchmarks.model_with_images import BATCH_SIZE, TRIES

FIELDS = {"cls_only_last": True, "backend": "auto"}


class Judge:
    """Measures configurations on the test images."""

    def __init__(self, number: int) -> None:
        self.model = open_model()
        loader = open_images(self.model, split="test", limit=number, batch_size=BATCH_SIZE)
        batches = [images for images, _ in loader]
        self.costs = Costs(self.model, tuple(batches[0].shape[1:]), True)
        self.meter = Meter(self.model, {"test": batches}, FIELDS)
        self.search = Search(Fitting(self.meter, self.costs, "image"), True, None, 0, lambda least: None)

    def measured(self, config: ATMConfig) -> dict[str, float]:
        measured = self.meter.measure(config, "test")
        error = measured.divergence.std() / len(measured.divergence) ** 0.5
        return {"gflops": measured.gflops.mean().item(), "kl": measured.divergence.mean().item(), "kl_se": error.item()}

    def at(self, config: ATMConfig, gflops: float) -> dict[str, float]:
        """Measure the configuration with its thresholds scaled until the test images cost ``gflops``."""
        thresholds = config.thresholds[: self.costs.merging]
        plan = Plan(
            counts=(),
            thresholds=thresholds,
            split_depth=config.split_depth,
            proportional_attention=config.proportional_attention,
        )
        return self.measured(self.search.settled(plan, gflops, ("test",), TRIES).config)


def earlier() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield the earlier calibrations: on how many images, for which goal in GFLOPs, with which configuration."""
    for path in sorted(RESULTS.glob("digits_calibrate_512*.json")):
        one = json.loads(path.read_text())
        yield f"{one['images']} images", one["target"]["max_gflops"], one["config"]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    judge, per_set = Judge(args.test), args.images
    loader = open_images(judge.model, split="calibration", limit=per_set * args.sets, batch_size=BATCH_SIZE)
    images = torch.cat([batch for batch, _ in loader])
    for name, goal, values in earlier():
        before = judge.measured(ATMConfig(**values))
        yield {"calibration": name, "goal": goal, "config": values, "as_is": before}
        for number in range(args.sets):
            begin, batches = time.process_time(), list(images[number * per_set :][:per_set].split(BATCH_SIZE))
            calibration = calibrate(judge.model, batches, Target(max_gflops=goal), "image", seed=number)
            about = {
                "cpu_seconds": time.process_time() - begin,
                "passes": calibration.passes,
                "family": calibration.family,
            }
            config = calibration.config
            about |= {"as_is": judge.measured(config), "at_cost": judge.at(config, before["gflops"])}
            about |= {"promise": asdict(calibration.promise), "config": asdict(config)}
            yield {"calibration": f"{per_set} images, set {number}", "goal": goal, **about}


def table(result: dict[str, Any]) -> str:
    """A Markdown table with the earlier calibration for each goal and, below it, those on few images."""
    lines = [
        f"| goal, GFLOPs | calibrated on | passes | CPU seconds | GFLOPs of {result['test']} test images | KL there "
        "| KL at the cost of the earlier one |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        effort = f"{row['passes']:,} | {row['cpu_seconds']:.0f}" if "passes" in row else " | "
        same = f"{row['at_cost']['kl']:.1e} ± {row['at_cost']['kl_se']:.0e}" if "at_cost" in row else ""
        kl = f"{row['as_is']['kl']:.1e} ± {row['as_is']['kl_se']:.0e}"
        lines.append(
            f"| {row['goal']:.4f} | {row['calibration']} | {effort} | {row['as_is']['gflops']:.4f} | {kl} | {same} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    if min(args.images, args.test, args.sets) < 1:
        raise ValueError("--images, --test and --sets must be at least 1")
    check_file("--out", args.out)
    rows = []
    for row in measure(args):
        rows.append(row)
        write_result(args.out, {"images": args.images, "test": args.test, "rows": rows})
        judged = row.get("at_cost", row["as_is"])
        print(
            f"{row['calibration']}: {judged['gflops']:.4f} GFLOPs, KL {judged['kl']:.2e} ± {judged['kl_se']:.0e}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="images per calibration (64)")
    parser.add_argument("--sets", type=int, default=3, help="sets of calibration images, one calibration each (3)")
    parser.add_argument("--test", type=int, default=2000, help="test images (2000)")
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_few_images.json")
    args = parser.parse_args(argv)
    return exit_code("few_images", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
