"""What CUDA graphs bake in from a model: its modules, and the memory of their tensors."""

from itertools import chain, repeat
from operator import contains, is_, itemgetter
from typing import Any

import torch
from timm.layers import DropPath
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from atm_triton import ops
from atm_triton.block import ATMAttention, ATMBlock

_HELD = itemgetter("_modules", "_parameters", "_buffers")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
_TRAINING = itemgetter("training")
_ATTENDS = itemgetter("scale", "fused_attn")
_KNOWN = ("torch.", "timm.", "atm_triton.")  # plain attributes of these modules do not change between passes
_FORWARD, _POINTER = "forward", Tensor.data_ptr
_METHODS = ("forward_head", "pool", "_pos_embed")  # methods in a graph that may be overridden on a model
MODULES = 24  # modules per part: the host can check about this many while it waits for a stage


class Modules:
    """The modules of a patched model as they are now.

    ``obstacle``: why its forward pass cannot be captured, None: it can. The memory of its tensors is kept alive: a
    graph that is replayed before all ``parts`` were checked for changes reads nothing else.
    """

    def __init__(self, model: VisionTransformer) -> None:
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        whole = Part(modules, modules[1:])  # a model's own hooks run around what is captured
        self.objects, self.obstacle = whole.objects, _obstacle(model, whole)
        self.pointers, self.settings = whole.pointers, whole.settings
        self.memory = [] if self.obstacle else [tensor.untyped_storage() for tensor in whole.tensors]
        self.parts = [Part(modules[:1], [])] if self.obstacle is None else []
        for first in range(1, len(modules) if self.obstacle is None else 1, MODULES):
            self.parts.append(Part(modules[first : first + MODULES], modules[first : first + MODULES]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Modules) or len(self.objects) != len(other.objects):
            return False
        same = self.pointers == other.pointers and self.settings == other.settings
        return same and all(map(is_, self.objects, other.objects))


class Part:
    """What some ``modules`` are made of, to notice changes. Those that are ``captured`` must run no Python of their own
    in a pass, such as hooks, because graphs would skip it."""

    def __init__(self, modules: list[nn.Module], captured: list[nn.Module]) -> None:
        self.owns, self.captured = ([module.__dict__ for module in some] for some in (modules, captured))
        self.strangers = [module.__dict__ for module in modules if not type(module).__module__.startswith(_KNOWN)]
        self.models = [module.__dict__ for module in modules if isinstance(module, VisionTransformer)]
        self.attentions = [module.__dict__ for module in modules if isinstance(module, Attention)]
        self.objects, self.settings = self._objects(), self._settings()
        self.tensors = [each for each in self.objects if isinstance(each, Tensor)]
        self.pointers = list(map(_POINTER, self.tensors))

    def _objects(self) -> list[nn.Module | Tensor | None]:
        held = chain.from_iterable(map(dict.values, chain.from_iterable(map(_HELD, self.owns))))
        return [*held, *(own.get(name) for own in self.models for name in _METHODS)]

    def _settings(self) -> list[Any]:
        """Plain attributes of modules from other libraries, such as PEFT's active adapter, and the settings of
        attention."""
        return [*map(_plain, self.strangers), *map(_ATTENDS, self.attentions)]

    def python_acts(self) -> bool:
        """Whether a pass runs Python that a graph would skip, or a module trains."""
        hooks, forwards = (
            chain.from_iterable(map(_HOOKS, self.captured)),
            map(contains, self.captured, repeat(_FORWARD)),
        )
        return any(map(_TRAINING, self.captured)) or any(hooks) or any(forwards) or every_module._has_any_global_hook()

    def same(self) -> bool:
        """Whether nothing has changed. Written for speed: each pass asks."""
        now = self._objects()
        if len(now) != len(self.objects) or not all(map(is_, now, self.objects)) or self.python_acts():
            return False
        if self.settings and self._settings() != self.settings:
            return False
        return list(map(_POINTER, self.tensors)) == self.pointers


def _plain(value: Any) -> Any:
    """A copy of numbers, strings and their containers that can be compared. None for everything else."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    return value if isinstance(value, (bool, int, float, str)) else None


def _obstacle(model: VisionTransformer, whole: Part) -> str | None:
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        return f"{scripted[0]} is compiled by torch.jit and cannot be inspected"
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in whole.tensors):
        return "a parameter is of a class of its own"
    if hasattr(model, "unshard"):  # refuse even though the parameters are there right now
        return "fully_shard frees the parameters after a pass"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in whole.tensors):
        return "gradients are on: torch.inference_mode() or no_grad() around the call"
    return _of_blocks(model) or (_of_python(model) if whole.python_acts() else None)


def _of_blocks(model: VisionTransformer) -> str | None:
    """What about the structure of the blocks prevents a capture."""
    blocks = model.blocks
    for index, block in enumerate(blocks):
        if type(block) is not ATMBlock:
            return f"blocks.{index} is of a class of its own, {type(block).__name__}"
        if blocks.own(index, block) is None:
            return f"blocks.{index} is not the block that apply_patch left there"
        if type(block.attn) not in (ATMAttention, Attention):
            return f"blocks.{index}.attn is of a class of its own, {type(block.attn).__name__}"
    drops = [m for block in blocks for m in (block.attn.proj_drop, block.drop_path1, block.drop_path2)]
    drops += [block.attn.attn_drop for block in blocks if not block.attn.fused_attn]
    if any(type(module) not in (nn.Dropout, nn.Identity, DropPath) for module in drops):
        return "a dropout is of a class of its own"
    if model.num_prefix_tokens > ops.KERNEL_PREFIX or blocks[0].attn.head_dim > ops.KERNEL_CHANNELS:
        return f"the kernels take {ops.KERNEL_PREFIX} protected tokens and {ops.KERNEL_CHANNELS} channels a head"
    return None


def _of_python(model: VisionTransformer) -> str:
    """What Python does in a pass, with the name of the module."""
    for name, module in model.named_modules():
        if name and module.training:
            return f"{name} is in training mode"
        if name and any(_HOOKS(module.__dict__)):
            return f"{name} has hooks of its own, which graphs would skip"
        if name and "forward" in module.__dict__:
            return f"{name} has a forward of its own, which graphs would skip"
    return "a hook on all modules"
