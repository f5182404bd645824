"""Records where a number came from: the versions, the machine and the command, in every result file."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy")


def environment() -> dict[str, Any]:
    """Python and package versions, processor, GPU, driver, git commit and dirty flag, UTC time and the command."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "atm_triton": _version("atm-triton"),
        "cpu": _cpu(),
        "cpu_threads": torch.get_num_threads(),
        **_gpu(),
        **_commit(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def check_file(option: str, path: Path) -> None:
    """Refuse a path that cannot be written to."""
    own = path.resolve()  # a link stays a link to what is written
    if not own.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: its directory does not exist; make it, or choose another")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a directory; name a file in it")
    if path.exists() and not path.is_file():  # writing would replace /dev/null itself
        raise ValueError(f"{option} {path} is not a regular file; choose another")
    if not all(os.access(p, os.W_OK) for p in (own.parent, own) if p.exists()):  # written beside it first
        raise PermissionError(f"{option} {path} cannot be written; choose another")
    try:
        NamedTemporaryFile(prefix=f"{path.name}.try", dir=own.parent).close()
    except OSError as error:  # a directory that takes no files, like /proc; a name that is too long
        raise OSError(f"{option} {path} cannot be written ({error.strerror}); choose another") from error


def check_new(option: str, path: Path) -> None:
    """Refuse a path that cannot be written to, or that holds something: a result that took long stays."""
    check_file(option, path)
    if path.exists() and path.stat().st_size:
        raise FileExistsError(f"{option} {path} exists already; delete it, or choose another")


def lock(number: int, path: Path) -> None:
    """Lock what is open under this file descriptor, a file or a directory at ``path``, until it is closed. Systems that
    cannot lock do nothing.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another run; wait, or choose another --out") from error
    except (ImportError, OSError):  # Windows; file systems without locks
        pass


def check_outputs(outputs: dict[str, Path], inputs: list[Path]) -> None:
    """Refuse outputs that would replace an input or one another.

    Args:
        outputs: paths to be written, by option; inputs: files, and directories of files, that are read.
    """
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        at = path.resolve()
        for given in inputs:
            inside = given.is_dir() and given.resolve() in at.parents and path.suffix != ".json"
            if path.exists() and (inside or (given.exists() and path.samefile(given))):
                raise ValueError(f"{option} {path} would replace what is read from {given}; choose another")
        if at in taken:
            raise ValueError(f"{taken[at]} and {option} are one file, {path}; choose another for one of them")
        taken[at] = option


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` and its :func:`environment` as JSON. Until all is written, the file keeps what it held
    before. A link stays one, to the file that is written."""
    path = path.resolve()
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    unfinished.replace(path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output(query)
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _commit() -> dict[str, Any]:
    """The commit of the checkout that this package is run from; None if it is not run from a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    if _output([*git, "ls-files", "--error-unmatch", str(Path(__file__))]) is None:
        return {"commit": None, "dirty": None}
    changes = _output([*git, "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"])
    return {"commit": _output([*git, "rev-parse", "HEAD"]), "dirty": None if changes is None else bool(changes)}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _command() -> str:
    """The command line without this machine's paths to the interpreter and the script."""
    arguments = sys.orig_argv[1:]
    if arguments and Path(arguments[0]).name == "atm-triton":
        return shlex.join(["atm-triton", *arguments[1:]])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        of_torchrun = [argument for argument in arguments if argument != "-u"]
        return shlex.join(["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *of_torchrun])
    return shlex.join(["python", *arguments])
