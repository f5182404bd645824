"""What the methods share: a block that reduces its tokens after attention, by whatever map a method fills."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from atm_triton import ATMConfig, ops
from atm_triton.block import ATMBlock, Step
from atm_triton.calibration.errors import UnreachableError
from atm_triton.flops import block_macs, linear_macs
from atm_triton.packed import Assignment, Images, Packed
from atm_triton.patch import check_model, install
from atm_triton.record import Number
from atm_triton.transformer import leading_tokens
from benchmarks.baselines.training import Learning


class About(NamedTuple):
    """A row of the table of methods. ``title``: name and venue; ``licence``: the licence of the authors' code;
    ``training``: whether the model must be trained, and what else is needed; ``own_count``: whether each image keeps
    its own number of tokens; ``fused``: whether attention can stay fused, with no N x N map written out."""

    title: str
    licence: str
    training: str = "no"
    own_count: str = "no"
    fused: str = "yes"


class DenseAssignment(NamedTuple):
    """What becomes of the tokens, where images have equal lengths. ``slots`` [B, N]: the slot of each token in its
    image, -1 if it is dropped; ``M``: slots per image; ``weights`` [B, N]: a slot is the sum of its tokens times their
    weights; None: their mean, weighted by size."""

    slots: Tensor
    M: int
    weights: Tensor | None = None

    def assignment(self) -> Assignment:
        """The same assignment with slots numbered consecutively over all images."""
        return Assignment.of(self.slots, self.M)


@dataclass(frozen=True)
class Baseline:
    """A method of token reduction. The fields of a subclass are its settings, with their published defaults.

    A subclass fills an assignment in :meth:`plan`; :meth:`apply` puts the method into a model. ``about`` is its row in
    the table of methods. ``after_mlp``: it reduces tokens after the MLP of a block, not between attention and MLP.
    """

    cls_only_last: bool = False  # as in ATMConfig; no method here publishes it
    proportional_attention: ClassVar[bool | None] = False
    after_mlp: ClassVar[bool] = False
    about: ClassVar[About]

    def plan(self, block: "ReducingBlock", q: Tensor, k: Tensor, tokens: Packed) -> DenseAssignment | Assignment | None:
        """Decide from queries and keys [B, H, N, d] which token goes to which slot. None: all tokens stay. Methods with
        which each image keeps its own number of tokens return an Assignment."""
        raise NotImplementedError

    def check(self, model: VisionTransformer) -> None:
        """Raise ValueError for a model that the method cannot reduce."""

    def prepare(self, model: VisionTransformer) -> None:
        """Add to an unpatched model the modules and parameters that the method trains beside the model's own
        weights."""

    def learning(self, model: VisionTransformer, seed: int = 0) -> Learning:
        """Call :meth:`prepare` and return how the method is trained, for ``atm_triton.training``. ``seed`` initialises
        the weights that are added.

        Raises:
            ValueError: a model that the method cannot reduce.
        """
        return Learning(self, model, seed)

    def matching_macs(self, block: "ReducingBlock", N: Number) -> Number:
        """Multiply-accumulates of the plan's matrix products."""
        return 0

    def apply(self, model: VisionTransformer) -> VisionTransformer:
        depth = len(check_model(model))
        self.check(model)
        if any(block >= depth for block in getattr(self, "blocks", None) or ()):
            raise ValueError(f"blocks={self.blocks}: the model has {depth}, counted from 0; give blocks below {depth}")
        config = ATMConfig(
            adapt="static",
            schedule=(0,) * depth,
            proportional_attention=self.proportional_attention,
            cls_only_last=self.cls_only_last,
            source=repr(self),
        )

        def reducing(block: Block, index: int) -> ReducingBlock:
            made = self.block_class().of(block, config, index, depth, model.num_prefix_tokens)
            made.baseline, made.index, made.depth = self, index, depth
            made.patches = model.patch_embed.num_patches
            made.check_prepared()
            return made

        return install(model, reducing, config)

    def block_class(self) -> type["ReducingBlock"]:
        return ReducingBlock

    @classmethod
    def settings(cls) -> str:
        """The settings with their defaults, in one readable line."""
        own = [field for field in fields(cls) if field.name != "cls_only_last"]
        return ", ".join(f"{field.name}={field.default!r}" for field in [*own, *fields(Baseline)])


