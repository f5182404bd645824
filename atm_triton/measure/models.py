"""Opens models by name: the digits model that comes with the package, or timm's."""

from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from atm_triton.digits import model as digits_model
from atm_triton.models import load_checkpoint
from atm_triton.patch import check_model

DIGITS = "digits"


def open_model(
    name: str = DIGITS, checkpoint: Path | None = None, pretrained: bool = False, **model_kwargs: Any
) -> VisionTransformer:
    """Make a model, in eval mode.

    Args:
        name: "digits", or any name that timm or :mod:`atm_triton.models` knows.
        checkpoint: weights to load into it (safetensors, or a .pth file that holds only tensors).
        pretrained: download timm's published weights. Without this and ``checkpoint`` weights are random, except the
            digits model's.
        model_kwargs: arguments of the model's function, such as ``global_pool="avg"``.

    Raises:
        ValueError: the name is unknown or the weights do not fit; OSError: the file cannot be read; TypeError: tokens
            of this model cannot be merged.
    """
    own = {"pretrained", "checkpoint_path", "features_only"} & model_kwargs.keys()
    if own:
        raise ValueError(f"model argument {own.pop()} is not supported; choose weights by checkpoint or pretrained")
    _check_name(name)
    if name == DIGITS:
        name, pretrained = digits_model.NAME, checkpoint is None
    if pretrained:
        with torch.device("meta"):
            check_model(_made(name, **model_kwargs))  # before weights are downloaded
    model = _made(name, pretrained=pretrained, **model_kwargs)
    check_model(model)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def _made(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # an unknown tag, no network, no such file; an argument that some layer rejects
        reason = str(error) or f"{type(error).__name__}, with {arguments}"
        raise ValueError(f"model {name!r} cannot be made: {reason}") from error


def check_weights(name: str, checkpoint: Path | None, pretrained: bool) -> None:
    """Refuse a model whose name is unknown, that cannot be merged, or whose weights would be random."""
    _check_name(name)
    if name != DIGITS and checkpoint is None and not pretrained:
        with torch.device("meta"):
            check_model(_made(name))
        raise ValueError(f"{name} would have random weights: give --checkpoint FILE or --pretrained")


def _check_name(name: str) -> None:
    if name != DIGITS and not timm.is_model(name.split(".")[0]):
        close = ", ".join(get_close_matches(name, [DIGITS, *timm.list_models()], n=3))
        raise ValueError(f"model {name!r} is unknown to timm" + (f"; did you mean {close}?" if close else ""))


def data_config(model: VisionTransformer) -> dict[str, Any]:
    """timm's settings for preparing images: channels and size are the model's own if it has them, the rest its
    weights'. If these are for another number of channels, every channel takes the average of their means and
    deviations."""
    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    size = getattr(model.patch_embed, "img_size", None) or config["input_size"][1:]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (fmean(config[name]),) * channels
    return {**config, "input_size": (channels, *size)}


def check_device(device: str) -> None:
    """Refuse "cuda" if torch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; give cpu")
