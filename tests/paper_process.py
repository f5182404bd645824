"""What test_paper.py runs in processes of benchmarks/paper/jobs.py, which see no patch of the test's own process."""

import os
import warnings

from atm_triton.measure.models import open_model
from benchmarks.paper import jobs, subject

FEW = 64  # the fewest images that settings can be chosen by


def shallow(*_, blocks=4, **__):
    """The digits model with its first blocks alone."""
    model = open_model()
    model.blocks = model.blocks[:blocks]
    return model


def open_shallow(args):
    """What ``jobs._open`` does, for the shallow model and few images to choose settings by."""
    subject.open_model, subject.CHOOSE_BY = shallow, FEW
    jobs._open(args)


def dies(*_):
    os._exit(1)


def warns(*_):
    warnings.warn("careful", stacklevel=1)
    return {"n": 1}
