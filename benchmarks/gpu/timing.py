"""How long a call takes: the one place where stages measure time.

Whole models are timed by ``atm_triton.measure.throughput.time_in_turn``.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from atm_triton.graphs import replays_on

WARM_UP, LEAST, MOST = 3, 5, 60  # calls
BUDGET = 0.04  # seconds of calls that are timed
FLUSH = 2**27  # float32 elements that are read between calls: many times any L2


@torch.inference_mode()
def median_us(call: Callable[[], Any], device: torch.device) -> float:
    """Median microseconds of a call; on a GPU by events, with an L2 that holds nothing of its tensors."""
    if device.type != "cuda":
        call()
        return statistics.median(_host_seconds(call) for _ in range(3)) * 1e6
    for _ in range(WARM_UP):
        call()
    rough = statistics.median(_event_seconds(call, 3))
    number = max(LEAST, min(MOST, int(BUDGET / max(rough, 1e-6))))
    return statistics.median(_event_seconds(call, number)) * 1e6


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _event_seconds(call: Callable[[], Any], number: int) -> list[float]:
    """Reading the buffer also gives the host the time to queue the launches of the call."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    for start, end in pairs:
        _buffer().sum()  # read, not written: no dirty lines that the call would pay for
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


@cache
def _buffer() -> Tensor:
    return torch.zeros(FLUSH, device="cuda")


@torch.inference_mode()
def host_us(call: Callable[[], Any], device: torch.device, calls: int, runs: int = 5) -> float:
    """Microseconds of host time to queue one call, without waiting for any; the median of ``runs`` of
    ``calls``, which must fit the queue of the GPU."""
    call()
    rounds = []
    for _ in range(runs):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(rounds)


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """GB/s of a copy of ``nbytes``, read and written."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_us(lambda: target.copy_(source), device) / 1e3


def product_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two square matrices."""
    one, other = torch.randn(2, side, side, dtype=dtype, device=device)
    return 2 * side**3 / median_us(lambda: one @ other, device) / 1e6


@triton.jit
def _nothing():
    pass


def empty_us(device: torch.device) -> float:
    """What a kernel that does nothing takes as a graph: no other can take less."""
    return median_us(replayed(lambda: _nothing[(1,)](), device), device)


def replayed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph, without what it costs the host; off a GPU the call itself."""
    for _ in range(WARM_UP):
        call()
    return replays_on(device).capture(call)


def compiled(call: Callable[..., Any], device: torch.device, **options: Any) -> Callable[..., Any]:
    """By torch.compile, for these shapes alone; on the CPU by its tracing without code of its own."""
    if device.type != "cuda":
        return torch.compile(call, backend="eager", dynamic=False)
    return torch.compile(call, dynamic=False, **options)
