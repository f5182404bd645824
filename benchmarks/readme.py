"""README's tables, from the files in ``benchmarks/results/``; ``python -m benchmarks.report`` writes them."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.paper import flops, table1, table2

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
SHOWN = (0.40, 0.50, 0.60, 0.70)  # of the costs that were measured


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def made_by(*names: str) -> str:
    """Where a table comes from: file, command, commit and machine."""
    lines = []
    for name in names:
        e = load(name)["environment"]
        commit = (e["commit"] or "none")[:7] + (" and changes" if e["dirty"] else "")
        lines.append(
            f"[`{name}`](benchmarks/results/{name}): `{e['command']}`, {e['cpu']}, torch {e['torch']}, "
            f"timm {e['timm']}, commit {commit}."
        )
    return "\n".join(lines)


def accuracy_table() -> str:
    return table2.table(load("digits_table2.json")) + "\n\n" + made_by("digits_table2.json", "digits_figure4.json")


def stress_table() -> str:
    return table1.table(load("digits_table1.json")) + "\n\n" + made_by("digits_table1.json")


def throughput_table() -> str:
    lines = ["| | images/s | speed-up | time(bound) / time | GFLOPs | peak MiB |", "|---|---|---|---|---|---|"]
    files = ("cpu_bench.json", "cpu_bench_image.json")
    for case in (case for name in files for case in load(name)["cases"]):
        lines.append(f"| **{case['title']}** | | | | | |")
        for row in case["rows"]:
            name = f"{row['name']}, {row['note']}" if row["note"] else row["name"]
            if name == "ATM" and case["config"]["adapt"] == "image":
                name = 'ATM, adapt="image"'
            lines.append(
                f"| {name} | {row['images_per_second']:.1f} ({row['slowest']:.1f} to {row['fastest']:.1f}) "
                f"| {row['speedup']:.2f} | {row['of_bound']:.3f} | {row['gflops']:.3f} | {row['peak_mib']:.1f} |"
            )
    return "\n".join(lines) + "\n\n" + made_by(*files)


def invariance_table() -> str:
    result = load("digits_invariance.json")
    lines = [
        f"| {result['images']} test images, against each alone | merged otherwise | other class | logits differ by |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f'| `adapt="{row["adapt"]}"`, batches of {row["batch_size"]}, {row["order"]} '
            f"| {row['other_assignments']} | {row['other_predictions']} | {row['logits_differ_by']:.1e} |"
        )
    return "\n".join(lines) + "\n\n" + made_by("digits_invariance.json")


def adaptivity_table() -> str:
    rows = [row for row in load("digits_adaptivity.json")["rows"] if row["share"] in SHOWN]
    images, unpatched = (rows[0]["overall"][name] for name in ("images", "top1_unpatched"))
    lines = [
        f"| {images} test images; top-1 unpatched {unpatched:.2f} % | saved | top-1 | agreement | KL "
        "| easiest tenth: saved, tokens | hardest tenth: saved, tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        quality, tenths = row["overall"], [row["deciles"][i] for i in (0, -1)] if row["deciles"] else []
        cells = [f"{100 * (1 - tenth['gflops'] / row['gflops_unpatched']):.0f} %" for tenth in tenths]
        if row["adapt"] == "image":
            cells = [f"{cell}, {tenth['own_tokens']:.0f}" for cell, tenth in zip(cells, tenths, strict=True)]
        lines.append(
            f'| `adapt="{row["adapt"]}"` | {100 * row["saved"]:.1f} % | {quality["top1"]:.2f} % '
            f"| {quality['agreement']:.2f} % | {quality['kl']:.1e} | {' | '.join(cells or ['', ''])} |"
        )
    return "\n".join(lines) + "\n\n" + made_by("digits_adaptivity.json")


def flops_table() -> str:
    return flops.table(load("paper_flops.json")) + "\n\n" + made_by("paper_flops.json")


TABLES = {
    "flops": flops_table,
    "accuracy": accuracy_table,
    "stress": stress_table,
    "throughput": throughput_table,
    "invariance": invariance_table,
    "adaptivity": adaptivity_table,
}


def fill(text: str) -> str:
    """``text`` with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README has no place for the table {name!r}")
        content = table()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text
