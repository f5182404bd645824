"""Choose thresholds for the digits model on its calibration split: ``python -m benchmarks.thresholds``.

A random search over the paper's curve (Eq. 1): beta and the distance of theta_min from 1, as a multiple of alpha's, are
drawn, alpha is bisected until the wanted share of the MACs is saved, and the draw with the least KL divergence from the
unpatched model is kept. Labels are not used, and no image of the test split is seen.
"""

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from atm_triton import ATMConfig
from atm_triton.digits.model import CONFIG
from atm_triton.env import check_file, write_result
from atm_triton.errors import exit_code
from atm_triton.evaluate import Evaluation, evaluate, unpatched_logits
from atm_triton.inputs import check_device, open_images, open_model

Batch = tuple[Tensor, Tensor]
SEARCH_BATCHES, BATCH_SIZE = 4, 64
FINALISTS = 5
TOLERANCE = 0.005  # of the share saved


class Search:
    """Evaluations of a model on calibration batches: the first few to search on, all of them to decide."""

    def __init__(self, model: VisionTransformer, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches
        self.base = unpatched_logits(model, batches)

    def measure(self, config: ATMConfig, batches: int | None = None) -> Evaluation:
        chosen, base = self.batches[:batches], self.base[:batches]
        return evaluate(self.model, chosen, config, base, title=None)

    def bisect_alpha(self, beta: float, spread: float, saved: float) -> tuple[float, ATMConfig] | None:
        """The KL and the configuration at the alpha that saves ``saved`` of the MACs, with 1 - theta_min = ``spread``
        (1 - alpha); None where no alpha does."""
        low, high = -5.0, -0.5  # of log10 (1 - alpha)
        for _ in range(10):
            distance = 10 ** ((low + high) / 2)
            config = ATMConfig(alpha=1 - distance, beta=beta, theta_min=max(1 - spread * distance, -1.0))
            outcome = self.measure(config, SEARCH_BATCHES)
            if abs(outcome.saved - saved) < TOLERANCE:
                return outcome.overall.kl, config
            low, high = ((low + high) / 2, high) if outcome.saved < saved else (low, (low + high) / 2)
        return None


def choose(search: Search, saved: float, draws: int, seed: int = 0) -> tuple[ATMConfig, Evaluation]:
    """The best of ``draws`` random curves that save ``saved`` of the MACs, and how it does on all batches."""
    rng = random.Random(seed)
    found = []
    for _ in tqdm(range(draws), desc=f"save {saved:.0%}", unit="draw", disable=None):
        candidate = search.bisect_alpha(10 ** rng.uniform(-5, 0), 10 ** rng.uniform(0, 2), saved)
        if candidate is not None:
            found.append(candidate)
    if not found:
        raise ValueError(f"none of {draws} curves saves {saved:.0%} of the MACs; take more draws or another share")
    finalists = [config for _, config in sorted(found, key=lambda pair: pair[0])[:FINALISTS]]
    outcomes = [(config, search.measure(config)) for config in finalists]
    return min(outcomes, key=lambda pair: pair[1].overall.kl)


def calibration_search(images: int, device: str) -> Search:
    """The search on ``images`` images of the digits' calibration split."""
    model = open_model().to(device)
    loader = open_images(model, split="calibration", limit=images, batch_size=BATCH_SIZE)
    return Search(model, [(x.to(device), labels) for x, labels in loader])


def rounded(config: ATMConfig, source: str) -> ATMConfig:
    """As it is written down: five digits tell thresholds apart."""
    values = {name: float(f"{getattr(config, name):.5g}") for name in ("alpha", "beta", "theta_min")}
    return ATMConfig(**values, source=source)


def document(config: ATMConfig, outcome: Evaluation, draws: int) -> dict[str, Any]:
    overall = outcome.overall
    return {
        "config": asdict(config),
        "model": "digits",
        "split": "calibration",
        "images": overall.images,
        "draws": draws,
        "promise": {"saved": outcome.saved, "kl": overall.kl, "agreement": overall.agreement},
    }


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    check_file("--out", args.out)
    if not 0 < args.saved < 1:
        raise ValueError(f"--saved {args.saved} is no share; give one between 0 and 1")
    search = calibration_search(args.images, args.device)
    config, _ = choose(search, args.saved, args.draws)
    config = rounded(config, "chosen by benchmarks.thresholds on the calibration split of the digits")
    result = document(config, search.measure(config), args.draws)
    write_result(args.out, result)
    print(json.dumps(result, indent=1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saved", type=float, default=0.5, help="the share of the MACs to save (0.5)")
    parser.add_argument("--images", type=int, default=2048, help="calibration images (2048)")
    parser.add_argument("--draws", type=int, default=20, help="curves drawn (20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=CONFIG)
    args = parser.parse_args(argv)
    return exit_code("thresholds", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
