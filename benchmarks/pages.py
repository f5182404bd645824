"""The tables of README, CONTRIBUTING and docs, from ``benchmarks/results/``: ``python -m benchmarks.report``."""

import json
import math
import re
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import timm

from atm_triton.digits import model as digits_model
from benchmarks import RESULTS, coverage, few_images, host, integration, kept_for_backward
from benchmarks.baselines import ALL
from benchmarks.baselines.table import table as methods_table
from benchmarks.gpu.models import DIGITS, NAMES
from benchmarks.paper import finetuned, flops, table1, table2, table4, table_a3
from benchmarks.paper.cells import saved
from benchmarks.photos import ideas, unmerge
from benchmarks.photos import report as photographs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ACCURACY, BACKBONES, CALIBRATION, ENGINE, EXPERIMENTS, KERNELS, PERFORMANCE, PHOTOS, TRAINED = (
    ROOT / f"docs/{page}.md"
    for page in (
        *("accuracy", "backbones", "calibration", "engine", "experiments", "kernels", "performance", "photos"),
        "trained",
    )
)
FAQ = ROOT / "docs/faq.md"
WORKS_WITH = ROOT / "docs/works-with.md"
AT = 0.5  # the share of FLOPs saved at which methods are compared
ON_PHOTOGRAPHS = 0.2  # the same for the DINOv2
SHOWN = (0.40, 0.50, 0.60, 0.70)  # of the costs that were measured


def load(name: str) -> dict[str, Any]:
    if not (RESULTS / name).is_file():
        raise FileNotFoundError(
            f"{RESULTS / name} is missing, README or a page of docs has a table of it; measure it, or check it out"
        )
    return json.loads((RESULTS / name).read_text())


def named(*names: str) -> str:
    """The line under a table of a page in the root: links to its result files, which say what made them."""
    return f"From {', '.join(f'[`{name}`](benchmarks/results/{name})' for name in names)}."


def made_by(*names: str) -> str:
    """The lines under a table in docs: each result file with its command, machine, versions and commit."""
    lines = []
    for name in names:
        e = load(name)["environment"]
        commit = (e["commit"] or "none")[:7] + (" and changes" if e["dirty"] else "")
        where = e["cpu"] if e["gpu"] is None else f"{e['gpu']}, driver {e['driver']}, triton {e['triton']}"
        lines.append(
            f"[`{name}`](../benchmarks/results/{name}): `{e['command']}`, {where}, torch {e['torch']}, "
            f"timm {e['timm']}, commit {commit}."
        )
    return "\n".join(lines)


def headline(
    gpu: dict[str, Any], cpu: dict[str, Any], digits: dict[str, Any], photos: dict[str, Any], dinov2: dict[str, Any]
) -> str:
    """README's first table: images per second without and with merging, and what that changes in trained models."""
    rows = {(row["model"], row["batch"], row["name"]): row for row in reversed(gpu["stages"]["engine"]["rows"])}
    card = gpu["environment"]["gpu"].removeprefix("NVIDIA ")
    names = ("timm, one graph", "ATM image", "ATM static, r = 0")
    before, after, alone = (rows["DeiT-S", 256, name] for name in names)
    lines = [
        "| | timm | ATM | |",
        "|---|---|---|---|",
        f"| DeiT-S, images/s, batch 256, bfloat16, {card}, each in CUDA graphs | {before['images_per_second']:,.0f} "
        f"| {after['images_per_second']:,.0f} | {after['of_timm_graph']:.2f} times "
        f"({alone['of_timm_graph']:.2f} without merging) |",
    ]
    on_cpu = {row["name"]: row for row in cpu["cases"][0]["rows"]}
    before, after = on_cpu["timm"], on_cpu["ATM"]
    lines.append(
        f"| digits, images/s, batch 64, float32, {cpu['environment']['cpu']} | {before['images_per_second']:.0f} "
        f"| {after['images_per_second']:.0f} | {after['speedup']:.2f} times |"
    )
    row = next(row for row in digits["rows"] if row["adapt"] == "image" and row["share"] == AT)
    quality = row["overall"]
    lines.append(
        f"| digits, top-1 with {100 * row['saved']:.0f} % fewer FLOPs, {quality['images']} test images "
        f"| {quality['top1_unpatched']:.2f} % | {quality['top1']:.2f} % | same class for {quality['agreement']:.2f} % |"
    )
    return "\n".join([*lines, _on_photographs(photos, dinov2["rows"][0]["gflops_unpatched"])])


