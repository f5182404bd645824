"""Rows that train a model, measured in several processes at once."""

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.paper.rows import Rows
from benchmarks.paper.subject import Subject


class Job(NamedTuple):
    """A row by its key: ``measure(subject, args, *arguments)`` returns the rest of it. ``measure`` is a function of a
    module, so that another process finds it."""

    key: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


def jobs_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    text = "trainings at once, each in a process of its own (1); their minutes are then those of a busy machine"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=text)
    return parser


def check_jobs(number: int) -> None:
    if number < 1:
        raise ValueError(f"--jobs {number}: give 1 or more")


def add_all(rows: Rows, subject: Subject, args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Add the row of each job unless it is there. With ``args.jobs`` above 1 so many are measured at once, and rows are
    added as they are done.

    Raises:
        Exception: what a job raised; of several at once the first that failed, after the rows of all others are added.
    """
    if args.jobs == 1:
        for job in jobs:
            rows.add(job.key, lambda job=job: job.measure(subject, args, *job.arguments))
        return
    own = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "experiment"})
    failed = None
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), _open, (own,)) as pool:
        futures = {pool.submit(_measure, job): job for job in jobs if not rows.has(job.key)}
        try:
            for future in as_completed(futures):
                try:
                    rows.add(futures[future].key, future.result)
                except Exception as error:  # of any kind: hours of other trainings must not be lost with it
                    failed = failed or error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if failed is not None:
        raise failed


_opened: tuple[Subject, argparse.Namespace]  # of a process that measures


def _open(args: argparse.Namespace) -> None:
    global _opened
    warnings.filterwarnings("ignore", r"\d+ % of the tokens are gone")  # as in the first process
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    _opened = Subject(args), args


def _measure(job: Job) -> dict[str, Any]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return job.measure(*_opened, *job.arguments)
