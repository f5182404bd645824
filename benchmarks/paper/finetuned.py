"""Fine-tuned ATM beside training-free ATM and beside the unmerged model fine-tuned as long.

All begin with the same weights and are trained on the same images in the same order by the same recipe, the paper's
with fewer epochs. Top-1 and KL compare each with the model before any training, KL(before || after), on the images to
judge by. ATM's thresholds come from --config (the digits: from ``python -m benchmarks.calibration``). They are scaled
to each cost before training and fixed during training. Each training has its own run folder beside the result, within
which ``--resume`` continues.
"""

import argparse
import copy
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from atm_triton import ATMConfig
from atm_triton.config import ADAPT
from atm_triton.measure.models import DIGITS
from atm_triton.measure.provenance import environment
from atm_triton.training.finetune import finetune
from atm_triton.training.folder import CHECKPOINT, RunFolder
from atm_triton.training.images import TrainDigits, TrainFolder, TrainImages
from atm_triton.training.recipe import Recipe
from benchmarks.baselines import Baseline
from benchmarks.paper.cells import about, drop, markdown, saved
from benchmarks.paper.jobs import Job, add_all, check_jobs, jobs_option
from benchmarks.paper.methods import at_cost, measured
from benchmarks.paper.rows import SAME, Rows
from benchmarks.paper.subject import Subject, batch_size, check_shares, overlap, shares

SHARES = (0.5, 0.6, 0.7)  # saved
DIGITS_AN_EPOCH = 4096
WATCHED = 4  # test batches after each epoch; at the end all are used
FREE, TUNED, UNMERGED = "ATM, training-free", "ATM, fine-tuned", "unmerged, fine-tuned"


def arguments() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, parents=[shares(SHARES), training_options([0])])


def training_options(seeds: list[int]) -> argparse.ArgumentParser:
    """The options of an experiment that trains."""
    parser = argparse.ArgumentParser(add_help=False, parents=[jobs_option()])
    text = "merge by one r per batch, as in the paper, or by each image's own count (batch)"
    parser.add_argument("--adapt", nargs="+", default=["batch"], choices=ADAPT[:2], help=text)
    parser.add_argument("--epochs", type=int, default=5, help="of each training (5)")
    text = f"a training for each ({' '.join(map(str, seeds))})"
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help=text)
    parser.add_argument("--images", type=int, help=f"of the digits, drawn for each epoch ({DIGITS_AN_EPOCH})")
    text = "passes, each of a batch, that a step sums (4)"
    parser.add_argument("--accumulate", type=int, default=4, metavar="PASSES", help=text)
    parser.add_argument("--train", type=Path, help="a directory of images to train on (the digits: drawn)")
    return parser


def recipe_of(args: argparse.Namespace, seed: int) -> Recipe:
    make = Recipe if args.train is not None else Recipe.for_digits
    return make(epochs=args.epochs, batch_size=batch_size(args), accumulate=args.accumulate, seed=seed)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return check_shares(args.shares) | training_settings(args)


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    if (args.train is None) != (args.data in (None, DIGITS)):
        raise ValueError("--train DIR goes with --data DIR: images to train on beside those to judge by")
    if args.train is not None and overlap(args.data, str(args.train)):
        raise ValueError(f"--train {args.train} holds images of --data: train on others than those to judge by")
    if args.train is not None and args.images is not None:
        raise ValueError("--images draws digits; with --train all images are used, so leave it out")
    for name in ("seeds", "adapt"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"--{name} wants each once")
    check_jobs(args.jobs)
    recipe = recipe_of(args, 0).to_dict()
    del recipe["seed"]
    about = {"images": _digits_an_epoch(args), "train": None if args.train is None else str(args.train)}
    return about | {"recipe": recipe}


def check_labelled(subject: Subject, args: argparse.Namespace) -> None:
    if not subject.labelled:
        raise ValueError(f"--data {args.data}: training wants a folder for each class of the model")


def unmerged(subject: Subject) -> ATMConfig:
    return ATMConfig(adapt="static", schedule=(0,) * subject.depth, cls_only_last=False)


