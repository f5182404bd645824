"""Definition 2 and Theorem 1: the merging error against its bounds, on random vectors and on a model's real merges.

Two unit vectors with cosine distance delta and sizes n_i and n_j merge into their size-weighted mean x*. The error
n_i delta(x_i, x*) + n_j delta(x_j, x*) is at least n_i n_j / (n_i + n_j) delta, and at most twice that if the angle
between the vectors is not obtuse. The model merges one r per batch (adapt="batch"), as in the paper.
"""

import argparse
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from atm_triton import ATMConfig, ops
from atm_triton.block import ATMBlock
from atm_triton.measure.evaluate import share
from atm_triton.packed import Assignment, Packed
from atm_triton.patch import install
from atm_triton.reference import of_tokens
from benchmarks.paper.cells import markdown
from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject, options

DIMENSIONS = (2, 64, 384)
DRAWN = 100_000
LARGEST = 64  # size of a random token
SLACK = 1e-9  # for float64 rounding, in the ratio of an error to its bound


def arguments() -> argparse.ArgumentParser:
    return options(choosing=False)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"drawn": DRAWN}


def merging_error(x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Definition 2 for pairs of vectors [K, C] with sizes [K], in float64. Returns the error, n m / (n + m) times the
    cosine distance, and the cosine. Distances come from differences of vectors, which lose no digits if they are
    near."""
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    n, m = n.double(), m.double()
    middle = F.normalize(n[:, None] * x + m[:, None] * y, dim=1)
    delta, of_x, of_y = ((a - b).square().sum(1) / 2 for a, b in ((x, y), (x, middle), (y, middle)))
    return n * of_x + m * of_y, n * m / (n + m) * delta, 1 - delta


def bounds(x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> dict[str, Any]:
    """Summarise where the errors of pairs lie between their bounds."""
    error, scale, cosine = merging_error(x, y, n, m)
    held = (cosine >= 0) & (scale > 0)
    ratio = (error / scale)[held]
    outside = ((ratio < 1 - SLACK) | (ratio > 2 + SLACK)).sum().item()
    extremes = (ratio.min().item(), ratio.max().item()) if len(ratio) else (None, None)
    return {
        "pairs": len(error),
        "obtuse": int((cosine < 0).sum()),
        "identical": int((scale == 0).sum()),
        "outside": int(outside),
        "least_ratio": extremes[0],
        "most_ratio": extremes[1],
        "mean_error": error.mean().item() if len(error) else None,
    }


class PairBlock(ATMBlock):
    """A block that keeps the pairs that it merges: both tokens after attention, and their sizes."""

    pairs: list[tuple[Tensor, ...]]

    def match(self, keys: Tensor, tokens: Packed) -> ops.Match | None:
        self.matched = super().match(keys, tokens)
        return self.matched

    def merge(self, tokens: Packed, attended: Tensor, assignment: Assignment) -> tuple[Packed, Tensor]:
        x = tokens.x + self.ls1(attended).flatten(0, -2)
        sizes = torch.ones(len(x), device=x.device) if tokens.sizes is None else tokens.sizes
        partner, slots = self.matched.partner, assignment.slots
        partner_row = of_tokens(tokens.images.cu_seqlens[:-1], tokens.images, len(x)) + partner.clamp(min=0)
        a = torch.nonzero((partner >= 0) & (slots[partner_row] == slots)).squeeze(1)
        b = partner_row[a]
        self.pairs.append(tuple(vector.cpu() for vector in (x[a], x[b], sizes[a], sizes[b])))
        return super().merge(tokens, attended, assignment)


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    rows.expect(len(DIMENSIONS) + subject.merging)
    for dimension in DIMENSIONS:
        rows.add({"vectors": "random", "dimension": dimension}, lambda dimension=dimension: drawn(dimension))
    of_blocks = cache(lambda: merged(subject, subject.configs["batch"]))
    for block in range(subject.merging):
        rows.add({"vectors": "merged", "block": block + 1}, lambda block=block: of_blocks()[block])


def drawn(dimension: int) -> dict[str, Any]:
    """The row of random pairs, from near to far, with sizes from 1 to LARGEST."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, DRAWN, dimension, generator=generator, dtype=torch.float64)
    near = 10 ** (-4 * torch.rand(DRAWN, 1, generator=generator, dtype=torch.float64))
    n, m = torch.randint(1, LARGEST + 1, (2, DRAWN), generator=generator)
    return bounds(x, (1 - near) * x + near * other, n, m)


@torch.inference_mode()
def merged(subject: Subject, config: ATMConfig) -> list[dict[str, Any]]:
    """The pairs that each block of the model merges in the images to judge by, one row per block."""
    model = share(subject.model)

    def collecting(block: torch.nn.Module, index: int) -> PairBlock:
        made = PairBlock.of(block, config, index, subject.depth, model.num_prefix_tokens)
        made.pairs = []
        return made

    model = install(model, collecting, config)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(subject.merging)]
    for images in tqdm(subject.images(), desc="merge", unit="batch", disable=None):
        model(images.to(next(model.parameters())))
        for part, block in zip(parts, model.blocks, strict=False):
            part += [bounds(*pairs) for pairs in block.pairs]
            block.pairs.clear()
    return [_together(part) for part in parts]


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [part for part in parts if part["pairs"]]
    counts = {name: sum(part[name] for part in parts) for name in ("pairs", "obtuse", "identical", "outside")}
    ratios = [part[name] for part in parts for name in ("least_ratio", "most_ratio") if part[name] is not None]
    errors = sum(part["mean_error"] * part["pairs"] for part in parts)
    return {
        **counts,
        "least_ratio": min(ratios, default=None),
        "most_ratio": max(ratios, default=None),
        "mean_error": errors / counts["pairs"] if counts["pairs"] else None,
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = ["pairs of", "pairs", "at an obtuse angle", "outside the bounds", "error / lower bound", "mean error"]
    body = []
    for row in result["rows"]:
        of = f"random vectors, {row['dimension']} dimensions" if row["vectors"] == "random" else f"block {row['block']}"
        ratios = "-" if row["least_ratio"] is None else f"{row['least_ratio']:.4f} to {row['most_ratio']:.4f}"
        error = "-" if row["mean_error"] is None else f"{row['mean_error']:.2e}"
        body.append([of, f"{row['pairs']:,}", f"{row['obtuse']:,}", f"{row['outside']:,}", ratios, error])
    return markdown(head, body)
