"""How the engine runs its stages again: as CUDA graphs, or by calling them where there is no GPU."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

UNREAD = -1  # what counts on the host hold until they are there
_capturing = threading.Lock()  # CUDA captures one graph at a time in a process


class Replays:
    """How stages are run again where there is no GPU: by calling them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def eagerly(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def mailbox(self, length: int) -> "Mailbox":
        return Mailbox(length)

    def reset(self) -> None:
        """Nothing that was captured is left."""

    def wait(self) -> None:
        """Until all that was launched is done."""

    def mib(self) -> float:
        """What has been captured holds, in MiB."""
        return 0.0


class CUDAGraphs(Replays):
    """CUDA graphs from one pool. The engine runs nothing else on their stream, so cuBLAS's workspace there lies in the
    pool. To clear all workspaces instead would pull those of other graphs of the process from under them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.side = torch.cuda.Stream(device)
        self.reset()

    def reset(self) -> None:
        self._renew()
        self.alive: weakref.WeakSet[Callable[[], Any]] = weakref.WeakSet()  # replays that somebody still has
        self.held = 0

    def _renew(self) -> None:
        """A pool, and a stream on which no workspace lies in another one."""
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if not self.alive:  # a pool that no graph uses any more takes none
            self.reset()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            with _capturing:
                torch.cuda.current_blas_handle()  # a thread's own, which it cannot make during a capture
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(self.device)
                with torch.cuda.graph(graph, **how):
                    out = run()
                self.held += torch.cuda.memory_reserved(self.device) - before
        except BaseException:  # torch leaves its stream current then, and the pool marked as being captured to
            torch.cuda.set_stream(current)
            self._renew()
            raise

        def replay() -> Any:
            graph.replay()
            return out

        self.alive.add(replay)
        return replay

    def mailbox(self, length: int) -> "Mailbox":
        return PinnedMailbox(length, self.side)

    def wait(self) -> None:
        with _capturing:  # no other engine may capture meanwhile
            torch.cuda.synchronize(self.device)

    def mib(self) -> float:
        return self.held / 2**20


def replays_on(device: torch.device) -> Replays:
    return CUDAGraphs(device) if device.type == "cuda" else Replays(device)


class Mailbox:
    """Counts [length] on their way to the host, where they lie in ``counts``; ``seen``: the same memory for Python."""

    def __init__(self, length: int) -> None:
        self._lie_in(torch.full((length,), UNREAD))

    def _lie_in(self, counts: Tensor) -> None:
        self.counts, self.seen = counts, counts.numpy()

    def send(self, counts: Tensor) -> None:
        self.counts.copy_(counts)

    def join(self) -> None:
        """What follows on the device waits for the copy."""

    def receive(self) -> list[int]:
        """The counts, once they are there."""
        return self._taken(self.seen.tolist())

    def _taken(self, counts: list[int]) -> list[int]:
        if UNREAD in counts:
            raise RuntimeError("the counts of a stage did not reach the host: ATMConfig(engine=False) runs the blocks")
        self.seen.fill(UNREAD)
        return counts


class PinnedMailbox(Mailbox):
    """From a GPU, on a stream ``side`` by side with what goes on; ``copied``: the event that the graph records."""

    def __init__(self, length: int, side: torch.cuda.Stream) -> None:
        self._lie_in(torch.full((length,), UNREAD).pin_memory())
        self.copied, self.side = torch.cuda.Event(external=True), side
        self.sent: Tensor | None = None

    def send(self, counts: Tensor) -> None:
        self.sent = counts  # until the streams join its memory is not to be another tensor's
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.counts.copy_(counts, non_blocking=True)
            self.copied.record()

    def join(self) -> None:
        if self.sent is not None:
            torch.cuda.current_stream().wait_stream(self.side)
            self.sent = None

    def receive(self) -> list[int]:
        self.copied.synchronize()
        counts = self.seen.tolist()
        if UNREAD in counts:  # the event was not recorded yet: slower, but never wrong
            with _capturing:  # on whatever stream the pass ran
                torch.cuda.synchronize(self.side.device)
            counts = self.seen.tolist()
        return self._taken(counts)
