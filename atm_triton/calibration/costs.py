"""Predicts what merging costs from the number of tokens that merge in each block."""

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.flops import block_macs, cost, paper_block, paper_last_norm, scheduled, unmerged
from atm_triton.reference import largest_r
from atm_triton.transformer import leading_tokens


class Costs:
    """GFLOPs per image, in the paper's convention.

    Args:
        image_shape: [C, H, W].
        cls_only_last: as in :class:`ATMConfig`.

    ``N``: tokens that enter the first block; ``prefix``: how many of them never merge; ``merging``: how many blocks
    may merge; ``leading``: how many tokens the last block computes (None: all); ``unmerged``: GFLOPs of the unpatched
    model; ``highest``: GFLOPs of the patched model if nothing merges.
    """

    def __init__(self, model: VisionTransformer, image_shape: tuple[int, ...], cls_only_last: bool) -> None:
        self.model, self.blocks, self.prefix = model, list(model.blocks), model.num_prefix_tokens
        self.leading = leading_tokens(model) if cls_only_last else None
        self.merging = len(self.blocks) - (self.leading is not None)
        record = unmerged(model, image_shape)
        self.N, self.unmerged = record.N, cost(model, record).paper_gflops
        self.highest = cost(model, scheduled(model, image_shape, (0,) * len(self.blocks), cls_only_last)).paper_gflops
        self._ends = 0.0  # stem and head
        self._ends = self.highest - self.of([0.0] * self.merging)

    def of(self, merged: Sequence[float]) -> float:
        """GFLOPs if the blocks that may merge merge this many tokens each."""
        return float(self.of_each(merged))

    def of_each(self, merged: Sequence[float | Tensor]) -> float | Tensor:
        """The same for n images with different counts: each block's number of merged tokens is a tensor [n]."""
        N: float | Tensor = self.N
        rows: float | Tensor = N
        total: float | Tensor = 0.0
        for index, block in enumerate(self.blocks):
            r = merged[index] if index < self.merging else 0
            alone = self.leading if index == len(self.blocks) - 1 else None
            rows = N - r if alone is None else alone
            count = N, N if alone is None else rows, rows
            total = total + paper_block(self.model, block_macs(block, *count), *count)
            N = N - r
        return self._ends + (total + paper_last_norm(self.model, rows)) / 1e9

    def within(self, counts: Sequence[float]) -> tuple[float, ...]:
        """The counts, each limited to the number of tokens of A left in its block."""
        N, kept = float(self.N), []
        for r in counts[: self.merging]:
            kept.append(min(r, (N - self.prefix) / 2))
            N -= kept[-1]
        return tuple(kept)

    def of_schedule(self, schedule: Sequence[int]) -> float:
        """GFLOPs of a given r for each block, as ``adapt="static"`` takes it."""
        N = self.N
        merged: list[int] = []
        for r in schedule[: self.merging]:
            merged.append(min(r, largest_r(N, self.prefix)))
            N -= merged[-1]
        return self.of(merged)

    def lowest(self, most: int | None = None) -> float:
        """GFLOPs if the first ``most`` blocks (None: all) merge as many tokens as they can."""
        blocks = self.merging if most is None else min(most, self.merging)
        return self.of_schedule([self.N] * blocks + [0] * (self.merging - blocks))

    def scaled(self, counts: Sequence[float], goal: float) -> tuple[float, ...]:
        """The counts times one factor, chosen so that they cost ``goal`` or, if that is out of reach, as little as
        they can."""
        low, high = -6.0, 6.0  # log2 of the factor
        for _ in range(40):
            middle = (low + high) / 2
            dearer = self.of(self.within([r * 2**middle for r in counts])) > goal
            low, high = (middle, high) if dearer else (low, middle)
        return tuple(r * 2**high for r in counts)
