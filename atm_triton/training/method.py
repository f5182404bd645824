"""Method: what a way of reducing tokens brings along to be trained, where it is not ATM."""

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from atm_triton.training.recipe import Recipe

Criterion = Callable[[Tensor, Tensor], Tensor]  # the recipe's loss, of logits [B, classes] and targets


class Method:
    """A way of reducing tokens in training, given to :func:`~atm_triton.training.finetune.finetune` in place of a
    configuration. A subclass overrides :meth:`patch`, and of the rest what differs from a plain training.

    Parameters of its own are parameters of the model: put them in (``model.blocks[3].predictor = ...``) before training
    begins. Then they are trained, averaged, saved and resumed with all others. Whatever else decides a step must follow
    from the arguments below and from random numbers, which are seeded for each pass: so an interrupted run goes on to
    the bit.
    """

    def patch(self, model: VisionTransformer) -> VisionTransformer:
        """Let ``model`` reduce its tokens, in place, and return it. It shares the weights that are trained; in training
        mode it answers for :meth:`answer`, in eval mode for the evaluation after an epoch."""
        raise NotImplementedError

    def optimizer(self, model: VisionTransformer, recipe: Recipe) -> Optimizer:
        """Of the parameters that are trained. The schedule multiplies the rate of a group by its ``lr_scale``."""
        return recipe.optimizer(model)

    def begin_step(self, merging: VisionTransformer, optimizer: Optimizer, done: float) -> None:
        """Called before each step. ``merging``: what :meth:`patch` returned; ``done``: the share of all steps that have
        been taken, from 0 to below 1."""

    def answer(self, merging: VisionTransformer, images: Tensor) -> Any:
        """What the loss is made of, for a pass of images [B, C, H, W]; under autocast where the recipe says so."""
        return merging(images)

    def loss(self, answer: Any, targets: Tensor, criterion: Criterion) -> Tensor:
        """The loss, a scalar. ``targets``: labels [B], or with mixup shares [B, classes]."""
        return criterion(answer, targets)
