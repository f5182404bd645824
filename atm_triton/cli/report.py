"""Makes tables and bar charts of what the commands measure."""

from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from atm_triton.calibration.calibrate import Calibration, Promise
from atm_triton.measure.comparison import Measure
from atm_triton.measure.evaluate import Evaluation, Quality
from atm_triton.measure.provenance import check_file

COLOURS = {"timm": "0.6", "free-merge bound": "0.8", "ToMe": "C1", "ATM": "C0"}  # the same in all plots


def throughput_table(rows: list[dict[str, Any]]) -> str:
    """A table of the rows of :func:`atm_triton.measure.throughput.measure`."""
    lines = [
        f"{'':24} {'images/s':>9} {'slowest':>9} {'fastest':>9} {'speed-up':>8} {'of bound':>8} {'GFLOPs':>7} "
        f"{'peak MiB':>8}"
    ]
    for row in rows:
        name = f"{row['name']}, {row['note']}" if row["note"] else row["name"]
        lines.append(
            f"{name:24} {row['images_per_second']:9.1f} {row['slowest']:9.1f} {row['fastest']:9.1f} "
            f"{row['speedup']:8.2f} {row['of_bound']:8.3f} {row['gflops']:7.3f} {row['peak_mib']:8.1f}"
        )
    lines.append("tokens that enter each block:")
    for row in rows:
        tokens = " ".join(f"{n:.0f}" for n in row["tokens"])
        lines.append(f"  {row['name']:22} {tokens}")
    return "\n".join(lines)


def slower(rows: list[dict[str, Any]]) -> str | None:
    """A warning that names the ways to merge that are slower than the unpatched model; None if none is."""
    ours = [row for row in rows if row["name"].startswith("ATM") and row["speedup"] < 1]
    told = " and ".join(f"{row['name']} has {row['speedup']:.2f} of timm's speed" for row in ours)
    return f"merging does not pay here: {told}; it does with larger batches, models or images" if ours else None


def evaluation_table(outcome: Evaluation) -> str:
    """A table with a row for all images, then one per decile from the easiest to the hardest."""
    overall = outcome.overall
    change, much = ("distance", "99th %ile") if overall.kl is None else ("agree %", "KL")
    lines = [f"{'':10} {'images':>7} {'top-1':>7} {'before':>7} {change:>9} {much:>9} {'GFLOPs':>7} {'own tokens':>10}"]
    lines.append(_line("all", overall))
    lines += [_line(f"decile {number}", quality) for number, quality in enumerate(outcome.deciles, start=1)]
    if outcome.deciles:
        lines.append("deciles: images sorted by the tokens that they would keep with their own count, fewest first")
    lines.append("tokens that enter each block: " + " ".join(f"{n:.1f}" for n in outcome.tokens))
    lines.append(
        f"{overall.gflops:.3f} GFLOPs per image; unmerged {outcome.gflops_unpatched:.3f}: "
        f"{100 * outcome.saved:.1f} % of the MACs saved"
    )
    if overall.top1 is not None and overall.top1_unpatched is not None:
        gained = overall.top1 - overall.top1_unpatched
        lines.append(f"top-1 changes by {gained:+.2f} points (standard error {outcome.top1_drop_se:.2f})")
    return "\n".join(lines)


def _line(name: str, quality: Quality) -> str:
    def figure(value: float | None, width: int, digits: int) -> str:
        return f"{value:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"

    if quality.kl is None:
        change = f"{quality.distance:9.1e} {quality.distance_p99:9.1e}"
    else:
        change = f"{quality.agreement:9.2f} {quality.kl:9.1e}"
    return (
        f"{name:10} {quality.images:7d} {figure(quality.top1, 7, 2)} {figure(quality.top1_unpatched, 7, 2)} "
        f"{change} {quality.gflops:7.3f} {figure(quality.own_tokens, 10, 1)}"
    )


