"""``python -m benchmarks.photos``: what merging by several methods does to a DINOv2 on photographs, at equal cost.

The weights come from ``python -m benchmarks.photos.fetch``. Without --data the images are crops of photographs that
ship with scikit-learn, scikit-image and matplotlib.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from atm_triton.calibration.calibrate import LEAST_IMAGES
from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.cli.report import need_matplotlib
from atm_triton.measure.configurations import checksum
from atm_triton.measure.provenance import check_file, check_outputs, environment
from benchmarks import RESULTS
from benchmarks.paper.rows import SAME, Rows
from benchmarks.paper.subject import check_shares, overlap
from benchmarks.photos import report
from benchmarks.photos.compare import Photos
from benchmarks.photos.images import PHOTOS, opened
from benchmarks.photos.methods import METHODS, measured_at
from benchmarks.photos.picture import draw
from benchmarks.photos.weights import BACKBONE, DECODER, kept, open_backbone, open_decoder

SHARES = (0.1, 0.2, 0.3, 0.4)  # of the FLOPs to save
WEIGHTS = {"backbone_sha256": BACKBONE, "decoder_sha256": DECODER}
OF_SUBJECT = ("images", "calibration_images", "batch_size", "data", "calibration_data")
OF_FILE = tuple(name for name in SAME if name not in ("commit", "dirty"))  # rows may be of several commits


def options() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.photos", description=__doc__.split("\n\n")[0].split(": ")[1])
    add_subject(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the FLOPs to save")
    text = f"some of: {'; '.join(METHODS)}"
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=text)
    parser.add_argument("--out", type=Path, default=RESULTS / "photos.json", help="the result; plots go beside it")
    return parser


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose weights and images."""
    parser.add_argument("--data", help="a directory of images to judge by, instead of the crops")
    parser.add_argument("--calibration-data", help="a directory of other images, to choose settings by")
    parser.add_argument("--images", type=int, default=48, help="to judge by (48)")
    parser.add_argument("--calibration-images", type=int, default=LEAST_IMAGES, help=f"to choose by ({LEAST_IMAGES})")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (32)")
    parser.add_argument("--weights", type=Path, help="a directory of them, instead of the fetched ones")
    parser.add_argument("--resume", action="store_true", help="add what --out holds no rows of yet")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all rows share. Raises ValueError for options that are out of range or contradict each
    other."""
    for option, number, least in (
        ("--images", args.images, 1),
        ("--calibration-images", args.calibration_images, LEAST_IMAGES),
        ("--batch-size", args.batch_size, 1),
    ):
        if number < least:
            raise ValueError(f"{option} {number} is too small; give {least} or more")
    if (args.data is None) != (args.calibration_data is None):
        raise ValueError("--data and --calibration-data go together: settings are chosen by other images than judged")
    if args.data is not None and overlap(args.data, args.calibration_data):
        raise ValueError(f"--calibration-data {args.calibration_data} holds images of --data; give others")
    photos = None if args.data else {split: list(names) for split, names in PHOTOS.items()}
    return {name: getattr(args, name) for name in OF_SUBJECT} | {
        "photos": photos,
        **{name: checksum(kept(file, args.weights)) for name, file in WEIGHTS.items()},
    }


def run(args: argparse.Namespace) -> None:
    pictures = {name: args.out.with_name(f"{args.out.stem}{name}.png") for name in ("", "_pictures")}
    outputs = {"--out": args.out, "--out (plot)": pictures[""], "--out (pictures)": pictures["_pictures"]}
    check_outputs(outputs, [Path(given) for given in (args.data, args.calibration_data) if given])
    for path in outputs.values():
        check_file("--out", path)
    _check_none_lost(args, list(pictures.values()))
    check_shares(args.shares)
    need_matplotlib()
    rows = Rows(args.out, settings(args), args.resume, same=OF_FILE)
    photos = subject(args)
    result = measure(photos, rows, args.methods, args.shares)
    print(report.table(result))
    report.plot(result, pictures[""])
    draw(photos, result, pictures["_pictures"])


def _check_none_lost(args: argparse.Namespace, pictures: list[Path]) -> None:
    """Refuse to replace a result that has rows of other methods or shares, or pictures that belong to no result."""
    if not args.out.is_file():
        others = [path for path in pictures if path.exists()]
        if others:
            raise ValueError(f"--out {args.out} would replace {others[0]}, which is of no result; choose another")
        return
    if args.resume:
        return
    try:
        keys = [(row["method"], row["share"]) for row in json.loads(args.out.read_text())["rows"]]
    except (ValueError, KeyError, TypeError):
        return  # Rows says what is wrong
    lost = [key for key in keys if key[0] not in args.methods or key[1] not in args.shares]
    if lost:
        raise ValueError(f"--out {args.out} would lose {len(lost)} rows, as of {lost[0][0]}; --resume keeps them")


def measure(photos: Photos, rows: Rows, methods: list[str], shares: list[float]) -> dict[str, Any]:
    """Measure each method at each share of the GFLOPs to save. Each row has the commit that measured it."""
    made = {name: environment()[name] for name in ("commit", "dirty")}
    rows.expect(len(methods) * len(shares))
    for method in methods:
        for saved in shares:
            key = {"method": method, "share": saved}
            rows.add(key, lambda key=key: {**measured_at(photos, key["method"], key["share"]), **made})
    return rows.finish()


def subject(args: argparse.Namespace) -> Photos:
    model, decoder = open_backbone(args.weights), open_decoder(args.weights)
    chosen_by = opened(model, "calibration", args.calibration_images, args.calibration_data, "--calibration-data")
    test = opened(model, "test", args.images, args.data, "--data")
    photos = torch.arange(args.images) % (args.images if args.data else len(PHOTOS["test"]))
    return Photos(model, decoder, chosen_by, test, photos, args.batch_size)


def main(argv: list[str] | None = None) -> int:
    args = options().parse_args(argv)
    warnings.filterwarnings("ignore", r"\d+ % of the tokens are gone")  # extreme settings are tried on purpose
    return exit_code("benchmarks.photos", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
