"""Calibrations from few images beside earlier ones from many: ``python -m benchmarks.few_images``.

The model is the digits', or with ``--photos`` a DINOv2, whose patch tokens are compared on crops of photographs. Each
calibration of ``results/`` by an earlier search on 512 images is compared with several new ones for the same goal, each
on a different small set of images. All are judged on other images as they are. Few images predict the cost less
exactly, so the new ones are also judged with the distances of their thresholds from 1 scaled until they cost as much on
those images as the earlier one.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton import ATMConfig, Target, calibrate
from atm_triton.calibration.costs import Costs
from atm_triton.calibration.fitting import Fitting, Plan
from atm_triton.calibration.measuring import Meter
from atm_triton.calibration.search import Search
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.measure.comparison import measure_of
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.measure.provenance import check_file, check_outputs, write_result
from atm_triton.patch import knows_sizes
from benchmarks import RESULTS
from benchmarks.model_with_images import BATCH_SIZE, TRIES
from benchmarks.photos.compare import told
from benchmarks.photos.images import PHOTOS, crops
from benchmarks.photos.weights import open_backbone

NEAR = 0.0005  # of the unmerged model's cost: how near equal costs are; a change grows about ten times as fast


@dataclass(frozen=True)
class Subject:
    """A model, images [n, C, H, W] to calibrate on and others to judge by, and whether patch tokens are compared.
    ``sources``: the photograph that each image to judge by comes from; ``earlier``: the files of earlier
    calibrations in ``results/``."""

    model: VisionTransformer
    images: Tensor
    test: Tensor
    sources: Tensor
    dense: bool
    earlier: str


def digits(images: int, test: int) -> Subject:
    model = open_model()

    def opened(split: str, number: int) -> Tensor:
        return torch.cat([batch for batch, _ in open_images(model, split=split, limit=number, batch_size=BATCH_SIZE)])

    return Subject(
        model,
        opened("calibration", images),
        opened("test", test),
        sources=torch.arange(test),
        dense=False,
        earlier="digits_calibrate_512*.json",
    )


def photographs(images: int, test: int) -> Subject:
    model = open_backbone()
    return Subject(
        model,
        crops(model, "calibration", images),
        crops(model, "test", test),
        sources=torch.arange(test) % len(PHOTOS["test"]),
        dense=True,
        earlier="dinov2_calibrate_512*.json",
    )


class Judge:
    """Measures configurations on a subject's images to judge by."""

    def __init__(self, subject: Subject) -> None:
        self.subject, model, last = subject, subject.model, not subject.dense
        self.costs = Costs(model, tuple(subject.test.shape[1:]), last)
        self.measure = measure_of(model, dense=subject.dense)
        fields = {"cls_only_last": last, "backend": "auto"}
        self.meter = Meter(model, {"test": list(subject.test.split(BATCH_SIZE))}, fields, self.measure)
        fitting = Fitting(self.meter, self.costs, "image")
        self.search = Search(fitting, knows_sizes(model), None, 0, lambda least: None)

    def measured(self, config: ATMConfig) -> dict[str, Any]:
        measured = self.meter.measure(config, "test")
        figures, name = told(measured.divergence, self.subject.sources), self.measure.divergence
        of_photos = {"of_photos": figures["of_photos"]} if "of_photos" in figures else {}
        gflops = measured.gflops.mean().item()
        return {"gflops": gflops, name: figures["mean"], f"{name}_se": figures["se"], **of_photos}

    def at(self, config: ATMConfig, gflops: float) -> dict[str, Any]:
        """Measure the configuration with its thresholds scaled until the images cost ``gflops``."""
        thresholds = config.thresholds[: self.costs.merging]
        plan = Plan(
            counts=(),
            thresholds=thresholds,
            split_depth=config.split_depth,
            proportional_attention=config.proportional_attention,
        )
        return self.measured(self.search.settled(plan, gflops, ("test",), TRIES, NEAR).config)


