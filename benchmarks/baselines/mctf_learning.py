"""How MCTF is trained: the same weights pass twice, as a student that fuses much and a teacher that fuses little."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.training.method import Criterion
from benchmarks.baselines.training import Learning, read

TEACHERS = 8  # the teacher's r is drawn below this for each pass
SURE = 0.4  # the consistency loss applies above this probability of the right class
CONSISTENT = 3.0  # weight of the consistency loss


class Answer(NamedTuple):
    """Logits [B, classes] and normalised class tokens [B, C] of both passes."""

    logits: Tensor
    token: Tensor
    teacher_logits: Tensor
    teacher_token: Tensor


class MCTFLearning(Learning):
    """Both passes learn from the labels. In addition the student's class token learns from the teacher's (not the other
    way round) on images whose class the student finds probable enough. No mixup by default; with mixup the
    probabilities of both classes of an image add up. The authors' scheduler adds ten epochs at the lowest rate to 30;
    they are left out, so that all methods train equally long."""

    lr, min_lr, warmup, epochs, more = 1.5e-5, 1e-6, 0.0, 30, {"mixup": 0.0, "cutmix": 0.0}
    loops = True  # checkpointing would recompute a block with the r of the other pass

    def answer(self, merging: VisionTransformer, images: Tensor) -> Answer:
        logits, token = read(merging, images)
        self.set(merging, r=int(torch.randint(TEACHERS, ())))
        teacher_logits, teacher_token = read(merging, images)
        self.set(merging)
        return Answer(logits=logits, token=token, teacher_logits=teacher_logits, teacher_token=teacher_token)

    def loss(self, answer: Answer, targets: Tensor, criterion: Criterion) -> Tensor:
        logits, token = answer.logits, answer.token
        teacher_logits, teacher_token = answer.teacher_logits, answer.teacher_token
        shares = targets if targets.dim() == 2 else F.one_hot(targets, logits.shape[1])
        right = shares > shares.amin(dim=1, keepdim=True)
        sure = (logits.detach().softmax(dim=1) * right).sum(dim=1) > SURE
        loss = criterion(logits, targets) + criterion(teacher_logits, targets)
        if not sure.any():
            return loss
        return loss + CONSISTENT * (teacher_token.detach() - token)[sure].square().mean()
