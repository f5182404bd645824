"""Bad input at the command line: one line on standard error and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from atm_triton.distributed import failed


class UnreachableError(ValueError):
    """A model cannot have what is asked for: a cost, or a method that goes by what it lacks."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help says what there is\n")


def exit_code(program: str, run: Callable[[], Any]) -> int:
    """0 when ``run`` is done; 2, and "``program``: what was wrong", on a ValueError, TypeError or OSError; 130, as a
    shell has it, on Ctrl-C."""
    try:
        run()
    except (ValueError, TypeError, OSError) as error:
        line = _one_line(error)
        if failed(line):
            print(f"{program}: {line}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"{program}: out of memory on the GPU; give a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception) -> str:
    """The message; of an error that comes with a worker's traceback, its last line."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
