"""Bad input at the command line: one line on standard error and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from atm_triton.distributed import failed


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line too, of several processes from one."""

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: {message}; {self.prog} --help says what there is\n"
        self.exit(2, None if int(os.environ.get("RANK", 0)) else line)


def exit_code(program: str, run: Callable[[], Any]) -> int:
    """0 when ``run`` is done; 2, and "``program``: what was wrong", on a ValueError, TypeError or OSError, or where a
    GPU's memory is too small; 130, as a shell has it, on Ctrl-C."""
    try:
        run()
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


def _one_line(error: Exception) -> str:
    """The message; of an error that comes with a worker's traceback, its last line."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
