"""Models by name: the digits' that comes with the package, or timm's."""

from difflib import get_close_matches
from pathlib import Path
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
    """A model in eval mode.

    Args:
        name: "digits", or any name of timm's or of :mod:`atm_triton.models`.
        checkpoint: weights to load into it (safetensors, or a .pth file of tensors alone).
        pretrained: download timm's published weights. With neither of the two, weights are random but the digits'.
        model_kwargs: of the model's function, as ``global_pool="avg"``.

    Raises:
        ValueError: an unknown name, or weights that do not fit; OSError: a file that cannot be read; TypeError: a model
            that cannot be merged.
    """
    own = {"pretrained", "checkpoint_path", "features_only"} & model_kwargs.keys()
    if own:
        raise ValueError(f"model argument {own.pop()}: give a checkpoint, or ask for pretrained weights, by itself")
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
    except Exception as error:  # an unknown tag, no network, no such file; an argument that some layer takes amiss
        reason = str(error) or f"{type(error).__name__}, with {arguments}"
        raise ValueError(f"model {name!r} cannot be made: {reason}") from error


def check_weights(name: str, checkpoint: Path | None, pretrained: bool) -> None:
    """Refuse a model by name that is unknown, or whose weights would be random."""
    _check_name(name)
    if name != DIGITS and checkpoint is None and not pretrained:
        raise ValueError(f"{name} would have random weights: give --checkpoint FILE or --pretrained")


def _check_name(name: str) -> None:
    if name != DIGITS and not timm.is_model(name.split(".")[0]):
        close = ", ".join(get_close_matches(name, [DIGITS, *timm.list_models()], n=3))
        raise ValueError(f"model {name!r} is unknown to timm" + (f"; did you mean {close}?" if close else ""))


def data_config(model: VisionTransformer) -> dict[str, Any]:
    """How timm makes images for a model: of the size that it was made for, else as its weights were trained."""
    config = resolve_model_data_config(model)
    size = getattr(model.patch_embed, "img_size", None)
    return config if size is None else {**config, "input_size": (config["input_size"][0], *size)}


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; give cpu")
