"""Replacing, wrapping or hooking a module works as on the unpatched model, or is refused by name."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from atm_triton import ATMConfig, apply_patch, remove_patch, summary
from atm_triton.packed import Packed
from models import images, vit
from processes import python

HERE = Path(__file__).parent
NOTHING = ATMConfig(adapt="static", schedule=(0,) * 4, cls_only_last=False)
STATIC = ATMConfig(adapt="static", schedule=(3, 5, 2, 4))
BATCH = ATMConfig(alpha=0.5, theta_min=0.3, beta=0.05)
IMAGE = replace(BATCH, adapt="image")
SAME = {"static": NOTHING, "image": ATMConfig(alpha=1.0, beta=0.0, theta_min=1.0, adapt="image", cls_only_last=False)}
MERGING = {"static": STATIC, "batch": BATCH, "image": IMAGE}


def model_of(fused, **changes):
    model = vit(drop_path_rate=0.0, qk_norm=True, init_values=0.3, **changes)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def shapes(values):
    return [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in values]


class Watch:
    """Puts hooks of every kind on every module and records what they see. Keyword arguments may differ."""

    def __init__(self, model):
        self.events, self.handles = [], []
        for name, module in model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(lambda module, args, name=name: self.see(name, "pre", args)),
                module.register_forward_hook(lambda module, args, out, name=name: self.see(name, "out", (*args, out))),
                module.register_forward_hook(
                    lambda module, args, options, out, name=name: self.see(name, "with_kwargs", (*args, out)),
                    with_kwargs=True,
                ),
                module.register_full_backward_pre_hook(lambda module, grads, name=name: self.see(name, "to", grads)),
                module.register_full_backward_hook(
                    lambda module, grads, of_out, name=name: self.see(name, "back", (*grads, *of_out))
                ),
            ]

    def see(self, name, kind, values):
        by_head = name.endswith(("q_norm", "k_norm"))  # of all tokens [H, T, d], not of images [B, H, N, d]
        self.events.append((name, kind, len(values) if by_head else shapes(values)))

    def of_a_pass(self, model, x):
        self.events.clear()
        model(x).square().sum().backward()
        return list(self.events)

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.works_with("torch", "forward and backward hooks on every module")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
@pytest.mark.parametrize("fused", [True, False])
def test_hooks_of_all_kinds_on_all_modules_fire_as_on_the_unpatched_model(fused, config):
    """They are registered before or after patching, or after removing the patch, and their handles remove them."""
    model, x = model_of(fused, global_pool="avg", fc_norm=False), images()  # its norm sees all tokens
    watch = Watch(model)
    expected = watch.of_a_pass(model, x)
    named = {name for name, _, _ in expected}
    assert {"blocks", "blocks.0", "blocks.3", "blocks.1.attn", "blocks.3.attn.qkv"} < named
    assert ("blocks.1.attn.attn_drop" in named) != fused
    apply_patch(model, config)
    assert watch.of_a_pass(model, x) == expected
    watch.remove()
    assert watch.of_a_pass(model, x) == []
    later = Watch(model)
    assert later.of_a_pass(model, x) == expected
    apply_patch(model, config)
    assert later.of_a_pass(model, x) == expected
    remove_patch(model)
    assert later.of_a_pass(model, x) == expected
    later.remove()
    assert later.of_a_pass(model, x) == []


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning")
@pytest.mark.parametrize("name", ["blocks", "blocks.1", "blocks.1.attn"])
def test_backward_hooks_of_the_old_kind_fire_too(name):
    model, seen = apply_patch(vit(), IMAGE), []
    model.get_submodule(name).register_backward_hook(lambda module, grads, of_out: seen.append(len(of_out)))
    model(images()).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("name", MERGING)
def test_hooks_see_the_tokens_that_are_there(name):
    """With "image" they see rows of all images once lengths differ."""
    model, seen = apply_patch(vit(), MERGING[name]), {}
    for module in ("blocks", "blocks.1", "blocks.1.attn", "blocks.1.mlp", "blocks.3", "blocks.3.attn"):
        model.get_submodule(module).register_full_backward_hook(
            lambda _, grads, of_out, module=module: seen.update({module: shapes((*grads, *of_out))})
        )
    model(images()).sum().backward()
    tokens = summary(model).record.tokens
    entered, left, last = ((int(sum(n)), 32) if name == "image" else (3, n, 32) for n in (*tokens[1:3], tokens[3]))
    assert entered != left != last
    assert seen["blocks"] == [(3, 26, 32), (3, 1, 32)]
    assert seen["blocks.1"] == [entered, left]
    assert seen["blocks.1.attn"] == [entered, entered]
    assert seen["blocks.1.mlp"] == [left, left]
    assert seen["blocks.3"] == seen["blocks.3.attn"] == [last, (3, 1, 32)]  # the class token alone is served


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("name", MERGING)
def test_attn_drop_sees_attention_maps(name, proportional):
    model, x, maps = model_of(False), images(), {1: [], 3: []}
    apply_patch(model, replace(MERGING[name], proportional_attention=proportional))
    for index, seen in maps.items():
        drop = model.blocks[index].attn.attn_drop
        drop.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
    mixed = {}
    model.blocks[1].attn.norm.register_forward_hook(lambda _, args, out: mixed.update(x=out))
    heads = {}
    for part in ("qkv", "k_norm"):
        model.blocks[1].attn.get_submodule(part).register_forward_hook(lambda _, a, out, p=part: heads.update({p: out}))
    model(x)
    record = summary(model).record
    lengths = torch.as_tensor(record.tokens[1]).expand(3).tolist()
    if name == "image":
        assert [tuple(each.shape) for each in maps[1]] == [(1, 2, n, n) for n in lengths]
        assert [tuple(each.shape) for each in maps[3]] == [(1, 2, 1, int(n)) for n in record.tokens[3]]
    else:
        assert [tuple(each.shape) for each in maps[1]] == [(3, 2, lengths[0], lengths[0])]
        assert [tuple(each.shape) for each in maps[3]] == [(3, 2, 1, record.tokens[3])]
    by_image = [part for each in maps[1] for part in each]  # [H, N, N]
    values = heads["qkv"].reshape(-1, 3, 2, 16)[:, 2].split(lengths)
    for each, v, out in zip(by_image, values, mixed["x"].reshape(-1, 32).split(lengths), strict=True):
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:2]))
        torch.testing.assert_close(torch.einsum("hqk,khd->qhd", each, v).flatten(1), out, rtol=1e-4, atol=1e-5)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


CHANGES = {
    "input of a block": lambda m: m.blocks[1].register_forward_pre_hook(lambda _, args: args[0] * 2),
    "output of a block": lambda m: m.blocks[1].register_forward_hook(lambda _, args, out: out * 2),
    "input of the blocks": lambda m: m.blocks.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "output of the blocks": lambda m: m.blocks.register_forward_hook(lambda _, args, out: out.square()),
    "input of an attention": lambda m: m.blocks[2].attn.register_forward_pre_hook(lambda _, args: args[0] + 1),
    "output of an attention": lambda m: m.blocks[2].attn.register_forward_hook(lambda _, args, out: -out),
    "attention maps": lambda m: m.blocks[3].attn.attn_drop.register_forward_hook(lambda _, args, out: out / 2),
    "an attn_drop of its own": lambda m: setattr(m.blocks[0].attn, "attn_drop", Halved()),
    "another attention": lambda m: setattr(m.blocks[1], "attn", like(m.blocks[1].attn)),
    "a compiled block": lambda m: m.blocks.__setitem__(2, torch.compile(m.blocks[2], backend="eager")),
    "a block compiled in place": lambda m: m.blocks[2].compile(backend="eager"),
    "a compiled attention": lambda m: setattr(m.blocks[2], "attn", torch.compile(m.blocks[2].attn, backend="eager")),
    "a block in a wrapper": lambda m: m.blocks.__setitem__(0, Wrapper(m.blocks[0])),
    "an attention in a wrapper": lambda m: setattr(m.blocks[3], "attn", Wrapper(m.blocks[3].attn)),
    "a forward of a block": lambda m: set_forward(m.blocks[1]),
    "a forward of an attention": lambda m: set_forward(m.blocks[1].attn),
    "a forward of the blocks": lambda m: set_forward(m.blocks),
}


def like(attn):
    made = Attention(32, 2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    made.load_state_dict({name: 0.9 * tensor for name, tensor in attn.state_dict().items()})
    made.fused_attn = attn.fused_attn
    return made


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return 2 * self.module(*args, **options)


def set_forward(module):
    module.forward = lambda *args, own=module.forward, **options: own(*args, **options).square()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_pass_changes_it_as_without_a_patch(change, request):
    torch.manual_seed(1)
    model, x = model_of(False), images()
    before = model(x)
    other = copy.deepcopy(model)
    change(other)
    expected = other(x)
    assert torch.allclose(expected, before, atol=1e-3) == ("compiled" in request.node.name)
    apply_patch(model, replace(NOTHING, cls_only_last=True))(x)
    summary_before = summary(model)
    change(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert summary(model).macs == summary_before.macs


def test_a_hook_that_changes_how_many_tokens_there_are_is_named():
    for name, message in (("blocks.1", r"left tokens \[T, C\] of \[51, 32\]; want \[54, 32\]"), ("blocks", "want")):
        model = apply_patch(vit(), STATIC)
        model.get_submodule(name).register_forward_hook(lambda _, args, out: out[:, 1:])
        with pytest.raises(ValueError, match=message):
            model(images())


class Foreign(nn.Module):
    def forward(self, x, **_):
        return x


class Deaf(nn.Module):
    """A wrapper that passes no keyword on."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, **_):
        return self.module(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.blocks[1], "attn", Foreign()), "attn is Foreign, .*; want Attention of timm"),
        (lambda m: setattr(m.blocks[3], "attn", Deaf(m.blocks[3].attn)), "attn is Deaf, .*passes keyword arguments on"),
        (
            lambda m: setattr(m.blocks, "2", nn.Identity()),
            "blocks.2 is Identity; want the block that apply",
        ),
        (lambda m: setattr(m, "blocks", m.blocks[:2]), "blocks is Sequential; want the sequence that"),
        (lambda m: setattr(m, "blocks", checkpoint_wrapper(m.blocks)), "blocks is CheckpointWrapper; want"),
    ],
)
def test_what_cannot_take_a_place_is_refused_by_name(change, message):
    model = apply_patch(vit(), STATIC)
    change(model)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(TypeError, match=message) as caught:
            call(images())
        assert "\n" not in str(caught.value)
    remove_patch(model)
    assert type(model) is VisionTransformer


