"""Accuracy against FLOPs, all methods: ATM ("batch" and "image") beside ToMe, one threshold, EViT, MCTF and PiToMe.

At each share of the model's FLOPs every method takes the setting whose cost comes closest, all with the last block for
the class token alone; beside it stands the cost with a last block that computes all its tokens and merges none. Neither
changes a logit, but for MCTF, which fuses before attention. ATM's thresholds are those of --config (the digits: the
shipped ones), scaled to the cost; no method sees a label. The products of the matching are in no cost.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from atm_triton import ATMConfig
from atm_triton.env import environment, write_result
from atm_triton.evaluate import share as shared
from atm_triton.flops import cost_of_each
from atm_triton.inputs import DIGITS, digits_config
from benchmarks.paper.methods import Way, at_cost
from benchmarks.paper.subject import Subject, options

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)  # saved
STYLES = {
    "tome": "C1s--",
    "threshold": "C2v--",
    "evit, fused": "C3^--",
    "evit": "C3^:",
    "mctf": "C4D--",
    "pitome": "C5P--",
    "atm, batch": "C0o--",
    "atm, image": "C0o-",
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[options()])
    parser.add_argument("--config", type=Path, help='ATM\'s thresholds, of "atm-triton calibrate"')
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the FLOPs to save")
    return parser


def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All rows; written to ``out`` as they come."""
    if any(not 0 < share < 1 for share in args.shares):
        raise ValueError("--shares want numbers between 0 and 1")
    if len(set(args.shares)) < len(args.shares):
        raise ValueError("--shares wants each share once")
    configs = configurations(args)
    subject = Subject(args)
    for config in configs.values():
        config.check_depth(len(subject.model.blocks))
    about = {**subject.about, "shares": args.shares, "configs": {k: asdict(v) for k, v in configs.items()}}
    about |= {"commit": environment()["commit"]}
    rows = _known(out, about) if args.resume else []
    done = {(row["method"], row["share"]) for row in rows}
    for share in args.shares:
        if all((name, share) in done for name in STYLES):
            continue
        for way in at_cost(subject, subject.goal(share), configs):
            if (_named(way), share) not in done:
                rows.append({"method": _named(way), "share": share, **_row(subject, way)})
                write_result(out, {"settings": about, "rows": rows})
    return {"settings": about, "rows": rows}


def configurations(args: argparse.Namespace) -> dict[str, ATMConfig]:
    """ATM's thresholds for either way to adapt."""
    if args.config is not None:
        given = ATMConfig.from_json(args.config.read_text())
        if given.adapt == "static":
            raise ValueError(f"--config {args.config} is a schedule; want thresholds")
        return {"batch": given, "image": given}
    if args.model != DIGITS:
        raise ValueError(f"--config FILE: say ATM's thresholds for {args.model}; atm-triton calibrate finds them")
    return {adapt: digits_config(adapt) for adapt in ("batch", "image")}


def _named(way: Way) -> str:
    return "evit, fused" if way.name == "evit" and way.settings.get("fuse_token", True) else way.name


def _row(subject: Subject, way: Way) -> dict[str, Any]:
    outcome = subject.outcome(way.patch, f"{_named(way)} {way.settings}"[:40])
    settings = {"config": way.settings["config"]} if "config" in way.settings else way.settings
    return {"settings": settings, **outcome.to_dict(), "gflops_all_tokens_last": _all_last(subject, way)}


@torch.inference_mode()
def _all_last(subject: Subject, way: Way) -> float:
    """GFLOPs of an image if the last block computes all its tokens and merges none."""
    model, each = way.patch(shared(subject.model)), []
    for images, _ in subject.test:
        model(images.to(next(model.parameters())))
        record = model.blocks.last
        rows = record.rows if record.leading is None else (*record.rows[:-1], record.tokens[-1])
        gflops = cost_of_each(model, replace(record, leading=None, rows=rows)).paper_gflops
        each.append(torch.as_tensor(gflops, dtype=torch.float64).expand(len(images)))
    return torch.cat(each).mean().item()


def _known(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    document = json.loads(out.read_text())
    if document.get("settings") != json.loads(json.dumps(about)):
        raise ValueError(
            f"--resume: {out} is of other settings or another commit; leave --resume out, or give another --out"
        )
    return document["rows"]


def table(result: dict[str, Any]) -> str:
    """In Markdown: top-1 and KL at each share."""
    shares = sorted({row["share"] for row in result["rows"]})
    first = result["rows"][0]["overall"]
    lines = [
        f"| {first['images']} images; top-1 unpatched {_percent(first['top1_unpatched'])}: top-1, KL at | "
        + " | ".join(f"-{100 * share:.0f} %" for share in shares)
        + " |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for method in STYLES:
        cells = []
        for share in shares:
            found = [row for row in result["rows"] if row["method"] == method and row["share"] == share]
            cells.append(_cell(found[0]) if found else "not reached")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    quality, whole = row["overall"], row["gflops_unpatched"]
    saved, without = (100 * (1 - cost / whole) for cost in (quality["gflops"], row["gflops_all_tokens_last"]))
    return f"{_percent(quality['top1'])}, {quality['kl']:.1e} (-{saved:.1f} %; all tokens last -{without:.1f} %)"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def plot(result: dict[str, Any], path: Path) -> None:
    """Top-1, agreement and KL against GFLOPs."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = ("top-1, %", "agreement with the unpatched model, %", "KL(unpatched || merged), nats")
    for panel, name, label in zip(panels, ("top1", "agreement", "kl"), labels, strict=True):
        for method, style in STYLES.items():
            rows = sorted((r["overall"] for r in result["rows"] if r["method"] == method), key=lambda q: q["gflops"])
            if all(row[name] is not None for row in rows):
                panel.plot([r["gflops"] for r in rows], [r[name] for r in rows], style, label=method, markersize=4)
        panel.set_xlabel("GFLOPs an image")
        panel.set_ylabel(label)
    panels[2].set_yscale("log")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
