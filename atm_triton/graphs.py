"""Repeats the engine's stages: replays CUDA graphs or, without a GPU, calls the stages again."""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda.graphs import _POOL_HANDLE

UNREAD = -1  # the value of counts on the host until they arrive
PRIORITY = -2  # of the streams that graphs are captured on: torch has 32 per priority, and no library uses this one
ENGINES = 32  # at most this many engines hold graphs at a time, each with its own stream
_capturing = threading.Lock()  # CUDA captures one graph at a time in a process


class Replays:
    """Runs stages again without a GPU, by calling them."""

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
        """Drop everything that was captured."""

    def wait(self) -> None:
        """Wait until everything launched is done."""

    def mib(self) -> float:
        """Memory held by what was captured, in MiB."""
        return 0.0


class CaptureStreams(NamedTuple):
    """The streams on which an engine captures: ``main``; ``branch`` and ``copies``, whose short work has priority; the
    ``pool`` of cuBLAS's workspace on the main stream; and a graph that ``keeps`` the pool alive and is never replayed.
    """

    main: torch.cuda.Stream
    branch: torch.cuda.Stream
    copies: torch.cuda.Stream
    pool: "_POOL_HANDLE"
    keeps: torch.cuda.CUDAGraph


class StreamLease:
    """Capture streams that belong to one engine at a time.

    Their cuBLAS workspace lies in a pool of its own that is never freed. A graph keeps the address of the workspace,
    but torch.compile clears all cuBLAS workspaces; in any other pool the allocator could then give that memory to
    another tensor, or back to the device.
    """

    made: ClassVar[dict[int, int]] = {}  # by the device's index
    spare: ClassVar[dict[int, list[CaptureStreams]]] = {}

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        spare = self.spare.setdefault(index, [])
        if spare:
            torch.cuda.synchronize(device)  # a graph of the previous holder may still be running
            self.streams = spare.pop()
        elif self.made.get(index, 0) == ENGINES:
            raise RuntimeError(f"{ENGINES} engines already hold graphs on {device}; drop those of one by engine.drop()")
        else:
            pool, main = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, PRIORITY)
            keeps = _place_workspace(main, pool)
            self.made[index] = self.made.get(index, 0) + 1
            branch, copies = (torch.cuda.Stream(device, PRIORITY - 1) for _ in range(2))
            self.streams = CaptureStreams(main=main, branch=branch, copies=copies, pool=pool, keeps=keeps)
        weakref.finalize(self, spare.append, self.streams).atexit = False

    def place_workspace(self) -> None:
        """Make sure that this thread's workspace lies in the pool, even after it was cleared."""
        _place_workspace(self.streams.main, self.streams.pool)


def _place_workspace(stream: torch.cuda.Stream, pool: "_POOL_HANDLE") -> torch.cuda.CUDAGraph:
    """Capture a graph that makes cuBLAS allocate its workspace in the pool, if there was none."""
    graph, ones = torch.cuda.CUDAGraph(), torch.ones(16, 16, dtype=torch.float16, device=stream.device)
    _multiply(ones)  # CUDA loads what this needs before the capture
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, "thread_local")
        try:
            _multiply(ones)
        finally:
            graph.capture_end()
    return graph


def _multiply(ones: Tensor) -> Tensor:
    """Multiply through cuBLAS and through cuBLASLt."""
    return F.linear(ones, ones, ones[0]) @ ones


