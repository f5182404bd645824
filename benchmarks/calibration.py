"""Calibrated thresholds compared with the alternatives: ``python -m benchmarks.calibration``, on the digits.

For each share of the MACs and each way to adapt it runs :func:`atm_triton.calibrate` and takes the best of 200 random
curves of the paper on the same images. Three static schedules stand beside them: a constant r (ToMe), the best
increasing r and the best decreasing r. All are judged on the test split. Rows that the same code has measured, and
those that --keep names, are not measured again. Under torchrun the processes share the images.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atm_triton import Target, calibrate
from atm_triton.calibration.fitting import Plan
from atm_triton.calibration.search import ranked
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.distributed import rank, start, stop
from atm_triton.measure.provenance import check_file, environment, write_result
from benchmarks import RESULTS
from benchmarks.model_with_images import BATCH_SIZE, ModelWithImages

SHARES = (0.62, 0.55, 0.45, 0.30)  # the hardest first
ADAPT = ("image", "batch", "static")
AGREEMENT = 0.995
OWN_CODE = ("benchmarks/model_with_images.py", "benchmarks/calibration.py")
SLOPES = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)  # at 1, r goes from 0 to twice its mean; above 1 some blocks have r = 0
RAMPS = {
    "ToMe": (0,),  # constant, except for single tokens that meet the cost
    "increasing": SLOPES,
    "decreasing": tuple(-slope for slope in SLOPES),
}


LINES = {
    "calibrated": ("ATM, calibrated", "C0"),
    "curve": ("the paper's curve", "C9"),
    "ToMe": ("ToMe, constant r", "C1"),
}


def calibrated(subject: ModelWithImages, adapt: str, target: Target) -> dict[str, Any]:
    begin = time.perf_counter()
    calibration = calibrate(subject.model, subject.loader, target, adapt)
    about = {"promise": asdict(calibration.promise), "family": calibration.family, "passes": calibration.passes}
    return subject.judged(calibration.config, **about, seconds=time.perf_counter() - begin)


def given(subject: ModelWithImages, slopes: tuple[float, ...], goal: float) -> dict[str, Any]:
    """Judge the best of the schedules whose r changes with depth by ``slopes``, with ToMe's alternate groups."""
    search, merging = subject.search("static"), subject.costs.merging
    ramps = []
    for slope in slopes:
        counts = tuple(max(1 + slope * (2 * block / (merging - 1) - 1), 0) for block in range(merging))
        counts = subject.costs.scaled(counts, goal)
        plan = Plan(counts=counts, split_depth=subject.depth, proportional_attention=subject.proportional)
        ramps.append(search.fitting.run(plan, "fit"))
    return subject.judged(ranked(ramps, goal)[0].config)


def cells(shares: list[float]) -> Iterator[dict[str, Any]]:
    """The keys of all rows, in the order in which they are measured."""
    yield {"method": "calibrated", "adapt": "image", "min_agreement": AGREEMENT}
    for share in shares:
        for adapt in ADAPT:
            yield {"method": "calibrated", "adapt": adapt, "share": share}
            yield {"method": "curve", "adapt": adapt, "share": share}
        for name in RAMPS:
            yield {"method": name, "adapt": "static", "share": share}


def measured(subject: ModelWithImages, cell: dict[str, Any], draws: int) -> dict[str, Any]:
    if "min_agreement" in cell:
        return calibrated(subject, cell["adapt"], Target(min_agreement=cell["min_agreement"]))
    goal = subject.goal(cell["share"])
    if cell["method"] == "calibrated":
        return calibrated(subject, cell["adapt"], Target(max_gflops=goal))
    if cell["method"] == "curve":
        return subject.judged(subject.best_curve(cell["adapt"], goal, draws))
    return given(subject, RAMPS[cell["method"]], goal)


