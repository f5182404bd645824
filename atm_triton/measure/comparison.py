"""Compares answers of the merged model with the unmerged model's: as classes, as labels, or as features.

The model decides which measure fits. Logits of classes are compared through their softmax. A single logit, and logits
of labels that do not exclude one another, are compared each through its sigmoid. A model without a head has no
classes: its pooled feature is compared by direction, as is the embedding of a CLIP model, or its patch tokens if those
are what is read.
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
CONTRASTIVE = ("_clip_", "_mci_", "_pe_core_")  # in timm's names of models that were trained with texts
PASSES_ON = (nn.Identity, nn.Dropout, nn.Sequential)  # a head of these alone answers with the features


@dataclass(frozen=True)
class Measure:
    """How to compare the answers of two models to B images.

    Args:
        name: one of :data:`MEASURES`. It defines the answers; their divergence; their agreement, per image:

            "softmax": logits [B, K] of classes; KL(unmerged || merged) in nats; 1 if both name the same class, else 0.
            "sigmoid": logits [B, K] of labels; the KL of a label's two outcomes, averaged over the labels; the share of
            labels that both decide alike at a probability of 0.5.
            "pooled": the pooled feature [B, C]; the distance 1 - cosine, in [0, 2]; no agreement.
            "dense": the patch tokens [B, N, C]; the mean of their distances; no agreement.

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
        """Whether features are compared: the divergence is then a distance, and there is no agreement."""
        return self.name in ("pooled", "dense")

    @property
    def has_classes(self) -> bool:
        """Whether the largest value of an answer names a class."""
        return self.name == "softmax"

    @property
    def divergence(self) -> str:
        """The name of the divergence in results: "kl" or "distance"."""
        return "distance" if self.of_features else "kl"

    def answers(self, model: VisionTransformer, images: Tensor) -> Tensor:
        """A model's answers to images [B, C, H, W], patched or not, float32 on the CPU."""
        images = images.to(next(model.parameters()))
        dense = self.name == "dense"
        answers = model.forward_features(images)[:, model.num_prefix_tokens :] if dense else model(images)
        return answers.float().cpu()

    def coordinates(self, answers: Tensor) -> Tensor:
        """The part of answers that is compared, float64: log-probabilities [B, K], or those of both outcomes [B, K, 2],
        or unit vectors [B, C] or [B, N, C]."""
        answers = answers.double()
        if self.name == "softmax":
            return F.log_softmax(answers, dim=-1)
        if self.name == "sigmoid":
            return torch.stack([F.logsigmoid(answers), F.logsigmoid(-answers)], dim=-1)
        return F.normalize(answers, dim=-1)

    def compared(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor | None]:
        """The divergence and the agreement of each image, float64 [B]; the agreement is None for features."""
        b, a = self.coordinates(before), self.coordinates(after)
        of_each = ((b - a) ** 2 / 2 if self.of_features else b.exp() * (b - a)).sum(-1)  # 1 - cos = |b - a|^2 / 2
        divergence = of_each if of_each.dim() == 1 else of_each.mean(1)
        if self.of_features:
            return divergence, None
        if self.has_classes:
            return divergence, (before.argmax(1) == after.argmax(1)).double()
        return divergence, ((before > 0) == (after > 0)).double().mean(1)

    def text(self, divergence: float, agreement: float | None, p99: float | None) -> str:
        """Put means over some images into words. ``p99``: the 99th percentile of the divergence."""
        if self.of_features:
            return f"distance {divergence:.2g}, 99th percentile {p99:.2g}"
        return f"KL {divergence:.2g}, agreement {agreement:.4g}"


def measure_of(model: VisionTransformer, dense: bool = False, sigmoid: bool = False) -> Measure:
    """The measure that fits a model.

    Args:
        dense: the caller reads patch tokens (``forward_features``), whatever the head is.
        sigmoid: the labels do not exclude one another. A single logit is always treated so.

    Raises:
        TypeError: the head cannot be inspected.
        ValueError: both are given, ``sigmoid`` is given for a model without a head, or the model pools nothing and
            ``dense`` is not given.
    """
    if dense and sigmoid:
        raise ValueError("dense compares patch tokens and sigmoid the labels of a head; give one of the two")
    if dense:
        return Measure("dense")
    shape = answer_shape(model)
    if not shape:
        raise ValueError("the model answers with one number per image; want logits [B, 1]")
    if len(shape) != 1:
        raise ValueError(
            f"the model answers with {shape[0]} unpooled tokens per image: ask for dense, which "
            "compares patch tokens, or make it with a global_pool"
        )
    if all(type(part) in PASSES_ON for part in model.head.modules()):
        if sigmoid:
            raise ValueError("sigmoid compares logits, but the model has no head (num_classes=0); leave it out")
        return Measure("pooled")
    if not sigmoid and _embeds(model, shape):
        return Measure("pooled")
    return Measure("sigmoid" if sigmoid or shape == (1,) else "softmax")


def _embeds(model: VisionTransformer, shape: tuple[int, ...]) -> bool:
    """Whether the head is a CLIP model's projection, by timm's name and tag. Its outputs are an embedding, no classes;
    a model that was fine-tuned to classes has another tag or another number of outputs."""
    made = getattr(model, "pretrained_cfg", None) or {}
    contrastive = any(part in (made.get("architecture") or "") for part in CONTRASTIVE)
    return contrastive and "_ft_" not in (made.get("tag") or "") and shape == (made.get("num_classes"),)


def percentile(divergence: Tensor) -> float:
    """The 99th percentile of the divergence of n images [n]: always one image's value, up to 100 images the largest."""
    return divergence.quantile(0.99, interpolation="higher").item()
