"""Turns bad input at the command line into one line on standard error and exit code 2, and our warnings into a line."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from atm_triton.measure.distributed import failed

PACKAGE = Path(__file__).parents[1]


class Parser(argparse.ArgumentParser):
    """argparse's parser with one-line errors; of several processes only the first prints them."""

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: {message}; see {self.prog} --help\n"
        self.exit(2, None if int(os.environ.get("RANK", 0)) else line)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        Printed(sys.stdout).flush()  # a closed pipe is no error after --help
        super().exit(status, message)


class Printed:
    """Standard output that survives a closed pipe, as with ``| head``: further output is discarded, the command goes
    on, and ``gone`` is True."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, call: Callable[..., Any], *arguments: str) -> Any:
        try:
            return call(*arguments)
        except BrokenPipeError:
            self.gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # also for what Python flushes at exit
            return None


def exit_code(program: str, run: Callable[[], Any]) -> int:
    """Call ``run`` and return an exit code: 0 if it succeeds; 2 on a ValueError, TypeError or OSError, if the GPU runs
    out of memory or if the output pipe is closed, after printing "``program``: what was wrong"; 130 on Ctrl-C, like a
    shell."""
    printed = Printed(open(os.devnull, "w") if sys.stdout is None else sys.stdout)  # None: closed by the shell
    try:
        with redirect_stdout(printed), _plain_warnings(program):
            run()
            printed.flush()
        if printed.gone:
            raise BrokenPipeError("nobody reads the output any more (broken pipe)")
    except (ValueError, TypeError, OSError, torch.OutOfMemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        line = "out of memory on the GPU; give smaller batches" if full else _one_line(error)
        if failed(line):
            print(f"{program}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _plain_warnings(program: str) -> Iterator[None]:
    """Print this package's warnings without file and line: they are meant for whoever runs the command."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is UserWarning and PACKAGE in Path(filename).parents:
                print(f"{program}: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _one_line(error: Exception) -> str:
    """The error's message as one line; if it holds a worker's traceback, only the last line of that."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
