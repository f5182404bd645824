"""Table 4: methods that are trained, beside ATM with and without training.

All begin with the same weights and see the same images equally often, augmented alike. Each has its authors' losses,
modules and rates as far as they are known (ATM has the paper's), with fewer epochs; ``benchmarks/baselines`` says what
is our reading, such as IA-RED²'s training. For all methods the last block computes the class token alone, which alone
saves some FLOPs; for "unmerged" it computes all tokens, as timm's. "All tokens last" compares them alike. The paper's
rows do not share one protocol: some are trained from scratch, some fine-tuned, some with a teacher. ATM's thresholds
come from --config (the digits: from ``python -m benchmarks.calibration``), scaled to the paper's shares of the FLOPs.
Each training has its own run folder beside the result, which ``--resume`` continues. All folders are deleted once the
table is complete.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from atm_triton import ATMConfig
from benchmarks.baselines import Baseline, baseline
from benchmarks.baselines.avit import AViT
from benchmarks.baselines.evit import EViT
from benchmarks.paper.cells import about, markdown, over_seeds, percent
from benchmarks.paper.finetuned import (
    check_labelled,
    free_at,
    minutes_head,
    training_options,
    training_settings,
    tuned,
    unfinished,
    unmerged,
)
from benchmarks.paper.jobs import Job, add_all
from benchmarks.paper.methods import at_cost
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

FREE = "atm, training-free"
WHOLE = 4.6  # GFLOPs of DeiT-S in the paper


class Published(NamedTuple):
    """A row of the paper's Table 4: DeiT-S on ImageNet, hours on one A6000. None: a dash in the paper, or no row."""

    gflops: float | None = None
    top1: float | None = None
    epochs: int | None = None
    hours: float | None = None


ROWS = {  # in the paper's order
    "unmerged": Published(4.6, 79.8),
    "dynamicvit": Published(2.9, 79.3, 30, 43),
    "iared2": Published(3.2, 79.1, 90),
    "evovit": Published(3.0, 79.4, 300, 126),
    "evit": Published(3.0, 79.5, 300, 95),
    "evit, keep rate falls": Published(),
    "avit": Published(3.6, 78.6, 100, 65),
    "tome": Published(2.7, 79.4, 300, 87),
    "bat": Published(3.0, 79.6, 300),
    "mctf": Published(2.6, 80.1, 30, 39),
    "ltmp": Published(),
    FREE: Published(3.0, 79.7, 0),
    "atm": Published(2.6, 79.8, 30, 11),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options(), training_options([0, 1, 2])])
    parser.add_argument(
        "--methods", nargs="+", default=list(ROWS), choices=ROWS, metavar="NAME", help="some of " + "; ".join(ROWS)
    )
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    if len(args.adapt) > 1:
        raise ValueError("--adapt: this table has one row of ATM; give one")
    return {"methods": args.methods, "adapt": args.adapt} | training_settings(args)


def of_model(subject: Subject) -> dict[str, Callable[[], Baseline]]:
    """Each method as published for DeiT-S, with its blocks at the same shares of the depth."""
    depth, alone = subject.depth, {"cls_only_last": True}
    quarters = tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
    third, two = depth // 3, 2 * depth // 3
    heads = subject.model.blocks[0].attn.num_heads
    return {
        "dynamicvit": lambda: baseline("dynamicvit", blocks=quarters, **alone),
        "iared2": lambda: baseline("iared2", blocks=(0, third, two), heads=heads, **alone),
        "evovit": lambda: baseline("evovit", blocks=(third, two), **alone),
        "evit": lambda: baseline("evit", blocks=quarters, **alone),
        "evit, keep rate falls": lambda: EViT(blocks=quarters, falls=True, **alone),
        "avit": lambda: AViT.fitted(subject.model, subject.loader, **alone),
        "tome": lambda: baseline("tome", r=13, **alone),
        "bat": lambda: baseline("bat", blocks=quarters, **alone),
        "mctf": lambda: baseline("mctf", r=16, **alone),
        "ltmp": lambda: baseline("ltmp", **alone),
    }


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    check_labelled(subject, args)
    rows.expect(sum(1 if name == FREE else len(args.seeds) for name in args.methods))
    runs = unfinished(rows, args)
    if FREE in args.methods:
        share = 1 - ROWS[FREE].gflops / WHOLE
        rows.add({"method": FREE, "seed": None}, lambda: free_at(subject, args.adapt[0], share))
    jobs = []
    for seed in args.seeds:
        for name in (name for name in args.methods if name != FREE):
            at = runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            jobs.append(Job(key={"method": name, "seed": seed}, measure=trained, arguments=(name, seed, at)))
    add_all(rows, subject, args, jobs)
    shutil.rmtree(runs, ignore_errors=True)


def trained(subject: Subject, args: argparse.Namespace, name: str, seed: int, at: Path) -> dict[str, Any]:
    """The row of a method, trained."""
    if name == "atm":
        way = _atm(subject, args)
    else:
        way = unmerged(subject) if name == "unmerged" else of_model(subject)[name]()
    if way is None:
        return {"missing": "no thresholds come close to the paper's share of the FLOPs"}
    return {"settings": repr(way), **tuned(subject, args, way, seed, at)}


def _atm(subject: Subject, args: argparse.Namespace) -> ATMConfig | None:
    way = at_cost(subject, f"atm, {args.adapt[0]}", subject.goal(1 - ROWS["atm"].gflops / WHOLE))
    return None if way is None else ATMConfig(**way.settings["config"])


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with means and standard deviations over the seeds."""
    epochs = result["settings"]["recipe"]["epochs"]
    head = [about(result["rows"]), "GFLOPs", "all tokens last", "top-1", "KL", "epochs", minutes_head(result)]
    head += ["the paper, DeiT-S: GFLOPs", "top-1", "epochs", "hours"]
    body = []
    for name in [name for name in ROWS if any(row["method"] == name for row in result["rows"])]:
        published = ["-" if value is None else f"{value}" for value in ROWS[name]]
        published[1] = percent(ROWS[name].top1).replace("0 %", " %")
        mine = [row for row in result["rows"] if row["method"] == name and "missing" not in row]
        if not mine:
            body.append([name, "no setting at that cost", *[""] * 5, *published])
            continue
        costs = [over_seeds([row["overall"]["gflops"] for row in mine], 3)]
        costs.append(over_seeds([row["gflops_all_tokens_last"] for row in mine], 3))
        top1 = f"{over_seeds([row['overall']['top1'] for row in mine])} %"
        spent = (
            [str(epochs), over_seeds([row["seconds"] / 60 for row in mine], 1)] if "seconds" in mine[0] else ["0", "-"]
        )
        kl = f"{mean(row['overall']['kl'] for row in mine):.1e}"
        body.append([name, *costs, top1, kl, *spent, *published])
    return markdown(head, body)
