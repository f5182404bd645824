"""Other methods of token reduction, on the engine of this package: ``apply_baseline(model, "evit")``.

Each follows what its authors' code executes, not what their paper says. Where no code was found it follows what is
known of the method. Each docstring states the departures. All share weights, attention, FLOP counter and clock.
``baseline("dynamicvit").learning(model)`` prepares one for ``atm_triton.training`` (docs/experiments.md).
"""

from collections import ChainMap
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from benchmarks.baselines.ats import ATS
from benchmarks.baselines.avit import AViT
from benchmarks.baselines.base import Baseline, DenseAssignment, ReducingBlock
from benchmarks.baselines.bat import BAT
from benchmarks.baselines.dtome import DToMe
from benchmarks.baselines.dynamicvit import DynamicViT
from benchmarks.baselines.evit import EViT
from benchmarks.baselines.evovit import EvoViT
from benchmarks.baselines.iared2 import IARED2
from benchmarks.baselines.ltmp import LTMP
from benchmarks.baselines.mctf import MCTF
from benchmarks.baselines.pitome import PiToMe
from benchmarks.baselines.threshold import Threshold
from benchmarks.baselines.tofu import ToFu
from benchmarks.baselines.tome import ToMe
from benchmarks.baselines.zero_tprune import ZeroTPrune

BASELINES: dict[str, type[Baseline]] = {
    "tome": ToMe,
    "threshold": Threshold,
    "evit": EViT,
    "mctf": MCTF,
    "pitome": PiToMe,
    "ats": ATS,
    "zero_tprune": ZeroTPrune,
    "tofu": ToFu,
    "dtome": DToMe,
}
TRAINED: dict[str, type[Baseline]] = {  # methods that need training
    "dynamicvit": DynamicViT,
    "iared2": IARED2,
    "evovit": EvoViT,
    "avit": AViT,
    "bat": BAT,
    "ltmp": LTMP,
}
ALL = ChainMap(TRAINED, BASELINES)  # in order: BASELINES, then TRAINED

__all__ = ["ALL", "BASELINES", "TRAINED", "Baseline", "DenseAssignment", "ReducingBlock", "apply_baseline", "baseline"]


def baseline(name: str, **settings: Any) -> Baseline:
    """Make a method from its name and settings. It can be applied to any number of models.

    Raises:
        ValueError: an unknown method or setting, or a value out of its range.
    """
    if name not in ALL:
        close = get_close_matches(str(name), ALL, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"method {name!r} is unknown; choose one of {', '.join(ALL)}{hint}")
    known = [field.name for field in fields(ALL[name])]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting!r}; it has {', '.join(known)}")
    return ALL[name](**settings)


def apply_baseline(model: VisionTransformer, name: str, **settings: Any) -> VisionTransformer:
    """Let a timm VisionTransformer reduce its tokens by another method, in place; ``remove_patch`` undoes it.

    Args:
        model: as for :func:`atm_triton.apply_patch`.
        name: a name in :data:`BASELINES`, or in :data:`TRAINED`. A method of the latter needs a model on which
            ``baseline(name).prepare(model)`` was called and into which trained weights were then loaded.
        settings: settings of the method; ``python -m benchmarks.baselines`` lists them. Blocks count from 0.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown method or setting, or a model that the method cannot reduce; TypeError: a model that
            cannot be patched.
    """
    return baseline(name, **settings).apply(model)
