"""A second device for a machine without a GPU: tensors whose data lie on the CPU but which claim another device.

As on a GPU, an operation on tensors of both devices fails, except for numbers and indices. The device is called "meta",
the only name besides the CPU's for which torch asks no driver. So costs, which are counted on meta tensors, are not
counted right here.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")
MIX = {aten.copy_.default, aten._to_copy.default, aten.to.other}  # operations that take tensors of both devices
INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor on the other device; ``data_here`` has its data."""

    @staticmethod
    def __new__(cls, here):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=DEVICE, **layout)
        made.data_here = here
        return made

    def tolist(self):
        return self.detach().data_here.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Also sees operations that make tensors and take none."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


@contextlib.contextmanager
def other_device(monkeypatch):
    """Yield the device. In this context ``module.to(device)`` and all operations work; autocast, which torch does not
    have for this device, does nothing."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Operations():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _run(operation, args, kwargs):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    _check_one_device(operation, given)
    asked, args, kwargs = _device_argument(operation, list(args), dict(kwargs))
    there = any(isinstance(tensor, Elsewhere) for tensor in given)
    if asked is not None:
        there = torch.device(asked) == DEVICE
    elif operation in (aten.copy_.default, aten.to.other):
        there = isinstance(args[operation is aten.to.other], Elsewhere)
    with _disable_current_modes():
        out = operation(*tree_map(_here, args), **tree_map(_here, kwargs))
    known = {id(_here(tensor)): tensor for tensor in given}

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        same = known.get(id(value))  # what an operation in place returns is its argument itself
        if same is not None and isinstance(same, Elsewhere) == there:
            return same
        return Elsewhere(value) if there else value

    with torch.inference_mode(False):  # torch cannot detach a tensor of Python that was made in inference mode
        return tree_map(placed, out)


def _check_one_device(operation, given):
    if operation in MIX:
        return
    if operation in INDEX and isinstance(given[0], Elsewhere):  # its indices may lie on the CPU
        given = [given[0], *given[-1:]] if operation is not aten.index.Tensor else given[:1]
    numbers = torch.Tag.pointwise in operation.tags  # to these, a tensor without dimensions is a number
    here = [tensor for tensor in given if not isinstance(tensor, Elsewhere) and not (numbers and tensor.dim() == 0)]
    if here and any(isinstance(tensor, Elsewhere) for tensor in given):
        raise RuntimeError(f"{operation}: tensors on two devices; {[list(tensor.shape) for tensor in here]} on the CPU")


def _device_argument(operation, args, kwargs):
    """The device that is asked for, and the arguments with the CPU in its place."""
    names = [argument.name for argument in operation._schema.arguments]
    position = names.index("device") if "device" in names else len(args)
    where, at = (args, position) if position < len(args) else (kwargs, "device")
    asked = where.get("device") if where is kwargs else where[at]
    if asked is not None:
        where[at] = "cpu"
    return asked, args, kwargs


def _here(value):
    return value.data_here if isinstance(value, Elsewhere) else value
