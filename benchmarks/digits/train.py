"""Train the digits model from nothing: ``python -m benchmarks.digits.train`` (under an hour on two CPU cores).

The canvas grows from 40 to 64 to 112 px, on random windows of the 14 x 14 grid of positions, under one cosine schedule.
Small canvases teach the strokes cheaply; the last stage teaches the clutter. A second head, which predicts for each
patch the digit that covers it (or none), helps the middle blocks and is dropped afterwards.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from torch import nn
from tqdm import tqdm

from atm_triton.cli.bad_input import Parser, exit_code
from atm_triton.digits.model import CHECKPOINT, vit_digits_patch8_112
from atm_triton.digits.render import CANVAS, Digits, render
from atm_triton.measure.models import check_device
from atm_triton.measure.provenance import check_file, write_result

STAGES = ((40, 48, 2600), (64, 32, 2400), (CANVAS, 32, 1700))  # side in px, batch size, steps
PATCH, GRID = 8, CANVAS // 8
AUXILIARY_BLOCK = 8  # the auxiliary head reads its output tokens
RESULT = Path(__file__).parents[1] / "results" / "digits_training.json"


class Trainee(nn.Module):
    """The model and its auxiliary head, on canvases of any side that is a multiple of the patch."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.patch_norm = nn.LayerNorm(model.embed_dim)
        self.patch_head = nn.Linear(model.embed_dim, 11)
        positions = build_sincos2d_pos_embed([GRID, GRID], model.embed_dim)
        with torch.no_grad():
            model.pos_embed[0, 1:] = 0.2 * positions

    def forward(self, images: torch.Tensor, corner: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images [B, 1, side, side] and the window's corner -> logits [B, 10], patch logits [B, P, 11]."""
        model = self.model
        side = images.shape[-1] // PATCH
        grid = model.pos_embed[0, 1:].view(GRID, GRID, -1)
        window = grid[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + window.reshape(1, side * side, -1)
        cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for number, block in enumerate(model.blocks, start=1):
            x = block(x)
            if number == AUXILIARY_BLOCK:
                patches = self.patch_head(self.patch_norm(x[:, 1:]))
        return model.forward_head(model.norm(x)), patches


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to the normalised floats that the model takes (mean 0.5, std 0.25)."""
    return (images.float() / 255 - 0.5) / 0.25


def loss_of(trainee: Trainee, batch: Digits, device: str, generator: torch.Generator) -> torch.Tensor:
    images = normalise(batch.images).to(device)
    room = GRID - images.shape[-1] // PATCH
    corner = tuple(torch.randint(room + 1, (2,), generator=generator).tolist())
    logits, patches = trainee(images, corner)
    covered = F.avg_pool2d(batch.ink, PATCH).flatten(1) > 0.1
    of_patch = torch.where(covered, batch.labels[:, None], 10).to(device)
    loss = F.cross_entropy(logits, batch.labels.to(device), label_smoothing=0.05)
    return loss + 0.5 * F.cross_entropy(patches.flatten(0, 1), of_patch.flatten())


@torch.inference_mode()
def accuracy(model: VisionTransformer, split: str, count: int, device: str) -> float:
    """Top-1 in percent on ``count`` images of a split, seed 0."""
    model.eval()
    digits = render(split, count, seed=0)
    right = 0
    for images, labels in zip(digits.images.split(250), digits.labels.split(250), strict=True):
        right += (model(normalise(images).to(device)).argmax(1).cpu() == labels).sum().item()
    model.train()
    return 100 * right / count


def train(seed: int, device: str, scale: float) -> tuple[VisionTransformer, list[dict]]:
    """Train all stages, each with ``scale`` times its steps. Returns the model and a log row for every 50 steps."""
    torch.manual_seed(seed)
    # Muon orthogonalises in bfloat16 only, which is slow on a CPU without bfloat16 products
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    trainee = Trainee(vit_digits_patch8_112(weight_init="jax")).to(device)
    optimizer = create_optimizer_v2(
        trainee, opt="nmuon", lr=5e-3, weight_decay=0.05, fallback_list=["head"], fallback_lr_scale=0.3
    )
    stages = [(side, batch, max(1, round(steps * scale))) for side, batch, steps in STAGES]
    total = sum(steps for *_, steps in stages)
    schedule = CosineLRScheduler(optimizer, t_initial=total, warmup_t=max(1, total // 30), lr_min=1e-5)
    generator = torch.Generator().manual_seed(seed)
    log, step, start = [], 0, time.perf_counter()
    bar = tqdm(total=total, desc="train", unit="step", disable=None)
    for side, batch_size, steps in stages:
        for _ in range(steps):
            schedule.step(step)
            loss = loss_of(trainee, render("train", batch_size, 1_000_000 * (seed + 1) + step, side), device, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if step % 50 == 0 or step == total:
                row = {"step": step, "side": side, "loss": loss.item(), "seconds": time.perf_counter() - start}
                log.append(row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", side=side)
    bar.close()
    return trainee.model, log


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    check_file("--out", args.out)
    check_file("--json", args.json)
    if not 0 < args.scale < math.inf:
        raise ValueError(f"--scale must be finite and above 0, got {args.scale}")
    model, log = train(args.seed, args.device, args.scale)
    halves = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict(halves)  # measure the weights as they are saved
    result = {
        "seed": args.seed,
        "scale": args.scale,
        "stages": STAGES,
        "minutes": log[-1]["seconds"] / 60,
        "calibration_top1": accuracy(model, "calibration", 2000, args.device),
        "test_top1": accuracy(model, "test", 4000, args.device),
        "log": log,
    }
    save_file(halves, args.out)
    write_result(args.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "log"}))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="the checkpoint to write (safetensors)")
    parser.add_argument("--json", type=Path, default=RESULT, help="the log and the accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps (on a GPU: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(argv)
    return exit_code("train", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