class ReducingBlock(ATMBlock):
    """timm's block whose tokens a :class:`Baseline` reduces between attention and MLP."""

    baseline: Baseline
    index: int
    depth: int
    patches: int  # per image

    needs: ClassVar[str] = ""  # the attribute that prepare adds to a block

    def check_prepared(self) -> None:
        """Raise ValueError if a module or parameter that ``prepare`` adds is missing."""
        if not self.needs or hasattr(self, self.needs):
            return
        if self.index in getattr(self.baseline, "blocks", [self.index]):
            what = f"{type(self.baseline).__name__}: block {self.index} has no {self.needs}"
            raise ValueError(f"{what} in this model: prepare(model), then load trained weights")

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        if step.leading is not None:
            return self.forward_leading(tokens, step.leading)
        x = tokens.images.shaped(tokens.x)
        attended, plan = self.called_attn(self.norm1(x), self.attend, tokens, step.merges)
        x = x + self.drop_images(self.drop_path1, self.ls1(attended), tokens.images)
        tokens = tokens.with_x(x.flatten(0, -2))
        if self.baseline.after_mlp:
            tokens = self.fed_forward(tokens)
        tokens, step.slots = self.reduced(tokens, plan)
        return tokens if self.baseline.after_mlp else self.fed_forward(tokens)

    def plan(self, q: Tensor, k: Tensor, tokens: Packed) -> DenseAssignment | Assignment | None:
        x = tokens.images.shaped(tokens.x)
        return self.baseline.plan(self, by_image(q, x), by_image(k, x), tokens)

    def fed_forward(self, tokens: Packed) -> Packed:
        images = tokens.images
        x = images.shaped(tokens.x)
        x = x + self.drop_images(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), images)
        return tokens.with_x(x.flatten(0, -2))

    def reduced(self, tokens: Packed, plan: DenseAssignment | Assignment | None) -> tuple[Packed, Tensor | None]:
        """Merge by the plan. Returns the new tokens with their sizes, and the slots numbered over all images."""
        if plan is None:
            return tokens, None
        assignment = plan.assignment() if isinstance(plan, DenseAssignment) else plan
        if assignment is plan or plan.weights is None:
            return ops.merge(tokens, assignment, self.config.backend), assignment.slots
        x, sizes, images = tokens.x, tokens.sizes, tokens.images
        sizes = torch.ones(len(x), dtype=torch.float32, device=x.device) if sizes is None else sizes
        weighted = x * plan.weights.to(x.dtype).reshape(-1, 1)
        merged, merged_sizes = (sums(images.shaped(rows), plan) for rows in (weighted, sizes))
        return Packed.of(merged, merged_sizes), assignment.slots

    def matching_macs(self, N: Number) -> Number:
        return self.baseline.matching_macs(self, N)

    def computed(self, N: Number, queries: Number, rows: Number) -> tuple[Number, Number, Number]:
        """The numbers of tokens, queries and MLP rows that the block computes. In the arguments, from the record,
        ``rows`` are the tokens that leave the block."""
        return N, queries, N if self.baseline.after_mlp and queries is N else rows


class EntryBlock(ReducingBlock):
    """timm's block that drops tokens at its entry by a ``predictor`` of its own, as :meth:`staying` says."""

    needs = "predictor"

    def staying(self, tokens: Packed) -> tuple[Tensor, int | None]:
        """Which rows stay, bool [T], and how many per image; None if each image keeps its own number."""
        raise NotImplementedError

    def forward_packed(self, tokens: Packed, step: Step) -> Packed:
        if not (step.merges and self.index in self.baseline.blocks):
            return ATMBlock.forward_packed(self, tokens, step)
        tokens, slots = left(tokens, *self.staying(tokens))
        tokens = ATMBlock.forward_packed(self, tokens, step)
        step.slots = slots
        return tokens

    def plan(self, *_: object) -> None:
        """Nothing to reduce after attention."""

    def macs(self, N: Number, queries: Number, rows: Number) -> Number:
        """MACs of the tokens that stay and of the predictor, which sees all tokens that enter. (The paper's count
        adds one norm of the tokens that enter and one of those that stay, as for any block.)"""
        if self.index not in self.baseline.blocks:
            return block_macs(self, N, queries, rows)
        return block_macs(self, rows, rows, rows) + self.predictor_macs(N)

    def predictor_macs(self, N: Number) -> Number:
        return (N - self.num_prefix_tokens) * linear_macs(self.predictor)


