"""``python -m benchmarks.photos.ideas``: what other ways to match tokens are worth, at the same counts in every block.

Each idea merges r tokens per block in every image, so that cost and counts are equal and only the matching differs.
With ``--adapt image`` each image merges its own number, by thresholds with which each block merges on average as many
tokens as calibrated ATM does. With ``--swap`` the photographs to choose by and those to judge by change places. The
ideas are written for this comparison, on top of the reference.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atm_triton import ATMConfig, apply_patch
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.evaluate import share
from atm_triton.measure.provenance import check_file
from benchmarks import RESULTS
from benchmarks.baselines.base import Baseline, DenseAssignment, ReducingBlock, places, sums
from benchmarks.paper.cells import markdown
from benchmarks.paper.methods import Way
from benchmarks.paper.rows import Rows
from benchmarks.photos import __main__ as photographs
from benchmarks.photos.compare import MEASURES, TO_SCALE, Photos
from benchmarks.photos.images import PHOTOS, crops


@dataclass(frozen=True)
class Matching(Baseline):
    """In every block r tokens, or those below the block's threshold, join the most similar token of the other group.

    Args:
        of: what is compared: "keys", the block's input "tokens", or "both", the mean of the two cosines.
        groups: "alternate", even and odd positions, or "drawn", random halves that differ from block to block.
        order: the order of the remaining tokens: by "groups", as in ToMe, or by "positions".
        by: what decides which tokens merge first: the cosine "distance" alone; the distance times n m / (n + m) of the
            pair's "sizes" (Theorem 1); or the distance times the "class" token's attention to the token that joins.
        rounds: with 2, every second block merges 2 r: first r, then another r of the remaining tokens.
        thresholds: in place of r: pairs with less distance, weighted by ``by``, merge in each block; blocks that come
            after the last threshold merge nothing. A batch is then one image.
        noted: the first block without a threshold appends its distances to this list.
    """

    r: int = 8
    of: str = "keys"
    groups: str = "alternate"
    order: str = "groups"
    by: str = "distance"
    rounds: int = 1
    thresholds: tuple[float, ...] | None = None
    noted: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    proportional_attention: ClassVar[bool | None] = True

    def plan(self, block: ReducingBlock, q: Tensor, k: Tensor, tokens: Any) -> DenseAssignment | None:
        idle = self.thresholds is not None and block.index > len(self.thresholds)
        if idle or block.index % self.rounds:
            return None
        B, _, N, d = k.shape
        if self.thresholds is not None and B != 1:
            raise ValueError(f"{B} images in a batch; give one: with thresholds each image merges its own number")
        P, x = block.num_prefix_tokens, tokens.images.shaped(tokens.x)
        attention = (q[:, :, :1] @ k.transpose(-2, -1) * d**-0.5).softmax(-1).mean((1, 2))
        sizes = x.new_ones(B, N) if tokens.sizes is None else tokens.images.shaped(tokens.sizes)
        held = {"keys": k.mean(1), "tokens": x, "attention": attention.unsqueeze(-1), "size": sizes.unsqueeze(-1)}
        slots, M = torch.arange(N).expand(B, N), N
        for number in range(self.rounds):
            step = self._round(held, P, block.index, number)
            slots, M = step.slots.gather(1, slots), step.M
            weight = held["size"]
            total = sums(weight, step)
            held = {name: sums(value * weight, step) / total for name, value in held.items()} | {"size": total}
        return None if M == N else DenseAssignment(slots, M)

    def _round(self, held: dict[str, Tensor], P: int, index: int, number: int) -> DenseAssignment:
        B, N = held["size"].shape[:2]
        free = torch.arange(P, N)
        if self.groups == "drawn":
            generator = torch.Generator().manual_seed(2 * index + number)
            free = free[torch.randperm(N - P, generator=generator)]
        b, a = free[::2], free[1::2]  # with P = 1, a has the even positions, as in ToMe
        cost = self._distance(held, a, b) * self._weight(held, a, b)
        least, partner = cost.min(2)
        r = self._number(least, index)
        joins = places(least.argsort(dim=1, stable=True)) < r  # [B, |a|]
        stays, behind = torch.ones(B, N, dtype=torch.bool), torch.zeros(B, N, dtype=torch.bool)
        stays[:, a] = ~joins
        behind[:, b] = self.order == "groups"
        ahead = stays & ~behind
        slots = torch.where(behind, ahead.sum(1, keepdim=True) + behind.cumsum(1), ahead.cumsum(1)) - 1
        slots[:, a] = torch.where(joins, slots[:, b].gather(1, partner), slots[:, a])
        return DenseAssignment(slots, N - r)

    def _number(self, least: Tensor, index: int) -> int:
        """How many tokens of A [B, |A|] merge, given their distances to their partners."""
        if self.thresholds is None:
            return min(self.r, least.shape[1])
        if index == len(self.thresholds):
            self.noted.append(least.flatten())
            return 0
        return int((least < self.thresholds[index]).sum())

    def _distance(self, held: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        names = ("keys", "tokens") if self.of == "both" else (self.of,)
        unit = [F.normalize(held[name], dim=-1) for name in names]
        return sum(1 - each[:, a] @ each[:, b].transpose(1, 2) for each in unit) / len(unit)

    def _weight(self, held: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor | float:
        if self.by == "sizes":
            n, m = held["size"][:, a], held["size"][:, b].transpose(1, 2)
            return n * m / (n + m)
        return held["attention"][:, a] if self.by == "class" else 1.0


class WithoutSizes(Matching):
    """The same without log n in attention."""

    proportional_attention: ClassVar[bool | None] = False


IDEAS = {
    "as ToMe": Matching(),
    "no log n in attention": WithoutSizes(),
    "by tokens": Matching(of="tokens"),
    "by keys and tokens": Matching(of="both"),
    "groups drawn anew": Matching(groups="drawn"),
    "tokens by position": Matching(order="positions"),
    "weighed by sizes": Matching(by="sizes"),
    "weighed by class attention": Matching(by="class"),
    "keys and tokens, drawn": Matching(of="both", groups="drawn"),
    "drawn, by sizes": Matching(groups="drawn", by="sizes"),
    "two rounds in every second block": Matching(rounds=2),
    "keys and tokens, drawn, by sizes": Matching(of="both", groups="drawn", by="sizes"),
}
EACH = (8, 16)  # r
AT_OWN_COUNTS = (
    *("as ToMe", "by keys and tokens", "groups drawn anew", "weighed by sizes", "keys and tokens, drawn"),
    *("drawn, by sizes", "keys and tokens, drawn, by sizes"),
)
SHARES = (0.2, 0.3)  # of the FLOPs, that calibrated ATM was asked to save
OUT = {"static": "photos_ideas.json", "image": "photos_ideas_image.json", "swap": "photos_ideas_swapped.json"}


def measure(photos: Photos, rows: Rows, each: tuple[int, ...]) -> dict[str, Any]:
    rows.expect(len(IDEAS) * len(each))
    for r in each:
        for name, idea in IDEAS.items():
            way = Way({"r": r}, replace(idea, r=r).apply)
            rows.add({"idea": name, "r": r}, lambda way=way: photos.outcome(way).to_dict(photos.photos))
    return rows.finish()


def measure_own_counts(
    photos: Photos, rows: Rows, calibrated: dict[float, ATMConfig], names: Sequence[str] = AT_OWN_COUNTS
) -> dict[str, Any]:
    """Measure ideas with thresholds. ``calibrated``: ATM's, by the share of the FLOPs that they were asked to save."""
    rows.expect(len(names) * len(calibrated))
    for saved, config in calibrated.items():
        counts = mean_counts(photos, config)
        for name in names:
            key = {"idea": name, "share": saved}
            rows.add(key, lambda idea=IDEAS[name], counts=counts: _with_counts(photos, idea, counts))
    return rows.finish()


