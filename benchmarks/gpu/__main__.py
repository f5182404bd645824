"""Prove and time the kernels on one GPU: ``python -m benchmarks.gpu --out dir``.

Writes ``gpu.json`` after every stage, ``gpu.md`` (the tables, which are also printed at the end) and a trace. Exit code
1 means that a stage failed.
"""

import argparse
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu import STAGES  # import nothing that imports Triton before main has set how Triton runs


def chosen(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"--stages {' '.join(unknown)}: unknown; choose from {' '.join(STAGES)}")
    return [name for name in STAGES if name in names]


def check(args: argparse.Namespace) -> None:
    from atm_triton.measure.models import check_device
    from atm_triton.ops import interpreting

    if args.device == "cpu" and not args.tiny:
        raise ValueError("--device cpu: the interpreter would take days at these sizes; add --tiny")
    check_device(args.device)
    if (args.device == "cpu") != interpreting():
        raise ValueError(f"--device {args.device}: set TRITON_INTERPRET=1 for the CPU, and for it alone")


def run_stage(name: str, setting: Any, results: dict[str, Any]) -> str | None:
    """Run a stage and fill its section of the results. Returns one line on what went wrong, or None."""
    section: dict[str, Any] = {}
    results["stages"][name] = section
    start = time.monotonic()
    failure = None
    try:
        import_module(f"benchmarks.gpu.{name}").run(setting, section, results["stages"])
    except Exception as error:  # of any kind, a compiler's or a driver's too: earlier measurements must be kept
        text = " ".join(str(error).split())[:300]
        failure = f"{name}: {text or type(error).__name__}"
        section |= {"failed": failure, "traceback": traceback.format_exc()}
    section["seconds"] = round(time.monotonic() - start, 1)
    return failure


def run(args: argparse.Namespace) -> str | None:
    """Run the stages. Returns which of them failed and why, or None."""
    stages = chosen(args.stages)
    check(args)
    import torch

    from atm_triton.measure.provenance import write_result
    from benchmarks.gpu.setting import Setting
    from benchmarks.gpu.table import tables

    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"tiny": args.tiny, "failures": [], "stages": {}}
    setting = Setting(
        device=torch.device(args.device),
        tiny=args.tiny,
        out=args.out,
        save=lambda: write_result(args.out / "gpu.json", results),
    )
    for name in stages:
        print(f"{setting.seconds():5.0f} s  {name}", flush=True)
        torch.manual_seed(0)
        failure = run_stage(name, setting, results)
        if failure:
            results["failures"].append(failure)
        setting.save()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    text = tables(results["stages"])
    (args.out / "gpu.md").write_text(text + "\n")
    print(text)
    return "; ".join(results["failures"]) or None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of gpu.json, gpu.md and the trace")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: by Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: does it run at all?")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise reports to the terminal
    from atm_triton.cli.bad_input import exit_code

    failures: list[str | None] = []
    code = exit_code("benchmarks.gpu", lambda: failures.append(run(args)))
    if failures and failures[0]:
        print(f"benchmarks.gpu: {failures[0]}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
