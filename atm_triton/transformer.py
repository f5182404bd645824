"""A timm VisionTransformer whose blocks merge: how sizes, the trace and the record travel through a forward pass.

Between calls only the record of the last pass and the engine's graphs are kept; threads take turns to use them.
"""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self, overload

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from atm_triton import ops
from atm_triton.block import ATMBlock, Step, handed_on, inside, is_changed
from atm_triton.config import ATMConfig
from atm_triton.engine import Engine, Facts, recorded
from atm_triton.packed import Images, Packed
from atm_triton.record import Record, number_of

GONE = 0.6  # warn if a larger share of the tokens is gone after a quarter of the blocks


class Run:
    """One pass through the blocks, apart from the values of the tokens: what :class:`~atm_triton.block.Step` is to a
    block.

    Inputs:
        image_shape: [channels, H, W].
        leading: how many leading tokens the classifier reads, if the last block computes only these.
        dense: the caller wants every token, including those that the classifier does not read.
        checkpointing: recompute each block in the backward pass.
        collect: the blocks, from 0, after which the unmerged tokens are kept.
        stop: number of blocks to run, None for all.
        refusal: why the engine does not run this pass, for the record.

    Outputs: the merged ``tokens`` after the last block; ``traces``, int32 [B N] per block, the row in which each token
    of the first block is now (None: nothing has merged, or nobody asked); the ``images`` after each block; and the
    unmerged tokens [B, N, C] ``collected`` after the requested blocks.
    """

    tokens: Packed
    traces: list[Tensor | None]
    images: list[Images]
    collected: list[Tensor]

    def __init__(
        self,
        image_shape: tuple[int, ...],
        leading: int | None,
        dense: bool,
        checkpointing: bool = False,
        collect: Container[int] = (),
        stop: int | None = None,
        refusal: str = "features of single blocks are asked for",
    ) -> None:
        self.image_shape, self.leading, self.dense, self.checkpointing = image_shape, leading, dense, checkpointing
        self.collect, self.stop, self.refusal = collect, stop, refusal


