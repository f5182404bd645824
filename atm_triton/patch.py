"""apply_patch and remove_patch: merging in and out of a timm model, in place."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from atm_triton.block import ATMAttention, ATMBlock
from atm_triton.config import REMEDY, ATMConfig
from atm_triton.engine import Engine
from atm_triton.operating_points import PAPER_NAMES
from atm_triton.transformer import ATMBlocks, MergingTransformer, knows_sizes, leading_tokens, merging_class

OWN_FORWARD = "forward of its own, which would no longer run: take it off, and put it on after apply_patch"
TIMMS_OWN = (
    *((VisionTransformer, method) for method in ("forward", "forward_features", "forward_intermediates")),
    (Block, "forward"),
    (Attention, "forward"),
)
_NO_GAP = "it has no point between attention and MLP where tokens could merge"
_REASONS = {
    "ResPostBlock": "it normalises after attention and MLP, on a path that is not supported",
    "ParallelScalingBlock": _NO_GAP,
    "ParallelThingsBlock": _NO_GAP,
    "DiffParallelScalingBlock": _NO_GAP,
}


def apply_patch(
    model: VisionTransformer, config: ATMConfig | None = None, block_class: type[ATMBlock] = ATMBlock
) -> VisionTransformer:
    """Make the blocks of a timm VisionTransformer merge tokens, in place.

    Every module stays the same object with its hooks, and parameters keep their names. Patching a patched model
    replaces the earlier patch. Wrap, shard or compile a model and its blocks after patching, not before.

    Args:
        model: any of timm's VisionTransformer class (or a subclass) whose blocks are ``Block`` with ``Attention``.
        config: which tokens merge, and how many. None, or without thresholds: the paper's thresholds if the model is in
            its tables, recognised by timm's name, its shape and the published weights that the name stands for; the
            weights themselves are not checked. ``summary`` says which thresholds were used.
        block_class: the class of the merging blocks. One with its own ``plan`` needs no thresholds.

    Returns:
        ``model``.

    Raises:
        TypeError: the model cannot be merged (it is left as it was), or ``block_class`` is not an ATMBlock, or has a
            plan but does not say what it costs.
        ValueError: ``config`` is for another depth, or has no thresholds and the model is not one of the paper's. A
            backend that cannot run is refused when the model runs.
    """
    if not isinstance(config, ATMConfig | None):
        raise TypeError(f"config is {type(config).__name__}; want ATMConfig")
    own_plan = _has_plan(block_class)
    blocks = check_model(model)
    depth = len(blocks)
    if config is None:
        config = (
            ATMConfig(adapt="static", schedule=(0,) * depth, source=block_class.__name__) if own_plan else ATMConfig()
        )

    config.check_depth(depth)
    whole = settled(config, model)

    def merging(block: Block, index: int) -> ATMBlock:
        return block_class.of(block, whole, index, depth, model.num_prefix_tokens)

    install(model, merging, whole).blocks.by_pool = config.proportional_attention is None
    return model


def _has_plan(block_class: type[ATMBlock]) -> bool:
    """Whether a class of blocks overrides ``plan``.

    Raises:
        TypeError: it is not a subclass of ATMBlock, or has a plan but does not say what it costs.
    """
    if not (isinstance(block_class, type) and issubclass(block_class, ATMBlock)):
        raise TypeError(f"block_class is {block_class!r}; want ATMBlock or a subclass of it")
    own = block_class.plan is not ATMBlock.plan
    if own and not hasattr(block_class, "matching_macs"):
        raise TypeError(
            f"{block_class.__name__} has a plan of its own; give it matching_macs(N), the multiply-accumulates of a "
            "plan for N tokens per image, so that costs are counted"
        )
    return own


def settled(config: ATMConfig, model: VisionTransformer) -> ATMConfig:
    """Fill in what ``config`` leaves to the model: its thresholds, and whether attention adds log n.

    Raises:
        ValueError: there are no thresholds, and the paper has none for this model.
    """
    if config.proportional_attention is None:
        config = replace(config, proportional_attention=knows_sizes(model))
    return config if config.has_thresholds else _as_in_the_paper(config, model)


def _as_in_the_paper(config: ATMConfig, model: VisionTransformer) -> ATMConfig:
    """The paper's configuration for this model, with the other fields of ``config``."""
    name = _name_in_paper(model)
    paper = settled(ATMConfig.preset(name), model)
    paper = replace(paper, source=f"{paper.source}; treated as a {name} whose weights were not checked")
    own = ["split_depth", "adapt", "proportional_attention", "backend", "engine"]
    if leading_tokens(model) is not None:
        own.append("cls_only_last")  # otherwise the last block computes all tokens in any case
    return paper.changed(**{field: getattr(config, field) for field in own})