def _with_counts(photos: Photos, idea: Matching, counts: list[float]) -> dict[str, Any]:
    idea = fitted(photos, idea, counts)
    return {"thresholds": idea.thresholds, **photos.outcome(Way({}, idea.apply)).to_dict(photos.photos)}


@torch.inference_mode()
def mean_counts(photos: Photos, config: ATMConfig) -> list[float]:
    """How many tokens each block merges with ATM, the mean over the first images to choose by."""
    model, merged = apply_patch(share(photos.model), config), []
    for image in photos.chosen_by[:TO_SCALE].split(1):
        model.forward_features(image)
        merged.append([float(r) for r in model.blocks.last.merged])
    return [sum(of_block) / len(merged) for of_block in zip(*merged, strict=True)]


@torch.inference_mode()
def fitted(photos: Photos, idea: Matching, counts: list[float]) -> Matching:
    """The idea with thresholds by which each block merges this many tokens, on average over the first images to choose
    by. One block after the other is fitted, with all blocks before it merging."""
    images = photos.chosen_by[:TO_SCALE].split(1)
    idea = replace(idea, thresholds=())
    for count in counts:
        noting = replace(idea, noted=[])
        model = noting.apply(share(photos.model))
        for image in images:
            model.forward_features(image)
        distances = torch.cat(noting.noted).sort().values.tolist()
        number = min(round(count * len(images)), len(distances))
        below, above = [-math.inf, *distances][number], [*distances, math.inf][number]
        threshold = below if math.isinf(below) else above if math.isinf(above) else (below + above) / 2
        idea = replace(idea, thresholds=(*idea.thresholds, threshold))
    return idea


