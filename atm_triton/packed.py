"""The two things that travel through a model: packed tokens, and the assignment that merges them.

The tokens of all images are rows [T, C], one image after the other. Images of equal length are a special case, not
another form: their rows are a view of [B, N, C].
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Images(NamedTuple):
    """Where each image of a batch lies among the rows.

    ``cu_seqlens``: int32 [B + 1] on the device of the tokens, the first row of each image and, at the end, the number
    of rows T. ``N``: upper bound on the tokens per image. ``equal``: every image has exactly N tokens.

    Kernels choose their configuration by N. Once images differ in length, N keeps the value that it had before, so that
    the result of an image never depends on the other images of its batch.
    """

    cu_seqlens: Tensor
    N: int
    equal: bool

    @classmethod
    def of(cls, B: int, N: int, device: torch.device | None = None) -> Self:
        """B images of N tokens each."""
        return cls(cu_seqlens=N * torch.arange(B + 1, dtype=torch.int32, device=device), N=N, equal=True)

    @classmethod
    def of_lengths(cls, lengths: Tensor, N: int | None = None) -> Self:
        """Images of these lengths, integers [B], on their device. ``N`` defaults to the longest."""
        if N is None:
            N = int(lengths.max()) if len(lengths) else 0
        return cls(cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(), N=N, equal=False)

    @property
    def B(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each image, int64 [B]."""
        return self.cu_seqlens.diff().long()

    def first(self, rows: Tensor, n: int) -> Tensor:
        """The first n rows of every image: [B, n, ...] of rows [T, ...]."""
        if self.equal:
            return rows.unflatten(0, (self.B, self.N))[:, :n]
        return rows[self.cu_seqlens[:-1].unsqueeze(1) + torch.arange(n, device=rows.device)]

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows [T, ...] in the shape that a model's own modules expect: [B, N, ...] if all images have N tokens."""
        return rows.unflatten(0, (self.B, self.N)) if self.equal else rows


class Packed(NamedTuple):
    """Tokens. ``x``: rows [T, C]. ``sizes``: float32 [T], the number of patches that each stands for (None: one each).
    ``images``: where each image lies. ``log2_sizes``: float32 [T], if the kernels have already computed it."""

    x: Tensor
    sizes: Tensor | None
    images: Images
    log2_sizes: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, sizes: Tensor | None = None) -> Self:
        """Pack images of equal length: x [B, N, C], sizes [B, N]."""
        B, N, _ = x.shape
        sizes = None if sizes is None else sizes.reshape(-1)
        return cls(x=x.reshape(B * N, x.shape[2]), sizes=sizes, images=Images.of(B, N, x.device))

    def with_x(self, x: Tensor) -> "Packed":
        """The same tokens with other values; unlike ``_replace``, dynamo of torch 2.11 can rebuild it."""
        return Packed(x=x, sizes=self.sizes, images=self.images, log2_sizes=self.log2_sizes)


class Assignment(NamedTuple):
    """A merge step.

    ``slots``: int32 [T], the row among the merged tokens that each token goes to; a number outside 0 .. T' - 1 drops
    it. ``num_slots``: T', the number of merged rows. ``images``: where the merged images lie. The kernels also need the
    inverse (None if the reference made the assignment): ``order``, int32 [T], the tokens ordered by slot, and
    ``spans``, int32 [T', 2], where in it the tokens of each slot begin and end."""

    slots: Tensor
    num_slots: int
    images: Images
    order: Tensor | None = None
    spans: Tensor | None = None

    @classmethod
    def of(cls, slots: Tensor, M: int) -> Self:
        """An assignment for images of equal length that keep M tokens each.

        Args:
            slots: [B, N], integers from 0 to M - 1 per image, each of them at least once; -1 drops a token.

        Raises:
            ValueError: a slot is out of range, or gets no token. On a GPU, where the host does not wait for the
                numbers, a device-side assertion fails instead.
        """
        if not torch.compiler.is_compiling() and not slots.is_meta:
            _check_slots(slots, M)
        B, device = slots.shape[0], slots.device
        first = M * torch.arange(B, device=device).unsqueeze(1)
        numbered = torch.where(slots < 0, -1, slots + first).int().flatten()
        return cls(slots=numbered, num_slots=B * M, images=Images.of(B, M, device))


def check_plan(assignment: Assignment, tokens: Packed, num_prefix: int) -> None:
    """Check that a plan fits the ``tokens``, and that the protected ones at the start of each image stay
    first and alone, because whatever reads the class token reads the first row.

    Raises:
        TypeError: it is not an assignment; ValueError: they do not. On a GPU a device-side assertion fails instead, as
            in :meth:`Assignment.of`.
    """
    if not isinstance(assignment, Assignment):
        raise TypeError(f"a plan must return an Assignment or None, got {type(assignment).__name__}")
    slots, images = assignment.slots, tokens.images
    if slots.shape != tokens.x.shape[:1]:
        raise ValueError(f"a plan has slots {list(slots.shape)} for {len(tokens.x)} tokens; give one per token")
    if num_prefix == 0 or torch.compiler.is_compiling() or slots.is_meta:
        return
    first, begin = torch.arange(num_prefix, device=slots.device), assignment.images.cu_seqlens[:-1]
    stay = images.first(slots, num_prefix) == begin[:, None] + first
    own = slots - begin.repeat_interleave(images.lengths, output_size=len(slots))
    alone = ((own >= 0) & (own < num_prefix)).sum() <= stay.numel()
    if slots.is_cuda:
        torch._assert_async(stay.all() & alone)
    elif not stay.all():
        image, token = (~stay).nonzero()[0].tolist()
        raise ValueError(
            f"a plan moves or drops token {token} of image {image}, one of the {num_prefix} at its start that must "
            f"stay; give it slot {token}"
        )
    elif not alone:
        raise ValueError(
            f"a plan merges tokens into the {num_prefix} at the start of an image that must stay as they are; give "
            f"the others slots from {num_prefix}"
        )


def _check_slots(slots: Tensor, M: int) -> None:
    if M < 1:
        raise ValueError(f"M={M} is too small; want the number of tokens that each image keeps, 1 or more")
    within = (slots >= -1) & (slots < M)
    taken = slots.new_zeros(len(slots), M + 1, dtype=torch.bool)
    taken = taken.scatter(1, torch.where(within & (slots >= 0), slots, M).long(), True)[:, :M]
    if slots.is_cuda:
        torch._assert_async(within.all() & taken.all())
    elif not within.all():
        slot = int(slots[~within][0])
        raise ValueError(
            f"slots has {slot}, where each image keeps M={M} tokens; want 0 to M - 1 for those that stay, numbered "
            "anew without gaps, and -1 for those that are dropped"
        )
    elif not taken.all():
        image, slot = (~taken).nonzero()[0].tolist()
        raise ValueError(
            f"no token of image {image} has slot {slot}, of M={M}; number those that stay from 0 without gaps"
        )