def earlier(files: str) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield the earlier calibrations: on how many images, for which goal in GFLOPs, with which configuration."""
    paths = sorted(RESULTS.glob(files))
    if not paths:
        raise FileNotFoundError(f"{RESULTS} has no {files} to compare with; make one by atm-triton calibrate")
    for path in paths:
        one = json.loads(path.read_text())
        yield f"{one['images']} images", one["target"]["max_gflops"], one["config"]


def measure(subject: Subject, per_set: int) -> Iterator[dict[str, Any]]:
    judge = Judge(subject)
    for name, goal, values in earlier(subject.earlier):
        before = judge.measured(ATMConfig(**values))
        yield {"calibration": name, "goal": goal, "config": values, "as_is": before}
        for number, images in enumerate(subject.images.split(per_set)):
            begin, batches = time.process_time(), list(images.split(BATCH_SIZE))
            target = Target(max_gflops=goal)
            calibration = calibrate(subject.model, batches, target, "image", seed=number, dense=subject.dense)
            about = {
                "cpu_seconds": time.process_time() - begin,
                "passes": calibration.passes,
                "family": calibration.family,
            }
            config = calibration.config
            about |= {"as_is": judge.measured(config), "at_cost": judge.at(config, before["gflops"])}
            about |= {"promise": asdict(calibration.promise), "config": asdict(config)}
            yield {"calibration": f"{per_set} images, set {number}", "goal": goal, **about}


def table(result: dict[str, Any]) -> str:
    """A Markdown table with the earlier calibration for each goal and, below it, those on few images."""
    name = "kl" if "kl" in result["rows"][0]["as_is"] else "distance"
    change = {"kl": "KL", "distance": "change of patch tokens"}[name]
    lines = [
        f"| goal, GFLOPs | calibrated on | passes | CPU seconds | GFLOPs of {result['test']} test images "
        f"| {change} there | {change} at the cost of the earlier one | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before: dict[str, Any] = {}
    for row in result["rows"]:
        effort, same = " | ", " | "
        if "at_cost" in row:
            effort = f"{row['passes']:,} | {row['cpu_seconds']:.0f}"
            same = f"{_cell(row['at_cost'], name)} | {_ratio(row['at_cost'], before, name)}"
        else:
            before = row["as_is"]
        lines.append(
            f"| {row['goal']:.4g} | {row['calibration']} | {effort} | {row['as_is']['gflops']:.4g} "
            f"| {_cell(row['as_is'], name)} | {same} |"
        )
    return "\n".join(lines)


def _cell(figures: dict[str, Any], name: str) -> str:
    return f"{figures[name]:.1e} ± {figures[f'{name}_se']:.0e}"


def _ratio(few: dict[str, Any], before: dict[str, Any], name: str) -> str:
    """How many times as much the answers change, with the standard error over the photographs where there are some."""
    ratio = few[name] / before[name]
    if "of_photos" not in few:
        return f"{ratio:.2f}"
    rest = torch.tensor(few["of_photos"]) - ratio * torch.tensor(before["of_photos"])
    return f"{ratio:.2f} ± {rest.std() / len(rest) ** 0.5 / before[name]:.2f}"


def run(args: argparse.Namespace) -> None:
    if min(args.images, args.sets) < 1 or (args.test is not None and args.test < 2):
        raise ValueError("--images and --sets must be at least 1, --test at least 2: a standard error takes two")
    made, usual, name = (photographs, 64, "photos") if args.photos else (digits, 2000, "digits")
    out, test = args.out or RESULTS / f"{name}_few_images.json", args.test or usual
    check_file("--out", out)
    subject = made(args.images * args.sets, test)
    check_outputs({"--out": out}, sorted(RESULTS.glob(subject.earlier)))
    rows = []
    for row in measure(subject, args.images):
        rows.append(row)
        write_result(out, {"images": args.images, "test": test, "rows": rows})
        judged = row.get("at_cost", row["as_is"])
        change = ", ".join(f"{of} {judged[of]:.2e}" for of in ("kl", "distance") if of in judged)
        print(f"{row['calibration']}: {judged['gflops']:.4g} GFLOPs, {change}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", action="store_true", help="a DINOv2 on crops of photographs, instead of the digits")
    parser.add_argument("--images", type=int, default=64, help="images per calibration (64)")
    parser.add_argument("--sets", type=int, default=3, help="sets of calibration images, one calibration each (3)")
    parser.add_argument("--test", type=int, help="test images (2000; 64 crops)")
    parser.add_argument("--out", type=Path, help="the result (results/digits_few_images.json, or photos_...)")
    args = parser.parse_args(argv)
    return exit_code("few_images", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