class ATMBlocks(nn.Sequential):
    """The blocks of a patched model. A slice is a plain sequence of the same blocks. Called without the model,
    ``blocks(x)`` behaves like such a sequence and returns what the last block returns."""

    config: ATMConfig
    engine: Engine
    depth: int
    warns: bool  # warn, once, if most tokens are gone early
    passes: int  # of the engine
    by_pool: bool = False  # the model's way of pooling decides whether attention adds log n
    _last: Record | Facts | None

    @property
    def last(self) -> Record | None:
        """The record of the last complete pass. The engine only leaves its facts, because writing a record takes as
        long as a pass over a few images; the record is written when somebody asks."""
        done = self._last
        if not isinstance(done, Facts):
            return done
        record = self._recorded(done)
        if self._last is done:  # no other thread has run since
            self._last = record
        return record

    @last.setter
    def last(self, done: Record | Facts | None) -> None:
        self._last = done

    def _recorded(self, done: Facts) -> Record:
        with self.engine.lock:  # another thread's pass reads the same mailbox
            record = recorded(done)
        if self.quarter:
            left = torch.as_tensor(record.rows[self.quarter - 1], dtype=torch.float64)  # already on the host
            self._warn_of_what_is_gone(left.mean().item() / record.N)
        return record

    def look(self, done: Facts) -> None:
        """Check passes 1, 2, 4, 8 and so on of the engine for tokens that are gone early: users may never ask for the
        record, and the first passes may be of noise."""
        self.passes += 1
        if self.warns and self.passes.bit_count() == 1:
            self._recorded(done)

    def __getstate__(self) -> dict[str, Any]:
        """A copy gets the finished record, because counts on their way to the host lie in memory that cannot be
        copied."""
        return {**super().__getstate__(), "_last": self.last}

    @overload
    def __getitem__(self, index: slice, /) -> nn.Sequential: ...

    @overload
    def __getitem__(self, index: int, /) -> nn.Module: ...

    def __getitem__(self, index: int | slice, /) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def __setitem__(self, index: int, module: nn.Module) -> None:
        if inside(module, ATMBlock) is None:
            raise TypeError(_no_block(index, module))
        super().__setitem__(index, module)

    def _fixed(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "blocks of a patched model cannot be added or removed, because each merges according to its position: "
            "remove_patch, then change them, then apply_patch"
        )

    append = extend = insert = pop = __delitem__ = __iadd__ = __imul__ = _fixed

    def own(self, index: int, module: nn.Module) -> ATMBlock | None:
        """``module``, or the block inside it, if it merges as this position requires; otherwise None."""
        block = inside(module, ATMBlock)
        if block is None or block.block_index != index:
            return None
        return block if block.config is self.config or block.config == self.config else None

    def know_sizes(self, proportional: bool) -> None:
        """Turn log n in attention on or off from now on."""
        config = replace(self.config, proportional_attention=proportional)
        for index, module in enumerate(self):
            block = self.own(index, module)
            if block is not None:
                block.config = config
        self.config = config

    def forward(self, x: Any, *, run: Run | None = None) -> Any:
        """Run the blocks on tokens x [B, N, C]; returns [B, M, C], or rows [T, C] once lengths differ. ``run`` is given
        by the model; without it this is a plain sequence."""
        if run is None:
            return super().forward(x)
        B, now = x.shape[0], Packed.of(x)
        trace: Tensor | None = None
        traces: list[Tensor | None] = []
        collected: list[Tensor] = []
        entered: list[Images] = []
        left: list[Images] = []
        counts: list[Tensor | None] = []
        matched: list[bool] = []
        for index, block in enumerate(list(self)[: run.stop]):
            if self.own(index, block) is None:
                raise TypeError(_no_block(index, block))
            serves_leading = run.leading is not None and index == len(self) - 1
            alone = serves_leading and not run.dense
            step = Step(now, not serves_leading, run.leading if alone else None)
            entered.append(now.images)
            if run.checkpointing:
                x = checkpoint(block, x, use_reentrant=False, step=step)
            else:
                x = block(x, step=step)
            if step.after is None:
                raise TypeError(_no_block(index, block))
            now, slots, count = handed_on(step.after, x), step.slots, step.counts
            if slots is not None and run.dense:
                trace = slots if trace is None else ops.compose(trace, slots)
            traces.append(trace)
            traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
            if index + 1 == self.quarter and not traced and B:
                self._warn_of_what_is_gone(len(now.x) / (B * entered[0].N))
            if index in run.collect:
                collected.append(self.unmerge(now, trace, B))
            left.append(now.images)
            counts.append(count)
            matched.append(slots is not None or count is not None)
        numbers = {id(images): number_of(images) for images in (*entered, *left)}
        record = Record(
            batch=B,
            image_shape=run.image_shape,
            leading=None if run.dense else run.leading,
            tokens=tuple(numbers[id(images)] for images in entered),
            rows=tuple(numbers[id(images)] for images in left),
            counts=tuple(counts),
            matched=tuple(matched),
            way=f"blocks: {run.refusal}",
        )
        self.last = record if len(entered) == len(self) else None
        run.tokens, run.traces, run.images, run.collected = now, traces, left, collected
        return x

    @property
    def quarter(self) -> int:
        """The number of blocks in the first quarter, at least two: one block merges at most half of the tokens."""
        return min(max(len(self) // 4, 2), len(self))

    def _warn_of_what_is_gone(self, left: float) -> None:
        """Warn, once, if too few tokens are left. ``left``: their share after a quarter of the blocks."""
        if self.warns and left < 1 - GONE:
            self.warns = False
            warnings.warn(
                f"{100 * (1 - left):.0f} % of the tokens are gone after {self.quarter} of {len(self)} blocks, as with "
                "another model's thresholds: atm-triton eval shows what that changes, calibrate finds better ones",
                stacklevel=2,
            )

    def unmerge(self, tokens: Packed, trace: Tensor | None, B: int) -> Tensor:
        """Give every original token the value of the token that it is now in: [B, N, C]."""
        x = tokens.x if trace is None else ops.unmerge(tokens.x, trace, self.config.backend)
        return x.unflatten(0, (B, -1) if B else (B, tokens.images.N))


def _no_block(index: int, module: nn.Module) -> str:
    return (
        f"blocks.{index} is {type(module).__name__}; want the block that apply_patch left, or a wrapper around it that "
        f"passes keyword arguments on: remove_patch, replace it and apply_patch again"
    )


def leading_tokens(model: VisionTransformer) -> int | None:
    """How many leading tokens the classifier reads, if it reads no others: the class token, and in a distilled model
    also the distillation token. None for a model that pools its patch tokens or reads them in its own way. A class with
    its own head may define a property ``leading_tokens``."""
    cls = type(model)
    if hasattr(cls, "leading_tokens"):
        return model.leading_tokens
    if cls.pool is not VisionTransformer.pool or cls.forward_head not in _HEADS:
        return None
    if getattr(model, "dist_token", None) is not None:
        return 2
    return 1 if model.global_pool == "token" else None


_HEADS = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)


def knows_sizes(model: VisionTransformer) -> bool:
    """Whether attention adds log n by default: not in a model that averages its patch tokens beside a class token."""
    return not (model.global_pool == "avg" and model.has_class_token)


if TYPE_CHECKING:  # the class that MergingTransformer is mixed into
    from timm.models.vision_transformer import VisionTransformer as Base
else:
    Base = object


class MergingTransformer(Base):
    """Mixed in before a model's own class while it is patched. Callers get what the model always returns: logits, or
    features of all N tokens, in which merged tokens share one value."""

    blocks: ATMBlocks

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse(x, attn_mask, is_causal)
        if "forward_features" in vars(self):
            raise TypeError(
                "forward_features was replaced on a patched model, whose forward would not call it: undo that"
            )
        # a head that pools over patch tokens reads all N, so that a merged one counts by its size
        return self._output(x, dense=leading_tokens(self) is None, head=True)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse(x, attn_mask, is_causal)
        return self._output(x, dense=True, head=False)

    def _output(self, images: Tensor, dense: bool, head: bool) -> Tensor:
        """Run the engine, or the blocks if it refuses. Returns logits (``head``) or normalised tokens; ``dense``: all N
        of them."""
        mine = self.engine.model is self  # false in a replica made by DataParallel
        done = self.engine.run(images, self._leading(), dense, head) if mine else "a replica has no engine"
        if not isinstance(done, str):
            out, self.blocks.last = done
            self.blocks.look(done[1])
            return out
        run = self._run(images, self._leading(), dense, refusal=done)
        return self.finish(run.tokens, run.traces[-1], images.shape[0], dense, head)

    @property
    def engine(self) -> Engine:
        return self._own_blocks().engine

    def _own_blocks(self) -> ATMBlocks:
        if not isinstance(self.blocks, ATMBlocks):
            raise TypeError(
                f"blocks is {type(self.blocks).__name__}; want the sequence that apply_patch left: wrap single blocks, "
                f"or remove_patch, replace them and apply_patch again"
            )
        if len(self.blocks) != self.blocks.depth:
            raise ValueError(
                f"{len(self.blocks)} blocks where {self.blocks.depth} were patched, each for its place: remove_patch, "
                "then add or remove blocks, then apply_patch"
            )
        if self.blocks.by_pool and self.blocks.config.proportional_attention != knows_sizes(self):
            self.blocks.know_sizes(knows_sizes(self))
        return self.blocks

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        done = super()._apply(fn, recurse)
        self.engine.refresh()  # otherwise it would keep the memory that the model has just left
        return done

    def stem(self, images: Tensor) -> Tensor:
        """Turn images [B, C, H, W] into the tokens [B, N, C] that enter the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def finish(self, tokens: Packed, trace: Tensor | None, B: int, dense: bool, head: bool) -> Tensor:
        """Everything after the last block: the norm, of the tokens that the classifier reads or of all N, and the
        head."""
        read = None if dense else leading_tokens(self)
        if read is not None:
            x = self.norm(tokens.images.first(tokens.x, read))
        elif is_changed(self.norm):  # its hooks see all N tokens
            x = self.norm(self.blocks.unmerge(tokens, trace, B))
        else:
            x = self.norm(tokens.images.shaped(tokens.x)).flatten(0, -2)
            x = self.blocks.unmerge(tokens.with_x(x), trace, B)
        return self.forward_head(x) if head else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's: features of all N tokens after the chosen blocks, and the final ones."""
        _refuse(x, attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; choose NCHW or NLC")
        chosen, last = feature_take_indices(len(self._own_blocks()), indices)
        run = self._run(x, self._leading(), dense=True, collect=chosen, stop=last + 1 if stop_early else None)
        features = [self.norm(feature) if norm else feature for feature in run.collected]
        P = self.num_prefix_tokens
        prefixes, features = [f[:, :P] for f in features], [f[:, P:] for f in features]
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            features = [f.transpose(1, 2).reshape(x.shape[0], -1, H, W).contiguous() for f in features]
        with_prefix = return_prefix_tokens and P > 0
        options = (run.traces[-1], x.shape[0], True, False)
        final = None if intermediates_only else self.finish(run.tokens, *options)
        if output_dict:
            result = {"image_intermediates": features}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": final}
        if with_prefix:
            features = list(zip(features, prefixes, strict=True))
        return features if intermediates_only else (final, features)

    def traces(self, x: Tensor) -> list[Tensor | None]:
        """Where the N tokens of images [B, C, H, W] are after each block: int32 [B, N], the number of the merged token
        within its image; -1: dropped. None instead of a tensor if nothing has merged yet."""
        run = self._run(x, self._leading(), dense=True)
        traces = [None if trace is None else trace.unflatten(0, (len(x), -1)) for trace in run.traces]
        return [
            None if trace is None else torch.where(trace < 0, -1, trace - images.cu_seqlens[:-1].unsqueeze(1))
            for trace, images in zip(traces, run.images, strict=True)
        ]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("thresholds belong to a model's depth: remove_patch first, prune, then apply_patch again")

    def _leading(self) -> int | None:
        return leading_tokens(self) if self._own_blocks().config.cls_only_last else None

    def _run(self, images: Tensor, leading: int | None, dense: bool, **options: Any) -> Run:
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        run = Run(tuple(images.shape[1:]), leading, dense, checkpointing, **options)
        x = self.blocks(self.stem(images), run=run)
        run.tokens = handed_on(run.tokens, x)
        return run

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (type(self).__bases__[1],), self.__dict__  # the class is made on the fly: pickle its base


def _refuse(images: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    if isinstance(images, Proxy):
        raise TypeError(
            "torch.fx, which create_feature_extractor uses, cannot trace a patched model: merging depends on values; "
            "take forward_intermediates or hooks (docs/features.md)"
        )
    if attn_mask is not None or is_causal:
        raise ValueError("a mask of N tokens does not fit once tokens merge: leave attn_mask and is_causal out")


@functools.cache
def merging_class(base: type) -> type:
    """The class that a model of class ``base`` has while it is patched."""
    return type(f"ATM{base.__name__}", (MergingTransformer, base), {"__module__": __name__})


def _new(base: type) -> VisionTransformer:
    return object.__new__(merging_class(base))