def known(path: Path, settings: dict[str, Any], keep: list[str]) -> list[dict[str, Any]]:
    """Read the rows of an earlier, perhaps interrupted run: all of them if the same code made them, otherwise those of
    the methods in ``keep``. Each row gets the commit that measured it."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text())
        made, rows = document["environment"], document["rows"]
        same, clean = document["settings"] == settings, not made["dirty"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out {path} is no result of this experiment; give another") from error
    if not same:
        raise ValueError(f"--out {path} was made with other settings; give another, or delete it")
    if not clean or environment()["dirty"]:
        return []
    rows = rows if _same_code(made["commit"]) else [row for row in rows if row["method"] in keep]
    return [{"commit": made["commit"]} | row for row in rows]


def _same_code(commit: str) -> bool:
    command = ["git", "diff", "--quiet", commit, "--", "atm_triton", "benchmarks/digits", *OWN_CODE]
    return subprocess.run(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL).returncode == 0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy and KL against GFLOPs, with a colour for each method and a line for each way to adapt."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    accuracy, change = figure.subplots(1, 2)
    lines = {"image": "o-", "batch": "s--", "static": "^:"}
    for method, (label, colour) in LINES.items():
        for adapt, line in lines.items():
            chosen = [r["overall"] for r in rows if r["method"] == method and r["adapt"] == adapt and "share" in r]
            chosen.sort(key=lambda quality: quality["gflops"])
            for panel, name in ((accuracy, "top1"), (change, "kl")):
                at = [quality["gflops"] for quality in chosen], [quality[name] for quality in chosen]
                panel.plot(*at, line, markersize=4, color=colour, label=f"{label}, {adapt}" if chosen else None)
    accuracy.axhline(rows[0]["overall"]["top1_unpatched"], color="0.8", linewidth=1, zorder=0)
    accuracy.set_ylabel("top-1, % (grey: the unmerged model)", fontsize=9)
    change.set_ylabel("KL(unmerged || merged), nats (log scale)", fontsize=9)
    change.set_yscale("log")
    for panel in (accuracy, change):
        panel.set_xlabel("GFLOPs per image")
    images = rows[0]["overall"]["images"]
    figure.suptitle(f"digits, {images} test images, batches of {BATCH_SIZE}, no training", fontsize=10)
    figure.legend(*change.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, handlelength=4)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    if min(args.draws, args.images, args.test) < 1:
        raise ValueError("--draws, --images and --test must be at least 1")
    if not all(0 < share < 1 for share in args.shares):
        raise ValueError("--shares want numbers between 0 and 1")
    check_file("--out", args.out)
    start("cpu")
    settings = {"draws": args.draws, "images": args.images, "test": args.test, "shares": args.shares}
    partial = args.out.with_name(f"{args.out.name}.partial")
    before = known(partial if partial.exists() else args.out, settings, args.keep)
    subject, rows = ModelWithImages.digits(args.images, args.test), []
    for cell in cells(args.shares):
        kept = [row for row in before if {name: row.get(name) for name in cell} == cell]
        if kept:
            rows.append(kept[0])
            continue
        rows.append({"commit": environment()["commit"], **cell, **measured(subject, cell, args.draws)})
        if rank() == 0:
            write_result(partial, {"settings": settings, "rows": rows + [row for row in before if row not in rows]})
            quality = rows[-1]["overall"]
            print(*cell.values(), f"{quality['gflops']:.4f} GFLOPs, KL {quality['kl']:.2e}", flush=True)
    if rank() == 0:
        write_result(args.out, {"settings": settings, "rows": rows})
        partial.unlink(missing_ok=True)
        plot(rows, args.out.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6144, help="calibration images (6144)")
    parser.add_argument("--test", type=int, default=6000, help="test images (6000)")
    parser.add_argument("--draws", type=int, default=200, help="random curves for each cell (200)")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the MACs to save")
    methods = ["calibrated", "curve", *RAMPS]
    text = "methods whose rows stay as they are, also by older code"
    parser.add_argument("--keep", nargs="+", default=[], choices=methods, metavar="METHOD", help=text)
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_calibration.json")
    args = parser.parse_args(argv)
    try:
        return exit_code("calibration", lambda: run(args))
    finally:
        stop()


if __name__ == "__main__":
    sys.exit(main())
