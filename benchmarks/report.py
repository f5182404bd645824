"""All results on pages by subject, and the tables of README, CONTRIBUTING and docs: ``python -m benchmarks.report``.

Every result file in ``benchmarks/results/`` appears on one page there, with its table, its plot and the command,
machine and commit that made it. ``REPORT.md`` links all pages. Nothing is measured; unchanged results give unchanged
pages.
"""

import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from atm_triton.cli.bad_input import Parser, exit_code
from benchmarks import pages
from benchmarks.paper.__main__ import EXPERIMENTS

INDEX = "REPORT.md"
PAGES = {  # file: title, and each result with its description; "": the first line of the experiment's docstring
    "cpu.md": (
        "Speed on a CPU",
        {
            "cpu_bench": "images per second: the digits with one r per batch, DeiT-S with r = 8",
            "cpu_bench_image": "images per second: each image by its own count, on the digits and on DeiT-S",
            "cpu_bench_single": "images per second: DeiT-T, one image at a time",
        },
    ),
    "gpu.md": (
        "Speed on a GPU",
        {
            "h200_engine": "milliseconds of a pass by model, batch and way to adapt, beside timm and the bound",
            "h200_engine_slow_host": "the same with a slower host",
            "h200_first": "the first version on the same card",
            "h200_kernels": "microseconds of each operation, and what bounds it",
            "h200_parity": "every operation at real sizes beside float64",
            "h200_training": "a training step: time and memory",
        },
    ),
    "digits.md": ("Methods at one cost, on the digits", {"digits_table[12]": "", "digits_figure[47]": ""}),
    "thresholds.md": (
        "Thresholds, schedules and groups, on the digits",
        dict.fromkeys(("digits_figure[256]", "digits_table3", "digits_tablesA2-A5", "digits_theorem1"), ""),
    ),
    "batches.md": (
        "Batches and single images",
        {
            "digits_adaptivity": "each image by its own count, one r per batch and a given r, at equal cost",
            "digits_invariance": "whether a prediction depends on the other images of the batch",
            "digits_tableA1": "",
        },
    ),
    "calibration.md": (
        "Calibration",
        {
            "digits_calibration": "calibrated thresholds beside random curves and ToMe's schedules",
            "digits_calibrate": "how long a calibration takes",
            "digits_calibrate_512*": "the same by an earlier search, on 512 images",
            "dinov2_calibrate": "a DINOv2 ViT-S/14 on 64 crops of photographs, by its patch tokens",
            "digits_few_images": "calibrations from 64 images beside earlier ones from many",
            "dinov2_calibrate_512_[45].[25]*": "the same by an earlier search, on 512 crops",
            "dinov2_calibrate_512_4.9": "the same; passes and time are those after an interruption",
            "photos_few_images": "calibrations of the DINOv2 from 64 crops beside those from 512",
        },
    ),
    "training.md": (
        "Training",
        {
            "digits_training": "how the digits model was trained",
            **dict.fromkeys(("digits_finetuned", "digits_table4", "digits_tableA3"), ""),
            "digits_cpu_table4": "minutes of Table 4 on a CPU: a twentieth of its images, in one epoch",
        },
    ),
    "photographs.md": (
        "A DINOv2 and photographs",
        {
            "photos": "all methods at several costs, by class token, patch tokens and saliency",
        },
    ),
    "matching.md": (
        "Other ways to match and unmerge, on photographs",
        {
            "photos_ideas": "other ways to match tokens",
            "photos_ideas_image": "the same where each image merges its own number",
            "photos_ideas_swapped": "three of these on other photographs",
            "photos_unmerge": "other ways to unmerge patch tokens",
        },
    ),
    "dinov2.md": ("The paper's experiments on the DINOv2", {"vit_small_patch14_dinov2_*": ""}),
    "checks.md": (
        "Checks: costs, compilation, the host, other libraries",
        {
            "coverage": "which lines of the package the tests run",
            "host": "what a pass costs the host",
            "kept_for_backward": "what a training step keeps for its backward pass",
            "integration": "other libraries on a patched model",
            "offline_compile_triton_*": "registers, spills and shared memory of every kernel configuration",
            "paper_flops": "parameters and MACs of the paper's models",
        },
    ),
}
MADE = "Made from the result files here by `python -m benchmarks.report`"
OTHERS = {
    file: table
    for path, tables in pages.TABLES.items()
    for name, (table, files) in tables.items()
    for file in files
    if path != pages.README and name not in ("pays", "since", "slow-host")  # those are extracts
}  # than the paper's by their name


