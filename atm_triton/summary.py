"""summary(model): how many tokens the last forward pass of a patched model kept, and what it cost."""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.flops import Cost, cost, mean, unmerged
from atm_triton.record import Record
from atm_triton.transformer import MergingTransformer


@dataclass(frozen=True)
class Summary:
    """The last forward pass, per image. ``print`` it as a table.

    ``tokens`` enter each block and ``r`` merge in it; where images differ these are means, and ``fewest`` and ``most``
    are the smallest and the largest number of tokens. ``macs`` and ``paper_gflops`` (1e9) are defined in ``flops.py``.
    ``unmerged`` is the cost of the unpatched model, ``saved`` the share of its MACs that was saved, in [0, 1]. This
    includes what is saved if the last block computes only the class token.
    """

    record: Record
    cost: Cost[float]
    unmerged: Cost[float]
    all_tokens_last: Cost[float]  # if the last block computed all its tokens
    way: str  # how the pass ran
    source: str = ""  # where thresholds or r come from, if the configuration says so
    logits: str = ""  # what the logits are, if the model can compute them in several ways

    @property
    def tokens(self) -> tuple[float, ...]:
        return tuple(map(mean, self.record.tokens))

    @property
    def fewest(self) -> tuple[int, ...]:
        return tuple(int(n.min()) if isinstance(n, Tensor) else n for n in self.record.tokens)

    @property
    def most(self) -> tuple[int, ...]:
        return tuple(int(n.max()) if isinstance(n, Tensor) else n for n in self.record.tokens)

    @property
    def r(self) -> tuple[float, ...]:
        record = self.record
        merged = [mean(N - rows) for N, rows in zip(record.tokens, record.rows, strict=True)]
        return tuple(merged if record.leading is None else [*merged[:-1], 0])

    @property
    def macs(self) -> float:
        return self.cost.macs

    @property
    def paper_gflops(self) -> float:
        return self.cost.paper_gflops

    @property
    def saved(self) -> float:
        return 1 - self.macs / self.unmerged.macs

    @property
    def saved_by_merging(self) -> float:
        """What would be saved if the last block computed all its tokens, as timm's does."""
        return 1 - self.all_tokens_last.macs / self.unmerged.macs

    def __str__(self) -> str:
        differ = any(isinstance(n, Tensor) for n in self.record.tokens)
        lines = ["block  tokens in" + "  fewest   most" * differ + "  merged  MLP rows       MACs"]
        rows = map(mean, self.record.rows)
        columns = zip(self.tokens, self.fewest, self.most, self.r, rows, self.cost.blocks, strict=True)
        for block, (N, fewest, most, r, rows, macs) in enumerate(columns, start=1):
            ends = f"  {fewest:6d} {most:6d}" * differ
            lines.append(f"{block:5d}  {_number(N, 9)}{ends}  {_number(r, 6)}  {_number(rows, 8)}  {macs:9.3e}")
        lines.append(
            f"{self.paper_gflops:.2f} GFLOPs per image ({self.macs:.4e} MACs); unmerged "
            f"{self.unmerged.paper_gflops:.2f}: {100 * self.saved:.1f} % of the MACs saved"
            + (f" (all tokens last: {100 * self.saved_by_merging:.1f} %)" if self.record.leading is not None else "")
        )
        said = {"run by": self.way, "merges by": self.source, "logits": self.logits}
        return "\n".join([*lines, *(f"{what}: {text}" for what, text in said.items() if text)])


def _number(value: float, width: int) -> str:
    return f"{value:{width}d}" if isinstance(value, int) else f"{value:{width}.1f}"


def summary(model: VisionTransformer) -> Summary:
    """Summarise the last forward pass of a patched model.

    Raises:
        ValueError: the model is not patched, or its last pass did not run all blocks.
    """
    if not isinstance(model, MergingTransformer):
        raise ValueError(f"{type(model).__name__} is not patched: apply_patch first")
    record = model.blocks.last
    if record is None:
        raise ValueError("the patched model has not run all its blocks yet: call it first")
    whole = cost(model, unmerged(model, record.image_shape))
    way = f"engine, {model.engine}" if record.way == "engine" else record.way
    return Summary(
        record=record,
        cost=cost(model, record),
        unmerged=whole,
        all_tokens_last=cost(model, record.all_tokens_last),
        way=way,
        source=model.blocks.config.source,
        logits=getattr(model, "logits_are", ""),
    )
