"""Evaluates merging: accuracy, agreement with the unpatched model, divergence from it, and cost, by difficulty."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from atm_triton.config import ATMConfig
from atm_triton.flops import Cost, cost, cost_of_each, unmerged
from atm_triton.measure.comparison import Measure, measure_of, percentile
from atm_triton.measure.distributed import in_order, silent
from atm_triton.patch import apply_patch
from atm_triton.record import Number, Record
from atm_triton.transformer import MergingTransformer

Batches = Iterable[tuple[Tensor, Tensor]]
Patch = Callable[[VisionTransformer], VisionTransformer]


@dataclass(frozen=True)
class Quality:
    """How good and how costly merging is on a number of images.

    ``top1`` and ``top1_unpatched`` are in percent (None if labels are not the model's classes), ``agreement`` is the
    percentage that agrees with the unpatched model, ``kl`` the mean KL(unpatched || merged) in nats, ``gflops`` the
    mean in the paper's convention, ``own_tokens`` the mean number of tokens that an image would keep by its own count
    (None without thresholds). Features have a mean ``distance`` and its 99th percentile instead of agreement and KL.
    ``*_se`` are standard errors. :class:`Measure` defines these."""

    images: int
    top1: float | None
    top1_unpatched: float | None
    agreement: float | None
    kl: float | None
    kl_se: float | None
    gflops: float
    own_tokens: float | None
    distance: float | None = None
    distance_se: float | None = None
    distance_p99: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The :class:`Quality` ``overall`` and in ``deciles``, from the images that would keep the fewest tokens to those
    that would keep the most (empty without thresholds). ``saved``: the share of the unpatched model's MACs that merging
    saves, in [0, 1]; ``top1_drop_se``: standard error of the paired difference in top-1, in points; ``tokens``: mean
    tokens that enter each block; ``gflops_all_tokens_last``: the cost if the last block computes all its tokens, which
    changes no logit; ``measure``: the name of the :class:`Measure`."""

    overall: Quality
    deciles: tuple[Quality, ...]
    gflops_unpatched: float
    saved: float
    top1_drop_se: float | None
    tokens: tuple[float, ...]
    gflops_all_tokens_last: float
    measure: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(model: VisionTransformer) -> VisionTransformer:
    """Copy a model, sharing its parameters and buffers. The copy can be patched without changing the model.

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
def unpatched_answers(
    model: VisionTransformer,
    batches: Iterable[tuple[Tensor, Any]],
    title: str | None = "unpatched",
    measure: Measure | None = None,
) -> list[Tensor]:
    """A model's answers to every batch, for use by several evaluations. ``measure``: None for the one that fits."""
    measure = measure_of(model) if measure is None else measure
    bar = tqdm(batches, desc=title, unit="batch", disable=silent(title))
    return [_unpatched(model, images, number, measure) for number, (images, _) in enumerate(bar)]


def _unpatched(model: VisionTransformer, images: Tensor, number: int, measure: Measure) -> Tensor:
    check_finite(images, "images", number)
    answers = measure.answers(model, images)
    check_finite(answers, "the unpatched model's answers", number)
    return answers


@torch.inference_mode()
def evaluate(
    model: VisionTransformer,
    batches: Batches,
    config: ATMConfig | Patch,
    base: list[Tensor] | None = None,
    labelled: bool = True,
    title: str | None = "merged",
    measure: Measure | None = None,
) -> Evaluation:
    """Run an unpatched model with and without ``config`` over the same batches.

    With several processes (:mod:`atm_triton.measure.distributed`) each passes the batches of its own shard, and all
    get the result over all batches.

    Args:
        model: unpatched, in eval mode; it stays so.
        batches: (images, labels), sized and re-iterable (a DataLoader without shuffling, or a list).
        config: how tokens merge, or a function that patches a model in place in another way and returns it.
        base: :func:`unpatched_answers` to the same batches by the same measure, if you have them.
        labelled: whether the labels are the model's classes; ignored if the model has no classes.
        title: of the progress bar; None for no bar.
        measure: how answers are compared; None: as fits the model.

    Raises:
        ValueError: no images, or images or answers that are not finite; TypeError: a model that cannot be merged.
    """
    measure = measure_of(model) if measure is None else measure
    patched = config(share(model)) if callable(config) else apply_patch(share(model), config)
    bar = tqdm(batches, desc=title, unit="batch", disable=silent(title))
    own: list[tuple[tuple[int, ...], dict[str, Tensor]]] = []
    for (images, labels), known in zip(bar, repeat(None) if base is None else base, strict=base is not None):
        before = _unpatched(model, images, len(own), measure) if known is None else known
        rows = compare(patched, images, before, len(own), measure)
        if labelled and measure.has_classes:
            rows |= {"right": rows["class"] == labels, "right_unpatched": before.argmax(1) == labels}
        own.append((tuple(images.shape[1:]), rows))
    every = in_order(own)
    if not every:
        raise ValueError("there are no images to evaluate")
    image_shape, names = every[0][0], every[0][1]
    table = {name: torch.cat([rows[name] for _, rows in every]).double() for name in names}
    return _conclude(table, cost(model, unmerged(model, image_shape)), measure)


def compare(
    patched: VisionTransformer, images: Tensor, before: Tensor, number: int, measure: Measure
) -> dict[str, Tensor]:
    """Run a patched model on a batch and compare it with the unpatched model's answers ``before``. Returns columns with
    a row per image, on the host: ``divergence``; for logits ``agree``; for classes the predicted ``class``; ``macs``
    and ``gflops`` (``all_last``: GFLOPs if the last block computes all its tokens); ``tokens`` that enter each block;
    tokens ``merged`` in it; and, with thresholds, ``own_tokens``."""
    after = measure.answers(patched, images)
    check_finite(after, "the merged model's answers", number)
    record, B = patched.blocks.last, len(images)
    spent = cost_of_each(patched, record)
    divergence, agree = measure.compared(before, after)
    rows = {
        "class": after.argmax(1) if measure.has_classes else None,
        "agree": agree,
        "divergence": divergence,
        "macs": _of_images(spent.macs, B),
        "gflops": _of_images(spent.paper_gflops, B),
        "all_last": _of_images(cost_of_each(patched, record.all_tokens_last).paper_gflops, B),
        "tokens": torch.stack([_of_images(N, B) for N in record.tokens], dim=1),
        "merged": torch.stack([_of_images(r, B) for r in record.merged], dim=1),
        "own_tokens": _own_tokens(record),
    }
    return {name: column for name, column in rows.items() if column is not None}


def _conclude(table: dict[str, Tensor], whole: Cost[float], measure: Measure) -> Evaluation:
    n = len(table["divergence"])
    every = torch.arange(n)
    deciles: tuple[Quality, ...] = ()
    if "own_tokens" in table and n >= 10:
        order = table["own_tokens"].argsort(stable=True)
        deciles = tuple(_quality(table, part, measure) for part in order.tensor_split(10))
    drop_se = None
    if "right" in table:
        drop_se = 100 * ((table["right"] - table["right_unpatched"]).std(correction=0) / n**0.5).item()
    return Evaluation(
        overall=_quality(table, every, measure),
        deciles=deciles,
        gflops_unpatched=whole.paper_gflops,
        saved=1 - table["macs"].mean().item() / whole.macs,
        top1_drop_se=drop_se,
        tokens=tuple(table["tokens"].mean(0).tolist()),
        gflops_all_tokens_last=table["all_last"].mean().item(),
        measure=measure.name,
    )


def _quality(table: dict[str, Tensor], chosen: Tensor, measure: Measure) -> Quality:
    def mean(name: str) -> float | None:
        return table[name][chosen].mean().item() if name in table else None

    def percent(name: str) -> float | None:
        share = mean(name)
        return None if share is None else 100 * share

    divergence = table["divergence"][chosen]
    error = (divergence.std(correction=0) / len(chosen) ** 0.5).item()
    values: dict[str, float | None] = {"kl": None, "kl_se": None, "agreement": percent("agree")}
    if measure.of_features:
        values["distance_p99"] = percentile(divergence)
    values |= {measure.divergence: divergence.mean().item(), f"{measure.divergence}_se": error}
    return Quality(
        images=len(chosen),
        top1=percent("right"),
        top1_unpatched=percent("right_unpatched"),
        gflops=table["gflops"][chosen].mean().item(),
        own_tokens=mean("own_tokens"),
        **values,
    )


def _of_images(number: Number | float, B: int) -> Tensor:
    """``number`` as one value per image, float64 [B]."""
    return torch.as_tensor(number, dtype=torch.float64, device="cpu").expand(B)


def _own_tokens(record: Record) -> Tensor | None:
    """The tokens that each image would keep by its own count, averaged over the blocks with a threshold."""
    kept = [
        _of_images(n, len(counts)) - counts.cpu()
        for n, counts in zip(record.tokens, record.counts, strict=True)
        if counts is not None
    ]
    return torch.stack(kept).mean(0) if kept else None


def check_finite(values: Tensor, name: str, batch: int) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{name} of batch {batch} hold NaN or infinity; check the images and the weights")
