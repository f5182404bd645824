"""Measure how long a call takes; all stages do it here.

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

WARM_UP, LEAST, MOST = 3, 5, 60  # numbers of calls
BUDGET = 0.04  # seconds of timed calls
FLUSH = 2**27  # float32 elements read between calls, many times the size of any L2 cache


@torch.inference_mode()
def median_us(call: Callable[[], Any], device: torch.device) -> float:
    """Median microseconds of a call; on a GPU measured by events, with none of its tensors in the L2 cache."""
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
    """Seconds of each call, between CUDA events. Reading the buffer first flushes the L2 cache and gives the host time
    to queue the launches of the call."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    for start, end in pairs:
        _buffer().sum()  # a read leaves no dirty lines, which the call would have to write back
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
    """Microseconds of host time to queue one call, without waiting for its end: the median over ``runs`` rounds of
    ``calls`` calls, which must fit the GPU's queue."""
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
    """GB/s of copying ``nbytes``; bytes read and bytes written both count."""
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
    """Microseconds of an empty kernel in a graph, the lower bound for any kernel."""
    return median_us(replayed(lambda: _nothing[(1,)](), device), device)


def replayed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call captured as a CUDA graph, which removes its host cost; without a GPU the call itself."""
    for _ in range(WARM_UP):
        call()
    return replays_on(device).capture(call)


def compiled(call: Callable[..., Any], device: torch.device, **options: Any) -> Callable[..., Any]:
    """The call compiled by torch.compile for fixed shapes; on the CPU it is traced only, without generated code."""
    if device.type != "cuda":
        return torch.compile(call, backend="eager", dynamic=False)
    return torch.compile(call, dynamic=False, **options)
