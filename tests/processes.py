"""Run programs in processes forked from one that has imported torch and timm, since the import takes four seconds."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["timm", "timm.data", "torch.distributed"])


def python(*arguments, ranks=1, timeout=120):
    """Run ``python ARGUMENTS``: ``-m MODULE`` or a script, and its arguments. With several ``ranks`` each process has
    the environment that torchrun sets, output is joined rank by rank, and the return code is that of a process that
    failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        outputs = [[Path(directory, f"{name}{rank}") for name in ("out", "err")] for rank in range(ranks)]
        forks = [
            FORKS.Process(target=_run, args=(list(map(str, arguments)), environment, os.getcwd(), files))
            for environment, files in zip(_environments(ranks), outputs, strict=True)
        ]
        codes = _ended(forks, time.monotonic() + timeout)
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True))
    if None in codes:
        raise TimeoutError(f"after {timeout} s the processes have ended with {codes}\n{out}\n{err}")
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess(arguments, code, out, err)


def _environments(ranks):
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        return [common]
    with socket.create_server(("127.0.0.1", 0)) as free:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _ended(forks, deadline):
    """The return code of each process; None for one that takes too long."""
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(max(0, deadline - time.monotonic()))
    codes = [fork.exitcode for fork in forks]
    for fork in forks:
        fork.kill()
        fork.join()
    return codes


def _run(arguments, environment, cwd, files):
    multiprocessing.set_start_method(None, force=True)  # as in a process that was not forked
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if arguments[0] == "-m":
        sys.argv[:], sys.path[:0] = arguments[1:], [cwd]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:], sys.path[:0] = arguments, [str(Path(arguments[0]).parent)]
        runpy.run_path(arguments[0], run_name="__main__")