def index_and_pages(directory: Path) -> dict[str, str]:
    """The Markdown of the index and of every page that has a result, by file name.

    Raises:
        ValueError: a file is not a result, or belongs to no page or to several pages.
    """
    sections: dict[str, dict[str, str]] = {}
    links: dict[str, list[str]] = {}
    for path in sorted(directory.glob("*.json")):
        page, about = _place(path)
        sections.setdefault(page, {})[path.name] = section(path, about)
        links.setdefault(page, []).append(f"- [{path.stem}]({page}#{_anchor(path.stem)}): {about}")
    made, index = {}, ["# Results", f"{MADE}. Each stands on one page, with its table, its plot and what made it."]
    for page in (page for page in PAGES if page in sections):
        title = PAGES[page][0]
        made[page] = "\n\n".join([f"# {title}", f"{MADE}; [all results]({INDEX}).", *sections[page].values()]) + "\n"
        index += [f"## [{title}]({page})", "\n".join(links[page])]
    return {INDEX: "\n\n".join(index) + "\n", **made}


def _place(path: Path) -> tuple[str, str]:
    """The page of a result, and its description."""
    places = [
        (page, about)
        for page, (_, results) in PAGES.items()
        for pattern, about in results.items()
        if fnmatch(path.stem, pattern)
    ]
    if len(places) != 1:
        pages_ = " and ".join(page for page, _ in places) or "no page"
        raise ValueError(f"{path} belongs to {pages_}; give it one page in PAGES of benchmarks/report.py")
    page, about = places[0]
    experiment = _experiment(path)
    return page, about or (experiment.__doc__.splitlines()[0].rstrip(".") if experiment else path.stem)


def _anchor(heading: str) -> str:
    """The anchor of a heading, as both GitHub and the page site make it."""
    return re.sub(r"[^\w-]", "", heading).lower()


def section(path: Path, about: str) -> str:
    """The section of a result: file name, description, origin, and its table, plot and pictures if it has them."""
    try:
        document = json.loads(path.read_text())
        lines = [
            f"## {path.stem}",
            f"{about[0].upper()}{about[1:]}.",
            f"`{path.name}`: {_made(document['environment'])}",
        ]
        lines += _table(path, document)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} is not a result of this version ({error!r}); make it anew") from error
    plots = (path.with_name(f"{path.stem}{what}.png") for what in ("", "_pictures"))
    return "\n\n".join([*lines, *(f"![{plot.stem}]({plot.name})" for plot in plots if plot.exists())])


def _made(made: dict[str, Any]) -> str:
    where = made["gpu"] or made["cpu"]
    commit = (made["commit"] or "none")[:7] + (" and changes" if made["dirty"] else "")
    return f"`{made['command']}`, {where}, torch {made['torch']}, timm {made['timm']}, commit {commit}, {made['utc']}"


def _experiment(path: Path) -> Any | None:
    name = path.stem.rpartition("_")[2]
    return EXPERIMENTS.get(name)


def _table(path: Path, document: dict[str, Any]) -> list[str]:
    experiment = _experiment(path)
    if experiment is not None:
        return [experiment.table(document)]
    if path.name in OTHERS:
        return [OTHERS[path.name](document)]
    return []


def run() -> None:
    made = {pages.RESULTS / name: text for name, text in index_and_pages(pages.RESULTS).items()}
    for path in sorted(pages.RESULTS.glob("*.md")):
        if path not in made:
            raise ValueError(f"{path} is a page without a result; delete it")
    made |= pages.filled()
    for path, text in made.items():
        path.write_text(text)
    print(f"written: {', '.join(map(str, made))}")


def main(argv: list[str] | None = None) -> int:
    Parser(prog="python -m benchmarks.report", description=__doc__.split(": ")[0]).parse_args(argv)
    return exit_code("benchmarks.report", run)


if __name__ == "__main__":
    sys.exit(main())
