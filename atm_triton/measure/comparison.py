"""How answers of the merged model are compared with the unmerged one's: as classes, as labels, or as features.

What fits is told by the model: logits of classes are compared through their softmax; a single logit, and logits of
labels that do not exclude one another, each through its sigmoid; without a head there are no classes, and the pooled
feature is compared by its direction, or the patch tokens where those are read.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atm_triton.flops import answer_shape

MEASURES = {
    "softmax": "logits of classes, through their softmax",
    "sigmoid": "logits of labels, each through its sigmoid",
    "pooled": "the pooled feature, by the cosine",
    "dense": "the patch tokens, unmerged, by the cosine",
}


@dataclass(frozen=True)
class Measure:
    """How answers of two models to B images are compared.

    Args:
        name: one of :data:`MEASURES`; answers, their divergence and their agreement are, for an image,

            "softmax": logits [B, K] of classes; KL(unmerged || merged) in nats; 1 if the largest is of one class.
            "sigmoid": logits [B, K] of labels; the same KL of a label's two outcomes, its mean over the labels; the
            share of the labels that are decided alike at a probability of 0.5.
            "pooled": the pooled feature [B, C]; the distance 1 - cosine, in [0, 2]; none.
            "dense": the patch tokens [B, N, C]; the mean of their distances; none.

    Raises:
        ValueError: an unknown name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in MEASURES:
            raise ValueError(f"measure {self.name!r} is unknown; want one of {', '.join(MEASURES)}")

    def __str__(self) -> str:
        return MEASURES[self.name]

    @property
    def of_features(self) -> bool:
        """Whether there is no agreement, and the divergence is a distance."""
        return self.name in ("pooled", "dense")

    @property
    def has_classes(self) -> bool:
        """Whether the largest value of an answer names a class."""
        return self.name == "softmax"

    @property
    def divergence(self) -> str:
        """What results call the divergence: "kl" or "distance"."""
        return "distance" if self.of_features else "kl"

    def answers(self, model: VisionTransformer, images: Tensor) -> Tensor:
        """A model's answers to images [B, C, H, W], patched or not, float32 on the CPU."""
        images = images.to(next(model.parameters()))
        dense = self.name == "dense"
        answers = model.forward_features(images)[:, model.num_prefix_tokens :] if dense else model(images)
        return answers.float().cpu()

    def coordinates(self, answers: Tensor) -> Tensor:
        """What of answers is compared, float64: log-probabilities [B, K], or of both outcomes [B, K, 2]; or directions
        [B, C] or [B, N, C]."""
        answers = answers.double()
        if self.name == "softmax":
            return F.log_softmax(answers, dim=-1)
        if self.name == "sigmoid":
            return torch.stack([F.logsigmoid(answers), F.logsigmoid(-answers)], dim=-1)
        return F.normalize(answers, dim=-1)

    def compared(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor | None]:
        """The divergence and the agreement of each image, float64 [B]; of features no agreement."""
        b, a = self.coordinates(before), self.coordinates(after)
        of_each = ((b - a) ** 2 / 2 if self.of_features else b.exp() * (b - a)).sum(-1)  # 1 - cos = |b - a|^2 / 2
        divergence = of_each if of_each.dim() == 1 else of_each.mean(1)
        if self.of_features:
            return divergence, None
        if self.has_classes:
            return divergence, (before.argmax(1) == after.argmax(1)).double()
        return divergence, ((before > 0) == (after > 0)).double().mean(1)

    def text(self, divergence: float, agreement: float | None, p99: float | None) -> str:
        """Means over some images, in words; ``p99``: the 99th percentile of the divergence."""
        if self.of_features:
            return f"distance {divergence:.2g}, 99th percentile {p99:.2g}"
        return f"KL {divergence:.2g}, agreement {agreement:.4g}"


def measure_of(model: VisionTransformer, dense: bool = False, sigmoid: bool = False) -> Measure:
    """The measure that fits a model.

    Args:
        dense: the caller reads patch tokens (``forward_features``), whatever the head says.
        sigmoid: the logits are of labels that do not exclude one another. A single logit is known to be.

    Raises:
        TypeError: a head that cannot be looked into.
        ValueError: both of them, ``sigmoid`` of a model without a head, or a model that pools nothing and is not
            ``dense``.
    """
    if dense and sigmoid:
        raise ValueError("dense compares patch tokens and sigmoid the labels of a head; give one of the two")
    if dense:
        return Measure("dense")
    shape = answer_shape(model)
    if not shape:
        raise ValueError("the model answers with a number an image, without a dimension of logits; want [B, 1]")
    if len(shape) != 1:
        raise ValueError(
            f"the model answers with {shape[0]} tokens an image, pooled by nothing: ask for dense, which "
            "compares patch tokens, or make it with a global_pool"
        )
    if isinstance(model.head, nn.Identity):
        if sigmoid:
            raise ValueError("sigmoid is of logits, and the model has no head (num_classes=0); leave it out")
        return Measure("pooled")
    return Measure("sigmoid" if sigmoid or shape == (1,) else "softmax")


def percentile(divergence: Tensor) -> float:
    """The 99th percentile of the divergence of n images [n]: that of one of them, of up to 100 the largest."""
    return divergence.quantile(0.99, interpolation="higher").item()