def test_deaf_blocks_are_refused():
    model = apply_patch(vit(), STATIC)
    model.blocks[1] = Deaf(model.blocks[1])
    with pytest.raises(TypeError, match="blocks.1 is Deaf; want .*passes keyword arguments on"):
        model(images())


@pytest.mark.parametrize("name", ["", "blocks", "blocks.2", "blocks.2.attn"])
def test_a_forward_set_while_patched_is_in_the_way_of_remove_patch(name):
    model, x = apply_patch(vit(), STATIC), images()
    before = model(x)
    module = model.get_submodule(name)
    set_forward(module)
    for call in (remove_patch, apply_patch):
        with pytest.raises(TypeError, match=f"{name or 'the model'} .*got a forward of its own while it was patched"):
            call(model)
    del module.forward
    assert torch.equal(model(x), before)
    remove_patch(model)


@pytest.mark.parametrize("name", ["", "blocks", "blocks.2", "blocks.2.attn", "blocks.2.mlp"])
def test_a_forward_that_is_the_classs_own_is_none(name):
    """accelerate leaves such a forward on a module when it removes its hooks."""
    model, x = vit(), images()
    expected = model(x)
    for call in (lambda: apply_patch(model, NOTHING), lambda: apply_patch(model, STATIC), lambda: remove_patch(model)):
        module = model.get_submodule(name)
        module.forward = module.forward
        call()
        assert "forward" not in vars(module)
    assert torch.equal(model(x), expected)


