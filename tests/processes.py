"""Run programs in processes forked from one that has imported torch and timm, since the import takes four seconds.

:func:`python` runs them in the tests' environment, also several at once. :class:`Forking` imports modules in another
environment, such as one without Triton's interpreter, which they read when they are imported.
"""

import json
import multiprocessing
import os
import re
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds
LEAKED = re.compile(r"nanobind: leaked .*?/refleaks\.html\n?", re.DOTALL)  # Triton 3.9 reports what gc.freeze keeps
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
    common = dict(os.environ)
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


FORKING = """
import gc, io, json, os, runpy, sys
from importlib import import_module
for module in sys.argv[1:]:
    import_module(module)
gc.freeze()
for line in sys.stdin:
    request = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
del line, child, import_module
os.environ.clear()
os.environ.update(request["environment"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(os.open(request["err"], os.O_WRONLY | os.O_CREAT), 2)
if request["out"] is None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.close(writer)
else:
    os.dup2(os.open(request["out"], os.O_WRONLY | os.O_CREAT), 1)
if os.environ.get("PYTHONUNBUFFERED"):
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
option, code, *sys.argv[1:] = request["arguments"]
if option == "-m":
    runpy.run_module(code, run_name="__main__", alter_sys=True)
else:
    exec(code)
"""


class Forking:
    """A Python process that has imported ``modules`` in an environment of its own, and forks for each program. A fork
    ends as any process does: it writes what it has not written by then.
    """

    def __init__(self, *modules, environment):
        self._environment = environment
        command = [sys.executable, "-c", FORKING, *modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, text=True, bufsize=1, cwd=ROOT, env=environment)

    def python(self, *arguments, reader=True, **environment):
        """Run ``python ARGUMENTS``: ``-m MODULE`` or ``-c CODE``, and its arguments, in the root of the checkout.
        Without a ``reader`` nobody reads its output."""
        with tempfile.TemporaryDirectory() as directory:
            out, err = (Path(directory, name) for name in ("out", "err"))
            request = {"arguments": list(map(str, arguments)), "environment": self._environment | environment}
            request |= {"out": str(out) if reader else None, "err": str(err)}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
            if not ready:
                self._process.kill()
                raise TimeoutError(f"python {' '.join(map(str, arguments))} has not ended after {TIMEOUT} s")
            code = int(self._process.stdout.readline())
            error = LEAKED.sub("", err.read_text())
            return subprocess.CompletedProcess(arguments, code, out.read_text() if reader else None, error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()
