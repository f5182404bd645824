"""The engine: inference on a GPU through CUDA graphs, one per stage of a pass and bucket of rows.

As soon as a stage has matched its tokens, and while attention runs, the host reads how many rows are left and launches
the next stage's graph for that number. It reads only where this is likely to save more time than it takes. A graph
bakes in addresses, so what passes from stage to stage lies in two sets of buffers that are used in turn, and any bucket
may follow any other. Without a GPU, under Triton's interpreter, the same engine calls the stages again instead of
replaying them.
"""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton import ops
from atm_triton.block import ATMBlock
from atm_triton.captured import Modules
from atm_triton.graphs import Mailbox, Replays, replays_on
from atm_triton.packed import Images, Packed
from atm_triton.record import Number, Record
from atm_triton.reference import largest_r
from atm_triton.stage import Pending, Stage, begin, enter, run, stages

MAX_GRAPHS, MAX_MIB = 512, 4096
READ_GFLOP = 6.0  # GFLOP that an H200 computes, in 16 bits, in the time of one host read
FLOAT32 = 8  # float32 takes this many times as long
KINDS = 4  # buffers are kept for this many kinds of passes, the latest ones


class Kind(NamedTuple):
    """What passes must have in common to share graphs: shape, dtype and device of the images, the dtype of autocast
    (None: off), ``leading``, ``dense`` and ``head`` as in :meth:`Engine.run`, and how the model pools."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    leading: int | None
    dense: bool
    head: bool
    pool: str


class Counts:
    """The counts of a pass, by block: one number per image. Those of the last stage are read on demand, at the latest
    by the next pass, which writes to the same mailbox."""

    def __init__(self) -> None:
        self.known: dict[int, list[int]] = {}
        self.late: tuple[Stage, Mailbox] | None = None

    def take(self, stage: Stage, mailbox: Mailbox) -> None:
        numbers = mailbox.receive()
        B = len(numbers) // len(stage.counted)
        self.known |= {index: numbers[B * i : B * (i + 1)] for i, index in enumerate(stage.counted)}

    def settle(self) -> dict[int, list[int]]:
        if self.late is not None:
            self.take(*self.late)
            self.late = None
        return self.known


class Facts(NamedTuple):
    """What :func:`recorded` needs to know about a pass: its kind, the blocks, the tokens per image that enter the first
    block, and the counts of each block with a threshold."""

    kind: Kind
    blocks: list[ATMBlock]
    N: int
    counts: Counts


class Passes:
    """What all passes of one kind share: their stages, and the memory that these read and write at fixed addresses. It
    consists of the ``images``, two sets of ``buffers`` with as many rows as the first stage has, and a mailbox for each
    stage with counts. ``counts``: those of the last pass; ``read``: the cost of a host read, in GFLOP."""

    def __init__(self, model: VisionTransformer, kind: Kind, replays: Replays, read: float) -> None:
        self.model, self.kind, self.replays, self.read = model, kind, replays, read
        self.blocks, self.counts = list(model.blocks), Counts()
        self.B, self.N = kind.shape[0], 0  # N, and with it the stages, are known once the stem has run
        self.stages: list[Stage] = []
        self.mailboxes: dict[int, Mailbox] = {}  # by the number of a stage
        self.branch = replays.branch()
        self.merged_first = False  # whether a block has merged before the first stage ends
        with torch.inference_mode(False):
            self.images = torch.empty(kind.shape, dtype=kind.dtype, device=kind.device)
        self.buffers: list[tuple[Pending, Tensor | None]] = []

    def stage(self, number: int, rows: int | None) -> Tensor | None:
        """Run a stage of this many rows (None: the first stage). The last stage returns the output of the pass."""
        kind = self.kind
        casts = torch.autocast(kind.device.type, kind.autocast, cache_enabled=False) if kind.autocast else nullcontext()
        into = self.buffers[(number + 1) % 2][0].first(rows) if self.buffers else None
        with casts:
            tokens, y, trace = self._entered(into) if rows is None else self._merged(number, rows)
            now = self.stages[number]
            leading = None if kind.dense else kind.leading
            merging = len(self.blocks) - (kind.leading is not None)
            of_blocks: list[Tensor] = []

            def counted(counts: Tensor) -> None:
                of_blocks.append(counts)
                if len(of_blocks) == len(now.counted):
                    self.mailboxes[number].send(torch.cat(of_blocks) if len(of_blocks) > 1 else counts)

            try:
                left, trace = run(self.blocks, now, tokens, y, trace, merging, leading, counted, self.branch, into)
                if isinstance(left, Packed):
                    return self.model.finish(left, trace, self.B, kind.dense, kind.head)
            finally:  # a capture cannot end while its streams are apart
                try:
                    self.branch.join()
                finally:
                    if number in self.mailboxes:
                        self.mailboxes[number].join()
        made = not self.buffers
        if made:
            self.buffers = [self._buffer(left, trace) for _ in range(2)]
        if number == 0:
            self.merged_first = left.sizes is not None
        self._write(number, left, trace)
        return self.stage(number, rows) if made else None  # run again, now into the buffers, as a capture will

    def _entered(self, into: Pending | None) -> tuple[Packed, None, Tensor | None]:
        x = enter(self.model, self.images, None if into is None else into.x)
        tokens = Packed.of(x)
        if not self.stages:
            self.N = x.shape[1]
            self.stages = stages(self.blocks, self.kind.leading, len(tokens.x), self.read)
            with torch.inference_mode(False):
                self.mailboxes = {
                    number: self.replays.mailbox(self.B * len(stage.counted))
                    for number, stage in enumerate(self.stages)
                    if stage.counted
                }
        trace = torch.arange(len(tokens.x), dtype=torch.int32, device=x.device) if self.kind.dense else None
        return tokens, None, trace

    def _merged(self, number: int, rows: int) -> tuple[Packed, Tensor, Tensor | None]:
        pending, trace = self.buffers[number % 2]
        if number == 1 and not self.merged_first:  # tokens of the stem: one patch each
            pending = pending._replace(sizes=None)
        block = self.blocks[self.stages[number].start - 1]
        N = self.N if block.config.adapt == "image" else min(self.N, rows // self.B)
        return *begin(block, pending, rows, Images(cu_seqlens=pending.cu_seqlens, N=N, equal=False)), trace

    def _buffer(self, left: Pending, trace: Tensor | None) -> tuple[Pending, Tensor | None]:
        sized = left._replace(sizes=left.x.new_empty(len(left.x), dtype=torch.float32))
        with torch.inference_mode(False):
            made = sized.each(partial(torch.empty_like, memory_format=torch.contiguous_format))
            return made, None if trace is None else torch.empty_like(trace)

    def _write(self, number: int, left: Pending, trace: Tensor | None) -> None:
        """Copy to the buffers whatever is not in them yet."""
        buffer, kept = self.buffers[(number + 1) % 2]
        for to, of in zip((*buffer, kept), (*left, trace), strict=True):
            if to is not None and of is not None and to.data_ptr() != of.data_ptr():
                to[: len(of)].copy_(of)


Key = tuple[Passes, int, int | None]  # key of a graph: its passes, stage number and rows (None: the first stage)


class Engine:
    """Runs a patched ``model`` in inference.

    ``max_graphs`` and ``max_mib`` (MiB held by captured graphs) may be set. Beyond the first limit the least recently
    used graphs are dropped; beyond the second, new stages run without a graph. ``step``: rows per bucket, None: the
    multiple of 128 nearest to 1/64 of the first stage's rows. ``read_gflop``: the cost of a host read, as
    :func:`stages` wants it, for kinds of passes that have not run yet.
    """

    def __init__(
        self,
        model: VisionTransformer,
        max_graphs: int = MAX_GRAPHS,
        max_mib: int = MAX_MIB,
        step: int | None = None,
        read_gflop: float = READ_GFLOP,
    ) -> None:
        self.model, self.max_graphs, self.max_mib = model, max_graphs, max_mib
        self.step, self.read_gflop = step, read_gflop
        self.make_replays = replays_on
        self.lock = threading.RLock()
        self.replays: Replays | None = None
        self._forget()

    def drop(self) -> None:
        """Forget all graphs and buffers."""
        with self.lock:
            if self.replays is not None:
                self.replays.wait()  # a pass, even an interrupted one, may still use them
            self._forget()
            if self.replays is not None:
                self.replays.reset()

    def refresh(self) -> None:
        """Forget all graphs if the model has changed."""
        with self.lock:
            if self.seen is not None and self.seen != Modules(self.model):
                self.drop()

    def _forget(self) -> None:
        self.graphs: OrderedDict[Key, Callable[[], Any] | None] = OrderedDict()
        self.passes: OrderedDict[Kind, Passes] = OrderedDict()
        self.stream: torch.cuda.Stream | None = None  # of the last pass
        self.done: torch.cuda.Event | None = None
        self.seen: Modules | None = None  # everything captured is valid for these
        self.trusted = False  # whether the last pass found that graphs may be replayed

    def __str__(self) -> str:
        captured = sum(graph is not None for graph in self.graphs.values())
        held = 0 if self.replays is None else self.replays.mib()
        return f"{captured} graphs (at most {self.max_graphs}) of {held:.0f} MiB (at most {self.max_mib})"

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(copy.deepcopy(self.model, memo), *self._limits())

    def __reduce__(self) -> tuple:
        return type(self), (self.model, *self._limits())

    def _limits(self) -> tuple[int, int, int | None, float]:
        return self.max_graphs, self.max_mib, self.step, self.read_gflop

    def refusal(self, images: Tensor) -> str | None:
        """Why the engine leaves a pass over ``images`` [B, C, H, W] to the blocks; None if it runs the pass itself."""
        return self._unfit(images) or Modules(self.model).obstacle

    def _unfit(self, images: Tensor) -> str | None:
        """Why the images, the configuration or the context of the pass rule the engine out; None: they do not."""
        config, device = self.model.blocks.config, images.device.type
        if not config.engine:
            return "engine=False in the configuration"
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "a compiler traces the model"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode derivatives are taken"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
            return "a transform or a mode of torch watches every operation"
        if device == "cuda" and torch.version.hip:
            return "CUDA graphs are not tried on ROCm"
        if type(images) is not Tensor:
            return f"the images are a {type(images).__name__}, not a plain tensor"
        if device == "cpu" and not ops.interpreting():
            return "the images are on the CPU"
        backend, why = ops.explain(config.backend, device, images.dtype)
        if backend == "reference":
            return f"the reference computes: {why}"
        if len(images) == 0:
            return "there are no images"
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        return "the images require a gradient" if ops.needs_grad(images) else None

    def run(self, images: Tensor, leading: int | None, dense: bool, head: bool) -> tuple[Tensor, Facts] | str:
        """Run a pass over images [B, C, H, W].

        Args:
            leading: how many leading tokens the classifier reads, if the last block computes only these.
            dense: compute all tokens, including those that the classifier does not read.
            head: return logits instead of what goes into the head.

        Returns:
            The output, which belongs to the caller, and what the pass did; or the :meth:`refusal`.
        """
        unfit = self._unfit(images)
        if unfit is not None:
            return unfit
        with self.lock, ops.device_of(images):
            early = self.trusted and not self.model.training and not torch.is_grad_enabled()
            modules = self.seen if early else None
            if modules is None:
                modules = self._examine()
                if modules.obstacle is not None:
                    return modules.obstacle
            stream = self._take_turn(images)
            try:
                with torch.no_grad():
                    done = self._run(images, leading, dense, head, modules, early)
            except BaseException:  # an interrupted pass leaves values that must not be read
                self.drop()
                raise
            if done is None:  # modules have changed
                self.drop()
                return self.run(images, leading, dense, head)
            if stream is not None:
                self.done = stream.record_event(self.done)
        return done

    def _examine(self) -> Modules:
        """The modules as they are now. If they have changed, everything captured is forgotten."""
        now = Modules(self.model)
        if now.obstacle is None and self.seen != now:
            self.drop()
            self.seen = now
        self.trusted = now.obstacle is None
        return now

    def _take_turn(self, images: Tensor) -> torch.cuda.Stream | None:
        """Wait for the last pass, which may still be at work on another stream. Returns the stream of this pass, None
        on a CPU."""
        if not images.is_cuda:
            return None
        if self.stream is None or self.stream.cuda_stream != raw_stream(images.device):
            self.stream = torch.cuda.current_stream()
            if self.done is not None:
                self.stream.wait_event(self.done)
        return self.stream

    def _run(
        self, images: Tensor, leading: int | None, dense: bool, head: bool, modules: Modules, early: bool
    ) -> tuple[Tensor, Facts] | None:
        """Run a pass. Returns its output and what it did, or None if the ``modules`` have changed. ``early``: check for
        changes while the device is at work."""
        passes = self._passes(images, leading, dense, head)
        passes.images.copy_(images)
        passes.counts.settle()
        passes.counts = counts = Counts()
        parts = iter(modules.parts if early else ())
        left = 0
        rows: int | None = None
        for number in count():
            key = (passes, number, rows)
            if self.graphs.get(key) is None and not all(part.same() for part in parts):  # Python runs from here on
                return None
            out = self._play(key, partial(passes.stage, number, rows))
            now = passes.stages[number]
            share = None if now.last is None else 1 + len(modules.parts) // len(passes.stages)
            if not all(part.same() for part in islice(parts, share)):
                return None
            if now.last is None:
                break
            counts.take(now, passes.mailboxes[number])
            merged = (removed(passes.blocks[index], counts.known[index]) for index in now.counted)
            left = (left or passes.B * passes.N) - sum(merged)
            rows = self._bucket(left, passes.B * passes.N)
        if now.counted:
            counts.late = now, passes.mailboxes[number]
        return out.clone(), Facts(kind=passes.kind, blocks=passes.blocks, N=passes.N, counts=counts)

    def _passes(self, images: Tensor, leading: int | None, dense: bool, head: bool) -> Passes:
        autocast = ops.autocast_dtype(images.device.type)
        shape, dtype, device, pool = tuple(images.shape), images.dtype, images.device, self.model.global_pool
        kind = Kind(shape, dtype, device, autocast, leading, dense, head, pool)  # keywords take a microsecond more
        if kind not in self.passes:
            read = self.read_gflop / (FLOAT32 if (autocast or dtype) == torch.float32 else 1)
            self.passes[kind] = Passes(self.model, kind, self._replays_on(device), read)
        self.passes.move_to_end(kind)
        if len(self.passes) > KINDS:
            _, old = self.passes.popitem(last=False)
            old.replays.wait()  # its graphs may still use its buffers
            self.graphs = OrderedDict((key, graph) for key, graph in self.graphs.items() if key[0] is not old)
        return self.passes[kind]

    def _replays_on(self, device: torch.device) -> Replays:
        if self.replays is None or self.replays.device != device:
            self.replays = self.make_replays(device)
        return self.replays

    def _bucket(self, T: int, most: int) -> int:
        """The number of rows to launch for ``T`` rows: rounded up, so that few graphs serve all batches, to ``most`` at
        most."""
        step = self.step or 128 * max(1, round(most / 64 / 128))
        return min(most, -(-T // step) * step)

    def _play(self, key: Key, call: Callable[[], Any]) -> Any:
        """Run eagerly the first time, as a warm-up; capture the second time; replay from then on."""
        if key not in self.graphs:
            out = key[0].replays.eagerly(call)
            self.graphs[key] = None
        else:
            replay = self.graphs.pop(key) or self._captured(key[0].replays, call)
            self.graphs[key] = replay  # now the most recently used
            out = replay()
        if len(self.graphs) > self.max_graphs:
            self.graphs.popitem(last=False)
        return out

    def _captured(self, replays: Replays, call: Callable[[], Any]) -> Callable[[], Any]:
        eagerly = partial(replays.eagerly, call)
        if replays.mib() >= self.max_mib:
            warnings.warn(f"graphs hold {self.max_mib} MiB: new stages run eagerly; raise engine.max_mib", stacklevel=2)
            return eagerly
        try:
            return replays.capture(call)
        except RuntimeError as error:  # out of memory, or a module does something that cannot be captured
            line = str(error).splitlines()[0]
            warnings.warn(f"a stage could not be captured and runs eagerly from now on: {line}", stacklevel=2)
            return eagerly


def raw_stream(device: torch.device) -> int:
    """The current stream, in a tenth of the time that torch.cuda.current_stream() takes."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def removed(block: ATMBlock, counts: list[int]) -> int:
    """How many tokens, of all images together, a block with these counts (one per image) merges away."""
    total = sum(counts)
    return total if block.config.adapt == "image" else total // len(counts) * len(counts)


