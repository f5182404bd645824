"""One r per batch against an r for each image: ``python -m benchmarks.adaptivity``, on the digits.

It compares three configurations at each of eight costs. Two take the thresholds calibrated for "image" and for "batch"
at the nearest of four costs, with their distances from 1 scaled until the calibration split costs as much. The third is
a static copy: each block's r is the mean that it has with ``adapt="image"``. All are judged on the test split, and also
on the tenth of its images that keeps the fewest tokens and on the tenth that keeps the most.
"""

import argparse
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from atm_triton import ATMConfig
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.evaluate import evaluate
from atm_triton.measure.provenance import check_file, write_result
from benchmarks import RESULTS
from benchmarks.model_with_images import ModelWithImages
from benchmarks.paper.methods import scaled
from benchmarks.paper.thresholds import Thresholds

SHARES = (0.30, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70)


def at_share(subject: ModelWithImages, adapt: str, share: float) -> ATMConfig:
    """Scale the calibrated thresholds until the calibration images save this share of the MACs."""
    goal = subject.goal(share)
    config = scaled(subject, Thresholds.of_digits().near(adapt, goal), goal)
    if config is None:
        raise ValueError(f"{share:.0%} cannot be saved by these thresholds")
    return config


def static_copy(subject: ModelWithImages, config: ATMConfig) -> ATMConfig:
    """The static configuration that merges in each block the mean r of ``config``, rounded."""
    entering = evaluate(subject.model, subject.loader, config, title=None).tokens
    left = [round(mean) for mean in entering]
    schedule = (*(before - after for before, after in pairwise(left)), 0)
    return replace(config, adapt="static", thresholds=None, schedule=schedule)


def measure(subject: ModelWithImages) -> list[dict[str, Any]]:
    rows = []
    for share in SHARES:
        image = at_share(subject, "image", share)
        for config in (image, at_share(subject, "batch", share), static_copy(subject, image)):
            rows.append(subject.judged(config, adapt=config.adapt, share=share))
            quality = rows[-1]["overall"]
            print(f"{share:.0%} {config.adapt}: saved {rows[-1]['saved']:.3f}, {quality['top1']:.2f} %", flush=True)
    return rows


def run(args: argparse.Namespace) -> None:
    if min(args.images, args.test) < 1:
        raise ValueError("--images and --test must be at least 1")
    check_file("--out", args.out)
    write_result(args.out, {"rows": measure(ModelWithImages.digits(args.images, args.test))})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024, help="calibration images (1024)")
    parser.add_argument("--test", type=int, default=4000, help="test images (4000)")
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_adaptivity.json")
    args = parser.parse_args(argv)
    return exit_code("adaptivity", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
