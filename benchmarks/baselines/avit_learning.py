"""How A-ViT is trained: halted tokens are masked, and a loss makes the others halt earlier."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.training.method import Criterion
from benchmarks.baselines.training import Learning, attended, fed

EPS = 0.01  # a token halts once its scores sum to 1 - EPS
PONDER, DEPTHS = 5e-4, 1e-3  # weights of the losses
MASKED = -1000.0  # added to the scores of keys that have halted


class Answer(NamedTuple):
    """``depths`` [B, N]: the number of blocks that each token went through, plus its remainder; ``scores`` [depth]: the
    mean score of the patch tokens after each block."""

    logits: Tensor
    depths: Tensor
    scores: Tensor


class AViTLearning(Learning):
    """Fine-tunes all weights of a trained model."""

    lr, warmup, epochs, loops = 3e-4, 5 / 100, 100, True

    def answer(self, merging: VisionTransformer, images: Tensor) -> Answer:
        x, method = merging.stem(images), self.baseline
        zero = x.new_zeros(x.shape[:2])
        c, rest, mask, depths, out, scores = zero, zero + 1, zero + 1, zero, torch.zeros_like(x), []
        for block in merging.blocks:
            m = mask.unsqueeze(2)
            x = x + (x * m - x).detach()
            added = attended(block, x * m, lambda s, m=mask: (s + (1 - m)[:, None, None] * MASKED).softmax(-1), m)[0]
            x = x + added
            x = x + fed(block, x * m, m)
            last = block.index == block.depth - 1
            scores.append(method.score(x, False)[:, 1:].mean())
            h = method.score(x, last)
            c, depths = c + h, depths + mask
            reached, runs = (c > 1 - EPS) * mask, (c < 1 - EPS).to(x.dtype)
            out = out + x * (rest * reached + h * runs).unsqueeze(2)
            depths, rest = depths + rest * reached, rest - h * runs
            mask = runs
        return Answer(logits=merging.forward_head(merging.norm(out)), depths=depths, scores=torch.stack(scores))

    def loss(self, answer: Answer, targets: Tensor, criterion: Criterion) -> Tensor:
        shares = (answer.scores / answer.scores.sum()).clamp(0.01, 0.99)
        spread = F.kl_div(shares.log(), bell(len(shares)).to(shares), reduction="batchmean")
        loss = criterion(answer.logits, targets) + PONDER * answer.depths.mean()
        return loss + DEPTHS * spread if spread > 0 else loss


def bell(depth: int) -> Tensor:
    """[depth] float64: a normal density around two thirds of the depth, scaled so that the part before sums to 0.98."""
    middle = round(8 / 12 * depth)
    density = [math.exp(-((block - middle) ** 2) / 2) for block in range(depth)]
    return torch.tensor(density, dtype=torch.float64) * 0.98 / sum(density[:middle])
