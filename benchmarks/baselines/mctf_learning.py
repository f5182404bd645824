"""How MCTF is trained: the same weights pass twice, as a student that fuses much and a teacher that fuses little."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.training.method import Criterion
from benchmarks.baselines.training import Learning, read

TEACHERS = 8  # r of the teacher is drawn below it, for each pass
SURE = 0.4  # probability of the right class from which on an image is to be consistent
CONSISTENT = 3.0  # weight of that


class Answer(NamedTuple):
    """Logits [B, classes] and normalised class tokens [B, C] of both passes."""

    logits: Tensor
    token: Tensor
    teacher_logits: Tensor
    teacher_token: Tensor


class MCTFLearning(Learning):
    """Both passes learn from the labels; the class token of the student learns from the teacher's, which does not learn
    from it, for images that the student is sure enough of. No mixup. The authors' scheduler adds ten epochs at the
    lowest rate to 30; they are left out, so that all methods train as long. With mixup the probability of both classes
    of an image counts."""

    lr, min_lr, warmup, epochs, more = 1.5e-5, 1e-6, 0.0, 30, {"mixup": 0.0, "cutmix": 0.0}
    loops = True  # a block that is computed again would fuse as many tokens as the other pass

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
