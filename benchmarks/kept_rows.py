"""Decide whether a row of ``offline_compile`` still holds: by the code of its kernel and by what is launched."""

import ast
import hashlib
import json
import re
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import triton


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code_of(path: str) -> str:
    """A digest of the code of a module's kernels: functions and constants, without comments and docstrings."""
    return digest(covered(Path(path)))


def covered(path: Path) -> str:
    """The tokens of a file's kernels and constants, and of those in the kernel modules that it imports from."""
    files = [path]
    for file in files:
        taken = re.findall(r"^from atm_triton\.kernels\.(\w+) import", file.read_text(), re.MULTILINE)
        files += [other for name in taken if (other := path.with_name(f"{name}.py")) not in files]
    files.sort(key=lambda file: file.stem == "common")  # last
    return "".join(compiled(file.read_text()) for file in files)


def compiled(text: str) -> str:
    """The tokens of a module's kernels and constants."""
    lines, parts = text.splitlines(keepends=True), []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and "triton.jit" in "".join(map(ast.unparse, node.decorator_list)):
            first, documented = node.decorator_list[0].lineno, ast.get_docstring(node) is not None
        elif isinstance(node, ast.Assign) and "constexpr" in ast.unparse(node.value):
            first, documented = node.lineno, False
        else:
            continue
        left_out = range(node.body[0].lineno, node.body[0].end_lineno + 1) if documented else ()
        code = (
            line
            for number, line in enumerate(lines, 1)
            if first <= number <= node.end_lineno and number not in left_out
        )
        tokens = tokenize.generate_tokens(code.__next__)
        parts += [token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    return " ".join(parts)


def named(row: dict[str, Any]) -> tuple[str, ...]:
    """The fields that identify a row: it still holds if all of them are the same."""
    return tuple(row[name] for name in ("case", "kernel", "chip", "configuration", "launch", "code"))


def known_rows(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a result file by their identity.

    Raises:
        FileNotFoundError: no such file; ValueError: another version of Triton made it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--keep: {path} is not there; compile everything, without --keep")
    document = json.loads(path.read_text())
    if document["environment"]["triton"] != triton.__version__:
        raise ValueError(f"--keep: {path} is of triton {document['environment']['triton']}, not {triton.__version__}")
    return {named(row): row for row in document["rows"] if "code" in row}