def _on_photographs(photos: dict[str, Any], unmerged: float) -> str:
    rows = {(row["method"], row["share"]): row for row in photos["rows"]}
    row = rows["atm, calibrated, image", ON_PHOTOGRAPHS]
    saved, of = 100 * (1 - row["gflops"] / unmerged), photos["settings"]["photos"]
    judged = f"{row['images']} photographs" if of is None else f"{row['images']} crops of {len(of['test'])} photographs"
    return (
        f"| DINOv2-S, change of patch tokens (1 - cosine) with {saved:.0f} % fewer FLOPs, {judged} "
        f"| 0 | {row['patch_tokens']['mean']:.4f} "
        f"| ToMe at that cost: {float(photographs.less_than_tome(photos, row, 'patch_tokens')):.1f} times as much |"
    )


def first_example(result: dict[str, Any]) -> str:
    """What README's first example merges and saves, from the bench, which runs on the same images."""
    case = result["cases"][0]
    rows = {row["name"]: row for row in case["rows"]}
    timm, atm = rows["timm"], rows["ATM"]
    return (
        f"An image costs {atm['gflops']:.3f} GFLOPs instead of {timm['gflops']:.3f}: of its {atm['tokens'][0]:.0f} "
        f"tokens, {atm['tokens'][-1]:.1f} on average enter the last block."
    )


def throughput_table(*documents: dict[str, Any]) -> str:
    lines = ["| | images/s | speed-up | time(bound) / time | GFLOPs | peak MiB |", "|---|---|---|---|---|---|"]
    for case in (case for document in documents for case in document["cases"]):
        lines.append(f"| **{case['title']}** | | | | | |")
        for row in case["rows"]:
            name = f"{row['name']}, {row['note']}" if row["note"] else row["name"]
            if name == "ATM" and case["config"]["adapt"] == "image":
                name = 'ATM, adapt="image"'
            name = name.replace("one r a batch", "one r per batch")  # as older results call it
            lines.append(
                f"| {name} | {row['images_per_second']:.1f} ({row['slowest']:.1f} to {row['fastest']:.1f}) "
                f"| {row['speedup']:.2f} | {row['of_bound']:.3f} | {row['gflops']:.3f} | {row['peak_mib']:.1f} |"
            )
    return "\n".join(lines)


ON_GPU = {  # heading: what the stage calls it
    "timm": "timm",
    "timm, graph": "timm, one graph",
    "timm, compiled": "timm, compiled",
    "bound, graph": "free-merge bound, one graph",
    "ATM static": "ATM static",
    'ATM `"batch"`': "ATM batch",
    'ATM `"image"`': "ATM image",
    "ATM, r = 0": "ATM static, r = 0",
}


def gpu_table(result: dict[str, Any]) -> str:
    """Milliseconds of a pass, and time(bound) / time for variants that merge. Processes with torch.compile are
    timed after all others; only rows that no other process has are taken from them."""
    measured, rows = result["stages"]["engine"]["rows"], {}
    for row in measured:
        rows.setdefault((row["model"], row["batch"], row["name"]), row)
    names = {name for *_, name in rows}
    shown = {heading: name for heading, name in ON_GPU.items() if name in names}
    made = result["environment"]
    lines = [f"| {made['gpu']}, bfloat16, ms | {' | '.join(shown)} |", f"|{'---|' * (1 + len(shown))}"]
    cells = dict.fromkeys(key[:2] for key in rows)
    for cell in cells:
        variants = [rows.get((*cell, name)) for name in shown.values()]
        lines.append(f"| {cell[0]}, batch {cell[1]} | {' | '.join(map(_milliseconds, variants))} |")
    lines += ["", *(_beside_a_graph(rows, cell) for cell in cells if cell[1] == 256)]
    compiled = {(row["model"], row["batch"], row["name"]): row["milliseconds"] for row in measured if row["session"]}
    lines += [
        f"- {cell[0]} at batch {cell[1]}, in a process of its own: `torch.compile` of timm (reduce-overhead) takes "
        f'{compiled[*cell, "timm, compiled"] / compiled[*cell, "ATM image"]:.2f} times as long as `adapt="image"`.'
        for cell in cells
        if {(*cell, "timm, compiled"), (*cell, "ATM image")} <= set(compiled)
    ]
    return "\n".join(lines)


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    of_bound = row.get("of_bound") if row["name"].startswith("ATM") else None
    return f"{row['milliseconds']:.2f}" + ("" if of_bound is None else f" ({of_bound:.2f})")


