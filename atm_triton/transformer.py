"""A timm VisionTransformer whose blocks merge: how sizes, the trace and the record travel through a forward pass.

Nothing is kept between calls but what the last one did and the engine's graphs, for which threads take turns.
"""

import functools
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple, Self

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atm_triton import ops
from atm_triton.block import ATMBlock, is_changed
from atm_triton.config import ATMConfig
from atm_triton.engine import Engine, Facts, recorded
from atm_triton.packed import Images, Packed
from atm_triton.record import Record, number_of

GONE = 0.6  # of the tokens after a quarter of the blocks: a larger share is said


class Run(NamedTuple):
    """The merged ``tokens`` after the last block run, the ``traces``: where the rows that entered the first block are
    after each block, int32 [B N] (None: nothing has merged, or nobody wants it), with the ``images`` that they are then
    of, and the unmerged tokens [B, N, C] after each block asked for."""

    tokens: Packed
    traces: list[Tensor | None]
    images: list[Images]
    collected: list[Tensor]


class ATMBlocks(nn.Sequential):
    """The merging blocks of a patched model, in the place and with the parameter names of its own."""

    def __init__(self, blocks: list[ATMBlock], original: nn.Sequential, config: ATMConfig) -> None:
        super().__init__(*blocks)
        self.original = (original,)  # in a tuple: not a submodule, its parameters are already here
        self.config = config
        self._last: Record | Facts | None = None
        self.engine: Engine | None = None  # once the blocks are in their model
        self.warns = True  # where most tokens are gone early; once

    @property
    def last(self) -> Record | None:
        """What the last whole pass did. The engine leaves the facts alone: to write the record takes as long as a pass
        over a few images."""
        done = self._last
        if not isinstance(done, Facts):
            return done
        with self.engine.lock:  # another thread's pass reads the same mailbox
            record = recorded(done)
        if self.quarter:
            left = torch.as_tensor(record.rows[self.quarter - 1], dtype=torch.float64)  # on the host, as all of it
            self._warn_of_what_is_gone(left.mean().item() / record.tokens[0])
        if self._last is done:  # no other thread has run since
            self._last = record
        return record

    @last.setter
    def last(self, done: Record | Facts | None) -> None:
        self._last = done

    def __getstate__(self) -> dict[str, Any]:
        """A copy gets the record: counts on their way to the host are in memory that cannot be copied."""
        return {**self.__dict__, "_last": self.last}

    def run(
        self,
        x: Tensor,
        image_shape: tuple[int, ...],
        leading: int | None,
        dense: bool,
        checkpointing: bool = False,
        collect: Container[int] = (),
        stop: int | None = None,
        refusal: str = "features of single blocks are asked for",
    ) -> Run:
        """Run the blocks on tokens [B, N, C].

        Args:
            leading: how many leading tokens the classifier reads, where the last block serves them alone.
            dense: the caller wants every token, also those that the classifier does not read.
            checkpointing: recompute each block in the backward pass.
            collect: the blocks, from 0, after which to keep the unmerged tokens.
            stop: the number of blocks to run, None for all.
            refusal: why the engine does not run, for the record.
        """
        self._warn_of_what_is_not_called()
        now, trace = Packed.of(x), None
        traces, collected, tokens, rows, counts, matched = [], [], [], [], [], []
        for index, block in enumerate(list(self)[:stop]):
            serves_leading = leading is not None and index == len(self) - 1
            alone = serves_leading and not dense
            tokens.append(now.images)
            call, option = (block.step_leading, leading) if alone else (block.step, not serves_leading)
            if checkpointing:
                now, slots, count = checkpoint(call, now, option, use_reentrant=False)
            else:
                now, slots, count = call(now, option)
            if slots is not None and dense:
                trace = slots if trace is None else ops.compose(trace, slots)
            traces.append(trace)
            traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
            if index + 1 == self.quarter and not traced and len(x):
                self._warn_of_what_is_gone(len(now.x) / (len(x) * x.shape[1]))
            if index in collect:
                collected.append(self.unmerge(now, trace, len(x)))
            rows.append(now.images)
            counts.append(count)
            matched.append(slots is not None or count is not None)
        numbers = {id(images): number_of(images) for images in (*tokens, *rows)}
        before, after = ([numbers[id(images)] for images in of] for of in (tokens, rows))
        served = None if dense else leading
        record = Record(
            len(x), image_shape, served, *map(tuple, (before, after, counts, matched)), f"blocks: {refusal}"
        )
        self.last = record if len(tokens) == len(self) else None
        return Run(now, traces, rows, collected)

    def _warn_of_what_is_not_called(self) -> None:
        """The blocks and their attention take sizes along, so they are run, but not called as modules."""
        if torch.compiler.is_compiling():
            return
        for name, module in self._not_called():
            if is_changed(module):
                warnings.warn(
                    f"{name} has hooks or a forward of its own, which a patched model does not call: use those of "
                    f"its norms, projections or MLP, or of the model",
                    stacklevel=2,
                )

    @property
    def quarter(self) -> int:
        """A quarter of the blocks."""
        return len(self) // 4

    def _warn_of_what_is_gone(self, left: float) -> None:
        """``left``: the share of the tokens that are left after a quarter of the blocks."""
        if self.warns and left < 1 - GONE:
            self.warns = False
            warnings.warn(
                f"{100 * (1 - left):.0f} % of the tokens are gone after {self.quarter} of {len(self)} blocks, as where "
                "thresholds are another model's: atm-triton eval tells what that changes, calibrate finds better ones",
                stacklevel=2,
            )

    def _not_called(self) -> Iterator[tuple[str, nn.Module]]:
        yield "blocks", self
        for index, block in enumerate(self):
            yield f"blocks.{index}", block
            yield f"blocks.{index}.attn", block.attn
            if not block.attn.fused_attn:  # else timm does not call it either
                yield f"blocks.{index}.attn.attn_drop", block.attn.attn_drop

    def unmerge(self, tokens: Packed, trace: Tensor | None, B: int) -> Tensor:
        """All N tokens of the B images, [B, N, C], of those that are left."""
        x = tokens.x if trace is None else ops.unmerge(tokens.x, trace, self.config.backend)
        return x.unflatten(0, (B, -1) if B else (B, tokens.images.N))

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("the blocks of a patched model pass sizes along: call the model, or remove_patch first")


