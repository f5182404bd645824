"""Reads configurations from files, and checks that they belong to the model at hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from atm_triton.config import REMEDY, ATMConfig
from atm_triton.digits import model as digits_model
from atm_triton.measure.comparison import Measure, measure_of


def digits_config(adapt: str = "batch") -> ATMConfig:
    """The thresholds chosen for the digits model on its calibration split, for "batch" or for "image"."""
    path = digits_model.IMAGE_CONFIG if adapt == "image" else digits_model.CONFIG
    return ATMConfig.from_json(path.read_text())


def read_config(path: Path, model: str, model_kwargs: dict[str, Any], checkpoint: Path | None) -> ATMConfig:
    """Read a configuration from a JSON file, :class:`ATMConfig`'s own or a result that holds one, and check that it
    belongs to this model and these weights (``checkpoint``; None: the model's own).

    Raises:
        OSError: no such file.
        ValueError: the file holds no configuration, or one that was calibrated for another model or other weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} is not a file; atm-triton calibrate makes one")
    try:
        text = path.read_text()
        config = ATMConfig.from_json(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not config.has_thresholds:
        raise ValueError(f"--config {path} has no thresholds; {REMEDY}")
    document = json.loads(text)
    made = document.get("model"), document.get("model_kwargs") or {}
    if made[0] is not None and made != (model, model_kwargs):
        of, here = (f"{name} {kwargs or ''}".strip() for name, kwargs in (made, (model, model_kwargs)))
        raise ValueError(f"--config {path} was calibrated for {of}, not for {here}; calibrate anew")
    of_weights = [document[name] for name in ("checkpoint_sha256", "ema_sha256") if name in document]
    if of_weights and checksum(checkpoint) not in of_weights:
        raise ValueError(f"--config {path} was calibrated for other weights, {document.get('weights')}; calibrate anew")
    return config


def promised_measure(path: Path | None, model: VisionTransformer) -> Measure | None:
    """The measure of the promise in a calibration's file; None if the file holds no promise.

    Raises:
        ValueError: the measure does not fit the model.
    """
    document = {} if path is None else json.loads(path.read_text())
    promise = document.get("promise")
    if promise is None:
        return None
    if not isinstance(promise, dict):
        raise ValueError(f"--config {path}: its promise is {promise!r}; want what atm-triton calibrate writes")
    try:
        promised = Measure(promise.get("measure", "softmax"))  # older files compared nothing else
        fitting = measure_of(model, promised.name == "dense", promised.name == "sigmoid")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if promised != fitting:
        raise ValueError(f"--config {path} compared {promised}, but this model gives {fitting}; calibrate anew")
    return promised


def checksum(checkpoint: Path | None) -> str | None:
    """The SHA-256 of a file of weights; None for a model's own weights."""
    if checkpoint is None:
        return None
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} is not a file")
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest()
