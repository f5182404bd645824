"""The models that are timed on a GPU, with their images and merging configurations."""

import math
from dataclasses import replace
from typing import NamedTuple

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from atm_triton.block import ATMBlock
from atm_triton.config import ATMConfig
from atm_triton.flops import mean
from atm_triton.measure.configurations import digits_config
from atm_triton.measure.evaluate import share
from atm_triton.measure.images import open_images
from atm_triton.measure.models import open_model
from atm_triton.ops import Match
from atm_triton.packed import Packed
from atm_triton.patch import apply_patch, install
from benchmarks.gpu.setting import Setting

DIGITS = "digits"
NAMES = {"DeiT-S": "deit_small_patch16_224", "DeiT-B": "deit_base_patch16_224", "ViT-L": "vit_large_patch16_224"}
NAMES |= {"DINOv2-S": "vit_small_patch14_dinov2"}
TINY_DEPTH, TINY_SIDE = 2, 32
SHARE = 1 / 24  # of the initial tokens merge in each of 12 blocks: 8 of DeiT's 197
OWN_R = ", image's r"  # marks plans with the token counts of adapt="image", where those differ from the other plans'


class Case(NamedTuple):
    """A model and its images. ``configs``: configurations by adapt; ``plans``: schedules for bounds and whole graphs,
    by the mark in their names; ``plan``: for each of ``configs`` the mark of the plan to compare with."""

    model: VisionTransformer
    images: Tensor
    configs: dict[str, ATMConfig]
    plans: dict[str, ATMConfig]
    plan: dict[str, str]


def opened(model: VisionTransformer, name: str, batch: int, setting: Setting) -> Case:
    return (digits if name == DIGITS else deit)(model, batch, setting)


def made(name: str, setting: Setting) -> VisionTransformer:
    dtype = setting.pick(torch.bfloat16, torch.float32)  # the interpreter cannot multiply bfloat16
    if name == DIGITS:
        model = open_model()
        if setting.tiny:
            model.blocks = model.blocks[:TINY_DEPTH].eval()
            model.set_input_size(TINY_SIDE)
        return model.to(setting.device, dtype)
    shape = {} if not setting.tiny else {"img_size": TINY_SIDE, "embed_dim": 32, "depth": 3, "num_heads": 2}
    with torch.device(setting.device):
        return timm.create_model(NAMES[name], **shape).eval().to(dtype)


def deit(model: VisionTransformer, batch: int, setting: Setting) -> Case:
    """A case with random weights, whose thresholds merge as many tokens as the given r."""
    dtype, depth = next(model.parameters()).dtype, len(model.blocks)
    N = model.patch_embed.num_patches + model.num_prefix_tokens
    r = setting.pick(int(SHARE * N * 12 / depth), 1)
    images = torch.randn(batch, 3, *model.patch_embed.img_size, dtype=dtype, device=setting.device)
    static = ATMConfig(adapt="static", schedule=(r,) * depth, backend="triton")
    configs = {
        "static": static,
        "batch": fitted(model, images, "batch", int((r + 0.5) * batch)),  # the mean rounds down to r
        "image": fitted(model, images, "image", r * batch),
    }
    return Case(model=model, images=images, configs=configs, plans={"": static}, plan=dict.fromkeys(configs, ""))


@torch.inference_mode()
def digits(model: VisionTransformer, batch: int, setting: Setting) -> Case:
    """The case of the trained digits model with the shipped thresholds. One of its plans merges as many tokens as
    "batch" does, the other as many as an image merges on average with "image"."""
    images, _ = next(iter(open_images(open_model(), limit=batch, batch_size=batch)))
    height, width = model.patch_embed.img_size  # a tiny model gets a corner of each image
    images = images[..., -height:, -width:].to(next(model.parameters()))
    configs = {
        adapt: setting.pick(digits_config(adapt), ATMConfig(alpha=0.9, beta=0.04, theta_min=0.8, adapt=adapt))
        for adapt in ("batch", "image")
    }
    configs = {adapt: replace(config, backend="triton") for adapt, config in configs.items()}
    plans = {}
    for mark, config in zip(("", OWN_R), configs.values(), strict=True):
        blocks = patched(model, config, engine=False)
        blocks(images)
        r = tuple(round(mean(r)) for r in blocks.blocks.last.merged)
        plans[mark] = replace(config, adapt="static", schedule=r, thresholds=None)
    configs = {"static": plans[""], **configs}
    return Case(
        model=model, images=images, configs=configs, plans=plans, plan={"static": "", "batch": "", "image": OWN_R}
    )


class FittingBlock(ATMBlock):
    """A block that sets its theta so that all its images together have ``wanted`` candidates."""

    wanted: int

    def match(self, keys: Tensor, tokens: Packed) -> Match | None:
        similarity = super().match(keys, tokens).similarity.sort(descending=True).values
        last = min(self.wanted, int((similarity > -math.inf).sum())) - 1
        between = similarity[last : last + 2].double().mean().item()  # midway between the last and the next pair
        self.theta = min(max(between, -1.0), 1.0)
        return super().match(keys, tokens)


@torch.inference_mode()
def fitted(model: VisionTransformer, images: Tensor, adapt: str, wanted: int) -> ATMConfig:
    """Fit thresholds with which each block has ``wanted`` candidates in all ``images`` together."""
    config = ATMConfig(adapt=adapt, thresholds=(1.0,) * len(model.blocks), backend="triton")

    def fitting(block: Block, index: int) -> FittingBlock:
        merging = FittingBlock.of(block, config, index, len(model.blocks), model.num_prefix_tokens)
        merging.wanted = wanted
        return merging

    probe = install(share(model), fitting, config)
    probe(images)
    return replace(config, thresholds=tuple(block.theta for block in probe.blocks))


def patched(model: VisionTransformer, config: ATMConfig, engine: bool) -> VisionTransformer:
    return apply_patch(share(model), replace(config, engine=engine))
