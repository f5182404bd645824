"""Calibrated thresholds beside what else could be done: ``python -m benchmarks.calibration``, on the digits.

For each share of the MACs and each way to adapt: :func:`atm_triton.calibrate`, and the best of 200 random curves of the
paper on the same images; and of given r's the constant one (ToMe), the best increasing and the best decreasing one. All
are judged on the test split. What lies in the result file from the same code is not measured again; under torchrun
the images are dealt out.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from atm_triton import ATMConfig, Target, calibrate
from atm_triton.calibrate import split_images
from atm_triton.distributed import own, rank, silent, start, stop
from atm_triton.env import check_file, environment, write_result
from atm_triton.errors import exit_code
from atm_triton.evaluate import evaluate, unpatched_logits
from atm_triton.inputs import open_images, open_model
from atm_triton.reference import threshold
from atm_triton.search import MANY, Meter, Search, ranked, similarities
from atm_triton.shapes import Drawer, Predictor, Shape

RESULTS = Path(__file__).parent / "results"
SHARES = (0.30, 0.45, 0.55, 0.62)
ADAPT = ("image", "batch", "static")
KEPT, LAST = 12, 4  # curves measured on the hardest images, and on others to choose by
BATCH_SIZE = 64
AGREEMENT = 0.995
RAMPS = {  # r of the first and of the last block, up to a factor
    "ToMe": ((1, 1),),  # constant, give or take the one token that meets the cost
    "increasing": ((0, 2), (0.5, 1.5)),
    "decreasing": ((2, 0), (1.5, 0.5)),
}


class Bench:
    """The digits model; ``images`` of its calibration split to choose by, ``test`` of its test split to judge by."""

    def __init__(self, images: int, test: int) -> None:
        self.model = open_model()
        self.loader = list(open_images(self.model, split="calibration", limit=images, batch_size=BATCH_SIZE))
        parts, _ = split_images(self.loader, seed=0)
        self.meter = Meter(self.model, parts, {"cls_only_last": True, "backend": "auto"})
        found = similarities(self.model, parts["fit"], ATMConfig())
        self.predictor = Predictor(self.model, tuple(parts["fit"][0].shape[1:]), found, cls_only_last=True)
        self.test = own(list(open_images(self.model, split="test", limit=test, batch_size=BATCH_SIZE)))
        self.base = unpatched_logits(self.model, self.test, "test")

    def goal(self, share: float) -> float:
        """GFLOPs that save this share of the MACs; they count norms too, which are no MACs."""
        return (1 - share) * self.predictor.unmerged

    def judged(self, config: ATMConfig, **about: Any) -> dict[str, Any]:
        """On the test split."""
        outcome = evaluate(self.model, self.test, config, self.base, title=None)
        return {**about, "config": asdict(config), **outcome.to_dict()}

    def calibrated(self, adapt: str, target: Target) -> dict[str, Any]:
        begin = time.perf_counter()
        found = calibrate(self.model, self.loader, target, adapt)
        about = {"promise": asdict(found.promise), "family": found.family, "passes": found.passes}
        return self.judged(found.config, **about, seconds=time.perf_counter() - begin)

    def search(self, adapt: str) -> Search:
        return Search(self.meter, self.predictor, adapt, True, None, 0, tqdm(disable=True))

    def best_curve(self, adapt: str, goal: float, draws: int, split_depth: int | None = None) -> ATMConfig:
        """Of random curves of the paper the one with the least change; the fewer are left, the more images decide.
        ``split_depth``: of all of them; None: drawn too."""
        search = self.search(adapt)
        drawer = Drawer(self.predictor, adapt, True, None, random.Random(1), goal)
        bar = tqdm(range(draws), desc=f"curves, {adapt}", unit="curve", disable=silent(""))
        drawn = search.sketched((random_curve(drawer, split_depth) for _ in bar), goal)
        fitted = ranked([search.measured(found[0], goal, found) for _, found in drawn[:KEPT]])
        best = min((found for _, found in fitted[:LAST]), key=lambda found: search.judged(found, goal))
        return search.config(search.settled(best, goal))

    def given(self, ramps: tuple[tuple[float, float], ...], goal: float) -> dict[str, Any]:
        """Of given r's that rise or fall with depth the best, with alternate grouping as ToMe has it."""
        search, configs, merging = self.search("static"), [], self.predictor.merging
        for first, last in ramps:
            weights = (first + (last - first) * block / (merging - 1) for block in range(merging))
            shape = Shape((*weights, None), "static", split_depth=merging + 1)
            configs.append(search.config((shape, search.foretold(shape, goal))))
        return self.judged(min(configs, key=lambda config: self.meter.mean(config, ("fit",), MANY).change))


