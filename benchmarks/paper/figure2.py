"""Figure 2: how much of the final class token is lost if one block alone merges, by block and threshold.

The loss is the cosine distance, with and without merging, between what the head reads: the class token, or the mean of
the patch tokens if the model pools. Each image merges its own count. Groups are alternate in every block, because
before the only merge all sizes are 1 and cannot tell tokens apart.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton import ATMConfig, apply_patch
from atm_triton.measure.evaluate import share
from benchmarks.paper.cells import markdown
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

THETAS = (0.8, 0.85, 0.9, 0.95)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options(choosing=False, config=False)])
    parser.add_argument("--thetas", type=float, nargs="+", default=list(THETAS), help="thresholds (0.8 to 0.95)")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    if not all(-1 <= theta <= 1 for theta in args.thetas) or len(set(args.thetas)) < len(args.thetas):
        raise ValueError("--thetas wants cosine similarities, -1 to 1, each once")
    return {"thetas": args.thetas}


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    original, merging = [_read(subject.model, images) for images in subject.images()], subject.merging
    rows.expect(merging * len(args.thetas))
    for theta in args.thetas:
        for block in range(1, merging + 1):
            key = {"theta": theta, "block": block}
            rows.add(key, lambda key=key: _loss(subject, original, **key))


@torch.inference_mode()
def _read(model: VisionTransformer, images: Tensor) -> Tensor:
    """The features [B, C] from which the head computes the logits."""
    features = model.forward_features(images.to(next(model.parameters())))
    return model.forward_head(features, pre_logits=True).double().cpu()


def _loss(subject: Subject, original: list[Tensor], theta: float, block: int) -> dict[str, Any]:
    thresholds = tuple(theta if number == block else None for number in range(1, subject.depth + 1))
    model = apply_patch(
        share(subject.model), ATMConfig(adapt="image", thresholds=thresholds, split_depth=subject.depth)
    )
    lost, merged = [], []
    for images, before in zip(subject.images(), original, strict=True):
        lost.append(1 - F.cosine_similarity(_read(model, images), before))
        record = model.blocks.last
        merged.append(torch.as_tensor(record.merged[block - 1]).double().expand(len(images)).cpu())
    lost, merged = torch.cat(lost), torch.cat(merged)
    error = (lost.std(correction=0) / len(lost) ** 0.5).item()
    return {"images": len(lost), "loss": lost.mean().item(), "loss_se": error, "merged": merged.mean().item()}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of the loss and of the tokens that merge for it."""
    thetas = result["settings"]["thetas"]
    by_key = {(row["theta"], row["block"]): row for row in result["rows"]}
    head = [f"{result['rows'][0]['images']} images: block", *(f"theta {theta:g}: loss (merged)" for theta in thetas)]
    body = []
    for block in sorted({row["block"] for row in result["rows"]}):
        body.append([str(block), *(_cell(by_key.get((theta, block))) for theta in thetas)])
    return markdown(head, body)


def _cell(row: dict[str, Any] | None) -> str:
    return "not measured yet" if row is None else f"{row['loss']:.1e} ({row['merged']:.1f})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot a line for each threshold, from dark to light since colours stand for methods, and bars for their mean."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.9), layout="constrained")
    panel = figure.subplots()
    blocks = sorted({row["block"] for row in result["rows"]})
    lines = {theta: [] for theta in result["settings"]["thetas"]}
    for row in sorted(result["rows"], key=lambda row: row["block"]):
        lines[row["theta"]].append(row["loss"])
    means = [sum(of_block) / len(lines) for of_block in zip(*lines.values(), strict=True)]
    panel.bar(blocks, means, color="0.85", label="their mean")
    for number, theta in enumerate(sorted(lines)):
        losses = [loss if loss > 0 else math.nan for loss in lines[theta]]  # no point if nothing merges
        panel.plot(
            blocks, losses, marker=".", color=colormaps["viridis"](number / len(lines)), label=f"threshold {theta:g}"
        )
    panel.set_yscale("log")
    panel.set_xticks(blocks)
    panel.set_xlabel("the one block that merges (no point: no token does)")
    panel.set_ylabel("1 - cosine of the final class token (log scale)")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
