"""Rows that train a model, measured in several processes at once."""

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject

EXPECTED = (ValueError, TypeError, OSError)  # errors that one line explains


class Job(NamedTuple):
    """A row to measure, identified by its ``key``: ``measure(subject, args, *arguments)`` returns the rest of the row.
    ``measure`` must be a function at module level, so that another process can find it."""

    key: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.key.values() if value is not None)


def jobs_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    text = "trainings at once, each in a process of its own (1); their minutes are then those of a busy machine"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=text)
    return parser


def check_jobs(number: int) -> None:
    if number < 1:
        raise ValueError(f"--jobs {number}: give 1 or more")


def add_all(rows: Rows, subject: Subject, args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Add the row of each job unless it is there. If ``args.jobs`` is above 1, that many jobs run at once, and rows are
    added in the order in which jobs finish.

    Raises:
        Exception: what a job raised. If several jobs run at once, the rows of the others are added first, and the
            message names each job that failed.
    """
    if args.jobs == 1:
        for job in jobs:
            rows.add(job.key, lambda job=job: job.measure(subject, args, *job.arguments))
        return
    missing = [job for job in jobs if not rows.has(job.key)]
    rows.bar.update(len(jobs) - len(missing))
    failed = _add(rows, args, missing)
    for _, error in failed:
        if not isinstance(error, EXPECTED):
            raise error
    if failed:
        raise ValueError("; ".join(f"{job}: {error}" for job, error in failed)) from failed[0][1]


def _add(rows: Rows, args: argparse.Namespace, jobs: Sequence[Job]) -> list[tuple[Job, Exception]]:
    """Measure the jobs and add their rows. Returns the jobs that failed, and how.

    Raises:
        ValueError: a process died, and with it those that ran beside it.
    """
    own = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "experiment"})
    failed: list[tuple[Job, Exception]] = []
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), _open, (own,)) as pool:
        futures = {pool.submit(_measure, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    row, broken, said = future.result()
                except BrokenProcessPool as error:
                    raise ValueError(
                        f"one of {args.jobs} processes died, as when memory runs out; give fewer --jobs, with --resume"
                    ) from error
                except Exception as error:  # of any kind: hours of other trainings must not be lost with it
                    failed.append((futures[future], error))
                else:
                    for message in said:
                        warnings.warn(f"{futures[future]}: {message}", stacklevel=2)
                    rows.add(futures[future].key, lambda row=row: row, broken)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return failed


_opened: tuple[Subject, argparse.Namespace]  # of a process that measures


def _open(args: argparse.Namespace) -> None:
    global _opened
    warnings.filterwarnings("ignore", r"\d+ % of the tokens are gone")  # as in the first process
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // args.jobs)))
    _opened = Subject(args), args


def _measure(job: Job) -> tuple[dict[str, Any], set[str], list[str]]:
    """The row of a job without its key, the paths of images that could not be read, and what was warned of."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(record=True) as said,
    ):
        row = job.measure(*_opened, *job.arguments)
    return row, _opened[0].broken, [str(one.message) for one in said]
