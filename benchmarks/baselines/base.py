"""What the methods share: a block that reduces its tokens after attention, by whatever map a method fills."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from atm_triton import ATMConfig, ops
from atm_triton.block import ATMBlock, Step, Tokens
from atm_triton.patch import check_model, install


class Plan(NamedTuple):
    """``assignment`` [B, N] int32: the slot of each token, -1: dropped; ``M``: the number of slots; ``weights`` [B, N]:
    a slot becomes the sum of its tokens, each times its weight; None: their mean, weighted by size."""

    assignment: Tensor
    M: int
    weights: Tensor | None = None


@dataclass(frozen=True)
class Baseline:
    """A method; the fields of a subclass are its settings, with their published defaults.

    A subclass fills an assignment in :meth:`plan`; :meth:`apply` puts it into a model.
    """

    cls_only_last: bool = False  # as in ATMConfig; no method here has it of its own
    proportional_attention: ClassVar[bool | None] = False

    def plan(self, block: "ReducingBlock", q: Tensor, k: Tensor, tokens: Tokens) -> Plan | None:
        """Which tokens go where, from queries and keys [B, H, N, d]; None: all stay."""
        raise NotImplementedError

    def check(self, model: VisionTransformer) -> None:
        """Raise ValueError for a model that the method cannot reduce."""

    def matching_macs(self, block: "ReducingBlock", N: int) -> int:
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
            return made

        return install(model, reducing, config)

    def block_class(self) -> type["ReducingBlock"]:
        return ReducingBlock

    @classmethod
    def settings(cls) -> str:
        """Names and defaults, for people to read."""
        own = [field for field in fields(cls) if field.name != "cls_only_last"]
        return ", ".join(f"{field.name}={field.default!r}" for field in [*own, *fields(Baseline)])


class ReducingBlock(ATMBlock):
    """timm's block whose tokens a :class:`Baseline` reduces between attention and MLP."""

    baseline: Baseline
    index: int
    depth: int

    def step(self, tokens: Tokens, merges: bool = True) -> Step:
        y = self.norm1(tokens.x)
        q, k, v = self._heads(self.attn.qkv(y))
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        plan = self.baseline.plan(self, q, k, tokens) if merges else None
        x = tokens.x + self.drop_path1(self.ls1(self._attend(y, q, k, v, tokens)))
        tokens = self.reduced(tokens._replace(x=x), plan)
        x = self._feed_forward(tokens.x, self.norm2(tokens.x), None)
        return Step(tokens._replace(x=x), None if plan is None else plan.assignment)

    def reduced(self, tokens: Tokens, plan: Plan | None) -> Tokens:
        """The tokens [B, M, C] of the slots, with their sizes."""
        if plan is None:
            return tokens
        x, size = tokens.x, tokens.size
        if plan.weights is None:
            return Tokens(*ops.merge(x, size, plan.assignment, plan.M, self.config.backend))
        size = torch.ones(x.shape[:2], device=x.device) if size is None else size
        summed = sums(x * plan.weights.to(x.dtype).unsqueeze(-1), plan.assignment, plan.M)
        return Tokens(summed, sums(size, plan.assignment, plan.M))

    def matching_macs(self, N: int) -> int:
        return self.baseline.matching_macs(self, N)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_blocks(name: str, blocks: object) -> None:
    """Refuse what is no list of different blocks, counted from 0."""
    good = isinstance(blocks, (tuple, list)) and all(type(block) is int and block >= 0 for block in blocks)
    if not good or len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}: blocks={blocks!r}; want different blocks, counted from 0")


def sums(x: Tensor, assignment: Tensor, M: int) -> Tensor:
    """The sum of the tokens [B, N, ...] of each slot, [B, M, ...]."""
    slot = torch.where(assignment < 0, M, assignment).long()
    index = slot.view(*slot.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return x.new_zeros(len(x), M + 1, *x.shape[2:]).scatter_add(1, index, x)[:, :M]


def places(order: Tensor) -> Tensor:
    """[B, N] int64: where each token stands in ``order``, which lists tokens."""
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position)


def by_value(values: Tensor) -> Tensor:
    """[B, N] int64: the tokens from the largest value to the smallest, of equal ones the first first."""
    return values.argsort(dim=1, descending=True, stable=True)
