"""How the engine runs its stages again: as CUDA graphs, or by calling them where there is no GPU."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

UNREAD = -1  # what counts on the host hold until they are there
PRIORITY = -2  # of the streams that are captured on: torch has 32 of each priority, and libraries take 0, -1 and -3
STREAMS = 32
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

    def branch(self) -> "Branch":
        return Branch()

    def reset(self) -> None:
        """Nothing that was captured is left."""

    def wait(self) -> None:
        """Until all that was launched is done."""

    def mib(self) -> float:
        """What has been captured holds, in MiB."""
        return 0.0


class CaptureStream:
    """A stream that nobody else captures on, while somebody has this. cuBLAS's workspace there lies in a pool of its
    own that is never given up. A graph keeps the address of the workspace, but whoever clears cuBLAS's workspaces, as
    torch.compile does, frees it: in the pool of another graph, or in none, it would be another tensor's next."""

    made: ClassVar[dict[torch.device, int]] = {}
    spare: ClassVar[dict[torch.device, list[tuple[torch.cuda.Stream, tuple[int, int], torch.cuda.CUDAGraph]]]] = {}

    def __init__(self, device: torch.device) -> None:
        spare = self.spare.setdefault(device, [])
        if spare:
            torch.cuda.synchronize(device)  # a graph of whoever had it before may be at work
            self.stream, self.pool, self.graph = spare.pop()
        elif self.made.get(device, 0) == STREAMS:
            raise RuntimeError(f"{STREAMS} engines hold graphs on {device}: engine.drop() gives up those of one")
        else:
            self.stream, self.pool = torch.cuda.Stream(device, PRIORITY), torch.cuda.graph_pool_handle()
            self.made[device] = self.made.get(device, 0) + 1
            self.graph = self.place_workspace()  # is never replayed, and keeps the pool
        weakref.finalize(self, spare.append, (self.stream, self.pool, self.graph)).atexit = False

    def place_workspace(self) -> torch.cuda.CUDAGraph:
        """See that this thread's workspace lies in the pool, also after it was cleared: by a capture that uses it."""
        graph, ones = torch.cuda.CUDAGraph(), torch.ones(16, 16, dtype=torch.float16, device=self.stream.device)
        _multiply(ones)  # CUDA loads what this needs before the capture
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, "thread_local")
            try:
                _multiply(ones)
            finally:
                graph.capture_end()
        return graph


def _multiply(ones: Tensor) -> Tensor:
    """By cuBLAS and by cuBLASLt."""
    return F.linear(ones, ones, ones[0]) @ ones


class CUDAGraphs(Replays):
    """CUDA graphs from one pool, captured on one stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.copying, self.branching = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.reset()

    def reset(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.captures: CaptureStream | None = None
        self.alive: weakref.WeakSet[Callable[[], Any]] = weakref.WeakSet()  # replays that somebody still has
        self.held = 0

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with _capturing:
                if not self.alive:  # a pool that no graph uses any more takes none
                    self.reset()
                captures = self.captures = self.captures or CaptureStream(self.device)
                captures.place_workspace()
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(self.device)
                how = {"pool": self.pool, "stream": captures.stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, **how):
                    out = run()
                self.held += torch.cuda.memory_reserved(self.device) - before
        except BaseException:  # torch leaves its stream current then, and the pool marked as being captured to
            torch.cuda.set_stream(current)
            self.pool = torch.cuda.graph_pool_handle()
            raise

        def replay(captures: CaptureStream = captures) -> Any:  # its workspace is the graph's
            graph.replay()
            return out

        self.alive.add(replay)
        return replay

    def mailbox(self, length: int) -> "Mailbox":
        return PinnedMailbox(length, self.copying)

    def branch(self) -> "Branch":
        return StreamBranch(self.branching)

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


class Branch:
    """What may run side by side with what is called between it and :meth:`join`."""

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    def join(self) -> None:
        """What follows on the device waits for it."""


class StreamBranch(Branch):
    """In a graph, on a stream of its own. Until the streams join, the memory of what it reads is not to be another
    tensor's. Outside one, what another thread does on a stream of the same number might take memory that is in use."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.reads: tuple[Any, ...] | None = None

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        if not torch.cuda.is_current_stream_capturing():
            return call(*args)
        self.reads = args
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return call(*args)

    def join(self) -> None:
        if self.reads is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.reads = None
