"""The command line: atm-triton bench | eval | calibrate | finetune | visualize | env.

Bad input is one line and exit code 2.
"""

import argparse
import io
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer

from atm_triton.calibration.calibrate import Calibration, Target, calibrate
from atm_triton.calibration.errors import UnreachableError
from atm_triton.calibration.resume import Notes
from atm_triton.cli import finetuning, report
from atm_triton.cli.bad_input import exit_code
from atm_triton.cli.options import DTYPES, parser
from atm_triton.config import ATMConfig
from atm_triton.measure.comparison import Measure, measure_of
from atm_triton.measure.configurations import checksum, digits_config, promised_measure, read_config
from atm_triton.measure.distributed import rank, start, stop
from atm_triton.measure.evaluate import evaluate
from atm_triton.measure.images import TRANSFORM, labels_fit, open_image, open_images
from atm_triton.measure.models import DIGITS, check_device, check_weights, data_config, open_model
from atm_triton.measure.provenance import check_file, check_new, check_outputs, environment, write_result
from atm_triton.measure.throughput import keep_freed_memory, measure
from atm_triton.measure.visualize import draw, picture
from atm_triton.ops import explain
from atm_triton.patch import apply_patch, settled
from atm_triton.record import Record
from atm_triton.training.finetune import finetune
from atm_triton.training.folder import AVERAGED, RESULT, WEIGHTS, RunFolder

DEIT = "deit_small_patch16_224"
RANDOM_R = 8  # r of every block on random images, where thresholds mean nothing

Batches = list[torch.Tensor]


class Case(NamedTuple):
    """What to time: an unpatched model, batches, and how to merge. ``given``: records whose counts replace the model's
    own; ``beside``: another configuration to time as well."""

    title: str
    model: VisionTransformer
    batches: Batches
    config: ATMConfig
    given: list[Record] | None = None
    beside: ATMConfig | None = None


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Throughput of timm's model, the free-merge bound (as many tokens as ATM, removed at no cost), ToMe and ATM."""
    if args.repeats < 1 or (args.batches is not None and args.batches < 1):
        raise ValueError("--repeats and --batches must be at least 1")
    report.check_plot(args.plot)
    keep_freed_memory()
    results = []
    for case in _cases(args):
        print(case.title)
        _say_source(case.config)
        _say_logits(case.model)
        print()
        rows = measure(case.model, case.batches, case.config, args.repeats, case.given, case.beside)
        print(report.throughput_table(rows) + "\n")
        if (warning := report.slower(rows)) is not None:
            print(warning + "\n")
        about = {"title": case.title, "config": asdict(case.config), "batch_size": len(case.batches[0])}
        results.append({**about, "rows": rows})
    if args.plot is not None:
        report.throughput_plot(results, args.plot)
    return {"cases": results}


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    """Make the cases to time one after the other, so that only one is in memory."""
    if args.model == DIGITS or args.data is not None:
        yield _image_case(args)
    else:
        if args.batches is not None:
            raise ValueError(f"--batches {args.batches}: {args.model} runs on one random batch; give it --data DIR")
        yield _random_case(args, args.model)
    if args.model == DIGITS and args.data is None and not _configured(args):
        yield _random_case(args, DEIT) if args.adapt is None else _counted_case(args)


def _image_case(args: argparse.Namespace) -> Case:
    model, data = _model(args), args.data or DIGITS
    batch_size = 64 if args.batch_size is None else args.batch_size
    count = 2 if args.batches is None else args.batches
    loader = open_images(model, data, batch_size=batch_size, limit=batch_size * count)
    parameter = next(model.parameters())
    batches = [images.to(parameter) for images, _ in islice(loader, count)]
    weights = _weights(args.model, args.checkpoint, args.pretrained)
    number = f"{len(batches)} batch" + "es" * (len(batches) > 1)
    title = f"{args.model}, {weights}, on {data}: {number} of {len(batches[0])}"
    beside = digits_config() if args.model == DIGITS and args.adapt == "image" and not _changed(args) else None
    return Case(
        title=f"{title}, {_where(args)}", model=model, batches=batches, config=_config(args, model), beside=beside
    )


