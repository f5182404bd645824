"""The program of each process in test_finetune.py: ``torchrun tests/finetuning.py OUT [DIES]``.

It fine-tunes a small model in each way to adapt. It is killed before it reads image number DIES of the first run.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from atm_triton import ATMConfig, apply_patch
from atm_triton.measure.distributed import own, start, stop
from atm_triton.training.finetune import Training, finetune
from atm_triton.training.folder import RunFolder
from atm_triton.training.method import Method
from atm_triton.training.recipe import Recipe
from models import images, small, vit

EASY = {"alpha": 0.7, "theta_min": 0.5, "beta": 0.05}
CONFIGS = {
    "static": ATMConfig(adapt="static", schedule=(5, 3, 2), split_depth=1),
    "batch": ATMConfig(**EASY, split_depth=1),
    "image": ATMConfig(**EASY, split_depth=1, adapt="image"),
}
RECIPE = Recipe(epochs=2, batch_size=4, accumulate=2, lr=1e-3, min_lr=1e-5, ema=0.8, clip_grad=1.0)


class Pictures(Dataset):
    """20 images of 5 classes: noise with a bright corner whose size shows the class. ``dies``: the process is killed
    once this many images have been read; ``raises``: a KeyboardInterrupt is raised instead."""

    def __init__(self, dies=None, raises=None):
        torch.manual_seed(1)
        self.x, self.labels = images(20, dtype=torch.float64), torch.arange(20) % 5
        for image, label in zip(self.x, self.labels, strict=True):
            image[:, : 4 * label + 4, :8] += 2
        self.read, self.dies, self.raises = 0, dies, raises

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        _, number = at
        if self.read == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.read == self.raises:
            raise KeyboardInterrupt
        self.read += 1
        return self.x[number].clone(), int(self.labels[number])

    def batches(self):
        return list(zip(self.x.split(4), self.labels.split(4), strict=True))


def new(dtype=torch.float64, **changes):
    """A model with dropout and drop path, with the same weights each time."""
    torch.manual_seed(0)
    return vit(dtype=dtype, **{"depth": 3, "embed_dim": 16, "drop_path_rate": 0.3, "proj_drop_rate": 0.1, **changes})


def train(out, config, recipe=RECIPE, pictures=None, model=None, **options):
    """Fine-tune a model. Returns the model and what ``finetune`` returned."""
    pictures = Pictures() if pictures is None else pictures
    model = new() if model is None else model
    folder = RunFolder(Path(out), {"recipe": recipe.to_dict()})
    return model, finetune(model, pictures, own(pictures.batches()), config, recipe, folder, **options)


CASES = {name: lambda config=config: {"config": config} for name, config in CONFIGS.items()}
PLAIN_STEPS = replace(RECIPE, opt="momentum", lr=1e-2)  # Adam's steps would amplify rounding errors
CASES["float32"] = lambda: {"config": CONFIGS["image"], "recipe": PLAIN_STEPS, "model": new(torch.float32)}


class Noisy(Method):
    """A method with its own loss, random draws and two parameters in the model. One parameter has a learning rate of
    its own that is 0 for the first half; the other is used by some passes only."""

    def __init__(self, model):
        model.blocks[1].gate = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        model.blocks[2].seldom = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def patch(self, model):
        return apply_patch(model, CONFIGS["static"])

    def optimizer(self, model, recipe):
        names = dict(model.named_parameters())
        gate = names.pop("blocks.1.gate")
        return recipe.optimizer([{"params": list(names.values())}, {"params": [gate], "lr_scale": 10.0}])

    def begin_step(self, merging, optimizer, done):
        optimizer.param_groups[1]["lr_scale"] = 0.0 if done < 0.5 else 10.0

    def answer(self, merging, images):
        logits = merging(images)
        return logits, merging.blocks[1].gate * torch.randn_like(logits), merging.blocks[2].seldom

    def loss(self, answer, targets, criterion):
        logits, noise, seldom = answer
        loss = criterion(logits + noise, targets) + noise.mean()
        return loss + seldom * logits.std() if targets[0].argmax() % 2 else loss


def of_its_own():
    model = new()
    return {"config": None, "model": model, "method": Noisy(model)}


CASES["method"] = of_its_own


def refused(model, recipe, message):
    try:
        Training(model, recipe, 1)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def main(out, dies=None):
    torch.set_num_threads(1)
    start("cpu")
    if torch.distributed.is_initialized():
        refused(new(), Recipe(accumulate=3), "accumulate=3 passes a step cannot be shared evenly among 2 processes")
        refused(small("lvvit_t"), Recipe(), "patch_embed.bn1 is a batch norm")
    for name, options in CASES.items():
        train(Path(out) / name, **options(), pictures=Pictures(dies), save_every=1)
    stop()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