# the entries of timm's pretrained_cfg that identify weights
_WEIGHTS = ("tag", "hf_hub_id", "hf_hub_filename", "url", "file", "state_dict")
_AS_FINE_TUNED = {"vit_base_patch16_224.mae": {"global_pool": "avg", "num_classes": 1000}}


def _name_in_paper(model: VisionTransformer) -> str:
    """The name of a model in the paper's tables.

    Raises:
        ValueError: the tables do not have it, or it has other weights or another shape than theirs.
    """
    made = getattr(model, "pretrained_cfg", None) or {}
    name = made.get("architecture")
    if name not in PAPER_NAMES:
        name = f"{name}.{made.get('tag')}"
    if name not in PAPER_NAMES:
        raise ValueError(f"no thresholds for this {type(model).__name__}: the paper has none; {REMEDY}")
    with torch.device("meta"):
        published = timm.create_model(name, **_AS_FINE_TUNED.get(name, {}))
    if any(made.get(key) != published.pretrained_cfg.get(key) for key in _WEIGHTS):
        raise ValueError(f"no thresholds for this {name}: the paper's are for other weights; {REMEDY}")
    if _shape(model) != _shape(published):
        raise ValueError(f"no thresholds for this {name}: the paper's are for another shape; {REMEDY}")
    return name


def _shape(model: VisionTransformer) -> tuple[Any, ...]:
    """What must equal the published model of the same name: shapes, heads and pooling."""
    tensors = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return tensors, [block.attn.num_heads for block in model.blocks], model.global_pool


def remove_patch(model: VisionTransformer) -> VisionTransformer:
    """Undo :func:`apply_patch`, in place, and return ``model``. Its modules stay the same objects, and hooks that were
    added or parts that were replaced in the meantime remain.

    Raises:
        ValueError: the model is not patched.
        TypeError: a change that was made to the model while it was patched prevents this.
    """
    if not isinstance(model, MergingTransformer):
        raise ValueError(f"{type(model).__name__} is not patched; remove_patch undoes apply_patch")
    _check_removable(model)
    if isinstance(model.blocks, ATMBlocks):
        model.blocks.engine.drop()
    for module in _own_modules(model):
        if isinstance(module, tuple(PATCHED)):
            _unpatch(module)
    model.__class__ = type(model).__bases__[1]
    return model


PATCHED = {ATMBlocks: nn.Sequential, ATMBlock: Block, ATMAttention: Attention}  # patched class: timm's class


def _own_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, but not those of other patched models in it."""
    others = [child for child in model.children() if not isinstance(child, MergingTransformer)]
    return [model, *(module for child in others for module in _own_modules(child))]


def _unpatch(module: nn.Module) -> None:
    (own,) = (theirs for ours, theirs in PATCHED.items() if isinstance(module, ours))
    for cls in type(module).__mro__[: type(module).__mro__.index(own)]:
        for name in inspect.get_annotations(cls):
            vars(module).pop(name, None)
    module.__class__ = own


def _forget_forwards(model: nn.Module) -> None:
    """Remove a ``forward`` set on a module if it is only its class's own, as accelerate leaves behind: it would
    otherwise still run after the class has changed."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, MethodType) and own.__func__ is type(module).forward and own.__self__ is module:
            del module.forward


def _check_removable(model: VisionTransformer) -> None:
    """Refuse changes to a module that are only valid for its patched class."""
    _forget_forwards(model)
    for name, module in model.named_modules():
        for ours in (MergingTransformer, *PATCHED):
            if not isinstance(module, ours):
                continue
            classes = type(module).__mro__
            what = f"{name or 'the model'} ({type(module).__name__})"
            if not all(issubclass(cls, ours) for cls in classes[: classes.index(ours)]):
                raise TypeError(f"{what} got another class while it was patched, as by fully_shard: remove_patch first")
            if "forward" in vars(module):
                raise TypeError(f"{what} got a forward of its own while it was patched: take it off first")