def measure(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    check_labelled(subject, args)
    each = len(args.adapt) * len(args.shares)
    rows.expect(each + (each + 1) * len(args.seeds))
    runs, jobs = unfinished(rows, args), []
    for seed in args.seeds:
        key = {"method": UNMERGED, "adapt": None, "share": 0.0, "seed": seed}
        jobs.append(Job(key=key, measure=tuned, arguments=(unmerged(subject), seed, runs / f"unmerged-{seed}")))
    for adapt in args.adapt:
        for share in args.shares:
            key = {"adapt": adapt, "share": share}
            free = rows.add({"method": FREE, **key, "seed": None}, lambda key=key: free_at(subject, **key))
            for seed in args.seeds if "missing" not in free else ():
                arguments = ATMConfig(**free["settings"]["config"]), seed, runs / f"{adapt}-{share}-{seed}"
                jobs.append(Job(key={"method": TUNED, **key, "seed": seed}, measure=tuned, arguments=arguments))
    add_all(rows, subject, args, jobs)
    shutil.rmtree(runs, ignore_errors=True)


def unfinished(rows: Rows, args: argparse.Namespace) -> Path:
    """The folder that keeps the trainings until the result is complete.

    Raises:
        ValueError: it exists already and --resume is not given.
    """
    runs = rows.path.with_suffix(".runs")
    if runs.exists() and not args.resume:
        raise ValueError(f"{runs} holds trainings that were interrupted; go on with --resume, or delete it")
    return runs


def free_at(subject: Subject, adapt: str, share: float) -> dict[str, Any]:
    goal = subject.goal(share)
    way = at_cost(subject, f"atm, {adapt}", goal)
    if way is None:
        return {"missing": f"no setting comes close to {goal:.4g} GFLOPs"}
    return measured(subject, way, f"training-free, {goal:.4g} GFLOPs")


def tuned(
    subject: Subject, args: argparse.Namespace, config: ATMConfig | Baseline, seed: int, at: Path
) -> dict[str, Any]:
    """Train with ATM by the paper's recipe, or with another method by its authors' recipe, and return the row."""
    model, recipe = copy.deepcopy(subject.model), recipe_of(args, seed)
    images, method = _images(subject, args, model, seed), None
    about: dict[str, Any] = dict(images.settings)
    if isinstance(config, ATMConfig):
        about["config"] = config.to_json()
    else:
        method = config.learning(model, seed)
        recipe = method.recipe(recipe)
        about["method"] = repr(config)
    same = Subject.settings(args) | training_settings(args) | about | {"recipe": recipe.to_dict()}
    same |= {name: value for name, value in environment().items() if name in SAME}
    folder = RunFolder(at, same)
    watched, resume = list(islice(subject.test, WATCHED)), (at / CHECKPOINT).exists()
    given = config if method is None else None
    workers = 0 if args.train is None else args.workers  # an epoch of digits is drawn at once
    done = finetune(model, images, watched, given, recipe, folder, resume, workers=workers, method=method)
    outcome = subject.outcome_of(model, config if method is None else method.patch, f"{at.name}, all images")
    row = {"seconds": done["seconds"], "at_once": args.jobs, "loss": [epoch["train_loss"] for epoch in done["epochs"]]}
    return row | {"recipe": recipe.to_dict(), **outcome.to_dict()}


def _digits_an_epoch(args: argparse.Namespace) -> int | None:
    """None for images of a directory."""
    if args.train is not None:
        return None
    return DIGITS_AN_EPOCH if args.images is None else args.images


def _images(subject: Subject, args: argparse.Namespace, model: Any, seed: int) -> TrainImages:
    digits = _digits_an_epoch(args)
    if digits is not None:
        return TrainDigits(digits, seed)
    images = TrainFolder(model, args.train, seed)
    if images.images.classes != subject.classes:
        raise ValueError(f"--train {args.train} and --data {args.data} hold different classes; want equal folder names")
    return images


def minutes_head(result: dict[str, Any]) -> str:
    """The head of the column with the minutes of a training, which says how many ran at once."""
    most = max((row["at_once"] for row in result["rows"] if "at_once" in row), default=1)
    return "minutes each" if most == 1 else f"minutes each, up to {most} at once"


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["share"], row["adapt"] or "", row["method"], row["seed"] or 0


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = [about(result["rows"]), "method", "adapt", "seed", "GFLOPs", "saved", "top-1", "KL", minutes_head(result)]
    body = []
    for row in sorted(
        result["rows"], key=lambda row: (row["share"], row["adapt"] or "", row["method"], row["seed"] or 0)
    ):
        first = [
            f"-{100 * row['share']:.0f} %" if row["share"] else "-",
            row["method"],
            row["adapt"] or "-",
            "-" if row.get("seed") is None else str(row["seed"]),
        ]
        if "missing" in row:
            body.append([*first, row["missing"], *[""] * 4])
            continue
        minutes = f"{row['seconds'] / 60:.1f}" if "seconds" in row else "-"
        quality = row["overall"]
        body.append([*first, f"{quality['gflops']:.3f}", saved(row), drop(row), f"{quality['kl']:.1e}", minutes])
    return markdown(head, body)
