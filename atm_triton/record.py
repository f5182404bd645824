"""What a forward pass did: how many tokens of each image went where."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from atm_triton.packed import Images

Number = int | Tensor  # of every image the same, or int64 [B], each image its own


@dataclass(frozen=True)
class Record:
    """What a forward pass did. ``leading``: how many tokens the last block served alone, None where it served all;
    ``tokens``: the tokens of an image that enter each block; ``rows``: those that its MLP sees; ``counts``: each
    block's [B] candidates, None without a theta; ``matched``: whether a block looked for partners at all; ``way``:
    "engine", or why the blocks ran one after the other."""

    batch: int
    image_shape: tuple[int, ...]
    leading: int | None
    tokens: tuple[Number, ...]
    rows: tuple[Number, ...]
    counts: tuple[Tensor | None, ...]
    matched: tuple[bool, ...]
    way: str = field(default="", compare=False)

    @property
    def N(self) -> int:
        """The tokens of an image that enter the first block, of every image as many."""
        return int(self.tokens[0])

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


def number_of(images: Images) -> Number:
    """The tokens of an image."""
    return images.N if images.equal else images.lengths
