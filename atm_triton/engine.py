"""The engine: inference on a GPU by CUDA graphs, one for each stage of a pass and bucket of rows.

The host reads how many rows are left as soon as a stage has matched its tokens, while attention runs, and launches the
next stage's graph for as many. A graph bakes in addresses: what passes from stage to stage lies in two sets of buffers,
used in turn, so that any bucket may follow any other. Where there is no GPU but Triton's interpreter, the same engine
calls the stages again instead of replaying them.
"""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from atm_triton import ops
from atm_triton.block import ATMBlock
from atm_triton.graphs import Replays, replays_on
from atm_triton.packed import Images, Packed
from atm_triton.record import Record
from atm_triton.reference import largest_r
from atm_triton.stage import Pending, begin, run, stages

MAX_GRAPHS, MAX_MIB = 512, 4096
KINDS = 4  # of passes whose buffers are kept


class Kind(NamedTuple):
    """What passes must share to share graphs: the images' shape, dtype and device, autocast's dtype (None: off),
    ``leading``, ``dense`` and ``head`` as in :meth:`Engine.run`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    leading: int | None
    dense: bool
    head: bool


class Passes:
    """What passes of one kind have in common: their stages, and what those read and write at fixed addresses: the
    ``images``, two sets of ``buffers`` with as many rows as the first stage has, and a mailbox for each read."""

    def __init__(self, model: VisionTransformer, kind: Kind, replays: Replays) -> None:
        self.model, self.kind = model, kind
        self.blocks = list(model.blocks)
        self.stages = stages(self.blocks, kind.leading)
        self.B, self.N = kind.shape[0], 0  # N is known once the stem has run
        with torch.inference_mode(False):
            self.images = torch.empty(kind.shape, dtype=kind.dtype, device=kind.device)
            self.mailboxes = [replays.mailbox(self.B) for _ in self.stages[:-1]]
        self.buffers: list[tuple[Pending, Tensor | None]] = []

    def stage(self, number: int, rows: int | None) -> Tensor | None:
        """Run a stage of so many rows (None: the first); the last one returns the output of the pass."""
        kind, now = self.kind, self.stages[number]
        casts = torch.autocast(kind.device.type, kind.autocast, cache_enabled=False) if kind.autocast else nullcontext()
        with casts:
            tokens, y, trace = self._entered() if number == 0 else self._merged(number, rows)
            out = self.buffers[(number + 1) % 2][0] if self.buffers else None
            into = out and Pending(*(tensor[: len(tokens.x)] for tensor in out))
            leading = None if kind.dense else kind.leading
            may = len(self.blocks) - (kind.leading is not None)
            sent = None if now.last is None else self.mailboxes[number].send
            left, trace = run(self.blocks, now, tokens, y, trace, may, leading, sent, into)
            if now.last is None:
                return self.model.finish(left, trace, self.B, kind.dense, kind.head)
        made = not self.buffers
        if made:
            self.buffers = [self._buffer(left, trace) for _ in range(2)]
        self._write(number, left, trace)
        return self.stage(number, rows) if made else None  # once more, writing to them: a warm-up of what is captured

    def _entered(self) -> tuple[Packed, None, Tensor | None]:
        x = self.model.stem(self.images)
        tokens, self.N = Packed.of(x), x.shape[1]
        trace = torch.arange(len(tokens.x), dtype=torch.int32, device=x.device) if self.kind.dense else None
        return tokens, None, trace

    def _merged(self, number: int, rows: int) -> tuple[Packed, Tensor, Tensor | None]:
        pending, trace = self.buffers[number % 2]
        if number == 1:  # what the stem made: one patch each
            pending = pending._replace(sizes=None)
        block = self.blocks[self.stages[number].first]
        longest = self.N if block.config.adapt == "image" else min(self.N, rows // self.B)
        return *begin(block, pending, rows, Images(pending.cu_seqlens, longest, False)), trace

    def _buffer(self, left: Pending, trace: Tensor | None) -> tuple[Pending, Tensor | None]:
        sized = left._replace(sizes=left.x.new_empty(len(left.x), dtype=torch.float32))
        with torch.inference_mode(False):
            made = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in sized)
            return Pending(*made), None if trace is None else torch.empty_like(trace)

    def _write(self, number: int, left: Pending, trace: Tensor | None) -> None:
        """To the buffers, what does not lie there yet."""
        buffer, kept = self.buffers[(number + 1) % 2]
        pairs = [(to[: len(of)], of) for to, of in zip((*buffer, kept), (*left, trace), strict=True) if of is not None]
        pairs = [(to, of) for to, of in pairs if to.data_ptr() != of.data_ptr()]
        for dtype in dict.fromkeys(of.dtype for _, of in pairs):  # one launch each
            torch._foreach_copy_(*map(list, zip(*(pair for pair in pairs if pair[1].dtype == dtype), strict=True)))


class Engine:
    """Runs a patched ``model`` in inference. ``max_graphs`` and ``max_mib`` (MiB that captured graphs hold) may be set:
    beyond the first, the graphs used least recently are dropped; beyond the second, what is new runs without one.
    ``step``: rows of a bucket, None: the multiple of 128 next to a 64th of the first stage's rows."""

    def __init__(self, model: VisionTransformer, max_graphs: int = MAX_GRAPHS, max_mib: int = MAX_MIB) -> None:
        self.model, self.max_graphs, self.max_mib, self.step = model, max_graphs, max_mib, None
        self.make_replays = replays_on
        self.lock = threading.RLock()
        self._forget()

    def drop(self) -> None:
        """Forget all graphs and buffers."""
        with self.lock:
            if self.replays is not None:
                self.replays.wait()  # a pass may still work on them, also one that was broken off
            self._forget()

    def _forget(self) -> None:
        self.graphs: OrderedDict[tuple, Callable[[], Any] | None] = OrderedDict()
        self.passes: OrderedDict[Kind, Passes] = OrderedDict()
        self.replays: Replays | None = None
        self.done: torch.cuda.Event | None = None
        self.seen: Modules | None = None

    def __str__(self) -> str:
        captured = sum(graph is not None for graph in self.graphs.values())
        held = 0 if self.replays is None else self.replays.mib()
        return f"{captured} graphs (at most {self.max_graphs}) of {held:.0f} MiB (at most {self.max_mib})"

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(copy.deepcopy(self.model, memo), self.max_graphs, self.max_mib)

    def __reduce__(self) -> tuple:
        return type(self), (self.model, self.max_graphs, self.max_mib)

    def refusal(self, images: Tensor) -> str | None:
        """Why the engine does not take a pass over ``images`` [B, C, H, W], so that the blocks run; None: it does."""
        return self._unfit(images) or Modules(self.model).obstacle

    def _unfit(self, images: Tensor) -> str | None:
        """What configuration, images and blocks have against it."""
        blocks, device = self.model.blocks, images.device.type
        if not blocks.config.engine:
            return "engine=False in the configuration"
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "a compiler traces the model"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
            return "a transform or a mode of torch watches every operation"
        if device == "cuda" and torch.version.hip:
            return "CUDA graphs are not tried on ROCm"
        if type(images) is not Tensor:
            return f"the images are a {type(images).__name__}, no plain tensor"
        if device == "cpu" and not ops.interpreting():
            return "the images are on the CPU"
        backend, why = ops.explain(blocks.config.backend, device, images.dtype)
        if backend == "reference":
            return f"the reference computes: {why}"
        if len(images) == 0:
            return "there are no images"
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        if any(type(block) is not ATMBlock for block in blocks):
            return "a block is of a class of its own"
        drops = (m for block in blocks for m in (block.attn.proj_drop, block.drop_path1, block.drop_path2))
        if any(type(module) not in (nn.Dropout, nn.Identity, DropPath) for module in drops):
            return "a dropout is of a class of its own"
        if self.model.num_prefix_tokens > ops.KERNEL_PREFIX or blocks[0].attn.head_dim > ops.KERNEL_CHANNELS:
            return f"the kernels take {ops.KERNEL_PREFIX} protected tokens and {ops.KERNEL_CHANNELS} channels a head"
        return "the images want a gradient" if ops.needs_grad(images) else None

    def run(self, images: Tensor, leading: int | None, dense: bool, head: bool) -> tuple[Tensor, Record] | str:
        """A pass over images [B, C, H, W].

        Args:
            leading: how many leading tokens the classifier reads, where the last block serves them alone.
            dense: serve all tokens, also those that the classifier does not read.
            head: return logits, not what goes into the head.

        Returns:
            The output, which is the caller's own, and what the pass did; or the :meth:`refusal`.
        """
        unfit = self._unfit(images)
        if unfit is not None:
            return unfit
        now = Modules(self.model)
        if now.obstacle is not None:
            return now.obstacle
        with self.lock, torch.no_grad(), ops.device_of(images):
            if self.seen != now:  # parameters or modules were replaced or moved: what was captured is stale
                self.drop()
                self.seen = now
            if self.replays is None:
                self.replays = self.make_replays(images.device)
            if self.done is not None:  # on the stream of another thread the last pass may still be at work
                torch.cuda.current_stream().wait_event(self.done)
            try:
                out, record = self._run(images, leading, dense, head)
            except BaseException:  # what a pass that was broken off left behind is not to be read
                self.drop()
                raise
            if images.is_cuda:
                self.done = torch.cuda.current_stream().record_event(self.done)
        return out, record

    def _run(self, images: Tensor, leading: int | None, dense: bool, head: bool) -> tuple[Tensor, Record]:
        passes = self._passes(images, leading, dense, head)
        passes.images.copy_(images)
        T, rows, r = 0, None, []
        for number, now in enumerate(passes.stages):
            out = self._play((passes.kind, number, rows), partial(passes.stage, number, rows))
            if now.last is None:
                break
            counts = passes.mailboxes[number].receive()
            r.append((now.last, counts))
            T = (T or passes.B * passes.N) - removed(passes.blocks[now.last], counts)
            rows = self._bucket(T, passes.B * passes.N)
        return out.clone(), recorded(passes, dict(r))

    def _passes(self, images: Tensor, leading: int | None, dense: bool, head: bool) -> Passes:
        autocast = ops.autocast_dtype(images.device.type)
        kind = Kind(tuple(images.shape), images.dtype, images.device, autocast, leading, dense, head)
        if kind not in self.passes:
            self.passes[kind] = Passes(self.model, kind, self.replays)
        self.passes.move_to_end(kind)
        if len(self.passes) > KINDS:
            old, _ = self.passes.popitem(last=False)
            self.graphs = OrderedDict((key, graph) for key, graph in self.graphs.items() if key[0] != old)
        return self.passes[kind]

    def _bucket(self, T: int, most: int) -> int:
        """As many rows or a few more, of which there are not too many kinds."""
        step = self.step or 128 * max(1, round(most / 64 / 128))
        return min(most, -(-T // step) * step)

    def _play(self, key: tuple, call: Callable[[], Any]) -> Any:
        """Eagerly the first time, which warms up what it needs; captured the second time; from then on replayed."""
        if key not in self.graphs:
            out = self.replays.eagerly(call)
            self.graphs[key] = None
        else:
            replay = self.graphs.pop(key) or self._captured(call)
            self.graphs[key] = replay  # used last
            out = replay()
        if len(self.graphs) > self.max_graphs:
            self.graphs.popitem(last=False)
        return out

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        eagerly = partial(self.replays.eagerly, call)
        if self.replays.mib() >= self.max_mib:
            warnings.warn(f"graphs hold {self.max_mib} MiB: raise engine.max_mib; new ones run eagerly", stacklevel=2)
            return eagerly
        try:
            return self.replays.capture(call)
        except RuntimeError as error:  # out of memory, or what a module does cannot be captured
            line = str(error).splitlines()[0]
            warnings.warn(f"a stage could not be captured and runs eagerly from now on: {line}", stacklevel=2)
            return eagerly


def removed(block: ATMBlock, counts: Tensor) -> int:
    """How many tokens of all images a block with these counts [B] merges away."""
    total = int(counts.sum())
    return total if block.config.adapt == "image" else total // len(counts) * len(counts)


def recorded(passes: Passes, counts: dict[int, Tensor]) -> Record:
    """What a pass did, by the counts of its blocks."""
    kind, blocks = passes.kind, passes.blocks
    leading = None if kind.dense else kind.leading
    now, tokens, rows, matched = passes.N, [], [], []
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        tokens.append(now)
        found = counts.get(index)
        if last and leading is not None:
            now, r = leading, 0
        elif last and kind.leading is not None:
            r = 0
        elif block.config.adapt == "static":
            r = min(block.r, largest_r(now, block.num_prefix_tokens))
        else:
            r = 0 if found is None else found if block.config.adapt == "image" else removed(block, found) // passes.B
        now = now - r
        rows.append(now)
        matched.append(found is not None or (isinstance(r, int) and r > 0))
    each = [counts.get(index) for index in range(len(blocks))]
    return Record(passes.B, kind.shape[1:], leading, *map(tuple, (tokens, rows, each, matched)), "engine")


class Modules:
    """The modules of a model and where their parameters and buffers lie: what graphs bake in. ``obstacle``: why its
    forward pass cannot be captured, None: it can."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.obstacle = "a hook on all modules" if every_module._has_any_global_hook() else None
        todo, culprit = list(model._modules.values()), None
        tensors = [*model._parameters.values(), *model._buffers.values()]
        while todo:  # what a pass waits for: written for speed
            module = todo.pop()
            if module is None:
                continue
            self.modules.append(module)
            own = module.__dict__
            todo += own["_modules"].values()
            tensors += own["_parameters"].values()
            tensors += own["_buffers"].values()
            if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                culprit = module
        tensors = [tensor for tensor in tensors if tensor is not None]
        if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in tensors):
            self.pointers, self.obstacle = [], "a parameter is of a class of its own"
            return
        self.pointers = [tensor.data_ptr() for tensor in tensors]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self.obstacle = "gradients are on: torch.inference_mode() or no_grad() around the call"
        if culprit is not None:
            self.obstacle = _why(model, culprit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Modules) and (self.pointers, self.modules) == (other.pointers, other.modules)

    __hash__ = None


def _why(model: nn.Module, culprit: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is culprit)
    if culprit.training:
        return f"{name} is in training mode"
    return f"{name} has {'a forward' if 'forward' in culprit.__dict__ else 'hooks'} of its own, which graphs would skip"