def _random_case(args: argparse.Namespace, name: str) -> Case:
    """A model on random images: thresholds mean nothing there, so it runs a stated schedule."""
    given = name == args.model
    model = _model(args) if given else open_model(name).to(args.device, DTYPES[args.dtype])
    stated = ATMConfig(adapt="static", schedule=(RANDOM_R,) * len(model.blocks))
    scheduled = args.adapt in (None, "static") or _configured(args)
    config = _config(args, model, stated) if scheduled else None
    if config is None or config.schedule is None:
        raise ValueError(f"thresholds mean nothing on random images: give {name} a --schedule, or --data DIR")
    shape = data_config(model)["input_size"]
    batch_size = 8 if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is too small; give 1 or more")
    images = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    r = (
        ", ".join(map(str, config.schedule))
        if len(set(config.schedule)) > 1
        else f"{config.schedule[0]} in every block"
    )
    weights = _weights(name, *((args.checkpoint, args.pretrained) if given else (None, False)))
    title = f"{name}, {weights}, random images, batch {batch_size}, r = {r}"
    return Case(
        title=f"{title}, {_where(args)}",
        model=model,
        batches=[images.to(args.device, DTYPES[args.dtype])],
        config=config,
    )


@torch.inference_mode()
def _counted_case(args: argparse.Namespace) -> Case:
    """DeiT-S with random weights on random images, merging as many tokens as the digits model does. Both models have
    the same number of tokens and blocks."""
    digits = _image_case(args)
    batch = digits.batches[0]
    apply_patch(digits.model, digits.config)(batch)
    model = open_model(DEIT).to(args.device, DTYPES[args.dtype])
    shape = data_config(model)["input_size"]
    images = torch.randn(len(batch), *shape, generator=torch.Generator().manual_seed(0)).to(batch)
    title = f"{DEIT}, random weights, random images, counts of the digits, batch {len(batch)}"
    return Case(
        title=f"{title}, {_where(args)}",
        model=model,
        batches=[images],
        config=digits.config,
        given=[digits.model.blocks.last],
    )


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, agreement, divergence and cost of merging, in all and by difficulty."""
    check_weights(args.model, args.checkpoint, args.pretrained)
    model, data = _model(args), args.data or DIGITS
    config, measure = _config(args, model), _measure(args, model)
    batch_size = 64 if args.batch_size is None else args.batch_size
    loader = open_images(model, data, args.split, args.limit, batch_size, args.workers, args.device, dealt=True)
    labelled = labels_fit(loader, model)
    outcome = evaluate(model, loader, config, labelled=labelled, measure=measure)
    print(f"{args.model} on {data}, batch {batch_size}, {_where(args)}")
    _say_source(config)
    _say_logits(model)
    print(f"compared: {measure}")
    if measure.has_classes and not labelled:
        print("no top-1: it needs one folder for each class of the model")
    print("\n" + report.evaluation_table(outcome))
    return {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "data": data,
        "split": args.split if data == DIGITS else None,
        "batch_size": batch_size,
        "config": asdict(config),
        "evaluation": outcome.to_dict(),
    }


def run_calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Thresholds for a model from images without labels: the least change at a cost, or the least cost at a change."""
    target = Target(**{field.name: getattr(args, field.name) for field in fields(Target)})
    check_new("--out", args.out)
    check_weights(args.model, args.checkpoint, args.pretrained)
    model = _model(args)
    target.check_fits(measure_of(model, args.dense, args.sigmoid))
    with Notes(Path(f"{args.out}.partial")) as notes:
        check_new("--out", args.out)  # another calibration may have written it before these notes were held
        about, calibration = _calibrated(args, model, target, notes)
        if rank() == 0:
            write_result(args.out, about)
        notes.over = True
    print(f"{args.model} on {about['data']}, {_where(args)}\n\n{report.calibration_table(calibration, args.images)}")
    return about


def _calibrated(
    args: argparse.Namespace, model: VisionTransformer, target: Target, notes: Notes
) -> tuple[dict[str, Any], Calibration]:
    """Read the images and calibrate on them. Returns what the file will hold, and the calibration."""
    data, batch_size = args.data or DIGITS, 64 if args.batch_size is None else args.batch_size
    reading = {"workers": args.workers, "device": args.device, "labelled": False, "lenient": True}
    begin = time.perf_counter()
    loader = open_images(model, data, args.split, args.images, batch_size, **reading)
    _say_logits(model)
    images = list(loader)
    broken = sorted(getattr(loader, "broken", ()))
    if broken:
        print(report.left_out(broken))
    transform = {name: data_config(model)[name] for name in TRANSFORM}
    weights = "pretrained" if args.checkpoint is None else args.checkpoint.name
    about = {"model": args.model, "model_kwargs": args.model_kwargs, "weights": weights, "data": data}
    about |= {"checkpoint_sha256": checksum(args.checkpoint)}
    about |= {"transform": transform, "batch_size": batch_size, "dtype": args.dtype}
    about |= {"split": args.split if data == DIGITS else None, "not_read": broken}
    names = ("max_merging_blocks", "dense", "sigmoid", "backend", "seed")
    options = {name: getattr(args, name) for name in names}
    try:
        calibration = calibrate(model, images, target, args.adapt, **options, notes=notes)
    except UnreachableError:
        notes.over = True  # there is nothing to continue
        raise
    about["seconds"] = time.perf_counter() - begin
    promise = f"promised {calibration.promise} ({calibration.promise.measure})"
    batches = f" in batches of {batch_size}" if args.adapt == "batch" else ""
    source = f"atm-triton calibrate, {args.model} on {calibration.images} images of {data}{batches}: {promise}"
    document = calibration.to_dict()
    document["config"] |= {"source": source}
    return about | document, calibration


