"""What merging changes: accuracy, agreement with the unpatched model and divergence from it, cost, by difficulty."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from atm_triton.config import ATMConfig
from atm_triton.distributed import in_order, silent
from atm_triton.flops import cost, cost_of_each, unmerged
from atm_triton.patch import apply_patch
from atm_triton.record import Number, Record
from atm_triton.transformer import MergingTransformer

Batches = Iterable[tuple[Tensor, Tensor]]
Patch = Callable[[VisionTransformer], VisionTransformer]


@dataclass(frozen=True)
class Quality:
    """Of a number of images: top-1 in percent, merged and unpatched (None where labels are not the model's classes),
    the percentage whose predicted class is the unpatched model's, mean KL(unpatched || merged) in nats and its standard
    error, mean GFLOPs in the paper's convention, and the mean number of tokens an image would keep by its own count
    (None without one)."""

    images: int
    top1: float | None
    top1_unpatched: float | None
    agreement: float
    kl: float
    kl_se: float
    gflops: float
    own_tokens: float | None


@dataclass(frozen=True)
class Evaluation:
    """``overall``, and ``deciles`` from the images that would keep the fewest tokens to those that would keep the most
    (empty where no threshold tells images apart); ``saved``: the share of the unpatched model's MACs, in [0, 1];
    ``top1_drop_se``: standard error of the difference in top-1, in points, from the images where the two differ;
    ``tokens``: mean tokens that enter each block; ``gflops_all_tokens_last``: what it costs with a last block that
    computes all its tokens, which changes no logit."""

    overall: Quality
    deciles: tuple[Quality, ...]
    gflops_unpatched: float
    saved: float
    top1_drop_se: float | None
    tokens: tuple[float, ...]
    gflops_all_tokens_last: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(model: VisionTransformer) -> VisionTransformer:
    """A copy of a model that shares its parameters and buffers, to be patched and measured on its own.

    Raises:
        ValueError: the model is patched, or in training mode.
    """
    if isinstance(model, MergingTransformer):
        raise ValueError("the model is patched already: remove_patch(model) makes it what it was")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@torch.inference_mode()
def unpatched_logits(model: VisionTransformer, batches: Batches, title: str | None = "unpatched") -> list[Tensor]:
    """The float32 logits of every batch on the CPU, for several evaluations against the same model."""
    parameter = next(model.parameters())
    logits = []
    for images, _ in tqdm(batches, desc=title, unit="batch", disable=silent(title)):
        check_finite(images, "images", len(logits))
        logits.append(model(images.to(parameter)).float().cpu())
        check_finite(logits[-1], "the unpatched model's logits", len(logits) - 1)
    return logits


@torch.inference_mode()
def evaluate(
    model: VisionTransformer,
    batches: Batches,
    config: ATMConfig | Patch,
    base: list[Tensor] | None = None,
    labelled: bool = True,
    title: str | None = "merged",
) -> Evaluation:
    """Run an unpatched model with and without ``config`` over the same batches.

    Of several processes (:mod:`atm_triton.distributed`) each gives the batches of its own shard, and all get the result
    over the batches of all.

    Args:
        model: unpatched, in eval mode; it stays so.
        batches: (images, labels), sized and re-iterable (a DataLoader without shuffling, or a list).
        config: how tokens merge, or a function that patches a model in place in another way and returns it.
        base: :func:`unpatched_logits` of the same batches, if they are at hand.
        labelled: whether the labels are the model's classes.
        title: of the progress bar; None for no bar.

    Raises:
        ValueError: no images, or images or logits that are not finite; TypeError: a model that cannot be merged.
    """
    base = unpatched_logits(model, batches) if base is None else base
    patched = config(share(model)) if callable(config) else apply_patch(share(model), config)
    bar = tqdm(batches, desc=title, unit="batch", disable=silent(title))
    own = []
    for (images, labels), before in zip(bar, base, strict=True):
        rows = compare(patched, images, before, len(own))
        if labelled:
            rows |= {"right": rows["class"] == labels, "right_unpatched": before.argmax(1) == labels}
        own.append((tuple(images.shape[1:]), rows))
    every = in_order(own)
    if not every:
        raise ValueError("there are no images to evaluate")
    image_shape, names = every[0][0], every[0][1]
    table = {name: torch.cat([rows[name] for _, rows in every]).double() for name in names}
    return _conclude(table, cost(model, unmerged(model, image_shape)))


def compare(patched: VisionTransformer, images: Tensor, before: Tensor, number: int) -> dict[str, Tensor]:
    """A patched model on a batch, beside the logits ``before`` of the unpatched one. For each image: its ``class``,
    whether they ``agree`` on it, ``kl``, ``macs``, ``gflops`` (``all_last``: with a last block that serves all its
    tokens), ``tokens`` that enter each block, those ``merged`` in it and, where a threshold is at work, ``own_tokens``;
    on the host."""
    parameter = next(patched.parameters())
    after = patched(images.to(parameter)).float().cpu()
    check_finite(after, "the merged model's logits", number)
    record, B = patched.blocks.last, len(images)
    spent, own_tokens = cost_of_each(patched, record), _own_tokens(record)
    rows = {
        "class": after.argmax(1),
        "agree": after.argmax(1) == before.argmax(1),
        "kl": _kl(before, after),
        "macs": _of_images(spent.macs, B),
        "gflops": _of_images(spent.paper_gflops, B),
        "all_last": _of_images(cost_of_each(patched, record.all_served).paper_gflops, B),
        "tokens": torch.stack([_of_images(tokens, B) for tokens in record.tokens], dim=1),
        "merged": torch.stack([_of_images(r, B) for r in record.merged], dim=1),
    }
    return rows if own_tokens is None else rows | {"own_tokens": own_tokens}


def _conclude(table: dict[str, Tensor], whole: Any) -> Evaluation:
    n = len(table["kl"])
    every = torch.arange(n)
    deciles = ()
    if "own_tokens" in table and n >= 10:
        order = table["own_tokens"].argsort(stable=True)
        deciles = tuple(_quality(table, part) for part in order.tensor_split(10))
    drop_se = None
    if "right" in table:
        drop_se = 100 * ((table["right"] - table["right_unpatched"]).std(correction=0) / n**0.5).item()
    return Evaluation(
        overall=_quality(table, every),
        deciles=deciles,
        gflops_unpatched=whole.paper_gflops,
        saved=1 - table["macs"].mean().item() / whole.macs,
        top1_drop_se=drop_se,
        tokens=tuple(table["tokens"].mean(0).tolist()),
        gflops_all_tokens_last=table["all_last"].mean().item(),
    )


def _quality(table: dict[str, Tensor], chosen: Tensor) -> Quality:
    def mean(name: str) -> float | None:
        return table[name][chosen].mean().item() if name in table else None

    def percent(name: str) -> float | None:
        return 100 * mean(name) if name in table else None

    return Quality(
        images=len(chosen),
        top1=percent("right"),
        top1_unpatched=percent("right_unpatched"),
        agreement=percent("agree"),
        kl=mean("kl"),
        kl_se=(table["kl"][chosen].std(correction=0) / len(chosen) ** 0.5).item(),
        gflops=mean("gflops"),
        own_tokens=mean("own_tokens"),
    )


def _kl(before: Tensor, after: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(before.double(), 1), F.log_softmax(after.double(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _of_images(number: Number | float, B: int) -> Tensor:
    """float64 [B]."""
    return torch.as_tensor(number, dtype=torch.float64).expand(B)


def _own_tokens(record: Record) -> Tensor | None:
    """The tokens that each image would keep by its own count, on average over the blocks that compare with a theta."""
    kept = [n - counts.cpu() for n, counts in zip(record.tokens, record.counts, strict=True) if counts is not None]
    return torch.stack(kept).double().mean(0) if kept else None


def check_finite(values: Tensor, name: str, batch: int) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{name} of batch {batch} hold NaN or infinity; check the images and the weights")