def install(model: VisionTransformer, make: Callable[[Block, int], ATMBlock], config: ATMConfig) -> VisionTransformer:
    """Let ``make(block, index)`` turn every block of ``model`` into a merging one, in place. An earlier patch is
    removed first."""
    if isinstance(model, MergingTransformer):
        remove_patch(model)
    blocks = model.blocks
    for index, block in enumerate(blocks):
        make(block, index)
    blocks.__class__ = ATMBlocks
    blocks.config, blocks.last, blocks.engine = config, None, Engine(model)
    blocks.depth, blocks.warns, blocks.passes = len(blocks), True, 0
    own: type = type(model)
    model.__class__ = merging_class(own)
    return model


def check_model(model: nn.Module) -> nn.Sequential:
    """Return the model's blocks if all of them can merge; otherwise raise TypeError with the reason."""
    if not isinstance(model, VisionTransformer):
        name, where = type(model).__name__, type(model).__module__
        of = f"it is not of timm's VisionTransformer class but of {where}"
        raise TypeError(f"{name} cannot be merged: {of}{_other_class(model)}")
    base = type(model)
    _forget_forwards(model)
    if isinstance(model, MergingTransformer):
        _check_removable(model)
        base = base.__bases__[1]
    for timms, method in TIMMS_OWN:
        owner = getattr(getattr(timms, method), "__globals__", {}).get("__name__")  # a wrapper copies __module__
        if owner != timms.__module__:
            raise TypeError(f"{base.__name__} cannot be merged: {owner} has replaced timm's {timms.__name__}.{method}")
    for method in ("forward", "forward_features", "forward_intermediates"):
        if getattr(base, method) is not getattr(VisionTransformer, method):
            raise TypeError(f"{base.__name__} cannot be merged: it has a {method} of its own")
        if method in model.__dict__:
            raise TypeError(f"{base.__name__} cannot be merged: this one has a {method} of its own, set on the object")
    if type(model.blocks) not in (nn.Sequential, ATMBlocks):
        what = f"is {type(model.blocks).__name__}; want nn.Sequential: wrap and shard after patching"
        raise TypeError(f"{base.__name__} cannot be merged: blocks {what}")
    if isinstance(model.blocks, ATMBlocks) and model.blocks.engine.model is not model:
        raise TypeError(f"{base.__name__} cannot be merged: its blocks are another patched model's; copy.deepcopy that")
    if "forward" in vars(model.blocks):
        raise TypeError(f"{base.__name__} cannot be merged: blocks has a {OWN_FORWARD}")
    for index, block in enumerate(model.blocks):
        reason = _obstacle(block)
        if isinstance(block, ATMBlock) and not isinstance(model.blocks, ATMBlocks):
            reason = "block of another patched model, which would merge by this one's thresholds: copy.deepcopy it"
        if any(block is other for other in list(model.blocks)[:index]):
            reason = "block that stands in another place too, and each place merges by its own threshold: copy it"
        if reason is not None:
            raise TypeError(f"{type(model).__name__} cannot be merged: blocks.{index} is a {reason}")
    return model.blocks


def _other_class(model: nn.Module) -> str:
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    held = next((name for name, part in parts if isinstance(part, VisionTransformer)), None)
    if held is not None:
        return f"; patch the bare model in it, {held}, before compiling or wrapping it"
    if getattr(model, "rope", None) is not None:
        return "; its keys are rotated by their position, and a merged token has no single one"
    return ""


def _obstacle(block: nn.Module) -> str | None:
    kind = type(block)
    if kind is not Block and not isinstance(block, ATMBlock):
        reason = _REASONS.get(kind.__name__, "only Block of timm is supported; wrap and shard blocks after patching")
        return f"{kind.__name__}: {reason}"
    if type(block.attn) not in (Attention, ATMAttention):
        return f"Block with {type(block.attn).__name__}: only Attention of timm is supported"
    for name, module in {"itself": block, "attn": block.attn}.items():
        if "forward" in vars(module):
            return f"Block that has on {name} a {OWN_FORWARD}"
    return None
