"""Accuracy against cost on the digits' test split, ATM beside ToMe: ``python -m benchmarks.accuracy``.

For each share of the MACs, ATM's thresholds are chosen on the calibration split (``thresholds.py``); ToMe merges the
same r in every block. Both compute the class token alone in the last block, which changes no logit. A JSON file with
every evaluation and a plot are written to ``benchmarks/results/``.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from atm_triton import ATMConfig
from atm_triton.env import write_result
from atm_triton.errors import exit_code
from atm_triton.evaluate import evaluate, unpatched_logits
from atm_triton.inputs import check_device, digits_config, open_images, open_model
from benchmarks.thresholds import BATCH_SIZE, calibration_search, choose, rounded

RESULTS = Path(__file__).parent / "results"
SHARES = (0.3, 0.4, 0.5, 0.6, 0.65)
TOME_R = (4, 8, 11, 13, 14, 15, 16, 20)


def configurations(draws: int, device: str) -> dict[str, list[ATMConfig]]:
    """By method, the configurations to evaluate: thresholds of the calibration split, constant r."""
    search = calibration_search(2048, device)
    chosen = [choose(search, share, draws)[0] for share in SHARES]
    atm = [rounded(config, f"{share:.0%} of the MACs") for config, share in zip(chosen, SHARES, strict=True)]
    tome = [ATMConfig(adapt="static", schedule=(r,) * 12, split_depth=12, source=f"r = {r}") for r in TOME_R]
    return {"shipped": [digits_config()], "ATM": atm, "ToMe": tome}


def measure(configs: dict[str, list[ATMConfig]], images: int, device: str) -> list[dict[str, Any]]:
    model = open_model().to(device)
    loader = open_images(model, split="test", limit=images, batch_size=BATCH_SIZE)
    batches = [(x.to(device), labels) for x, labels in loader]
    base = unpatched_logits(model, batches)
    rows = []
    for method, of_method in configs.items():
        for config in of_method:
            outcome = evaluate(model, batches, config, base, title=f"{method} {config.source}")
            rows.append({"method": method, "config": asdict(config), **outcome.to_dict()})
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    panel = figure.subplots()
    whole = rows[0]["gflops_unpatched"]
    unpatched = rows[0]["overall"]["top1_unpatched"]
    panel.plot([whole], [unpatched], "k*", markersize=12, label="unpatched", linestyle="none")
    panel.axhline(unpatched, color="0.8", linewidth=1, zorder=0)
    for method, style in (("ATM", "o-"), ("ToMe", "s--")):
        points = sorted((r["overall"]["gflops"], r["overall"]["top1"]) for r in rows if r["method"] == method)
        label = {"ATM": 'ATM, adapt="batch"', "ToMe": "ToMe, constant r"}[method]
        panel.plot(*zip(*points, strict=True), style, label=label)
    panel.set_xlabel("GFLOPs an image")
    panel.set_ylabel("top-1, %")
    images = rows[0]["overall"]["images"]
    panel.set_title(f"digits, {images} test images, batches of {BATCH_SIZE}, no training", fontsize=9)
    panel.legend()
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    if args.draws < 1 or args.images < 1:
        raise ValueError("--draws and --images want 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out {args.out} is no directory")
    rows = measure(configurations(args.draws, args.device), args.images, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "digits_accuracy.json", {"rows": rows})
    plot(rows, args.out / "digits_accuracy.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000, help="test images (4000)")
    parser.add_argument("--draws", type=int, default=6, help="curves drawn for each share of the MACs (6)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    args = parser.parse_args(argv)
    return exit_code("accuracy", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