def calibrated_thresholds(path: Path) -> dict[float, ATMConfig]:
    """Calibrated ATM's configurations in a result of ``python -m benchmarks.photos``.

    Raises:
        ValueError: rows are missing; OSError: so is the file.
    """
    rows = json.loads(path.read_text())["rows"]
    own = {row["share"]: row["settings"]["config"] for row in rows if row["method"] == "atm, calibrated, image"}
    if not set(SHARES) <= set(own):
        raise ValueError(f"{path} has no calibrated rows at {SHARES}; run python -m benchmarks.photos before")
    return {saved: ATMConfig.from_json(json.dumps(own[saved])) for saved in SHARES}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table. Its last column says how many times less class and patch tokens change than as
    ToMe: the geometric mean over photographs, because a single photograph may dominate the arithmetic mean."""
    own = "share" in result["rows"][0]
    head = [
        "matching",
        "asked" if own else "r",
        "GFLOPs",
        "class token",
        "its worst",
        "patch tokens",
        "saliency",
        "times less than as ToMe",
    ]
    rows = {(f"-{100 * row['share']:.0f} %" if own else str(row["r"]), row["idea"]): row for row in result["rows"]}
    body = []
    for (at, idea), row in rows.items():
        cells = [f"{row[name]['mean']:.4f}" for name in MEASURES]
        less = ", ".join(f"{_less(rows[at, 'as ToMe'], row, name):.2f}" for name in MEASURES[:2])
        worst = f"{row['class_token']['worst']:.4f}"
        body.append([idea, at, f"{row['gflops']:.2f}", cells[0], worst, *cells[1:], less])
    return markdown(head, body)


def _less(before: dict[str, Any], row: dict[str, Any], name: str) -> float:
    pairs = zip(before[name]["of_photos"], row[name]["of_photos"], strict=True)
    return geometric_mean(tome / ours for tome, ours in pairs)


def run(args: argparse.Namespace) -> None:
    if args.adapt == "static" and (args.swap or args.ideas != list(AT_OWN_COUNTS)):
        raise ValueError("--swap and --ideas have no effect without --adapt image; leave them out")
    out = RESULTS / OUT["swap" if args.swap else args.adapt] if args.out is None else args.out
    check_file("--out", out)
    least = len(PHOTOS["test"]) + 1
    if args.data or args.images < least:
        raise ValueError(
            f"ideas are compared photograph by photograph: leave --data out, and give --images {least} or more"
        )
    if args.adapt == "static":
        rows = Rows(out, photographs.settings(args), args.resume)
        print(table(measure(photographs.subject(args), rows, EACH)))
        return
    args.batch_size, calibrated = 1, calibrated_thresholds(RESULTS / "photos.json")
    rows = Rows(out, photographs.settings(args) | {"swapped": args.swap, "ideas": args.ideas}, args.resume)
    photos = photographs.subject(args)
    if args.swap:
        photos = swapped(photos, args.images, args.calibration_images)
    print(table(measure_own_counts(photos, rows, calibrated, args.ideas)))


def swapped(photos: Photos, images: int, calibration_images: int) -> Photos:
    """The same with the photographs to choose by and those to judge by in each other's place."""
    chosen_by, test = crops(photos.model, "test", calibration_images), crops(photos.model, "calibration", images)
    of_photos = torch.arange(images) % len(PHOTOS["calibration"])
    return Photos(photos.model, photos.decoder, chosen_by, test, of_photos, photos.batch)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.photos.ideas", description=__doc__.split("\n\n")[0].split(": ")[1])
    photographs.add_subject(parser)
    parser.add_argument("--adapt", choices=("static", "image"), default="static", help="one r, or own counts")
    parser.add_argument("--swap", action="store_true", help="choose by the photographs to judge by, and the reverse")
    text = "with --adapt image: some of " + "; ".join(AT_OWN_COUNTS)
    parser.add_argument("--ideas", nargs="+", choices=AT_OWN_COUNTS, default=list(AT_OWN_COUNTS), help=text)
    parser.add_argument("--out", type=Path, help=f"the result (in results/: {' or '.join(OUT.values())})")
    args = parser.parse_args(argv)
    return exit_code("benchmarks.photos.ideas", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
