"""A timm VisionTransformer whose blocks merge: how sizes, the trace and the record travel through a forward pass.

Nothing is kept between calls but a finished :class:`Record` of the last one, so threads may share a model.
"""

import functools
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atm_triton import ops, reference
from atm_triton.block import ATMBlock
from atm_triton.config import ATMConfig


@dataclass(frozen=True)
class Record:
    """What a forward pass did. ``tokens``: the tokens of an image that enter each block; ``rows``: those that its MLP
    sees; ``queries``: those that its attention computes; ``counts``: each block's [B] candidates, None without a theta;
    ``matched``: whether a block looked for partners at all."""

    batch: int
    image_shape: tuple[int, ...]
    tokens: tuple[int, ...]
    queries: tuple[int, ...]
    rows: tuple[int, ...]
    counts: tuple[Tensor | None, ...]
    matched: tuple[bool, ...]


class Run(NamedTuple):
    """Merged tokens ``x`` [B, M, C] after the last block run, the ``assignments`` of all blocks that merged, and the
    unmerged tokens [B, N, C] after each block asked for."""

    x: Tensor
    assignments: list[Tensor]
    collected: list[Tensor]

    @property
    def trace(self) -> Tensor | None:
        """Where the N tokens that entered the first block ended up, [B, N] int32; None: nothing merged."""
        return trace_of(self.assignments)


def trace_of(assignments: list[Tensor]) -> Tensor | None:
    """All merge steps as one; None for no step."""
    return functools.reduce(reference.compose, assignments) if assignments else None


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
        size, log2_size, assignments, collected = None, None, [], []
        tokens, queries, rows, counts, matched = [], [], [], [], []
        for index, block in enumerate(list(self)[:stop]):
            serves_leading = leading is not None and index == len(self) - 1
            alone = serves_leading and not dense
            tokens.append(x.shape[1])
            queries.append(leading if alone else x.shape[1])
            call, option = (block.step_leading, leading) if alone else (block.step, not serves_leading)
            if checkpointing:
                step = checkpoint(call, x, size, log2_size, option, use_reentrant=False)
            else:
                step = call(x, size, log2_size, option)
            x, size, log2_size, assignment, count = step
            if assignment is not None:
                assignments.append(assignment)
            if index in collect:
                collected.append(self.unmerge(x, trace_of(assignments)))
            rows.append(x.shape[1])
            counts.append(count)
            matched.append(assignment is not None or count is not None)
        whole = len(tokens) == len(self)
        record = Record(len(x), image_shape, *map(tuple, (tokens, queries, rows, counts, matched)))
        self.last = record if whole else None
        return Run(x, assignments, collected)

    def unmerge(self, x: Tensor, trace: Tensor | None) -> Tensor:
        return x if trace is None else ops.unmerge(x, trace, self.config.backend)

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("the blocks of a patched model pass sizes along: call the model, or remove_patch first")


def leading_tokens(model: VisionTransformer) -> int | None:
    """How many leading tokens the classifier reads if it reads no others: the class token, and in a distilled model the
    distillation token; None for a model that pools its patch tokens, or reads them in a way of its own."""
    cls = type(model)
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
        if leading_tokens(self) is None:  # pools over patch tokens: of all N, so a merged token counts by its size
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        _refuse_mask(attn_mask, is_causal)
        run = self._run(x, self._leading(), dense=False)
        return self.forward_head(self.norm(run.x))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        run = self._run(x, self._leading(), dense=True)
        return self.blocks.unmerge(self.norm(run.x), run.trace)

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
        final = None if intermediates_only else self.blocks.unmerge(self.norm(run.x), run.trace)
        if output_dict:
            result = {"image_intermediates": features}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": final}
        if with_prefix:
            features = list(zip(features, prefixes, strict=True))
        return features if intermediates_only else (final, features)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("thresholds belong to a model's depth: remove_patch first, prune, then apply_patch again")

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
