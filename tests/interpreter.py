"""Makes Triton's interpreter twice as fast, and lets it find integers that overflow."""

import dataclasses
from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter

patch_language, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
types = {}  # NumPy's, by the name of Triton's


def speed_up():
    """Leave out work without effect: patching the language at every call of a function, making a table of types for
    every value, and computing overflow that nothing looks at."""
    interpreter._patch_lang, interpreter._get_np_dtype = patch_language_once, known_type
    check_overflow(False)


def patch_language_once(fn):
    """The launch of a kernel has patched the language already when the kernel calls a function."""
    langs = [value for value in fn.__globals__.values() if value is language or value is language.core]
    if any(language.core.is_builtin(lang.load) for lang in langs):
        return patch_language(fn)
    return SimpleNamespace(restore=lambda: None)


def known_type(of):
    scalar = of.scalar
    if scalar.name not in types:
        types[scalar.name] = numpy_type(scalar)
    return types[scalar.name]


def check_overflow(checks):
    """Whether sums, differences and products of 32-bit integers that overflow are errors."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=checks, sanitize_overflow=checks)
