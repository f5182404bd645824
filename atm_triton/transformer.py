"""A timm VisionTransformer whose blocks merge: how sizes, the trace and the record travel through a forward pass.

Nothing is kept between calls but a finished :class:`Record` of the last one, so threads may share a model.
"""

import functools
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atm_triton import ops
from atm_triton.block import ATMBlock, Tokens, first_tokens
from atm_triton.config import ATMConfig

Number = int | Tensor  # of every image the same, or int64 [B], each image its own


@dataclass(frozen=True)
class Record:
    """What a forward pass did. ``leading``: how many tokens the last block served alone, None where it served all;
    ``tokens``: the tokens of an image that enter each block; ``rows``: those that its MLP sees; ``counts``: each
    block's [B] candidates, None without a theta; ``matched``: whether a block looked for partners at all."""

    batch: int
    image_shape: tuple[int, ...]
    leading: int | None
    tokens: tuple[Number, ...]
    rows: tuple[Number, ...]
    counts: tuple[Tensor | None, ...]
    matched: tuple[bool, ...]

    @property
    def queries(self) -> tuple[Number, ...]:
        """The tokens whose attention each block computes."""
        return self.tokens if self.leading is None else (*self.tokens[:-1], self.leading)

    @property
    def all_served(self) -> "Record":
        """The same with a last block that computes all its tokens and merges none, but for one that fuses before its
        attention: it gives the same logits."""
        return self if self.leading is None else replace(self, leading=None, rows=(*self.rows[:-1], self.tokens[-1]))

    @property
    def merged(self) -> tuple[Number, ...]:
        """The tokens of an image that each block merges."""
        r = tuple(before - after for before, after in zip(self.tokens, self.rows, strict=True))
        return r if self.leading is None else (*r[:-1], 0)


def number_of(tokens: Tokens) -> Number:
    """The tokens of an image."""
    packing = tokens.packing
    if packing is None:
        return tokens.x.shape[1]
    return packing.cu_seqlens.diff().long() if packing.lengths is None else packing.lengths


class Run(NamedTuple):
    """The merged ``tokens`` after the last block run, the ``traces``: where the N tokens that entered the first block
    are after each block, [B, N] int32, -1: dropped (None: nothing has merged, or nobody wants it), and the unmerged
    tokens [B, N, C] after each block asked for."""

    tokens: Tokens
    traces: list[Tensor | None]
    collected: list[Tensor]


class ATMBlocks(nn.Sequential):
    """The merging blocks of a patched model, in the place and with the parameter names of its own."""

    def __init__(self, blocks: list[ATMBlock], original: nn.Sequential, config: ATMConfig) -> None:
        super().__init__(*blocks)
        self.original = (original,)  # in a tuple: not a submodule, its parameters are already here
        self.config = config
        self.last: Record | None = None

    def run(
        self,
        x: Tensor,
        image_shape: tuple[int, ...],
        leading: int | None,
        dense: bool,
        checkpointing: bool = False,
        collect: Container[int] = (),
        stop: int | None = None,
    ) -> Run:
        """Run the blocks on tokens [B, N, C].

        Args:
            leading: how many leading tokens the classifier reads, where the last block serves them alone.
            dense: the caller wants every token, also those that the classifier does not read.
            checkpointing: recompute each block in the backward pass.
            collect: the blocks, from 0, after which to keep the unmerged tokens.
            stop: the number of blocks to run, None for all.
        """
        now, trace, traces, collected = Tokens(x), None, [], []
        tokens, rows, counts, matched = [], [], [], []
        for index, block in enumerate(list(self)[:stop]):
            serves_leading = leading is not None and index == len(self) - 1
            alone = serves_leading and not dense
            tokens.append(number_of(now))
            call, option = (block.step_leading, leading) if alone else (block.step, not serves_leading)
            before = now.packing
            if checkpointing:
                now, assignment, count = checkpoint(call, now, option, use_reentrant=False)
            else:
                now, assignment, count = call(now, option)
            if assignment is not None and dense:
                trace = assignment if trace is None else ops.compose(trace, assignment, before)
            traces.append(trace)
            if index in collect:
                collected.append(self.unmerge(now, trace))
            rows.append(number_of(now))
            counts.append(count)
            matched.append(assignment is not None or count is not None)
        whole = len(tokens) == len(self)
        served = None if dense else leading
        record = Record(len(x), image_shape, served, *map(tuple, (tokens, rows, counts, matched)))
        self.last = record if whole else None
        return Run(now, traces, collected)

    def unmerge(self, tokens: Tokens, trace: Tensor | None) -> Tensor:
        """All N tokens, dense, of those that are left."""
        return tokens.x if trace is None else ops.unmerge(tokens.x, trace, self.config.backend, tokens.packing)

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
        read = leading_tokens(self)
        if read is None:  # pools over patch tokens: of all N, so a merged token counts by its size
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        _refuse_mask(attn_mask, is_causal)
        tokens = self._run(x, self._leading(), dense=False).tokens
        return self.forward_head(self.norm(first_tokens(tokens.x, read, tokens.packing)))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        run = self._run(x, self._leading(), dense=True)
        return self._features(run)

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
        final = None if intermediates_only else self._features(run)
        if output_dict:
            result = {"image_intermediates": features}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": final}
        if with_prefix:
            features = list(zip(features, prefixes, strict=True))
        return features if intermediates_only else (final, features)

    def traces(self, x: Tensor) -> list[Tensor | None]:
        """Where the tokens of images [B, C, H, W] are after each block: :attr:`Run.traces`."""
        return self._run(x, self._leading(), dense=True).traces

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("thresholds belong to a model's depth: remove_patch first, prune, then apply_patch again")

    def _features(self, run: Run) -> Tensor:
        return self.blocks.unmerge(run.tokens._replace(x=self.norm(run.tokens.x)), run.traces[-1])

    def _leading(self) -> int | None:
        return leading_tokens(self) if self.blocks.config.cls_only_last else None

    def _run(self, images: Tensor, leading: int | None, dense: bool, **options: Any) -> Run:
        x = self._pos_embed(self.patch_embed(images))
        x = self.norm_pre(self.patch_drop(x))
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        return self.blocks.run(x, tuple(images.shape[1:]), leading, dense, checkpointing, **options)

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
