"""What an experiment measures: a model, images to choose settings by, and images to judge by."""

import argparse
from itertools import islice

from torch import Tensor

from atm_triton import ATMConfig
from atm_triton.calibrate import split_images
from atm_triton.evaluate import Evaluation, Patch, evaluate, unpatched_logits
from atm_triton.inputs import DIGITS, check_device, labels_fit, open_images, open_model
from atm_triton.options import DTYPES, data_options, model_options
from atm_triton.search import Meter, similarities
from atm_triton.shapes import Predictor
from benchmarks.calibration import Bench

CHOOSE_BY = 512  # images


def options() -> argparse.ArgumentParser:
    """The options of every experiment that runs a model."""
    parser = argparse.ArgumentParser(add_help=False, parents=[model_options(), data_options()])
    parser.add_argument("--limit", type=int, help="judge by the first images alone")
    parser.add_argument("--choose-by", help="a directory of images to choose settings by (the digits: their own split)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds of the same run")
    return parser


class Subject(Bench):
    """A model in eval mode with its images."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_device(args.device)
        data, size = args.data or DIGITS, 64 if args.batch_size is None else args.batch_size
        if args.model != DIGITS and args.checkpoint is None and not args.pretrained:
            raise ValueError(f"{args.model} would have random weights: give --checkpoint FILE or --pretrained")
        if data != DIGITS and args.choose_by is None:
            raise ValueError("--choose-by DIR: say by which images settings are chosen; others than those of --data")
        model = open_model(args.model, args.checkpoint, args.pretrained, **args.model_kwargs)
        self.model = model.to(args.device, DTYPES[args.dtype])
        opened = {"batch_size": size, "workers": args.workers, "device": args.device}
        chosen = args.choose_by or DIGITS
        calibration = open_images(self.model, chosen, "calibration", CHOOSE_BY, labelled=False, **opened)
        self.loader = list(calibration)
        self.test = list(open_images(self.model, data, "test", args.limit, **opened))
        self.labelled = labels_fit(open_images(self.model, data, "test", args.limit, **opened), self.model)
        self.base = unpatched_logits(self.model, self.test, "unpatched")
        parts, _ = split_images(self.loader, seed=0)
        self.meter = Meter(self.model, parts, {"cls_only_last": True, "backend": "auto"})
        found = similarities(self.model, parts["fit"], ATMConfig())
        self.predictor = Predictor(self.model, self.image_shape, found, cls_only_last=True)
        self.about = {"model": args.model, "model_kwargs": args.model_kwargs, "data": data, "choose_by": chosen}
        self.about |= {"checkpoint": str(args.checkpoint), "pretrained": args.pretrained}
        self.about |= {"limit": args.limit, "batch_size": size, "dtype": args.dtype}

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.test[0][0].shape[1:])

    def image(self) -> Tensor:
        """One image [1, C, H, W], to count by."""
        images = next(islice(self.loader, 1))[0]
        return images[:1].to(next(self.model.parameters()))

    def outcome(self, how: ATMConfig | Patch, title: str) -> Evaluation:
        return evaluate(self.model, self.test, how, self.base, self.labelled, title)