def _beside_a_graph(rows: dict[tuple, dict[str, Any]], cell: tuple[str, int]) -> str:
    ours, unmerged = (rows[*cell, name]["of_timm_graph"] for name in ("ATM image", "ATM static, r = 0"))
    return (
        f'- {cell[0]} at batch {cell[1]}: `adapt="image"` is {ours:.2f} times as fast as timm in a CUDA graph; without '
        f"merging (r = 0) the engine alone is {unmerged:.2f} times."
    )


def since_the_first(first: dict[str, Any], now: dict[str, Any]) -> str:
    """Milliseconds of a pass on the same card: the first version in eager mode and as one graph, and today's engine."""
    measured = {(row["model"], row["batch"], row["name"]): row for row in reversed(now["stages"]["engine"]["rows"])}
    names = {"deit_small_patch16_224": "DeiT-S", "deit_base_patch16_224": "DeiT-B"}
    lines = [
        "| ms, bfloat16, r = 8 | timm, eager | first version, eager | in one graph, by hand | now: engine, `"
        '"static"` | `"image"` |',
        "|---|---|---|---|---|---|",
    ]
    for row in first["graphs"]:
        model, batch = names[row["model"]], row["B"]
        ours = (f"{measured[model, batch, f'ATM {adapt}']['milliseconds']:.2f}" for adapt in ("static", "image"))
        lines.append(
            f"| {model}, batch {batch} | {row['eager_ms']['timm']:.2f} | {row['eager_ms']['ours']:.2f} "
            f"| {row['graph_ms']['ours']:.2f} | {' | '.join(ours)} |"
        )
    return "\n".join(lines)


def pays_table(gpu: dict[str, Any], *cpu: dict[str, Any]) -> str:
    """The speed-up over timm by model, image size, batch size and way to adapt. Values below 1 are in bold."""
    card, processor = gpu["environment"]["gpu"], cpu[0]["environment"]["cpu"]
    cells_of = {f"{card}, bfloat16, each in CUDA graphs": {}, f"{processor}, float32": {}}
    on_gpu, on_cpu = cells_of.values()
    for row in gpu["stages"]["engine"]["rows"]:
        if row["name"] in _WAYS and not row["session"]:
            on_gpu.setdefault((row["model"], row["batch"]), {})[_WAYS[row["name"]]] = row["of_timm_graph"]
    for case in (case for document in cpu for case in document["cases"]):
        (row,) = (row for row in case["rows"] if row["name"] == "ATM")
        cell = case["title"].partition(",")[0], case["batch_size"]
        on_cpu.setdefault(cell, {})[case["config"]["adapt"]] = row["speedup"]
    heads = " | ".join(f'`"{adapt}"`' for adapt in _WAYS.values())
    lines = [f"| times as fast as timm | pixels | batch | {heads} |", f"|{'---|' * 6}"]
    for where, cells in cells_of.items():
        lines.append(f"| **{where}** | | | | | |")
        for model, batch in sorted(cells):
            times = (_times(cells[model, batch].get(adapt)) for adapt in _WAYS.values())
            name, side = _model(model)
            lines.append(f"| {name} | {side} | {batch} | {' | '.join(times)} |")
    return "\n".join(lines)


SHORT = {**NAMES, "DeiT-T": "deit_tiny_patch16_224"}
_WAYS = {"ATM static": "static", "ATM batch": "batch", "ATM image": "image"}


