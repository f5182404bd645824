"""Makes Triton's interpreter several times as fast, and lets it find integers that overflow."""

import dataclasses
from types import SimpleNamespace

import numpy
from triton import language
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

patch_language, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
make_block_type, reduce = core.block_type.__init__, interpreter.ReduceOps.apply_impl
check_operands, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
numpy_types = {}  # by the name of Triton's
block_types = {}  # by their elements and shape
shapes = {(): (core.tuple([]), core.constexpr(1))}  # by a type's shape: the tensor's, and its number of elements


def speed_up():
    """Leave out work without effect: patching the language at every call of a function, making types and shapes anew
    for every value, casting and broadcasting what already agrees, reducing by xor one element at a time, and computing
    overflow that nothing looks at."""
    interpreter._patch_lang, interpreter._get_np_dtype = patch_language_once, known_numpy_type
    core.block_type.__new__, core.block_type.__init__ = known_block_type, lambda self, element_ty, shape: None
    core.tensor.__init__ = tensor_of_known_type
    TritonSemantic.binary_op_type_checking_impl = operands_checked_if_they_differ
    TritonSemantic.broadcast_impl_value = broadcast_if_shapes_differ
    TritonSemantic.binary_op_sanitize_overflow_impl = overflow_found
    interpreter.ReduceOps.apply_impl = xor_reduced_at_once
    check_overflow(False)


def patch_language_once(fn):
    """The launch of a kernel has patched the language already when the kernel calls a function."""
    langs = [value for value in fn.__globals__.values() if value is language or value is language.core]
    if any(language.core.is_builtin(lang.load) for lang in langs):
        return patch_language(fn)
    return SimpleNamespace(restore=lambda: None)


def known_numpy_type(of):
    scalar = of.scalar
    if scalar.name not in numpy_types:
        numpy_types[scalar.name] = numpy_type(scalar)
    return numpy_types[scalar.name]


def known_block_type(cls, element_ty, shape):
    """The one object for all equal types. Equal shapes of tensors are one object too, so ``is`` compares them."""
    shape = shape.value if isinstance(shape, core.constexpr) else shape
    shape = tuple(n.value if isinstance(n, core.constexpr) else n for n in shape)
    key = element_ty.name, getattr(element_ty, "address_space", None), shape
    if key not in block_types:
        made = object.__new__(cls)
        make_block_type(made, element_ty, list(shape))  # or raises
        if shape not in shapes:
            shapes[shape] = core.tuple([core.constexpr(n) for n in shape]), core.constexpr(made.numel)
        made.known_shape = shapes[shape]
        block_types[key] = made
    return block_types[key]


def tensor_of_known_type(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.known_shape if type.is_block() else shapes[()]


def operands_checked_if_they_differ(self, left, right, *args, **kwargs):
    """Operands of one shape and one of these types need no cast, whatever the operation; division casts smaller
    floats."""
    if isinstance(left, core.tensor) and isinstance(right, core.tensor) and left.shape is right.shape:
        if left.dtype is right.dtype and left.dtype in (core.int32, core.int64, core.float32):
            return left, right
    return check_operands(self, left, right, *args, **kwargs)


def broadcast_if_shapes_differ(self, left, right):
    return (left, right) if left.shape is right.shape else broadcast(self, left, right)


def xor_reduced_at_once(self, values):
    """The sort of triton.language reduces by xor."""
    if self.combine_fn is not language.standard._xor_combine or not values[0].dtype.is_int():
        return reduce(self, values)
    (of,) = values
    return self.to_tensor(numpy.bitwise_xor.reduce(of.handle.data, self.axis, keepdims=self.keep_dims), of.dtype)


def overflow_found(self, left, right, operation):
    """Triton's own check casts and compares in the interpreter, which takes half of the time."""
    type = left.type.scalar
    if not self.builder.options.sanitize_overflow or type.int_bitwidth >= 64:
        return
    ufunc = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}[operation.__name__]
    exact = ufunc(left.handle.data, right.handle.data, dtype=numpy.int64)
    if exact.min() < type.get_int_min_value() or exact.max() > type.get_int_max_value():
        raise OverflowError(f"{type}: {operation.__name__} of {left} and {right}")


def check_overflow(checks):
    """Whether sums, differences and products of 32-bit integers that overflow are errors."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=checks, sanitize_overflow=checks)