def run_finetune(args: argparse.Namespace) -> dict[str, Any]:
    """Train a model with merging in it: the weights load into the unpatched model too."""
    report.check_plot(args.plot)
    finetuning.check_options(args)
    check_weights(args.model, args.checkpoint, args.pretrained)
    recipe = finetuning.recipe_of(args)
    model = _model(args, **finetuning.drop_path(args))
    images, validation = finetuning.training_images(args, model, recipe)
    recalibrate = finetuning.recalibration(args, recipe)
    config = _config(args, model) if recalibrate is None else None
    if config is not None and config.source and args.max_gflops is None and args.top1_drop is None:
        config = replace(config, source=f"found before fine-tuning: {config.source}")  # its promise is of those weights
    folder = RunFolder(args.out, finetuning.settings(args, recipe, images, None if config is None else asdict(config)))
    print(f"{args.model} on {args.data or DIGITS}, {recipe.images_per_step} images a step, {_where(args)}")
    if config is not None:
        _say_source(config)
    _say_logits(model)
    loading = {"workers": finetuning.workers(args), "save_every": args.save_every}
    done = finetune(model, images, validation, config, recipe, folder, args.resume, recalibrate, **loading)
    about = {"model": args.model, "model_kwargs": args.model_kwargs, "weights": WEIGHTS, "settings": folder.settings}
    if rank() == 0:
        about["checkpoint_sha256"] = checksum(args.out / WEIGHTS)
        if recipe.ema is not None:
            about["ema_sha256"] = checksum(args.out / AVERAGED)
        write_result(args.out / RESULT, about | done)
        if args.plot is not None:
            report.training_plot(done["epochs"], args.plot)
    print(f"{args.out / WEIGHTS} written")
    return about | done