def test_remove_patch_leaves_nothing_behind():
    model = vit()
    modules = list(model.modules())
    before = [(type(module), set(vars(module))) for module in modules]
    apply_patch(model, IMAGE)(images())
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    remove_patch(model)
    assert [(type(module), set(vars(module))) for module in modules] == before


class Kept:
    """An object with a hook that counting costs must neither copy nor call."""

    def hook(self, module, args, out):
        self.out = out


def test_summary_leaves_hooks_alone():
    model, kept = apply_patch(vit(), STATIC), Kept()
    for name in ("patch_embed", "norm", "head", "blocks.1"):
        model.get_submodule(name).register_forward_hook(kept.hook)
    logits = model(images())
    assert summary(model).macs > 0
    assert kept.out is logits


def doubled(module, args, out):
    return 2 * out


def test_copies_keep_their_hooks():
    model, x = model_of(True), images()
    model.blocks[1].register_forward_hook(doubled)
    expected = model(x)
    apply_patch(model, NOTHING)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[1] is not model.blocks[1]
        torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(remove_patch(twin)(x), expected)


@pytest.mark.parametrize("config", MERGING.values(), ids=MERGING)
def test_slices_of_the_blocks_are_sequences_of_the_same_blocks(config):
    model, x = apply_patch(vit(), config), images()
    own = list(model.blocks)
    for index in (slice(1), slice(-1, None), slice(1, 3), slice(None)):
        part = model.blocks[index]
        assert type(part) is nn.Sequential
        assert all(one is other for one, other in zip(part, own[index], strict=True))
        assert list(part.state_dict()) == [
            name for name in model.blocks.state_dict() if int(name.split(".")[0]) in range(4)[index]
        ]
    model.blocks[:2].requires_grad_(False)
    model(x).sum().backward()
    assert [block.mlp.fc1.weight.grad is None for block in model.blocks] == [True, True, False, False]
    remove_patch(model)
    assert type(model.blocks[:1]) is nn.Sequential