def left(tokens: Packed, stays: Tensor, M: int | None = None) -> tuple[Packed, Tensor]:
    """Keep the rows marked in ``stays``, bool [T], in their order. ``M``: how many stay per image; None: each image
    keeps its own number. Returns the tokens and each row's slot, -1 if it is dropped."""
    x, images = tokens.x, tokens.images
    before = torch.cat([stays.new_zeros(1, dtype=torch.long), stays.cumsum(dim=0)])
    slots = torch.where(stays, before[1:] - 1, -1).int()
    rest = Images(cu_seqlens=before[images.cu_seqlens.long()].int(), N=images.N, equal=False)
    return Packed(x=x[stays], sizes=None, images=rest if M is None else Images.of(images.B, M, x.device)), slots


def is_number(value: object) -> bool:
    """Whether the value is a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_blocks(name: str, blocks: object) -> None:
    """Raise ValueError unless ``blocks`` lists different blocks, counted from 0."""
    good = isinstance(blocks, (tuple, list)) and all(type(block) is int and block >= 0 for block in blocks)
    if not good or len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}: blocks={blocks!r}; want different blocks, counted from 0")


def check_share(method: str, name: str, value: object) -> None:
    """Raise ValueError unless the value is above 0 and at most 1."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{method}: {name}={value!r}; want a share above 0, at most 1")


def check_flag(method: str, name: str, value: object) -> None:
    """Raise ValueError unless the value is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{method}: {name}={value!r}; want True or False")


def check_class_token(name: str, model: VisionTransformer) -> None:
    """Refuse a model that does not classify from its class token: its logits would need the dropped tokens."""
    if not model.has_class_token:
        raise UnreachableError(
            f"{name} ranks tokens by the class token's attention; this {type(model).__name__} has none"
        )
    check_drops(name, model)


def check_drops(name: str, model: VisionTransformer) -> None:
    """Refuse a model whose logits need all patch tokens."""
    if leading_tokens(model) is None:
        raise UnreachableError(
            f"{name} drops patch tokens; this {type(model).__name__} makes its logits of all of them"
        )


def check_entry(name: str, model: VisionTransformer, blocks: tuple[int, ...]) -> None:
    """Refuse the last block, because the record does not say what enters it, and models for images of any size, because
    a share of the patches is no fixed number there."""
    if len(model.blocks) - 1 in blocks:
        raise ValueError(f"{name}: blocks={blocks} has the last block; give blocks before it")
    if model.dynamic_img_size:
        raise ValueError(f"{name}: the model takes images of any size; make it with dynamic_img_size=False")


def groups(N: int, num_prefix: int) -> tuple[slice, slice]:
    """A and B: the tokens at even and at odd positions, without the leading ones."""
    even = num_prefix + num_prefix % 2
    odd = num_prefix + 1 - num_prefix % 2
    return slice(even, N, 2), slice(odd, N, 2)


def by_image(heads: Tensor, x: Tensor) -> Tensor:
    """Reshape heads [H, T, d] of the images x [B, N, C] to [B, H, N, d]."""
    return heads.unflatten(1, x.shape[:2]).transpose(0, 1)


def sums(x: Tensor, plan: DenseAssignment) -> Tensor:
    """Sum the tokens [B, N, ...] of each slot: [B, M, ...]."""
    slot = torch.where(plan.slots < 0, plan.M, plan.slots).long()
    index = slot.view(*slot.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return x.new_zeros(len(x), plan.M + 1, *x.shape[2:]).scatter_add(1, index, x)[:, : plan.M]


def places(order: Tensor) -> Tensor:
    """The position of each token in ``order``, which lists tokens: [B, N] int64, the inverse permutation."""
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position)


def by_value(values: Tensor) -> Tensor:
    """The tokens from the largest value to the smallest, ties in their order: [B, N] int64."""
    return values.argsort(dim=1, descending=True, stable=True)
