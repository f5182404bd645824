"""Several processes, one result: under torchrun processes take batches in turn, and each gets the rows of all.

Whole batches are dealt out, so that a batch holds the same images as with one process: with one r per batch, its images
decide what merges. Rows are gathered in the order of the batches, so that sums equal those of one process, to the bit.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
WAIT = timedelta(hours=2)  # how long to wait for the slowest process where processes meet
ANSWER = 2.0  # seconds within which every live process reports


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def silent(title: str | None) -> bool | None:
    """tqdm's ``disable``: True for a bar without a title and on every process but the first, else None."""
    return True if title is None or rank() else None


def start(device: str) -> None:
    """Join the other processes, if torchrun started this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device == "cuda":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(f"torchrun starts {processes} processes on a machine of {gpus} GPUs; start {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=WAIT)
    signal.signal(signal.SIGTERM, lambda *_: _end())  # torchrun sends this when a process has died


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def own(batches: Sequence[T]) -> list[T]:
    """The batches of this process."""
    return list(batches[rank() :: world_size()])


def own_images(count: int, batch_size: int) -> list[int]:
    """The numbers of the images, out of ``count``, in the :func:`own` batches."""
    return [i for batch in own(torch.arange(count).split(batch_size)) for i in batch.tolist()]


def from_first(value: T) -> T:
    """Send the first process's value to every process."""
    if world_size() == 1:
        return value
    values = [value]
    try:
        dist.broadcast_object_list(values)
    except RuntimeError:  # a connection was closed
        _end()
    return values[0]


def in_order(rows: list[T]) -> list[T]:
    """Gather the rows that each process has for its :func:`own` batches; every process gets those of all batches."""
    if world_size() == 1:
        return rows
    shards: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(shards, rows)
    except RuntimeError:  # a connection was closed
        _end()
    together = sum(map(len, shards))
    return [shards[number % len(shards)][number // len(shards)] for number in range(together)]


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over the processes. All have one dtype and device."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError:  # a connection was closed
        _end()
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def failed(line: str) -> bool:
    """Tell the other processes that this one ends with an error. Returns whether this process should print it: if all
    fail alike, only one does."""
    if world_size() == 1:
        return int(os.environ.get("RANK", 0)) == 0
    store = _store()
    store.set(f"failed {rank()}", line)
    time.sleep(ANSWER / 2 * (rank() > 0))
    return rank() == 0 or not store.check(["failed 0"])


def _end() -> NoReturn:
    """Find out which processes died silently, let one of the others report it, and exit."""
    store = _store()
    store.set(f"alive {rank()}", "")
    time.sleep(ANSWER)
    others = range(world_size())
    alive = [r for r in others if store.check([f"alive {r}"])]
    dead = [r for r in others if r not in alive and not store.check([f"failed {r}"])]
    told = any(store.check([f"failed {r}"]) for r in others)
    if rank() == alive[0] and (dead or not told):
        names = f"rank{'s' * (len(dead) > 1)} {', '.join(map(str, dead))} {'have' if len(dead) > 1 else 'has'} died"
        why = names if dead else f"a process was stopped, or did not answer within {WAIT}"
        print(f"atm-triton: {why}: the run is ended", file=sys.stderr, flush=True)
    os._exit(1)


def _store() -> dist.Store:
    """Torchrun's own store, which lives as long as any process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore("atm-triton", dist.TCPStore(host, port, is_master=False, wait_for_workers=False))
