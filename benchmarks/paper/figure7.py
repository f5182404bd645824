"""Pictures of merged tokens, block by block, from easy to hard images: ATM beside ToMe at equal FLOPs.

Easy is an image that keeps few tokens by its own count. Merged patches have their mean colour and one outline.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from atm_triton import apply_patch
from atm_triton.evaluate import share
from atm_triton.visualize import Picture, draw, picture
from benchmarks.paper.figure4 import configurations
from benchmarks.paper.methods import by_shapes, by_similarity, shape_of
from benchmarks.paper.subject import Subject, options

SAVED = 0.5


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options()])
    parser.add_argument("--config", type=Path, help='ATM\'s thresholds, of "atm-triton calibrate"')
    parser.add_argument("--pictures", type=int, default=4, help="images shown, from easy to hard (4)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 6, 8, 11], help="after which (2 4 6 8 11)")
    return parser


@torch.inference_mode()
def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Tokens left and cost of every picture; the pictures go beside ``out``."""
    if args.pictures < 1:
        raise ValueError("--pictures wants 1 or more")
    config = configurations(args)["image"]
    subject = Subject(args)
    goal = subject.goal(SAVED)
    depth = len(subject.model.blocks)
    config = by_similarity(subject, shape_of(config, depth, "image"), goal)
    ours = apply_patch(share(subject.model), config)
    tome = by_shapes(subject, "tome", "r", list(range(1, subject.predictor.N)), goal)
    theirs = tome.patch(share(subject.model))
    images = torch.cat([x for x, _ in subject.test])
    kept = torch.cat([_tokens(ours, x) for x in images.split(64)])
    order = kept.argsort(stable=True)
    chosen = [int(order[round((len(order) - 1) * at)]) for at in torch.linspace(0.02, 0.98, args.pictures).tolist()]
    rows: list[Picture] = []
    for number in chosen:
        for name, model in (("ATM", ours), (f"ToMe, r = {tome.settings['r']}", theirs)):
            rows.append(picture(model, images[number], tuple(args.blocks), f"image {number}, {name}"))
    draw(rows, out.with_suffix(".png"))
    about = {**subject.about, "saved": SAVED, "blocks": args.blocks}
    return {"settings": about, "rows": [{"title": r.title, "gflops": r.gflops, "left": r.left} for r in rows]}


def _tokens(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[B]: the tokens of an image that enter the last block."""
    model(images.to(next(model.parameters())))
    return torch.as_tensor(model.blocks.last.tokens[-1]).expand(len(images)).cpu()


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    blocks = " | ".join(f"after block {block}" for block in result["settings"]["blocks"])
    lines = [f"| tokens left | GFLOPs | {blocks} |", "|---" * (len(result["settings"]["blocks"]) + 2) + "|"]
    for row in result["rows"]:
        lines.append(f"| {row['title']} | {row['gflops']:.3f} | " + " | ".join(map(str, row["left"])) + " |")
    return "\n".join(lines)
