"""Prove and then time the kernels on one GPU: ``make gpu OUT=dir``. Each stage of ``STAGES``, in order, is a module.

A stage is a function ``run(setting, section, results)``. It fills ``section`` as it measures, so that partial results
survive a failure; ``results`` holds the sections of earlier stages.
"""

STAGES = (
    "parity",
    "repeat",
    "kernels",
    "attention",
    "engine",
    "training",
    "host",
    "trace",
    "memory",
    "sanitize",
    "targets",
)


class StageError(Exception):
    """A stage found something wrong; one line says what."""