def calibration_table(calibration: Calibration, asked: int) -> str:
    """A text with the configuration that was found and what it promises. ``asked``: for how many images."""
    config, promise = calibration.config, calibration.promise
    merging = config.thresholds or config.schedule or ()
    values = " ".join("-" if value is None else f"{value:g}" for value in merging)
    of_r = "r" if config.thresholds is None else "threshold"
    whole = calibration.unmerged_gflops
    saved = 100 * (1 - promise.gflops / whole)
    doubt = calibration.target.doubt(promise)
    fewer = "" if calibration.images >= asked else f", fewer than --images {asked}: there are no more"
    cost_error = "" if promise.gflops_se is None else f" ± {promise.gflops_se:.2g}"
    return "\n".join(
        [
            f'adapt="{config.adapt}", {of_r} of each block: {values}',
            f"on {promise.images} images that the search did not see:",
            f"  {promise.gflops:.4g}{cost_error} GFLOPs of {whole:.4g}: {saved:.1f} % saved",
            *_promised_change(promise),
            f"compared: {Measure(promise.measure)}",
            f"{calibration.passes:,} forward passes of single images, on {calibration.images} images{fewer}",
            *([f"the target may not hold: {doubt}; set a stricter one, or give more images"] if doubt else []),
        ]
    )


def _promised_change(promise: Promise) -> list[str]:
    if promise.distance is None:
        what, value, error = "KL", promise.kl, promise.kl_se
    else:
        what, value, error = "distance", promise.distance, promise.distance_se
    lines = [f"  {what} {value:.3g}" + ("" if error is None else f" ± {error:.2g}")]
    if promise.distance_p99 is not None:
        lines.append(f"  its 99th percentile {promise.distance_p99:.3g}")
    if promise.agreement is not None and promise.agreement_se is not None:
        lines.append(f"  agreement {100 * promise.agreement:.2f} ± {100 * promise.agreement_se:.2f} %")
    return lines


def left_out(broken: list[str]) -> str:
    """A sentence that names the images that could not be read."""
    what = (
        "1 image could not be read and was" if len(broken) == 1 else f"{len(broken)} images could not be read and were"
    )
    return f"{what} left out: {', '.join(broken)}"


def need_matplotlib() -> None:
    """Raise ValueError if matplotlib is missing, so that a long run fails at its start and not at its end."""
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'atm-triton[paper]'")


def check_plot(path: Path | None, option: str = "--plot") -> None:
    """Check at the start of a run that its plot can be written at the end."""
    if path is None:
        return
    need_matplotlib()
    check_file(option, path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{option} {path}: want a name that ends in .png, .pdf or .svg")


def throughput_plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Plot images per second of every variant, one panel per case; whiskers show the range over the turns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        rows = case["rows"]
        names = [f"{fill(row['name'], 12, break_on_hyphens=False)}\n{row['gflops']:.2f} GFLOPs" for row in rows]
        rates = [row["images_per_second"] for row in rows]
        below = [row["images_per_second"] - row["slowest"] for row in rows]
        above = [row["fastest"] - row["images_per_second"] for row in rows]
        colours = [COLOURS.get(row["name"], "lightsteelblue") for row in rows]
        panel.bar(names, rates, yerr=[below, above], color=colours, capsize=3)
        panel.set_ylabel("images per second")
        panel.set_title(fill(case["title"], 72), fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=150)


def training_plot(epochs: list[dict[str, Any]], path: Path) -> None:
    """Plot loss and top-1 by epoch from the rows of :func:`atm_triton.training.finetune.finetune`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    trained = [row for row in epochs if row["train_loss"] is not None]
    losses.plot([row["epoch"] for row in trained], [row["train_loss"] for row in trained], marker="o")
    losses.set_ylabel("training loss")
    for name, label in (("top1", "merged"), ("top1_unpatched", "unpatched"), ("top1_ema", "merged, averaged weights")):
        known = [row for row in epochs if row[name] is not None]
        if known:
            accuracies.plot([row["epoch"] for row in known], [row[name] for row in known], marker="o", label=label)
    accuracies.set_ylabel("top-1, %")
    accuracies.legend()
    for panel in (losses, accuracies):
        panel.set_xlabel("epoch")
    figure.savefig(path, dpi=150)
