"""Pictures of merged tokens, block by block, from easy to hard images: ATM beside ToMe at equal FLOPs.

An image is easy if it keeps few tokens by its own count. Merged patches share their mean colour and one outline. All
pictures are drawn in one go, also when a run is resumed.
"""

import argparse
from typing import Any

import torch
from tqdm import tqdm

from atm_triton.flops import cost_of_each
from atm_triton.measure.evaluate import share
from atm_triton.measure.visualize import Picture, draw, picture
from benchmarks.paper.cells import markdown
from benchmarks.paper.methods import at_cost
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

SAVED = 0.5


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options()])
    parser.add_argument("--pictures", type=int, default=2, help="images shown, from easy to hard (2)")
    parser.add_argument("--share", type=float, default=SAVED, help="of the FLOPs to save (0.5)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 6, 8, 11], help="after which (2 4 6 8 11)")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    if args.pictures < 1:
        raise ValueError("--pictures wants 1 or more")
    if not 0 < args.share < 1:
        raise ValueError(f"--share {args.share:g} is out of range; want one between 0 and 1")
    return {"saved": args.share, "pictures": args.pictures, "blocks": args.blocks}


@torch.inference_mode()
def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    """Measure the tokens left and the cost of every picture, and draw the pictures beside the result."""
    wrong = [block for block in args.blocks if not 1 <= block <= subject.depth]
    if wrong:
        raise ValueError(f"--blocks {wrong[0]} is outside 1 .. {subject.depth}")
    goal, (ours, theirs) = subject.goal(args.share), ("atm, image", "tome")
    ways = {method: at_cost(subject, method, goal) for method in (ours, theirs)}
    for method, way in ways.items():
        if way is None:
            raise ValueError(f"{method}: no setting comes close to {goal:.4g} GFLOPs; give another --share")
    models = {method: way.patch(share(subject.model)) for method, way in ways.items()}
    bar = tqdm(subject.images(), desc="tokens left", unit="batch", disable=None)
    kept = torch.cat([_tokens(models[ours], images) for images in bar])
    if args.pictures > len(kept):
        raise ValueError(f"--pictures {args.pictures} is more than there are images, {len(kept)}; give fewer")
    order = kept.argsort(stable=True)
    chosen = [int(order[round((len(order) - 1) * at)]) for at in torch.linspace(0.02, 0.98, args.pictures).tolist()]
    images = _numbered(subject, set(chosen))
    rows.expect(len(chosen) * len(models))
    names = {ours: "ATM", theirs: f"ToMe, r = {ways[theirs].settings['r']}"}
    pictures: list[Picture] = []
    about: list[dict[str, Any]] = []
    for number in chosen:
        for method, model in models.items():
            shown = picture(model, images[number], tuple(args.blocks), f"image {number}, {names[method]}")
            pictures.append(shown)
            all_last = cost_of_each(model, model.blocks.last.all_tokens_last).paper_gflops
            about.append({"gflops": shown.gflops, "gflops_all_tokens_last": float(all_last), "left": shown.left})
    draw(pictures, rows.path.with_suffix(".png"))
    for shown, row in zip(pictures, about, strict=True):
        rows.add({"title": shown.title}, lambda row=row: row)


def _numbered(subject: Subject, wanted: set[int]) -> dict[int, torch.Tensor]:
    """The test images [C, H, W] with the wanted numbers, by number."""
    chosen, first = {}, 0
    for images in subject.images():
        chosen |= {number: images[number - first] for number in wanted if first <= number < first + len(images)}
        first += len(images)
    return chosen


def _tokens(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each image that enter the last block, [B]."""
    model(images.to(next(model.parameters())))
    return torch.as_tensor(model.blocks.last.tokens[-1]).expand(len(images)).cpu()


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [
        "tokens left",
        "GFLOPs",
        "all tokens last",
        *(f"after block {block}" for block in result["settings"]["blocks"]),
    ]
    body = []
    for row in result["rows"]:
        costs = [f"{row[name]:.3f}" for name in ("gflops", "gflops_all_tokens_last")]
        body.append([row["title"], *costs, *map(str, row["left"])])
    return markdown(head, body)