def _model(name: str) -> tuple[str, int]:
    """The name of a model on the pages, and the side of its images in pixels."""
    timms = {DIGITS: digits_model.NAME, **SHORT}.get(name, name)
    short = {long: short for short, long in SHORT.items()}.get(timms, name)
    return short, timm.get_pretrained_cfg(timms).input_size[-1]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def kernels_table(result: dict[str, Any]) -> str:
    """Microseconds of each operation by the number of images, and its bound, at the first row's shapes (DeiT-S)."""
    section = result["stages"]["kernels"]
    first = section["rows"][0]
    same = {key: first[key] for key in ("dtype", "N", "H", "d")}
    rows = [row for row in section["rows"] if all(row[key] == value for key, value in same.items())]
    row_of = {(row["operation"], row["B"]): row for row in rows}
    batches = dict.fromkeys(row["B"] for row in rows)
    heads = (f"B = {B}, us | bound" for B in batches)
    lines = [f"| {first['dtype']} | {' | '.join(heads)} |", f"|{'---|' * (1 + 2 * len(batches))}"]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        cells = (row_of[operation, B] for B in batches)
        told = (f"{row['microseconds']:.1f} | {row['bound_us']:.1f}" for row in cells)
        lines.append(f"| {operation} | {' | '.join(told)} |")
    rate = section["product_tflop_per_second"][first["dtype"]]
    copy = section["copy_gb_per_second"]
    told = f"The bounds are of {copy:.0f} GB/s and {rate:.0f} TFLOP/s, measured in the same run"
    return "\n".join([*lines, "", f"{told}; a kernel that does nothing takes {section['empty_us']:.1f} us there."])


def attention_beside(result: dict[str, Any]) -> str:
    """Microseconds of attention with log n by the kernel, and of torch's own attention with and without a bias."""
    rows, others = {}, ("SDPA, mask", "SDPA, no bias", "written out")
    for row in result["stages"]["attention"]["rows"]:
        shape = f"{row['dtype']}, d = {row['d']}, N = {row['N']}, B = {row['B']}, H = {row['H']}"
        name = "SDPA, mask" if row["candidate"].startswith("SDPA, mask") else row["candidate"]
        rows.setdefault(shape, {})[name] = row["microseconds"]
    lines = [f"| us | the kernel | {' | '.join(others)} |", f"|{'---|' * (2 + len(others))}"]
    for shape, of in rows.items():
        cells = (f"{of[name]:.0f}" if of.get(name) else "" for name in ("kernel", *others))
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(result: dict[str, Any]) -> str:
    section = result["stages"]["training"]
    lines = [f"| a step, batch {section['batch']}, r = {section['r']} | | ms | peak MiB |", "|---|---|---|---|"]
    for row in section["rows"]:
        figures = f"{row['milliseconds']:.1f} | {row['peak_mib']:.0f}"
        lines.append(f"| {row['model']}, {row['dtype']} | {row['name']} | {figures} |")
    return "\n".join(lines)


