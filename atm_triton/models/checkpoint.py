"""load_checkpoint: reads weights from a file, in any of the wrappings that authors of checkpoints use."""

import warnings
from pathlib import Path
from typing import TypeVar

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
NAMED = 3  # keys that an error names before it counts the rest


def load_checkpoint(model: Model, path: str | Path, ema: bool | None = None) -> Model:
    """Load the weights in a file into ``model``, all of them or none.

    The file is a safetensors file, or a torch file that holds only tensors (``weights_only``). The weights may be under
    "state_dict_ema", "model_ema", "state_dict" or "model", and their names may begin with "module.".

    Args:
        model: any model; it keeps its dtype and device.
        ema: take the averaged weights if the file has both kinds. None: as the authors of ``model`` evaluate it, which
            is False for LV-ViT and True for all others.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: the file does not exist; ValueError: it holds no weights, it cannot be read without running
            code in it, its keys or shapes are not the model's (the message names them), or the model is on the meta
            device. The model is left as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not a file")
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError(f"this {type(model).__name__} is on the meta device: model.to_empty(device=...) first")
    loaded = _read(path, getattr(model, "evaluated_with_ema", True) if ema is None else ema)
    wrong = {
        " missing": sorted(own.keys() - loaded.keys()),
        " unexpected": sorted(loaded.keys() - own.keys()),
        "": [_shapes(key, loaded[key], own[key]) for key in own if _differ(loaded.get(key), own[key])],
    }
    said = "; ".join(f"{_some(keys)}{problem}" for problem, keys in wrong.items() if keys)
    if said:
        raise ValueError(
            f"checkpoint {path} does not fit this {type(model).__name__}: {said}{_head_remedy(loaded, own)}"
        )
    model.load_state_dict(loaded)
    return model


def _read(path: Path, ema: bool) -> dict[str, Tensor]:
    for use_ema in (ema, True):  # averaged weights also if the file has no others
        try:
            with warnings.catch_warnings(action="ignore"):
                loaded = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
            named = bool(loaded) and all(map(_plain, loaded.values()))
        except Exception as error:  # torch, pickle, zip and safetensors raise different errors for a foreign file
            raise ValueError(f"checkpoint {path} holds no weights that can be read: {_reason(error)}") from error
        if named:
            return loaded
    raise ValueError(f"checkpoint {path} holds no weights: want plain tensors by name, or a state_dict of them")


def _plain(value: object) -> bool:
    """Whether ``value`` can be copied into a parameter or buffer."""
    if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.is_complex():
        return False
    return value.layout == torch.strided


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "weights_only" not in text:
        return text[:200] or type(error).__name__
    _, _, blocked = text.partition("Unsupported globals: ")
    what = f" ({blocked.partition('. ')[0][:120]})" if blocked else ""
    return f"it holds more than tensors{what}, which would run code; save its state_dict alone"


def _differ(loaded: Tensor | None, own: Tensor) -> bool:
    return loaded is not None and loaded.shape != own.shape


def _shapes(key: str, loaded: Tensor, own: Tensor) -> str:
    return f"{key} is {list(loaded.shape)}, want {list(own.shape)}"


def _head_remedy(loaded: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """How to make a model with the file's head, or without a head, if the two differ only in that."""
    keys = own.keys() | loaded.keys()
    heads = {key for key in keys if key.startswith(("head.", "head_dist.", "aux_head."))}
    same = all(key in own and key in loaded and not _differ(loaded[key], own[key]) for key in keys - heads)
    classes = {tuple(loaded[key].shape[:1]) for key in heads & loaded.keys()} or {(0,)}
    if not same or len(classes) > 1 or () in classes:
        return ""
    return f"; give --model-kwargs num_classes={classes.pop()[0]} (in Python an argument of the model)"


def _some(keys: list[str]) -> str:
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more} more" if more > 0 else "")