def recorded(facts: Facts) -> Record:
    """The record of a pass, from the counts of its blocks."""
    kind, blocks = facts.kind, facts.blocks
    B, leading = kind.shape[0], None if kind.dense else kind.leading
    known = facts.counts.settle()
    counts = [torch.tensor(known[index]) if index in known else None for index in range(len(blocks))]
    now: Number = facts.N
    entered: list[Number] = []
    rows: list[Number] = []
    matched: list[bool] = []
    for index, (block, candidates) in enumerate(zip(blocks, counts, strict=True)):
        last = index == len(blocks) - 1
        entered.append(now)
        r = 0 if last and kind.leading is not None else _merged_in(block, now, candidates)
        now = leading if last and leading is not None else now - r
        rows.append(now)
        matched.append(candidates is not None or (isinstance(r, int) and r > 0))
    return Record(
        batch=B,
        image_shape=kind.shape[1:],
        leading=leading,
        tokens=tuple(entered),
        rows=tuple(rows),
        counts=tuple(counts),
        matched=tuple(matched),
        way="engine",
    )


def _merged_in(block: ATMBlock, N: Number, counts: Tensor | None) -> Number:
    """How many of its N tokens each image merged in a block with these counts, [B]."""
    if block.r is not None:  # N is a number then
        return min(block.r, largest_r(int(N), block.num_prefix_tokens))
    if counts is None or block.config.adapt == "image":
        return 0 if counts is None else counts
    return int(counts.sum()) // len(counts)
