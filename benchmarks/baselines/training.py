"""What the trained methods share: Learning, a method for ``atm_triton.training``, and timm's block written out."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.optim import Optimizer

from atm_triton.training.images import seed_all
from atm_triton.training.method import Method
from atm_triton.training.recipe import Recipe

BATCH = 512  # images per step for which DeiT and its followers give their learning rates


class Learning(Method):
    """Training of a :class:`~benchmarks.baselines.base.Baseline`: ``finetune(model, ...,
    method=baseline.learning(model))``. It prepares the model: it adds the method's own modules, which are trained and
    saved with the weights, and freezes what is not trained.

    By default a method is trained as it runs afterwards, by the recipe's loss, and the constants below are DeiT's. The
    recipe is that of the authors in fewer epochs. ``lr``: the rate at 512 images per step, scaled by the batch size if
    ``scaled``; ``warmup``: the share of the epochs in which the rate rises, rounded; ``more``: other fields of Recipe;
    ``epochs``: as published; ``loops``: training computes the blocks in its own way, so that none can be checkpointed;
    ``drop_path``: False if the authors train without it.
    """

    lr: ClassVar[float] = 5e-4
    min_lr: ClassVar[float] = 1e-5
    scaled: ClassVar[bool] = True
    warmup: ClassVar[float] = 5 / 300
    weight_decay: ClassVar[float] = 0.05
    more: ClassVar[dict[str, Any]] = {}
    epochs: ClassVar[int] = 300
    loops: ClassVar[bool] = False
    drop_path: ClassVar[bool] = True

    def __init__(self, baseline: Any, model: VisionTransformer, seed: int = 0) -> None:
        baseline.check(model)
        self.baseline = baseline
        seed_all(seed)
        baseline.prepare(model)
        for part in model.modules():
            if isinstance(part, DropPath) and not self.drop_path:
                part.drop_prob = 0.0

    def recipe(self, like: Recipe) -> Recipe:
        """The authors' recipe, with the epochs and images per step of ``like``."""
        scale = like.images_per_step / BATCH if self.scaled else 1
        rates = {"lr": self.lr * scale, "min_lr": min(self.min_lr, self.lr * scale), "weight_decay": self.weight_decay}
        return replace(like, **rates, warmup_epochs=round(self.warmup * like.epochs), **self.more)

    def patch(self, model: VisionTransformer) -> VisionTransformer:
        return self.baseline.apply(model)

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise ValueError if the method cannot be trained by this recipe."""
        if self.loops and recipe.grad_checkpointing:
            name = type(self.baseline).__name__
            raise ValueError(f"{name} computes its blocks in its own way in training: leave grad_checkpointing out")

    def optimizer(self, model: VisionTransformer, recipe: Recipe) -> Optimizer:
        self.check_recipe(recipe)
        return super().optimizer(model, recipe)

    def set(self, merging: VisionTransformer, **settings: Any) -> None:
        """Change the method's settings in the blocks of ``merging``."""
        changed = replace(self.baseline, **settings)
        for block in merging.blocks:
            block.baseline = changed


def frozen(model: VisionTransformer) -> VisionTransformer:
    """A frozen copy of the model, in eval mode, as a teacher."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def read(merging: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the class token [B, C] after the last norm, from which they are computed."""
    normed: list[Tensor] = []
    handle = merging.norm.register_forward_hook(lambda _, args, out: normed.append(out))
    try:
        logits = merging(images)
    finally:
        handle.remove()
    return logits, normed[0][:, 0]


def scaled_groups(model: VisionTransformer, weight_decay: float, scale: Callable[[str], float]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser. ``scale(name)`` multiplies the learning rate of each parameter; biases, norms,
    class token and positions have no weight decay."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    plain = {"cls_token", "dist_token", "reg_token", "pos_embed"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scale(name), parameter.dim() > 1 and name not in plain), []).append(parameter)
    return [
        {"params": own, "lr_scale": by, "full_scale": by, "weight_decay": weight_decay * decays}
        for (by, decays), own in groups.items()
    ]


def attended(
    block: Block, x: Tensor, weigh: Callable[[Tensor], Tensor], mask: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run timm's block up to its attention on x [B, N, C]. ``weigh`` turns the scaled scores into weights
    [B, H, N, N]; ``mask`` multiplies the norm of x. Returns what attention adds to x, the keys [B, H, N, d] and the
    weights."""
    attn, y = block.attn, block.norm1(x) * mask
    q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = weigh(q @ k.transpose(-2, -1) * attn.scale)
    mixed = attn.norm((attn.attn_drop(weights.to(v.dtype)) @ v).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        mixed = mixed * attn.gate(y).sigmoid()
    return block.drop_path1(block.ls1(attn.proj_drop(attn.proj(mixed)))), k, weights


def fed(block: Block, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """What the MLP adds to x; ``mask`` multiplies the norm of x."""
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x) * mask)))


def through(block: Block, x: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Run timm's block with attention weights from ``weigh``."""
    x = x + attended(block, x, weigh)[0]
    return x + fed(block, x)


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard.to(soft.dtype) - soft.detach() + soft


def softmax_of_kept(scores: Tensor, mask: Tensor, eps: float, own: bool) -> Tensor:
    """A softmax over the keys whose ``mask`` [B, N] is 1, not 0, with a gradient to the mask. ``own``: each token also
    sees itself. As in DynamicViT it is (e + eps / N) / (sum of e + eps). The largest score, which is subtracted first,
    has no gradient (it would be of the order of eps)."""
    N = scores.shape[-1]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    seen = mask[:, None, None, :].to(scores.dtype)
    if own:
        seen = seen + (1 - seen) * torch.eye(N, dtype=scores.dtype, device=scores.device)
    e = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp() * seen
    return (e + eps / N) / (e.sum(dim=-1, keepdim=True) + eps)
