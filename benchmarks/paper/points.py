"""Tables A2-A5: every operating point that the paper prints for a model, its figures beside ours.

The name pointsA3 runs those of Table A3, for checkpoints that were fine-tuned with merging. The paper's points are for
its own checkpoints on ImageNet-1k. The digits take those of DeiT-S, which has as many tokens and blocks: they show what
thresholds chosen for another model do. As in the paper, all merge one r per batch (adapt="batch").
"""

import argparse
from typing import Any

from atm_triton import ATMConfig
from atm_triton.measure.models import DIGITS
from atm_triton.operating_points import OperatingPoint, operating_points, paper_name
from benchmarks.paper.cells import about, drop, markdown, saved
from benchmarks.paper.methods import measured, of_config
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

STAND_IN = "deit_small_patch16_224"


def arguments() -> argparse.ArgumentParser:
    return options(choosing=False, config=False)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    if not _points(args):
        raise ValueError(f"{args.name}: the paper has no such points for {args.model}")
    return {"points_of": paper_name(name_of(args))}


def name_of(args: argparse.Namespace) -> str:
    return STAND_IN if args.model == DIGITS else args.model


def _points(args: argparse.Namespace) -> list[OperatingPoint]:
    model = paper_name(name_of(args))
    fine_tuned = args.name == "pointsA3"
    return [point for point in operating_points() if point.model == model and point.fine_tuned == fine_tuned]


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    points = _points(args)
    rows.expect(len(points))
    for point in points:
        thresholds = {"alpha": point.alpha, "beta": point.beta, "theta_min": point.theta_min}
        nothing = ATMConfig(adapt="static", schedule=(0,) * subject.depth)
        config = nothing if point.alpha is None else ATMConfig(**thresholds)
        title = ", ".join(f"{name} {value}" for name, value in thresholds.items() if value is not None) or "no merging"
        key = {"table": point.table, **thresholds, "paper_gflops": point.gflops, "paper_top1": point.top1}
        rows.add(key, lambda config=config, title=title: measured(subject, of_config(config), title))


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [
        f"{about(result['rows'])}: alpha, beta, theta_min of {result['settings']['points_of']}",
        "the paper's GFLOPs, top-1",
        "GFLOPs",
        "saved",
        "top-1",
        "KL",
    ]
    body = []
    for row in result["rows"]:
        quality = row["overall"]
        merging = row["alpha"] is not None
        curve = f"{row['alpha']}, {row['beta']}, {row['theta_min']}" if merging else "no merging"
        curve += f" ({row['table']})"
        printed = f"{row['paper_gflops']:.2f}, {row['paper_top1']:.2f} %"
        body.append([curve, printed, f"{quality['gflops']:.3f}", saved(row), drop(row), f"{quality['kl']:.1e}"])
    return markdown(head, body)
