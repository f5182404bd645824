"""summary(model): what the last forward pass of a patched model kept, and what it cost."""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer

from atm_triton.flops import Cost, cost, unmerged
from atm_triton.model import MergingTransformer, Record


@dataclass(frozen=True)
class Summary:
    """The last forward pass, for one image; ``print`` it as a table.

    ``tokens`` enter each block and ``r`` merge in it; ``macs`` and ``paper_gflops`` (1e9) as ``flops.py`` defines them,
    ``unmerged`` the cost of the model without a patch, ``saved`` the share of its MACs that was not spent, in [0, 1]
    (with that of a last block that computes the class token alone).
    """

    record: Record
    cost: Cost
    unmerged: Cost

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.record.tokens

    @property
    def r(self) -> tuple[int, ...]:
        record = self.record
        merged = zip(record.tokens, record.queries, record.rows, strict=True)
        return tuple(tokens - rows if queries == tokens else 0 for tokens, queries, rows in merged)

    @property
    def macs(self) -> int:
        return self.cost.macs

    @property
    def paper_gflops(self) -> float:
        return self.cost.paper_gflops

    @property
    def saved(self) -> float:
        return 1 - self.macs / self.unmerged.macs

    def __str__(self) -> str:
        lines = ["block  tokens in  merged  MLP rows       MACs"]
        columns = zip(self.tokens, self.r, self.record.rows, self.cost.blocks, strict=True)
        for block, (tokens, r, rows, macs) in enumerate(columns, start=1):
            lines.append(f"{block:5d}  {tokens:9d}  {r:6d}  {rows:8d}  {macs:9.3e}")
        lines.append(
            f"{self.paper_gflops:.2f} GFLOPs an image ({self.macs:.4e} MACs) of {self.unmerged.paper_gflops:.2f}: "
            f"{100 * self.saved:.1f} % of the MACs saved"
        )
        return "\n".join(lines)


def summary(model: VisionTransformer) -> Summary:
    """The :class:`Summary` of the last forward pass of a patched model.

    Raises:
        ValueError: the model is not patched, or its last pass did not run every block.
    """
    if not isinstance(model, MergingTransformer):
        raise ValueError(f"{type(model).__name__} is not patched: apply_patch first")
    record = model.blocks.last
    if record is None:
        raise ValueError("the patched model has not run all its blocks yet: call it first")
    return Summary(record, cost(model, record), cost(model, unmerged(model, record.image_shape)))
