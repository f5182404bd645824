"""Settings and fixtures for all tests: one thread, Triton's interpreter without a GPU, and seeds."""

import os

import pytest
import torch

torch.set_num_threads(1)  # a process runs on each core, and sums must equal those of the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"  # for these; make sets it earlier, when libraries read it

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    import interpreter

    interpreter.speed_up()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def overflow():
    """Find 32-bit integers that overflow in a kernel, where Triton's interpreter runs it."""
    if torch.cuda.is_available():
        yield
        return
    interpreter.check_overflow(True)
    yield
    interpreter.check_overflow(False)


@pytest.fixture
def poison(monkeypatch):
    """Fill new memory with NaN or a huge index, so that values a kernel leaves unwritten are noticed."""

    def poisoned(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(2**30)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