@pytest.mark.parametrize("config", MERGING.values(), ids=MERGING)
@torch.no_grad()
def test_a_block_takes_what_a_block_returns(config):
    model = apply_patch(vit(), replace(config, cls_only_last=False))
    pictures = images()
    h = stem = model.stem(pictures)
    for block in model.blocks:
        h = block(h)
    x, sizes = (h.x, h.sizes) if isinstance(h, Packed) else h
    assert sizes.sum() == 3 * 26
    logits = model.forward_head(model.norm(x if x.dim() == 3 else h.images.first(x, 1)))
    torch.testing.assert_close(logits, model(pictures), rtol=1e-5, atol=1e-5)
    for other in (model.blocks(stem), model.blocks[2:](model.blocks[:2](stem))):
        assert torch.equal(other[0], x) and torch.equal(other[1], sizes)


def test_the_example_in_the_documentation_runs():
    names = {}
    exec((HERE.parent / "docs" / "hooks.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["x"].shape[0] == 2 and names["sizes"].sum() == 2 * 197


def watched_fc1(model):
    calls = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    return calls


def wraps(kind):
    return lambda module: isinstance(module, kind)


@pytest.mark.works_with("torch", "apply_activation_checkpointing after patching")
@pytest.mark.parametrize("impl", list(CheckpointImpl))
@pytest.mark.parametrize("config", MERGING.values(), ids=MERGING)
def test_activation_checkpointing_of_blocks_computes_twice_and_the_same(config, impl):
    model, x = apply_patch(vit(), config).train(), images().requires_grad_()
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    calls = watched_fc1(model)
    apply_activation_checkpointing(model, lambda m: checkpoint_wrapper(m, impl), wraps(Block))
    assert all(isinstance(block, CheckpointWrapper) for block in model.blocks)
    model.zero_grad()
    out = model(x)
    assert len(calls) == 1
    out.square().sum().backward()
    assert len(calls) == 2
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
    assert summary(model).r[1] > 0
    remove_patch(model)
    assert [type(block._checkpoint_wrapped_module) for block in model.blocks] == [Block] * 4
    assert model(x).shape == (3, 5)


@pytest.mark.parametrize("kind", [Attention, nn.Linear])
def test_activation_checkpointing_of_parts_computes_the_same(kind):
    model, x = apply_patch(vit(dtype=torch.float64), IMAGE).train(), images(dtype=torch.float64)
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    calls = []
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda *_: calls.append(1))
    apply_activation_checkpointing(model, checkpoint_wrapper, wraps(kind))
    model.zero_grad()
    model(x).square().sum().backward()
    assert len(calls) == 2
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-9)


def test_what_is_wrapped_or_changed_before_patching_is_refused_by_name():
    model = vit()
    apply_activation_checkpointing(model, checkpoint_wrapper, wraps(Block))
    with pytest.raises(TypeError, match="blocks.0 is a CheckpointWrapper: only Block of timm .*wrap .* after patching"):
        apply_patch(model)
    for name, message in (("blocks", "blocks has a"), ("blocks.1", "on itself a"), ("blocks.1.attn", "on attn a")):
        model = vit()
        set_forward(model.get_submodule(name))
        with pytest.raises(TypeError, match=f"{message} forward of its own, which would no longer run"):
            apply_patch(model)
        assert type(model) is VisionTransformer
    model = vit()
    model.blocks = checkpoint_wrapper(model.blocks)
    with pytest.raises(TypeError, match="blocks is CheckpointWrapper; want nn.Sequential"):
        apply_patch(model)


FSDP2 = pytest.mark.works_with("torch", "FSDP2 (fully_shard of blocks, parts and the model) on two processes")
PARALLEL = pytest.mark.works_with("torch", "DDP, FSDP1 and tensor parallel layers on two processes")


