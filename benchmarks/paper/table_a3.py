"""Table A3: ATM fine-tuned at the paper's costs, beside ATM without training.

The costs are the shares of the unmerged model's FLOPs in the paper's Table A3 for the model; the digits take those of
DeiT-S. Thresholds come from --config (the digits: from ``python -m benchmarks.calibration``), scaled to each cost
before training. The rest is as in ``finetuned``. (``pointsA3`` runs checkpoints that are already fine-tuned, with the
paper's own thresholds.)
"""

import argparse
from typing import Any

from atm_triton.operating_points import OperatingPoint, operating_points, paper_name
from benchmarks.paper import finetuned
from benchmarks.paper.cells import about, markdown, over_seeds
from benchmarks.paper.finetuned import FREE, TUNED, UNMERGED, minutes_head, training_options
from benchmarks.paper.points import name_of
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

POINTS = 4


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options(), training_options([0, 1, 2])])
    parser.add_argument("--points", type=int, default=POINTS, help=f"of the paper's, from dear to cheap ({POINTS})")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    args.shares = list(chosen(args))
    return {"points": args.points} | finetuned.settings(args)


def chosen(args: argparse.Namespace) -> dict[float, OperatingPoint]:
    """The chosen points of the paper, evenly spaced among those of the model, by the share of the FLOPs they save."""
    model = paper_name(name_of(args))
    points = [point for point in operating_points() if point.model == model and point.fine_tuned]
    if not points:
        raise ValueError(f"{args.name}: the paper has no such points for {args.model}")
    whole, merging = points[0], points[1:]
    if not 1 <= args.points <= len(merging):
        raise ValueError(f"--points {args.points}: the paper has {len(merging)} of {model}; give 1 to {len(merging)}")
    steps = max(args.points - 1, 1)
    some = [merging[(len(merging) - 1) * (n if args.points > 1 else 1) // steps] for n in range(args.points)]
    by_share = {round(1 - point.gflops / whole.gflops, 4): point for point in some}
    if len(by_share) < len(some):
        raise ValueError(f"{args.name}: some of the paper's points for {model} cost the same; give fewer --points")
    return by_share


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    finetuned.measure(subject, rows, args)
    for share, point in chosen(args).items():
        for row in rows.rows:
            if row["share"] == share:
                row |= {"paper_gflops": point.gflops, "paper_top1": point.top1}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with means and standard deviations over the seeds."""
    head = [
        about(result["rows"]),
        "adapt",
        "GFLOPs",
        "top-1, training-free",
        "top-1, fine-tuned",
        "epochs",
        minutes_head(result),
    ]
    head += ["the paper: GFLOPs", "top-1"]
    epochs, body = result["settings"]["recipe"]["epochs"], []
    for share, adapt in sorted({(row["share"], row["adapt"] or "") for row in result["rows"]}):
        own = [row for row in result["rows"] if (row["share"], row["adapt"] or "") == (share, adapt)]
        free, trained = ([row for row in own if row["method"] in names] for names in ([FREE], [TUNED, UNMERGED]))
        paper = [f"{own[0]['paper_gflops']}", f"{own[0]['paper_top1']} %"] if "paper_gflops" in own[0] else ["-", "-"]
        first = [f"-{100 * share:.1f} %" if adapt else UNMERGED, adapt or "-"]
        if not trained:
            body.append([*first, free[0]["missing"], *[""] * 4, *paper])
            continue
        costs, top1 = ([row["overall"][name] for row in trained] for name in ("gflops", "top1"))
        untrained = (
            f"{free[0]['overall']['top1']:.2f} %" if free else f"{trained[0]['overall']['top1_unpatched']:.2f} %"
        )
        minutes = over_seeds([row["seconds"] / 60 for row in trained], 1)
        body.append([*first, over_seeds(costs, 3), untrained, f"{over_seeds(top1)} %", str(epochs), minutes, *paper])
    return markdown(head, body)
