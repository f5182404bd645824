"""The kernels on one GPU, proved and then timed: ``make gpu OUT=dir``. One module a stage, in the order of ``STAGES``.

A stage is a function ``run(setting, section, results)`` that fills ``section`` as it measures, so that what it had is
kept when it fails; ``results`` holds the sections of the stages before it.
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
