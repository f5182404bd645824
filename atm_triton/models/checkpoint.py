"""load_checkpoint: weights from a file, as their authors wrapped them."""

from pathlib import Path
from typing import TypeVar

from timm.models import load_state_dict
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
NAMED = 3  # keys that an error names before it counts the rest


def load_checkpoint(model: Model, path: str | Path, ema: bool | None = None) -> Model:
    """Load the weights in a file into ``model``, all of them or none.

    The file is of safetensors, or a torch file of tensors alone (``weights_only``); the weights may lie under
    "state_dict_ema", "model_ema", "state_dict" or "model", their names may begin with "module.".

    Args:
        model: any model; it keeps its dtype and device.
        ema: take averaged weights where the file has some. None: as the authors of ``model`` evaluate it, which for
            LV-ViT is False, else True.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: no such file; ValueError: it holds no weights, cannot be read without running its code, or
            its keys or shapes are not the model's; they are named, and the model is left as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    found = _read(path, getattr(model, "evaluated_with_ema", True) if ema is None else ema)
    own = model.state_dict()
    wrong = {
        "missing": sorted(own.keys() - found.keys()),
        "unexpected": sorted(found.keys() - own.keys()),
        "of another shape": [_shapes(key, found[key], own[key]) for key in own if _differ(found.get(key), own[key])],
    }
    said = "; ".join(f"{_some(keys)} {problem}" for problem, keys in wrong.items() if keys)
    if said:
        raise ValueError(f"checkpoint {path} is none of this {type(model).__name__}: {said}")
    model.load_state_dict(found)
    return model


def _read(path: Path, ema: bool) -> dict[str, Tensor]:
    try:
        found = load_state_dict(str(path), use_ema=ema, weights_only=True)
        named = bool(found) and all(isinstance(value, Tensor) for value in found.values())
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own for a file that is not theirs
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"checkpoint {path} holds no weights that can be read safely: {reason}") from error
    if not named:
        raise ValueError(f"checkpoint {path} holds no weights: want tensors by name, or a state_dict of them")
    return found


def _differ(found: Tensor | None, own: Tensor) -> bool:
    return found is not None and found.shape != own.shape


def _shapes(key: str, found: Tensor, own: Tensor) -> str:
    return f"{key} {list(found.shape)}, not {list(own.shape)},"


def _some(keys: list[str]) -> str:
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more} more" if more > 0 else "")
