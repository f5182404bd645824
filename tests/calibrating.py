"""The program of each process in test_distributed.py: ``torchrun tests/calibrating.py OUT ADAPT [DIES]``.

It calibrates a small model and writes the result. With the ADAPT "image dense" it compares patch tokens, with
"image whole" every part is one batch. The rank DIES exits silently in the middle of the calibration.
"""

import os
import sys
from pathlib import Path

import torch

from atm_triton import Target, calibrate
from atm_triton.calibration import measuring, search
from atm_triton.measure.distributed import rank, start, stop
from models import images, vit


def main(out, adapt, dies=None):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    search.LEVELS, search.CURVES, search.STEPS = (1 / 4,), ((0.5, 6.0),), 3
    start("cpu")
    if rank() == dies:
        measuring.Meter.mean = lambda *_: os._exit(1)
    adapt, *asked = adapt.split()
    batches, dense = images(100).split(100 if "whole" in asked else 8), "dense" in asked
    calibration = calibrate(vit(), batches, Target(max_gflops=0.0009), adapt, progress=False, dense=dense)
    (Path(out) / f"{rank()}.txt").write_text(repr(calibration))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