def slow_host_table(*results: dict[str, Any]) -> str:
    """Milliseconds of DeiT-S in two runs on the same kind of card, one of them on a slower host."""
    runs = [
        {
            (row["batch"], row["name"]): row["milliseconds"]
            for row in result["stages"]["engine"]["rows"]
            if row["model"] == "DeiT-S" and not row["session"]
        }
        for result in results
    ]
    names = {"timm": "timm, eager", "timm, one graph": "timm, graph", "ATM static": 'ATM `"static"`'}
    names |= {"ATM image": 'ATM `"image"`'}
    lines = [f"| DeiT-S, ms: one run, the other | {' | '.join(names.values())} |", f"|{'---|' * (1 + len(names))}"]
    for batch in sorted({batch for batch, _ in runs[0]}):
        cells = (", ".join(f"{run[batch, name]:.2f}" for run in runs) for name in names)
        lines.append(f"| batch {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def invariance_table(result: dict[str, Any]) -> str:
    lines = [
        f"| {result['images']} test images, against each alone | merged otherwise | other class | logits differ by |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f'| `adapt="{row["adapt"]}"`, batches of {row["batch_size"]}, {row["order"]} '
            f"| {row['other_assignments']} | {row['other_predictions']} | {row['logits_differ_by']:.1e} |"
        )
    return "\n".join(lines)


def adaptivity_table(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["share"] in SHOWN]
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
    return "\n".join(lines)


def accuracy_table(result: dict[str, Any]) -> str:
    """The rows of Table 2 at one cost; the page of results has the other costs."""
    return table2.table(result | {"rows": [row for row in result["rows"] if row["share"] == AT]})


def calibration_table(*documents: dict[str, Any]) -> str:
    """The table of the calibration benchmark, and for a single calibration a sentence on the effort it took."""
    return "\n\n".join(_targets(document) if "rows" in document else effort(document) for document in documents)


SCHEDULES = {"ToMe": "constant r", "increasing": "rising r", "decreasing": "falling r"}  # as the pages call them


def _targets(result: dict[str, Any]) -> str:
    """A row for each target and way to adapt: the calibrated thresholds, and the KL of other choices at equal cost."""
    rows = {(row["method"], row.get("share"), row["adapt"]): row for row in result["rows"]}
    others = [("curve", f"best of {result['settings']['draws']} curves"), *SCHEDULES.items()]
    first = result["rows"][0]
    lines = [
        f"| {first['overall']['images']} test images; target | calibrated for | saved | top-1 | agreement (promised) "
        f"| KL (promised) | {' | '.join(f'KL, {title}' for _, title in others)} |",
        f"|{'---|' * (6 + len(others))}",
    ]
    for row in sorted(result["rows"], key=lambda row: row.get("share", 0)):
        if row["method"] != "calibrated":
            continue
        share, adapt = row.get("share"), row["adapt"]
        target = f"agreement {row['min_agreement']}" if share is None else f"-{100 * share:.0f} %"
        beside = [rows.get((method, share, adapt)) if share is not None else None for method, _ in others]
        lines.append(f'| {target} | `"{adapt}"` | {_outcome(row)} | {" | ".join(map(_kl, beside))} |')
    ratios, above = beside_the_curve(result)
    calibrated = [row for row in result["rows"] if row["method"] == "calibrated"]
    passes, seconds = ([row[name] for row in calibrated] for name in ("passes", "seconds"))
    lines += [
        "",
        f"In {sum(ratio <= 1 for ratio in ratios)} of {len(ratios)} cells the calibrated KL is at or below that of the "
        f"best curve, in the others at most {100 * max([1, *ratios]) - 100:.0f} %, or {max([0, *above]):.1f} standard "
        f"errors, above. The geometric mean of the {len(ratios)} ratios is {geometric_mean(ratios):.2f}. A calibration "
        f"took {min(passes):,} to {max(passes):,} passes of an image through the model, "
        f"{min(seconds):.0f} to {max(seconds):.0f} seconds.",
        *_commits(result["rows"]),
    ]
    return "\n".join(lines)


def _photographs(result: dict[str, Any]) -> str:
    return "\n".join([photographs.table(result), *_commits(result["rows"])])


def _commits(rows: list[dict[str, Any]]) -> list[str]:
    """A line that says which commit measured which methods; nothing if one commit measured all rows."""
    by_commit: dict[str, dict[str, None]] = {}  # a set that keeps the order
    for row in rows:
        by_commit.setdefault(row["commit"][:7], {})[SCHEDULES.get(row["method"], row["method"])] = None
    whose = "; ".join(f"{', '.join(methods)} {commit}" for commit, methods in by_commit.items())
    return ["", f"The rows are of the commits: {whose}."] if len(by_commit) > 1 else []


def effort(*results: dict[str, Any]) -> str:
    """A sentence per calibration on the passes and the time that it took."""
    lines = []
    for result in results:
        asked = f"--max-gflops {result['target']['max_gflops']:g}` with `--adapt {result['config']['adapt']}"
        took = f"{result['passes']:,} forward passes of single images, {result['seconds'] / 60:.1f} minutes"
        lines.append(f"- {result['model']}, {result['images']} images, `{asked}`: {took}")
    return "\n".join(lines)


def beside_the_curve(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """For each share and way to adapt: the ratio of the calibrated KL to that of the best random curve, and by how many
    standard errors it is above."""
    rows = {(row["method"], row.get("share"), row["adapt"]): row["overall"] for row in result["rows"]}
    pairs = [(rows["calibrated", *cell], row) for (method, *cell), row in rows.items() if method == "curve"]
    above = [(ours["kl"] - curve["kl"]) / math.hypot(ours["kl_se"], curve["kl_se"]) for ours, curve in pairs]
    return [ours["kl"] / curve["kl"] for ours, curve in pairs], above


def _outcome(row: dict[str, Any]) -> str:
    quality, promise = row["overall"], row["promise"]
    agreement = f"{100 * promise['agreement']:.2f} ± {100 * promise['agreement_se']:.2f} %"
    error = "" if promise["kl_se"] is None else f" ± {promise['kl_se']:.0e}"
    return (
        f"{saved(row)} | {quality['top1']:.2f} % | {quality['agreement']:.2f} % ({agreement}) "
        f"| {_kl(row)} ({promise['kl']:.1e}{error})"
    )


def _kl(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['overall']['kl']:.1e} ± {row['overall']['kl_se']:.0e}"


TABLES = {  # for each page: the name of a table, the function that makes it, and its result files
    README: {
        "headline": (
            headline,
            (
                *("h200_engine.json", "cpu_bench_image.json", "digits_adaptivity.json", "photos.json"),
                "vit_small_patch14_dinov2_table3.json",
            ),
        ),
        "first": (first_example, ("cpu_bench_image.json",)),
    },
    CONTRIBUTING: {"coverage": (coverage.table, ("coverage.json",))},
    ACCURACY: {
        "accuracy": (accuracy_table, ("digits_table2.json",)),
        "stress": (table1.table, ("digits_table1.json",)),
        "invariance": (invariance_table, ("digits_invariance.json",)),
        "adaptivity": (adaptivity_table, ("digits_adaptivity.json",)),
    },
    BACKBONES: {"flops": (flops.table, ("paper_flops.json",))},
    CALIBRATION: {
        "calibration": (calibration_table, ("digits_calibration.json", "digits_calibrate_512.json")),
        "few": (few_images.table, ("digits_few_images.json",)),
        "few-crops": (few_images.table, ("photos_few_images.json",)),
    },
    FAQ: {"effort": (effort, ("digits_calibrate.json", "dinov2_calibrate.json"))},
    EXPERIMENTS: {"methods": (partial(methods_table, ALL), ())},  # from the classes' own descriptions
    ENGINE: {"host": (host.table, ("host.json",))},
    KERNELS: {
        "attention": (attention_beside, ("h200_kernels.json",)),
        "kernels": (kernels_table, ("h200_kernels.json",)),
    },
    PERFORMANCE: {
        "pays": (pays_table, ("h200_engine.json", "cpu_bench.json", "cpu_bench_image.json", "cpu_bench_single.json")),
        "gpu": (gpu_table, ("h200_engine.json",)),
        "slow-host": (slow_host_table, ("h200_engine.json", "h200_engine_slow_host.json")),
        "training": (training_table, ("h200_training.json",)),
        "kept": (kept_for_backward.table, ("kept_for_backward.json",)),
        "since": (since_the_first, ("h200_first.json", "h200_engine.json")),
        "throughput": (throughput_table, ("cpu_bench.json", "cpu_bench_image.json", "cpu_bench_single.json")),
    },
    PHOTOS: {
        "photos": (_photographs, ("photos.json",)),
        "unmerge": (unmerge.table, ("photos_unmerge.json",)),
        "ideas": (ideas.table, ("photos_ideas.json",)),
        "ideas-image": (ideas.table, ("photos_ideas_image.json",)),
        "ideas-swapped": (ideas.table, ("photos_ideas_swapped.json",)),
    },
    TRAINED: {
        "table4": (table4.table, ("digits_table4.json",)),
        "finetuned": (finetuned.table, ("digits_finetuned.json",)),
        "tableA3": (table_a3.table, ("digits_tableA3.json",)),
    },
    WORKS_WITH: {"works-with": (integration.table, ("integration.json",))},
}


def fill(page: Path) -> str:
    """The text of a page with every table between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    text = page.read_text()
    for name, (table, files) in TABLES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name} has no place for the table {name!r}")
        source = named(*files) if page.parent == ROOT else made_by(*files)
        content = f"{table(*map(load, files))}\n\n{source}".rstrip()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def filled() -> dict[Path, str]:
    """The up-to-date text of every page that has tables."""
    return {page: fill(page) for page in TABLES}