def leading_tokens(model: VisionTransformer) -> int | None:
    """How many leading tokens the classifier reads if it reads no others: the class token, and in a distilled model the
    distillation token; None for a model that pools its patch tokens, or reads them in a way of its own. A class with a
    head of its own may tell by a property ``leading_tokens``."""
    cls = type(model)
    if hasattr(cls, "leading_tokens"):
        return model.leading_tokens
    if cls.pool is not VisionTransformer.pool or cls.forward_head not in _HEADS:
        return None
    if getattr(model, "dist_token", None) is not None:
        return 2
    return 1 if model.global_pool == "token" else None


_HEADS = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)


class MergingTransformer:
    """Mixed in before a model's own class while it is patched. What a caller sees is what the model always returns:
    logits, or features of all N tokens, where merged tokens share one value."""

    blocks: ATMBlocks

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        # a head that pools over patch tokens reads all N, so that a merged one counts by its size
        return self._output(x, dense=leading_tokens(self) is None, head=True)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        return self._output(x, dense=True, head=False)

    def _output(self, images: Tensor, dense: bool, head: bool) -> Tensor:
        """By the engine, or by the blocks where it refuses: logits, or all N normalised tokens; ``dense``: from all."""
        if torch.jit.is_tracing() and self.blocks.config.adapt != "static":
            raise ValueError('torch.jit.trace would fix how many tokens merge: patch with adapt="static", or compile')
        mine = self.engine.model is self  # not so in a replica of DataParallel
        done = self.engine.run(images, self._leading(), dense, head) if mine else "a replica has no engine"
        if not isinstance(done, str):
            out, self.blocks.last = done
            return out
        run = self._run(images, self._leading(), dense, refusal=done)
        return self.finish(run.tokens, run.traces[-1], len(images), dense, head)

    @property
    def engine(self) -> Engine:
        return self.blocks.engine

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        done = super()._apply(fn, recurse)
        self.engine.refresh()  # it would keep the memory that the model has just left
        return done

    def stem(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to the tokens [B, N, C] that enter the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def finish(self, tokens: Packed, trace: Tensor | None, B: int, dense: bool, head: bool) -> Tensor:
        """What comes after the last block: the norm of the tokens that the classifier reads, or of all N; the head."""
        if dense:
            x = self.norm(tokens.images.shaped(tokens.x)).flatten(0, -2)
            x = self.blocks.unmerge(tokens.with_x(x), trace, B)
        else:
            x = self.norm(tokens.images.first(tokens.x, leading_tokens(self)))
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
        _refuse_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; choose NCHW or NLC")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        run = self._run(x, self._leading(), dense=True, collect=chosen, stop=last + 1 if stop_early else None)
        features = [self.norm(tokens) if norm else tokens for tokens in run.collected]
        P = self.num_prefix_tokens
        prefixes, features = [f[:, :P] for f in features], [f[:, P:] for f in features]
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            features = [f.transpose(1, 2).reshape(len(x), -1, H, W).contiguous() for f in features]
        with_prefix = return_prefix_tokens and P > 0
        options = (run.traces[-1], len(x), True, False)
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
        """Which token of its image each of the N tokens of images [B, C, H, W] is after each block: int32 [B, N], -1:
        dropped; None: nothing has merged."""
        run = self._run(x, self._leading(), dense=True)
        traces = [None if trace is None else trace.unflatten(0, (len(x), -1)) for trace in run.traces]
        return [
            None if trace is None else torch.where(trace < 0, -1, trace - images.cu_seqlens[:-1].unsqueeze(1))
            for trace, images in zip(traces, run.images, strict=True)
        ]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("thresholds belong to a model's depth: remove_patch first, prune, then apply_patch again")

    def _leading(self) -> int | None:
        return leading_tokens(self) if self.blocks.config.cls_only_last else None

    def _run(self, images: Tensor, leading: int | None, dense: bool, **options: Any) -> Run:
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        return self.blocks.run(self.stem(images), tuple(images.shape[1:]), leading, dense, checkpointing, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (type(self).__bases__[1],), self.__dict__  # the class is made on the fly: pickle its base


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a mask of N tokens does not fit once tokens merge: leave attn_mask and is_causal out")


@functools.cache
def merging_class(base: type) -> type:
    """The class of a patched model whose own class is ``base``."""
    return type(f"ATM{base.__name__}", (MergingTransformer, base), {"__module__": __name__})


def _new(base: type) -> VisionTransformer:
    cls = merging_class(base)
    return cls.__new__(cls)
