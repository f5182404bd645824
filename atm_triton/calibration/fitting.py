"""Fitting passes: in one pass, find the thresholds at which blocks merge the wanted mean counts, and measure them.

All batches go through the model block by block. Before a block merges, the similarities of its tokens of A are pooled
over all images; earlier blocks have already merged. The threshold is the quantile that leaves the wanted number of
them above it. So one pass gives thresholds, exact counts, the cost and the change.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton import ops
from atm_triton.block import ATMBlock, AwaitingCounts, Step, handed_on
from atm_triton.calibration.costs import Costs
from atm_triton.calibration.measuring import Mean, Measured, Meter, together
from atm_triton.config import ATMConfig
from atm_triton.measure.distributed import in_order, own, world_size
from atm_triton.measure.evaluate import check_finite, share
from atm_triton.packed import Packed
from atm_triton.patch import install
from atm_triton.reference import count
from atm_triton.transformer import leading_tokens

T = TypeVar("T")
MEMORY = 2**31  # bytes of hidden states that are kept, so that a pass can start in the middle of a model


@dataclass(frozen=True)
class Plan:
    """How much to merge: ``counts``, the mean number of tokens for each block that may merge, or the ``thresholds`` of
    these blocks, which take precedence. ``split_depth`` and ``proportional_attention`` as in :class:`ATMConfig`."""

    counts: tuple[float, ...]
    thresholds: tuple[float | None, ...] | None = None
    split_depth: int | None = None
    proportional_attention: bool = True

    @property
    def family(self) -> str:
        return "free" if self.thresholds is None else "curve"

    def scaled(self, scale: float) -> "Plan":
        """The plan with its counts, or the distances of its thresholds from 1, multiplied by ``scale``."""
        if self.thresholds is None:
            return replace(self, counts=tuple(r * scale for r in self.counts))
        return replace(
            self, thresholds=tuple(None if t is None else theta_at((1 - t) * scale) for t in self.thresholds)
        )

    def without(self, blocks: int) -> "Plan":
        """The plan with its first ``blocks`` blocks idle."""
        if self.thresholds is None:
            return replace(self, counts=tuple(0.0 if i < blocks else r for i, r in enumerate(self.counts)))
        return replace(self, thresholds=tuple(None if i < blocks else t for i, t in enumerate(self.thresholds)))


def theta_at(distance: float) -> float:
    """The threshold at this distance from 1, rounded to seven decimals."""
    return max(round(1 - distance, 7), -1.0)


class Fitted(NamedTuple):
    """A plan, the configuration fitted to some images, and what was measured on them."""

    plan: Plan
    config: ATMConfig
    mean: Mean


class FittingBlock(ATMBlock):
    """A block that attends to all batches before any of them merges."""

    held: list[tuple[Tensor, Any]]

    def similarities(self, tokens: Packed) -> Tensor:
        """Attend, and return the similarities of the tokens of A [B Na] to their partners, on the host."""
        x = tokens.images.shaped(tokens.x)
        out, plan = super().called_attn(self.norm1(x), self.attend, tokens, True)
        self.held.append((out, plan.pairs))
        return plan.pairs.similarity[plan.pairs.partner >= 0].float().cpu()

    def called_attn(self, y: Tensor, by: Any, *given: Any) -> tuple[Tensor, Any]:
        if not self.held:
            return super().called_attn(y, by, *given)
        out, pairs = self.held.pop(0)
        if self.theta is None:
            return out, None
        counts = count(pairs.similarity, self.theta, given[0].images)
        return out, AwaitingCounts(pairs._replace(counts=counts, theta=self.theta), ops.to_host(counts))


class State(NamedTuple):
    """A batch before a block: its tokens; the trace from the first block's tokens (None: not needed); and, for each
    earlier block, the number of tokens per image [B] that entered it."""

    tokens: Packed
    trace: Tensor | None
    entered: tuple[Tensor, ...]


class Trail(NamedTuple):
    """All batches before a block, the thresholds of the earlier blocks, and the rounding error that the next count
    makes up for."""

    states: list[State]
    thresholds: tuple[float | None, ...]
    owed: float


class Fitting:
    """Fitting passes over parts of the images of a ``meter``. ``adapt``: as in :class:`ATMConfig`."""

    def __init__(self, meter: Meter, costs: Costs, adapt: str) -> None:
        self.meter, self.costs, self.adapt = meter, costs, adapt
        self._model, self.depth = share(meter.model), len(costs.blocks)
        self._trails: dict[Any, Trail] = {}  # of the last pass, keyed by what the earlier blocks merged
        self._kept: dict[Any, Trail] = {}

    def keep(self) -> None:
        """Keep the states of the last pass: a later pass whose first blocks merge alike can then start at the first
        block that differs."""
        self._kept = self._trails

    def run(self, plan: Plan, *parts: str) -> Fitted:
        """Fit a plan to all images of the given parts and measure it on them. A plan's own thresholds are not
        changed."""
        config, L = self._config(plan), self.depth
        key = f"fitted {' '.join(parts)} {plan.counts} {config.to_json()}"
        known = self.meter.notes.get(key)
        if known is None:
            self._trails = {}
            thresholds, measured = self._pass(plan, config, parts)
            known = [*thresholds, *Mean.of(measured).to_list()]
            self.meter.notes.add(key, known)
        if self.adapt != "static":
            config = replace(config, thresholds=tuple(known[:L]))
        return Fitted(plan=plan, config=config, mean=Mean.from_list(known[L:]))

    def _config(self, plan: Plan) -> ATMConfig:
        fields: dict[str, Any] = {
            "split_depth": plan.split_depth,
            "proportional_attention": plan.proportional_attention,
        }
        fields |= {"adapt": self.adapt, **self.meter.fields}
        rest = self.depth - self.costs.merging
        if self.adapt != "static":
            thresholds = plan.thresholds or (None,) * self.costs.merging
            return ATMConfig(thresholds=(*thresholds, *[None] * rest), **fields)
        whole = [round(total) for total in accumulate(plan.counts[: self.costs.merging], initial=0)]
        return ATMConfig(schedule=(*(after - before for before, after in pairwise(whole)), *[0] * rest), **fields)

    @torch.inference_mode()
    def _pass(self, plan: Plan, config: ATMConfig, parts: tuple[str, ...]) -> tuple[list[float | None], Measured]:
        blocks = self._install(config)
        first, trail = self._begin(plan, parts)
        images = sum(len(x) for part in parts for x in self.meter.parts[part])
        every = self._every(images)
        for index in range(first, self.depth):
            if index % every == 0:
                self._trails[self._key(plan, parts, index)] = trail
            trail = self._through(blocks[index], trail, plan, parts)
        self.meter.count(images * (1 - first / self.depth))
        return list(trail.thresholds), self._measured(trail.states, parts)

    def _install(self, config: ATMConfig) -> list[FittingBlock]:
        def fitting(block: nn.Module, index: int) -> FittingBlock:
            made = FittingBlock.of(block, config, index, self.depth, self._model.num_prefix_tokens)
            made.held = []
            return made

        return list(install(self._model, fitting, config).blocks)

    def _key(self, plan: Plan, parts: tuple[str, ...], index: int) -> tuple:
        settings = parts, plan.split_depth, plan.proportional_attention
        return settings, plan.counts[:index], plan.thresholds and plan.thresholds[:index], index

    def _begin(self, plan: Plan, parts: tuple[str, ...]) -> tuple[int, Trail]:
        """The block to start at, after those that a kept pass has already computed, and the states that enter it."""
        for index in range(self.depth - 1, -1, -1):
            key = self._key(plan, parts, index)
            if key in self._kept:
                self._trails = {k: t for k, t in self._kept.items() if k == self._key(plan, parts, k[-1])}
                return index, self._kept[key]
        parameter = next(self._model.parameters())
        batches = [x for part in parts for x in own(self.meter.parts[part])]
        states = [State(tokens=Packed.of(self._model.stem(x.to(parameter))), trace=None, entered=()) for x in batches]
        return 0, Trail(states=states, thresholds=(), owed=0.0)

    def _every(self, images: int) -> int:
        """The n for which the states of every n-th block, over two passes, fit into :data:`MEMORY`; the same on every
        process."""
        parameter = next(self._model.parameters())
        nbytes = images * self.costs.N * self._model.embed_dim * parameter.element_size() / world_size()
        return max(1, math.ceil(2 * self.depth * nbytes / MEMORY))

    def _through(self, block: FittingBlock, trail: Trail, plan: Plan, parts: tuple[str, ...]) -> Trail:
        """All batches through a block."""
        index, owed = block.block_index, trail.owed
        last = index >= self.costs.merging  # it computes only the leading tokens
        if plan.thresholds is None and self.adapt != "static" and not last and plan.counts[index] > 0:
            block.theta, owed = self._threshold(block, trail.states, plan.counts[index] + owed, parts)
        states = [self._step(block, state, last) for state in trail.states]
        return Trail(states=states, thresholds=(*trail.thresholds, block.theta), owed=owed)

    def _threshold(
        self, block: FittingBlock, states: list[State], wanted: float, parts: tuple[str, ...]
    ) -> tuple[float | None, float]:
        """The threshold at which ``wanted`` tokens per image merge on average (None: nothing merges), and the remainder
        that the next block should make up for. A remainder arises if a batch shares one r, a whole number."""
        block.theta = -1.0  # with any threshold the block looks for partners
        own_batches = [(state.tokens.images.B, block.similarities(state.tokens)) for state in states]
        of_batches = self._of_all(own_batches, parts)
        images = sum(B for B, _ in of_batches)
        pooled = torch.cat([similarity for _, similarity in of_batches]).sort(descending=True).values
        shared = self.adapt == "batch"
        number = min(round((wanted + 0.5 * shared) * images), len(pooled))
        if number < 1:
            return None, wanted if shared else 0.0
        below = pooled[number].item() if number < len(pooled) else -1.0
        theta = max(-1.0, min((pooled[number - 1].item() + below) / 2, 1.0))
        if not shared:
            return theta, 0.0
        merged = sum(B * (int((similarity >= theta).sum()) // B) for B, similarity in of_batches) / images
        return theta, max(-1.0, min(wanted - merged, 1.0))

    def _step(self, block: FittingBlock, state: State, last: bool) -> State:
        dense = self.meter.by.name == "dense" or leading_tokens(self._model) is None
        step = Step(state.tokens, not last, self.costs.leading if last and not dense else None)
        x = block(state.tokens.images.shaped(state.tokens.x), step=step)  # as a module: its hooks run
        if step.after is None:
            raise TypeError(f"blocks.{block.block_index} did not run: something around it returned in its place")
        tokens, trace = handed_on(step.after, x), state.trace
        if step.slots is not None and dense:
            trace = step.slots if trace is None else ops.compose(trace, step.slots)
        return State(tokens=tokens, trace=trace, entered=(*state.entered, state.tokens.images.lengths.cpu()))

    def _measured(self, states: list[State], parts: tuple[str, ...]) -> Measured:
        bases = [base for part in parts for base in self.meter.base[part]]
        rows = [self._row(*pair, number) for number, pair in enumerate(zip(states, bases, strict=True))]
        return together(self._of_all(rows, parts))

    def _of_all(self, of_batches: list[T], parts: tuple[str, ...]) -> list[T]:
        """Gather what each process has for its own batches of each part; all batches, in order."""
        every, first = [], 0
        for part in parts:
            after = first + len(self.meter.base[part])
            every += in_order(of_batches[first:after])
            first = after
        return every

    def _row(self, state: State, before: Tensor, number: int) -> Measured:
        model, by, B = self._model, self.meter.by, len(before)
        if by.name == "dense":
            answers = model.finish(state.tokens, state.trace, B, True, False)[:, model.num_prefix_tokens :]
        else:
            answers = model.finish(state.tokens, state.trace, B, leading_tokens(model) is None, True)
        answers = answers.float().cpu()
        check_finite(answers, "the merged model's answers", number)
        left = torch.stack([*state.entered, state.tokens.images.lengths.cpu()], dim=1).double()
        merged = left[:, :-1] - left[:, 1:]
        merged[:, self.costs.merging :] = 0
        gflops = torch.as_tensor(self.costs.of_each(merged[:, : self.costs.merging].unbind(1)), dtype=torch.float64)
        divergence, agree = by.compared(before, answers)
        return Measured(gflops=gflops.expand(B), divergence=divergence, agree=agree, merged=merged)


def check_hooks(model: VisionTransformer) -> None:
    """Refuse hooks that a fitting pass would not call, because it runs the model block by block.

    Raises:
        ValueError: there are such hooks; the message names them.
    """
    watched = {"the model": model, "blocks": model.blocks, **{f"blocks.{i}": b for i, b in enumerate(model.blocks)}}
    for name, module in watched.items():
        after = module._forward_hooks if not name.startswith("blocks.") else ()
        if module._forward_pre_hooks or after:
            raise ValueError(f"{name} has hooks that a calibration would not call; remove them first")
