"""Cells that the Markdown tables of several experiments share."""

import statistics
from typing import Any


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def drop(row: dict[str, Any]) -> str:
    """Top-1 and its difference from the unpatched model's, with the standard error of the difference."""
    quality = row["overall"]
    if quality["top1"] is None:
        return "-"
    return f"{quality['top1']:.2f} % ({quality['top1'] - quality['top1_unpatched']:+.2f} ± {row['top1_drop_se']:.2f})"


def changed(quality: dict[str, Any], digits: int = 1) -> list[str]:
    """Agreement and KL; for a model without a head, which has neither, the distance of its features."""
    if quality["kl"] is None:
        return ["-", f"distance {quality['distance']:.{digits}e}"]
    return [f"{quality['agreement']:.2f} %", f"{quality['kl']:.{digits}e}"]


def over_seeds(values: list[float], digits: int = 2) -> str:
    """The mean of the values, and with several values their standard deviation."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def saved(row: dict[str, Any]) -> str:
    """The share of GFLOPs saved, and the same if the last block computes all its tokens."""
    whole = row["gflops_unpatched"]
    costs = row["overall"]["gflops"], row["gflops_all_tokens_last"]
    with_all, alone = (round(100 * (1 - cost / whole), 1) + 0.0 for cost in reversed(costs))  # -0.0 becomes 0.0
    return f"{alone:.1f} % (all tokens last: {with_all:.1f} %)"


def about(rows: list[dict[str, Any]]) -> str:
    """The number of images, and cost and top-1 of the unpatched model."""
    row = next((row for row in rows if "overall" in row), None)
    if row is None:
        return "nothing measured"
    quality = row["overall"]
    return (
        f"{quality['images']} images; unpatched {row['gflops_unpatched']:.3f} GFLOPs, "
        f"top-1 {percent(quality['top1_unpatched'])}"
    )


def markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))