SHARED = dict.fromkeys(["blocks", "parts", "model first", "refusals"], FSDP2) | {"parallel": PARALLEL}


@pytest.mark.parametrize("case", [pytest.param(case, marks=mark) for case, mark in SHARED.items()])
def test_two_processes_share_a_model(case):
    """The logits and gradients equal those of one process with the same images."""
    done = python(HERE / "sharding.py", case, ranks=2, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("the same") == 2


def test_blocks_that_another_patched_model_has_are_refused():
    """Patched in place, they would take the other model's thresholds."""
    big, small = vit(depth=4), vit(depth=2)
    small.blocks = torch.nn.Sequential(*big.blocks[:2])
    apply_patch(big, ATMConfig(thresholds=(None,) * 4))
    before = [block.theta for block in big.blocks]
    with pytest.raises(TypeError, match="blocks.0 is a block of another patched model"):
        apply_patch(small, ATMConfig(thresholds=(-1.0,) * 2))
    with pytest.raises(TypeError, match="its blocks are another patched model's; copy.deepcopy that"):
        apply_patch(copy.copy(big), ATMConfig(thresholds=(0.5,) * 4))
    assert [block.theta for block in big.blocks] == before
    apply_patch(copy.deepcopy(big), ATMConfig(thresholds=(0.5,) * 4))
    assert [block.theta for block in big.blocks] == before


def test_a_patched_model_within_another_keeps_its_patch():
    student = vit(depth=2)
    student.teacher = apply_patch(vit(depth=2), ATMConfig(thresholds=(0.5,) * 2))
    apply_patch(student, ATMConfig(thresholds=(0.9,) * 2))
    remove_patch(student)
    assert [block.theta for block in student.teacher.blocks] == [0.5, 0.5]
    assert type(student.blocks[0]) is Block


@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: blocks.append(Block(32, 2)),
        lambda blocks: blocks.extend([Block(32, 2)]),
        lambda blocks: blocks.insert(0, Block(32, 2)),
        lambda blocks: blocks.pop(1),
        lambda blocks: blocks.__delitem__(-1),
        lambda blocks: blocks.__iadd__(nn.Sequential(Block(32, 2))),
        lambda blocks: blocks.__imul__(2),
    ],
    ids=["append", "extend", "insert", "pop", "del", "+=", "*="],
)
def test_blocks_are_not_added_or_removed_while_patched(change):
    model, x = apply_patch(vit(), STATIC), images()
    before, own = model(x), list(model.blocks)
    with pytest.raises(ValueError, match="blocks of a patched model cannot be added or removed, .*: remove_patch") as e:
        change(model.blocks)
    assert "\n" not in str(e.value)
    assert all(one is other for one, other in zip(model.blocks, own, strict=True)) and torch.equal(model(x), before)
    change(remove_patch(model).blocks)
    assert len(model.blocks) != 4


def test_a_block_that_cannot_merge_takes_no_place():
    model, x = apply_patch(vit(), STATIC), images()
    before = model(x)
    with pytest.raises(TypeError, match="blocks.1 is Block; want the block that apply_patch left"):
        model.blocks[1] = Block(32, 2)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.blocks.__setitem__(1, copy.deepcopy(m.blocks[2])),
        lambda m: m.blocks.__setitem__(1, m.blocks[2]),
        lambda m: m.blocks.__setitem__(1, apply_patch(vit(), IMAGE).blocks[1]),
    ],
    ids=["a copy of another place", "two places", "another configuration"],
)
def test_a_block_that_merges_as_another_place_says_is_refused(change):
    model = apply_patch(vit(), STATIC)
    change(model)
    with pytest.raises(TypeError, match="blocks.1 is ATMBlock; want the block that apply_patch left"):
        model(images())


def test_a_block_may_be_replaced_by_its_like():
    model, x = apply_patch(vit(), STATIC), images()
    before, twin = model(x), apply_patch(vit(), STATIC)
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    assert torch.equal(model(x), before)
    model.blocks[1] = twin.blocks[1]
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("change", "number"),
    [(lambda m: m.blocks.add_module("4", Block(32, 2)), 5), (lambda m: delattr(m.blocks, "1"), 3)],
    ids=["added", "removed"],
)
def test_blocks_that_came_or_went_otherwise_are_counted(change, number):
    model = apply_patch(vit(), STATIC)
    change(model)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=f"{number} blocks where 4 were patched, each for its place: remove_patch"):
            call(images())
    assert len(remove_patch(model).blocks) == number
