"""A progress bar, or a line now and then if stderr is not a terminal."""

import sys

from tqdm import tqdm

from atm_triton.measure.distributed import silent

EVERY = 30  # seconds from line to line
COUNTED = "{n:.0f} of {total:.0f} image passes, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm's bar over about ``total`` images through the model; separate lines if stderr is not a terminal."""

    total: float
    n: float
    disable: bool

    def __init__(self, total: float, shown: bool) -> None:
        self.lines = not sys.stderr.isatty()
        every = {"mininterval": EVERY, "miniters": 1} if self.lines else {}
        bar = "calibrate: " + ("" if self.lines else "{percentage:3.0f} % |{bar}| ") + COUNTED
        super().__init__(total=total, bar_format=bar, disable=bool(silent("" if shown else None)), **every)

    def update(self, n: float = 1) -> bool | None:
        self.total = max(self.total, self.n + n)  # the total was an estimate
        return super().update(n)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.lines:
            super().display(msg, pos)
        elif self.n:  # the first pass tells how long the rest takes
            print(str(self), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.lines and not self.disable:
            self.display()
            self.disable = True  # otherwise tqdm would end its line once more
        super().close()
