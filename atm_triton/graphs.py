"""How the engine runs its stages again: as CUDA graphs, or by calling them where there is no GPU."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNREAD = -1  # what counts on the host hold until they are there
_capturing = threading.Lock()  # CUDA captures one graph at a time in a process


class Replays:
    """How stages are run again where there is no GPU: by calling them."""

    def eagerly(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def mailbox(self, B: int) -> "Mailbox":
        return Mailbox(torch.full((B,), UNREAD), None)

    def wait(self) -> None:
        """Until all that was launched is done."""

    def mib(self) -> float:
        """What has been captured holds, in MiB."""
        return 0.0


class CUDAGraphs(Replays):
    """CUDA graphs from one pool. Their stages run on a stream of their own the first time, so that what CUDA sets up on
    first use is there when they are captured on it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.held = 0

    def eagerly(self, run: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = run()
        current.wait_stream(self.stream)
        return out

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            with _capturing:
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(self.stream.device)
                torch._C._cuda_clearCublasWorkspaces()  # the graphs' own lies in their pool: nothing else frees it
                with torch.cuda.graph(graph, **how):
                    out = run()
                torch._C._cuda_clearCublasWorkspaces()
                self.held += torch.cuda.memory_reserved(self.stream.device) - before
        except BaseException:  # torch leaves its stream current then, and the pool marked as being captured to
            torch.cuda.set_stream(current)
            self.pool = torch.cuda.graph_pool_handle()
            raise

        def replay() -> Any:
            graph.replay()
            return out

        return replay

    def mailbox(self, B: int) -> "Mailbox":
        return Mailbox(torch.full((B,), UNREAD).pin_memory(), torch.cuda.Event(external=True))

    def wait(self) -> None:
        torch.cuda.synchronize(self.stream.device)

    def mib(self) -> float:
        return self.held / 2**20


def replays_on(device: torch.device) -> Replays:
    return CUDAGraphs(device) if device.type == "cuda" else Replays()


class Mailbox(NamedTuple):
    """Counts [B] on their way to the host: ``counts``, pinned there, and the event, recorded by the graph that copies
    them (None: the copy is waited for anyway)."""

    counts: Tensor
    copied: torch.cuda.Event | None

    def send(self, counts: Tensor) -> None:
        self.counts.copy_(counts, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def receive(self) -> Tensor:
        """A copy of them, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
            if int(self.counts.min()) == UNREAD:  # the event was not recorded yet: slower, but never wrong
                torch.cuda.current_stream().synchronize()
        counts = self.counts.clone()
        if int(counts.min()) == UNREAD:
            raise RuntimeError("the counts of a stage did not reach the host: ATMConfig(engine=False) runs the blocks")
        self.counts.fill_(UNREAD)
        return counts