def run_visualize(args: argparse.Namespace) -> dict[str, Any]:
    """Pictures of merged tokens, block by block: each region in its mean colour, with its outline."""
    report.check_plot(args.out, "--out")
    check_weights(args.model, args.checkpoint, args.pretrained)
    model = _model(args)
    config = _config(args, model)
    apply_patch(model, config)
    depth = len(model.blocks)
    blocks = tuple(args.blocks or sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    images = [open_image(model, path) for path in args.images]
    rows = [picture(model, image, blocks, path.name) for path, image in zip(args.images, images, strict=True)]
    draw(rows, args.out)
    _say_source(config)
    print(f"{args.out} written")
    pictures = [{"image": row.title, "gflops": row.gflops, "blocks": row.blocks, "left": row.left} for row in rows]
    return {"model": args.model, "model_kwargs": args.model_kwargs, "pictures": pictures}


def run_env(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, the GPU, and the backend that "auto" takes here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, reason = explain("auto", device)
    facts = {**environment(), "backend_auto": backend, "backend_reason": reason}
    for name, value in facts.items():
        print(f"{name:15} {value}")
    return {"backend_auto": backend, "backend_reason": reason}


def _model(args: argparse.Namespace, **more: Any) -> VisionTransformer:
    model = open_model(args.model, args.checkpoint, args.pretrained, **args.model_kwargs, **more)
    return model.to(args.device, DTYPES[args.dtype])


def _measure(args: argparse.Namespace, model: VisionTransformer) -> Measure:
    """The measure that the options ask for, else the one of the promise in --config, else the one that fits."""
    asked = args.dense or args.sigmoid
    promised = None if asked else promised_measure(args.config, model)
    return measure_of(model, args.dense, args.sigmoid) if promised is None else promised


def _say_source(config: ATMConfig) -> None:
    """Print the way to adapt, and where the thresholds come from."""
    print(f'adapt="{config.adapt}"' + (f"; {config.source}" if config.source else ""))


def _say_logits(model: VisionTransformer) -> None:
    """Print what the logits are, if the model can compute them in several ways."""
    if hasattr(model, "logits_are"):
        print(f"logits: {model.logits_are}")


def _weights(name: str, checkpoint: Path | None, pretrained: bool) -> str:
    if checkpoint is not None:
        return f"weights of {checkpoint.name}"
    return "published weights" if pretrained else "its own weights" if name == DIGITS else "random weights"


def _where(args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{args.dtype}, {device}, backend {explain(args.backend, args.device, DTYPES[args.dtype])[0]}"


def _changed(args: argparse.Namespace) -> bool:
    """Whether any option of merging other than --adapt is given."""
    of_blocks = args.split_depth is not None or args.proportional_attention is not None or args.all_tokens_last
    return _configured(args) or of_blocks or args.backend != "auto"


def _configured(args: argparse.Namespace) -> bool:
    given = (args.config, args.schedule, args.max_gflops, args.top1_drop)
    return bool(_curve(args)) or any(value is not None for value in given)


def _doubt(name: str, model: VisionTransformer) -> str:
    """Why the figures of the paper's model of that name may not hold for ``model``."""
    try:
        settled(ATMConfig(), model)
    except ValueError:
        return f"this {name} has another shape or other weights"
    return f"treated as a {name} whose weights were not checked"


def _curve(args: argparse.Namespace) -> dict[str, Any]:
    """The given parameters of the paper's curve (Eq. 1)."""
    curve = {name: getattr(args, name) for name in ("alpha", "beta", "theta_min")}
    return {name: value for name, value in curve.items() if value is not None}


def _config(args: argparse.Namespace, model: VisionTransformer, default: ATMConfig | None = None) -> ATMConfig:
    """The configuration that the options ask for: a file, a preset of the paper, a schedule or a curve; else
    ``default``, or the digits' or the paper's thresholds. Options for single fields are applied last."""
    curve = _curve(args)
    if args.config is not None:
        config = read_config(args.config, args.model, args.model_kwargs, args.checkpoint)
    elif args.max_gflops is not None or args.top1_drop is not None:
        config = ATMConfig.preset(args.model, args.max_gflops, args.top1_drop, fine_tuned=args.command == "finetune")
        config = replace(config, source=f"{config.source}; {_doubt(args.model, model)}")
    elif args.schedule is not None:
        config = ATMConfig(adapt="static", schedule=tuple(args.schedule))
    elif curve:
        config = ATMConfig(**curve, adapt=args.usual_adapt)
    elif default is not None:
        config = default
    elif args.model == DIGITS and args.checkpoint is None and not args.model_kwargs:
        config = digits_config(args.adapt or args.usual_adapt)
    else:
        check_weights(args.model, args.checkpoint, args.pretrained)
        config = ATMConfig()
    names = ("adapt", "split_depth", "backend", "proportional_attention")
    fields = {name: getattr(args, name) for name in names} | curve
    if args.all_tokens_last:
        fields["cls_only_last"] = False
    if curve and (config.adapt == "static" or config.thresholds is not None):
        options = ", ".join("--" + name.replace("_", "-") for name in curve)
        raise ValueError(f"{options}: no effect beside a schedule or thresholds of each block; leave one of them out")
    if curve:
        fields["source"] = ""  # the thresholds no longer come from there
    config = config.changed(**{name: value for name, value in fields.items() if value is not None})
    config.check_depth(len(model.blocks))
    return settled(config, model)


COMMANDS = {
    "bench": bench,
    "eval": run_eval,
    "calibrate": run_calibrate,
    "finetune": run_finetune,
    "visualize": run_visualize,
    "env": run_env,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its :func:`exit_code`."""
    args = parser(COMMANDS).parse_args(argv)
    try:
        return exit_code("atm-triton", lambda: _run(args))
    finally:
        stop()  # last, so that an error still reaches the other processes


def _run(args: argparse.Namespace) -> None:
    device = getattr(args, "device", "cpu")
    if args.json is not None:
        check_file("--json", args.json)
    check_outputs(
        _paths(args, "out", "json", "plot"), list(_paths(args, "checkpoint", "config", "data", "images").values())
    )
    check_device(device)
    start(device)
    with redirect_stdout(io.StringIO()) if rank() else nullcontext():  # one process reports
        result = args.run(args)
    if args.json is not None and rank() == 0:
        write_result(args.json, result)


def _paths(args: argparse.Namespace, *names: str) -> dict[str, Path]:
    """The files and directories that these options name. --images is a list of them for visualize, but a number for
    calibrate."""
    given = {name: getattr(args, name, None) for name in names}
    several = {f"{name} {path}": path for name, paths in given.items() if isinstance(paths, list) for path in paths}
    return {f"--{name}": Path(path) for name, path in (given | several).items() if isinstance(path, str | Path)}