def random_curve(drawer: Drawer, split_depth: int | None = None) -> Shape:
    """Eq. 1 with its own parameters drawn, as one would without knowing what they do to this model."""
    beta, spread = 10 ** drawer.rng.uniform(-5, 0), 10 ** drawer.rng.uniform(0, 2)

    def distances(d: float) -> list[float | None]:
        lowest = max(1 - spread * d, -1.0)
        return [1 - threshold(block, 1 - d, beta, lowest) for block in range(1, drawer.merging + 1)]

    split = drawer.rng.choice([None, drawer.depth])
    return drawer.shaped(drawer.meeting(distances), split_depth or split, "curve")


def cells(shares: list[float]) -> Iterator[dict[str, Any]]:
    """What is measured, in turn."""
    yield {"method": "calibrated", "adapt": "image", "min_agreement": AGREEMENT}
    for share in shares:
        for adapt in ADAPT:
            yield {"method": "calibrated", "adapt": adapt, "share": share}
            yield {"method": "curve", "adapt": adapt, "share": share}
        for name in RAMPS:
            yield {"method": name, "adapt": "static", "share": share}


def measured(bench: Bench, cell: dict[str, Any], draws: int) -> dict[str, Any]:
    if "min_agreement" in cell:
        return bench.calibrated(cell["adapt"], Target(min_agreement=cell["min_agreement"]))
    goal = bench.goal(cell["share"])
    if cell["method"] == "calibrated":
        return bench.calibrated(cell["adapt"], Target(max_gflops=goal))
    if cell["method"] == "curve":
        return bench.judged(bench.best_curve(cell["adapt"], goal, draws))
    return bench.given(RAMPS[cell["method"]], goal)


def known(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that this very code and these settings made, as far as they went."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    made = document["environment"]
    clean = not made["dirty"] and not environment()["dirty"] and document["settings"] == settings
    return document["rows"] if clean and _same_code(made["commit"]) else []


def _same_code(commit: str) -> bool:
    command = ["git", "diff", "--quiet", commit, "--", "atm_triton", "benchmarks/digits", "benchmarks/calibration.py"]
    return subprocess.run(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL).returncode == 0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and KL against GFLOPs: a colour for each method, a line for each way to adapt."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    accuracy, change = figure.subplots(1, 2)
    lines = {"image": "-", "batch": "--", "static": ":"}
    for method, colour in (("calibrated", "C0"), ("curve", "C1"), ("ToMe", "C2")):
        for adapt, line in lines.items():
            chosen = [r["overall"] for r in rows if r["method"] == method and r["adapt"] == adapt and "share" in r]
            chosen.sort(key=lambda quality: quality["gflops"])
            for panel, name in ((accuracy, "top1"), (change, "kl")):
                at = [quality["gflops"] for quality in chosen], [quality[name] for quality in chosen]
                panel.plot(*at, line, marker=".", color=colour, label=f"{method}, {adapt}" if chosen else None)
    accuracy.axhline(rows[0]["overall"]["top1_unpatched"], color="0.8", linewidth=1, zorder=0)
    accuracy.set_ylabel("top-1, %; the unpatched model's in grey")
    change.set_ylabel("KL(unpatched || merged), nats")
    change.set_yscale("log")
    for panel in (accuracy, change):
        panel.set_xlabel("GFLOPs an image")
    images = rows[0]["overall"]["images"]
    accuracy.set_title(f"digits, {images} test images, batches of {BATCH_SIZE}, no training", fontsize=9)
    change.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    if min(args.draws, args.images, args.test) < 1:
        raise ValueError("--draws, --images and --test want 1 or more")
    check_file("--out", args.out)
    settings = {"draws": args.draws, "images": args.images, "test": args.test, "shares": args.shares}
    rows = known(args.out, settings)
    bench = Bench(args.images, args.test)
    for cell in list(cells(args.shares))[len(rows) :]:
        rows.append({**cell, **measured(bench, cell, args.draws)})
        if rank() == 0:
            write_result(args.out, {"settings": settings, "rows": rows})
            quality = rows[-1]["overall"]
            print(*cell.values(), f"{quality['gflops']:.4f} GFLOPs, KL {quality['kl']:.2e}", flush=True)
    if rank() == 0:
        plot(rows, args.out.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6144, help="calibration images (6144)")
    parser.add_argument("--test", type=int, default=6000, help="test images (6000)")
    parser.add_argument("--draws", type=int, default=200, help="random curves for each cell (200)")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the MACs to save")
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_calibration.json")
    args = parser.parse_args(argv)
    start("cpu")
    try:
        return exit_code("calibration", lambda: run(args))
    finally:
        stop()


if __name__ == "__main__":
    sys.exit(main())
