"""The directory of a run: writes its files, always whole, and reads what a resumed run continues from."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from atm_triton.measure.distributed import rank
from atm_triton.measure.provenance import lock

CHECKPOINT, LOG, WEIGHTS, AVERAGED, RESULT = (
    "checkpoint.pt",
    "log.jsonl",
    "model.safetensors",
    "ema.safetensors",
    "result.json",
)
NAMES = (CHECKPOINT, LOG, WEIGHTS, AVERAGED, RESULT)


class RunFolder:
    """The directory of a fine-tuning. Of several processes only the first writes.

    Args:
        path: the directory, made if it does not exist.
        settings: all that distinguishes one run from another, as JSON values.

    Raises:
        OSError: the path is a file, or the directory cannot be made.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--out {path} is a file; name a directory")
        if rank() == 0:
            path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no other run write here meanwhile.

        Raises:
            ValueError: another run holds the directory.
        """
        if rank() != 0:
            yield
            return
        number = os.open(self.path, os.O_RDONLY)
        try:
            lock(number, self.path)
            yield
        finally:
            os.close(number)

    def check_new(self) -> None:
        """Raise FileExistsError if another run has left files here."""
        left = [name for name in NAMES if (self.path / name).exists()]
        if left:
            raise FileExistsError(
                f"--out {self.path} holds {', '.join(left)} of another run; give --resume to go on with it, or "
                "another directory"
            )

    def load(self) -> dict[str, Any]:
        """Read what the last :meth:`save` wrote, and cut the log back to that step.

        Raises:
            FileNotFoundError: nothing was saved; ValueError: it cannot be read, or the run had other settings.
        """
        path = self.path / CHECKPOINT
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} does not exist; leave --resume out to begin")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = json.loads(state["settings"])
        except Exception as error:  # torch, pickle and zip each raise their own for a file that is not theirs
            raise ValueError(f"--resume: {path} is not a readable checkpoint of a fine-tuning") from error
        self._check_same(before)
        if rank() == 0:
            self._cut_log(state["step"])
        return state

    def _check_same(self, before: dict[str, Any]) -> None:
        before, asked = _parts(before), _parts(self.settings)
        for name in {**before, **asked}:
            was, now = before.get(name), asked.get(name)
            if was != now:
                raise ValueError(
                    f"--resume: {name} is {_short(now)}, the run in {self.path} had {_short(was)}; "
                    "go on with its settings, or begin in another --out"
                )

    def _cut_log(self, step: int) -> None:
        path = self.path / LOG
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {path} is damaged: {error}; delete it, and the log begins here") from error
        replace_file(path, "".join(kept).encode())

    def log(self, row: dict[str, Any]) -> None:
        """Add a line to the log."""
        if rank() == 0:
            try:
                with (self.path / LOG).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise OSError(_unwritten(self.path / LOG, error)) from error

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; the previous one stays until this one is complete."""
        if rank() == 0:
            buffer = io.BytesIO()
            torch.save({**state, "settings": json.dumps(self.settings)}, buffer)
            replace_file(self.path / CHECKPOINT, buffer.getbuffer())

    def save_weights(self, name: str, weights: dict[str, Tensor]) -> Path:
        """Write weights (safetensors)."""
        if rank() == 0:
            plain = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            replace_file(self.path / name, safetensors.torch.save(plain))
        return self.path / name


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file completely, or leave what it held before.

    Raises:
        OSError: for example, the disk is full; the unfinished file is removed.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(_unwritten(path, error)) from error


def _unwritten(path: Path, error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror}); what was saved before is kept: make room, then --resume"


def _parts(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten settings: the entries of a dictionary get dotted names such as merging.split_depth."""
    parts: dict[str, Any] = {}
    for name, value in settings.items():
        parts |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return parts


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:25]}...{text[-32:]}"  # paths differ at their ends