class CUDAGraphs(Replays):
    """CUDA graphs that share one pool and are captured on streams of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.reset()

    def reset(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.lease: StreamLease | None = None
        self.alive: weakref.WeakSet[Callable[[], Any]] = weakref.WeakSet()  # replays that are still referenced
        self.held = 0

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with _capturing:
                if not self.alive:  # a pool without a live graph accepts no new one
                    self.reset()
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(self.device)
                lease = self.lease = self.lease or StreamLease(self.device)
                lease.place_workspace()
                main, mode = lease.streams.main, "thread_local"
                with torch.cuda.graph(graph, pool=self.pool, stream=main, capture_error_mode=mode):
                    out = run()
                self.held += torch.cuda.memory_reserved(self.device) - before
        except BaseException:  # torch leaves its stream current then, and the pool marked as being captured to
            torch.cuda.set_stream(current)
            self.pool = torch.cuda.graph_pool_handle()
            raise

        def replay(lease: StreamLease = lease) -> Any:  # its workspace is the graph's
            graph.replay()
            return out

        self.alive.add(replay)
        return replay

    def mailbox(self, length: int) -> "Mailbox":
        return PinnedMailbox(length, self)

    def branch(self) -> "Branch":
        return StreamBranch(self)

    def side(self, name: str) -> torch.cuda.Stream | None:
        """One of the streams while a graph is captured, otherwise None: another thread's stream may have the same
        handle, and its work could then take memory that is still read here."""
        if self.lease is None or not torch.cuda.is_current_stream_capturing():
            return None
        return getattr(self.lease.streams, name)

    def wait(self) -> None:
        with _capturing:  # no other engine may capture meanwhile
            torch.cuda.synchronize(self.device)

    def mib(self) -> float:
        return self.held / 2**20


def replays_on(device: torch.device) -> Replays:
    return CUDAGraphs(device) if device.type == "cuda" else Replays(device)


class Mailbox:
    """Counts [length] on their way to the host. ``counts``: where they arrive. ``seen``: the same memory for Python."""

    def __init__(self, length: int) -> None:
        self._lie_in(torch.full((length,), UNREAD))

    def _lie_in(self, counts: Tensor) -> None:
        self.counts, self.seen = counts, counts.numpy()

    def send(self, counts: Tensor) -> None:
        self.counts.copy_(counts)

    def join(self) -> None:
        """Make later work on the device wait for the copy."""

    def receive(self) -> list[int]:
        """The counts, once they have arrived."""
        return self._taken(self.seen.tolist())

    def _taken(self, counts: list[int]) -> list[int]:
        if UNREAD in counts:
            raise RuntimeError("the counts of a stage did not reach the host: ATMConfig(engine=False) runs the blocks")
        self.seen.fill(UNREAD)
        return counts


class PinnedMailbox(Mailbox):
    """A mailbox for counts from a GPU, copied inside a graph while other work goes on. ``copied``: the event that says
    when they have arrived."""

    def __init__(self, length: int, graphs: CUDAGraphs) -> None:
        self._lie_in(torch.full((length,), UNREAD).pin_memory())
        self.copied, self.graphs = torch.cuda.Event(external=True), graphs
        self.aside = Aside()

    def send(self, counts: Tensor) -> None:
        self.aside.run(self.graphs.side("copies"), self._copy, counts)

    def _copy(self, counts: Tensor) -> None:
        self.counts.copy_(counts, non_blocking=True)
        self.copied.record()

    def join(self) -> None:
        self.aside.join()

    def receive(self) -> list[int]:
        self.copied.synchronize()
        counts = self.seen.tolist()
        if UNREAD in counts:  # the event was not recorded yet: waiting for everything is slower, but never wrong
            self.graphs.wait()  # on whatever stream the pass ran
            counts = self.seen.tolist()
        return self._taken(counts)


class Aside:
    """Work on another stream, until the streams join."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.reads: tuple[Any, ...] = ()  # kept so that their memory is not reused meanwhile

    def run(self, stream: torch.cuda.Stream | None, call: Callable[..., Any], *args: Any) -> Any:
        """Run ``call`` on ``stream``; None: on the current one."""
        if stream is None:
            return call(*args)
        self.stream, self.reads = stream, args
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            return call(*args)

    def join(self) -> None:
        stream, reads = self.stream, self.reads
        self.stream, self.reads = None, ()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        del reads


class Branch:
    """Work that may run concurrently with everything called between it and :meth:`join`."""

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    def join(self) -> None:
        """Make later work on the device wait for it."""


class StreamBranch(Branch):
    """A branch inside a graph, on a stream beside the main one."""

    def __init__(self, graphs: CUDAGraphs) -> None:
        self.graphs, self.aside = graphs, Aside()

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        return self.aside.run(self.graphs.side("branch"), call, *args)

    def join(self) -> None:
        self.aside.join()
