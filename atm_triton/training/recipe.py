"""The recipe of a fine-tuning: the paper's numbers, and the baseline's for everything that the paper leaves open."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

SCHEDULES = ("cosine", "tanh", "poly")
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WARMUP_LR = 1e-6  # the learning rate at which DeiT's warm-up begins


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune a model. The defaults are the paper's (Appendix: 30 epochs, no warm-up, cosine from 2e-5 to
    3e-6, at least 256 images per step) and DeiT's (AdamW, mixup, smoothing), which the paper calls the baseline's.

    A step averages the gradients of ``accumulate`` passes of ``batch_size`` images each. Several processes share out
    the passes of a step, so neither their number nor the way the images are loaded changes the result.

    Args:
        epochs: passes over the training images.
        batch_size: images per pass; with adapt="batch" they share one r.
        accumulate: passes per step.
        opt: name of an optimiser in timm.
        lr: learning rate at the start, not scaled by the batch; min_lr: at the end.
        sched: how the rate falls in between, step by step ("poly": linearly); warmup_epochs: epochs in which it rises
            linearly from 1e-6.
        weight_decay: weight decay of matrices; biases, norms, class token and positions have none.
        clip_grad: the largest norm of the gradient; None: no limit.
        smoothing: label smoothing; mixup, cutmix: alpha of timm's ``Mixup``, 0 for none.
        ema: decay of the average of weights that is kept beside the model; None: no average.
        amp: "bfloat16" or "float16" for autocast (the latter with a scaled loss); None: no autocast.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        recalibrate: find new thresholds for the current weights every so many epochs; None: never.
        seed: seed of the order of images, augmentation, mixup, dropout and drop path.

    Raises:
        ValueError: a number is out of range, a name is unknown, or a batch is odd with mixup.
    """

    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 4
    opt: str = "adamw"
    lr: float = 2e-5
    min_lr: float = 3e-6
    sched: str = "cosine"
    warmup_epochs: int = 0
    weight_decay: float = 0.05
    clip_grad: float | None = None
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    ema: float | None = None
    amp: str | None = None
    grad_checkpointing: bool = False
    recalibrate: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "recalibrate"):
            self._check(name, 1, math.inf)
        for name in ("warmup_epochs", "weight_decay", "mixup", "cutmix", "min_lr", "seed"):
            self._check(name, 0, math.inf)
        for name in ("lr", "clip_grad"):
            self._check(name, 0, math.inf, open_below=True)
        for name in ("smoothing", "ema"):
            self._check(name, 0, 1)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower it")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} of {self.epochs} epochs leave none; give fewer")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size}: mixup pairs images; give an even number, or mixup 0")
        for name, known in (("sched", SCHEDULES), ("amp", (None, *AMP)), ("opt", list_optimizers())):
            if getattr(self, name) not in known:
                names = ", ".join(str(one) for one in known if one is not None)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {names}")

    def _check(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not low <= value < high or (open_below and value == low):
            least = f"above {low}" if open_below else f"{low} or more"
            raise ValueError(
                f"{name}={value} is out of range; give {least}{'' if high == math.inf else f', below {high}'}"
            )

    @classmethod
    def for_digits(cls, **changes: Any) -> Self:
        """The recipe that the digits model was trained with: new images in each epoch, smoothing 0.05, no mixup."""
        return replace(cls(smoothing=0.05, mixup=0.0, cutmix=0.0), **changes)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.accumulate

    def optimizer(self, model: nn.Module | list[dict[str, Any]]) -> Optimizer:
        """Make timm's optimiser for a model, with timm's parameter groups, or for the given groups.

        Raises:
            ValueError: the optimiser needs a library that is not installed, or second derivatives.
        """
        try:
            made = create_optimizer_v2(model, opt=self.opt, lr=self.lr, weight_decay=self.weight_decay)
        except Exception as error:  # the libraries that optimisers need raise errors of their own
            raise ValueError(f"opt={self.opt!r} cannot be made: {error or type(error).__name__}") from error
        if getattr(made, "is_second_order", False):
            raise ValueError(f"opt={self.opt!r} wants second derivatives, which the merge does not have")
        return made

    def schedule(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """A schedule by steps: ``step_update(n)`` sets the rate of step n, counted from 0, whatever came before."""
        rates = {"min_lr": self.min_lr, "warmup_lr": min(WARMUP_LR, self.lr), "warmup_epochs": self.warmup_epochs}
        rates["decay_rate"] = 1.0  # the power of "poly"
        steps = {"num_epochs": self.epochs, "step_on_epochs": False, "updates_per_epoch": steps_per_epoch}
        return create_scheduler_v2(optimizer, self.sched, **rates, **steps)[0]

    def mixing(self, classes: int) -> Mixup | None:
        if not self.mixes:
            return None
        return Mixup(self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=classes)

    def loss(self) -> nn.Module:
        """The loss for logits [B, classes] and labels [B], or with mixup the shares of the classes [B, classes]."""
        return SoftTargetCrossEntropy() if self.mixes else LabelSmoothingCrossEntropy(self.smoothing)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
