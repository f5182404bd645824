"""Record: what a forward pass did, in numbers of tokens per image and block."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from atm_triton.packed import Images

Number = int | Tensor  # the same for every image, or int64 [B], one per image


@dataclass(frozen=True)
class Record:
    """What a forward pass did, block by block.

    ``leading``: how many tokens the last block computed, None: all. ``tokens``: tokens per image that enter each block.
    ``rows``: tokens per image that its MLP sees. ``counts``: candidates [B] of each block, None without a threshold.
    ``matched``: whether a block looked for partners. ``way``: "engine", or why the blocks ran one after the other;
    empty if no pass was run and the numbers are predicted."""

    batch: int
    image_shape: tuple[int, ...]
    leading: int | None
    tokens: tuple[Number, ...]
    rows: tuple[Number, ...]
    counts: tuple[Tensor | None, ...]
    matched: tuple[bool, ...]
    way: str = field(default="", compare=False)

    @property
    def ran(self) -> bool:
        """Whether a pass was run; otherwise the record is a prediction."""
        return bool(self.way)

    @property
    def N(self) -> int:
        """Tokens per image that enter the first block, the same for every image."""
        return int(self.tokens[0])

    @property
    def queries(self) -> tuple[Number, ...]:
        """Tokens per image for which each block computes attention."""
        return self.tokens if self.leading is None else (*self.tokens[:-1], self.leading)

    @property
    def all_tokens_last(self) -> "Record":
        """The same pass with a last block that computes all its tokens and merges none, which gives the same logits.
        (A block that fuses tokens before its attention still does so.)"""
        return self if self.leading is None else replace(self, leading=None, rows=(*self.rows[:-1], self.tokens[-1]))

    @property
    def merged(self) -> tuple[Number, ...]:
        """Tokens per image that each block merges."""
        r = tuple(before - after for before, after in zip(self.tokens, self.rows, strict=True))
        return r if self.leading is None else (*r[:-1], 0)


def number_of(images: Images) -> Number:
    """Tokens per image."""
    return images.N if images.equal else images.lengths
