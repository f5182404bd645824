"""Method: the interface for training with a way of reducing tokens other than ATM."""

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from atm_triton.training.recipe import Recipe

Criterion = Callable[[Tensor, Tensor], Tensor]  # the recipe's loss: logits [B, classes], targets -> scalar


class Method:
    """A way of reducing tokens in training, given to :func:`~atm_triton.training.finetune.finetune` in place of a
    configuration. A subclass overrides :meth:`patch`, and those of the other methods that differ from plain training.

    A method's own parameters must be parameters of the model: add them (``model.blocks[3].predictor = ...``) before
    training begins, and they are trained, averaged, saved and resumed like all others. A step may otherwise depend only
    on the arguments below and on random numbers, which are seeded for each pass. Then a resumed run gives the same
    bits.
    """

    def patch(self, model: VisionTransformer) -> VisionTransformer:
        """Make ``model`` reduce its tokens, in place, and return it. It shares the trained weights. It runs in training
        mode for :meth:`answer`, and in eval mode for the evaluation after an epoch."""
        raise NotImplementedError

    def optimizer(self, model: VisionTransformer, recipe: Recipe) -> Optimizer:
        """The optimiser of the trained parameters. The schedule multiplies a group's rate by its ``lr_scale``."""
        return recipe.optimizer(model)

    def begin_step(self, merging: VisionTransformer, optimizer: Optimizer, done: float) -> None:
        """Called before each step. ``merging``: what :meth:`patch` returned; ``done``: the share of all steps taken so
        far, in [0, 1)."""

    def answer(self, merging: VisionTransformer, images: Tensor) -> Any:
        """Run a pass of images [B, C, H, W] and return what :meth:`loss` needs; under autocast if the recipe asks for
        it."""
        return merging(images)

    def loss(self, answer: Any, targets: Tensor, criterion: Criterion) -> Tensor:
        """The loss, a scalar. ``targets``: labels [B], or with mixup the shares of the classes [B, classes]."""
        return criterion(answer, targets)
