"""Makes Triton's interpreter twice as fast, and lets it find integers that overflow."""

import dataclasses
from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter

patch_language = interpreter._patch_lang


def speed_up():
    """Leave out work without effect: patching the language at every call of a function, and computing overflow that
    nothing looks at."""
    interpreter._patch_lang = patch_language_once
    check_overflow(False)


def patch_language_once(fn):
    """The launch of a kernel has patched the language already when the kernel calls a function."""
    langs = [value for value in fn.__globals__.values() if value is language or value is language.core]
    if any(language.core.is_builtin(lang.load) for lang in langs):
        return patch_language(fn)
    return SimpleNamespace(restore=lambda: None)


def check_overflow(checks):
    """Whether sums, differences and products of 32-bit integers that overflow are errors."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=checks, sanitize_overflow=checks)
