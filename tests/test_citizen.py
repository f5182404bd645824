"""Tools of torch and timm for whole models work on a patched one: at r = 0 it equals the unpatched model."""

import copy
import io
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from atm_triton import ATMConfig, apply_patch, remove_patch, summary
from models import images, images_for, vit
from test_patch import EASY, IMAGE, STATIC, every_kind

ABOVE_ALL = {"alpha": 1.0, "beta": 0.0, "theta_min": 1.0}  # no two tokens are that similar
SAME = {
    "static": ATMConfig(adapt="static", schedule=(0,) * 4),
    "batch": ATMConfig(**ABOVE_ALL),
    "image": ATMConfig(**ABOVE_ALL, adapt="image"),
}
with_torch = partial(pytest.mark.works_with, "torch")
with_timm = partial(pytest.mark.works_with, "timm")


def new():
    torch.manual_seed(0)
    return vit(dtype=torch.float64)


def assert_same(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


# ---- linear layers that are more than their matrix


def pruned_by_columns(linear):
    prune.ln_structured(linear, "weight", 0.25, 2, 0)


def own_class(linear):
    linear.__class__ = Doubling


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


LINEARS = {
    "weight_norm, old": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned by columns": pruned_by_columns,
    "a class of its own": own_class,
}


@with_torch("weight_norm and spectral_norm (old and as parametrizations), orthogonal, prune, before and after patching")
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
@pytest.mark.parametrize("change", LINEARS.values(), ids=LINEARS)
def test_linear_layers_that_are_more_than_their_matrix(change, config, patched_first):
    def changed(model):
        torch.manual_seed(1)  # power iterations begin anywhere
        for module in list(model.blocks.modules()):
            if type(module) is nn.Linear:
                change(module)
                for parameter in module.parameters():
                    parameter.data *= 1.3  # as an optimiser would, so that what a layer has cached is outdated
        return model.eval()

    x, plain = images(dtype=torch.float64), changed(new())
    expected = plain(x)
    ours = changed(apply_patch(new(), config)) if patched_first else apply_patch(changed(new()), config)
    out = ours(x)
    assert_same(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    for (name, one), (other_name, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert_same(remove_patch(ours)(x), expected)


# ---- what users do with a whole model: functions of a model that return a tensor


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn = False  # torch has no forward derivative of fused attention
    return model


def drawn_like(tensors):
    torch.manual_seed(2)
    return {name: 0.3 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_other_weights(model, x):
    return functional_call(model, drawn_like(parameters_of(model)), (x,))


def gradient(model, x):
    gradients = grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters_of(model))
    return torch.cat([each.flatten() for each in gradients.values()])


def derivative(model, x):
    p = parameters_of(unfused(model))
    return torch.stack(jvp(lambda p: functional_call(model, p, (x,)), (p,), (drawn_like(p),)))


def twice_differentiated(model, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(unfused(model)(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def swapped(model, x):
    for parameter, other in zip(model.parameters(), drawn_like(parameters_of(model)).values(), strict=True):
        torch.utils.swap_tensors(parameter, nn.Parameter(other))
    return model(x)


def assigned(model, x):
    model.load_state_dict(drawn_like(model.state_dict()), assign=True)
    return model(x)


def materialised(model, x):
    state = model.state_dict()
    model = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return model(x)


def shallow_copies(model, x):
    twin = copy.copy(model)
    twin.head = nn.Identity()
    return torch.cat([twin(x), model(x)], dim=1)


def saved_whole(model, x):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(x)


def trained_a_little(model):
    for parameter, step in zip(model.parameters(), drawn_like(parameters_of(model)).values(), strict=True):
        parameter.data += step


def averaged(model, x):
    mean = AveragedModel(model)
    for _ in range(3):
        mean.update_parameters(model)
        trained_a_little(model)
    return mean(x)


def exponentially_averaged(model, x):
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    trained_a_little(model)
    ema.update(model)
    return ema(x)


def inference_tensors(model, x):
    with torch.inference_mode():
        x, model = x.clone(), copy.deepcopy(model)
        inside = model(x)
    with torch.no_grad():
        return torch.stack([inside.clone(), model(x)])


def parametrized_itself(model, x):
    parametrize.register_parametrization(model, "pos_embed", nn.Tanh())
    return model(x)


def heads_pruned(model, x):
    """Remove one of two heads, as torch-pruning does."""
    for attn in (block.attn for block in model.blocks):
        of_qkv, kept = torch.arange(96).view(3, 2, 16)[:, 1].flatten(), slice(16, 32)
        attn.qkv.weight, attn.qkv.bias = (nn.Parameter(each.data[of_qkv]) for each in (attn.qkv.weight, attn.qkv.bias))
        attn.proj.weight = nn.Parameter(attn.proj.weight.data[:, kept])
        attn.num_heads, attn.attn_dim, attn.qkv.out_features, attn.proj.in_features = 1, 16, 48, 16
    return model(x)


def watched_by_all(model, x):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 1.1 * out if isinstance(module, nn.LayerNorm) else None
    )
    try:
        return model(x)
    finally:
        handle.remove()


def parameters_as_a_vector(model, x):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.1 * vector, model.parameters())
    return model(x)


def tied(model, x):
    model.blocks[0].mlp.fc1.weight = model.blocks[3].mlp.fc1.weight
    model.blocks[1].norm1 = model.blocks[2].norm1
    return model(x)


def with_deterministic_algorithms(model, x):
    torch.use_deterministic_algorithms(True)
    try:
        out = model(x)
        return torch.cat([each.flatten() for each in torch.autograd.grad(out.square().sum(), model.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)


def activations_off_the_device(model, x):
    with torch.autograd.graph.save_on_cpu():
        out = model(x)
    return torch.cat([each.flatten() for each in torch.autograd.grad(out.square().sum(), model.parameters())])


def in_another_layout(model, x):
    return model(x.to(memory_format=torch.channels_last).flip(-1).transpose(-1, -2))


def of_another_size(model, x):
    model.set_input_size(img_size=(48, 32))
    return model(x.repeat(1, 1, 2, 1)[:, :, :48, :32])


def reparameterized(model, x):
    return timm.utils.reparameterize_model(model)(x)


WHOLE = {
    with_other_weights: with_torch("torch.func: functional_call, grad; jvp and second derivatives at r = 0"),
    gradient: with_torch("torch.func: functional_call, grad; jvp and second derivatives at r = 0"),
    derivative: with_torch("torch.func: functional_call, grad; jvp and second derivatives at r = 0"),
    twice_differentiated: with_torch("torch.func: functional_call, grad; jvp and second derivatives at r = 0"),
    swapped: with_torch("swap_tensors, load_state_dict(assign=True), to_empty, parameters_to_vector"),
    assigned: with_torch("swap_tensors, load_state_dict(assign=True), to_empty, parameters_to_vector"),
    materialised: with_torch("swap_tensors, load_state_dict(assign=True), to_empty, parameters_to_vector"),
    parameters_as_a_vector: with_torch("swap_tensors, load_state_dict(assign=True), to_empty, parameters_to_vector"),
    shallow_copies: with_torch("copy.copy, torch.save of a whole model"),
    saved_whole: with_torch("copy.copy, torch.save of a whole model"),
    averaged: with_torch("AveragedModel"),
    exponentially_averaged: with_timm("ModelEmaV3"),
    of_another_size: with_timm("set_input_size, reparameterize_model"),
    reparameterized: with_timm("set_input_size, reparameterize_model"),
    inference_tensors: with_torch("inference tensors, as images and as parameters"),
    parametrized_itself: with_torch("a parametrization of pos_embed"),
    heads_pruned: with_torch("pruned heads, tied layers"),
    tied: with_torch("pruned heads, tied layers"),
    watched_by_all: with_torch("hooks on all modules at once (on the last qkv alone they need one of its own)"),
    with_deterministic_algorithms: with_torch("deterministic algorithms, save_on_cpu"),
    activations_off_the_device: with_torch("deterministic algorithms, save_on_cpu"),
    in_another_layout: with_torch("images in any memory format"),
}


@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
@pytest.mark.parametrize("done", [pytest.param(done, marks=mark, id=done.__name__) for done, mark in WHOLE.items()])
def test_what_is_done_with_a_whole_model(done, config):
    x = images(dtype=torch.float64)
    expected = done(new(), x)
    assert torch.equal(expected, new()(x)) == (done in SAME_LOGITS)
    assert_same(done(apply_patch(new(), config), x), expected)


SAME_LOGITS = (materialised, saved_whole, reparameterized)


@with_torch("nn.Module.compile of the model")
def test_compiled_in_place():
    model, x = apply_patch(new(), SAME["static"]), images(dtype=torch.float64)
    model.compile(backend="eager")
    assert_same(model(x), new()(x))


@pytest.mark.parametrize("config", [STATIC, EASY, IMAGE], ids=["static", "batch", "image"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@with_torch("set_default_dtype")
def test_sizes_are_float32_whatever_the_default_dtype(dtype, config):
    model, x = apply_patch(vit(), config), images()
    expected, rows = model(x), summary(model).record.rows
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(summary(model).r) > 0 and str(summary(model).record.rows) == str(rows)


def assert_quantised_alike(out, expected, exact):
    """Quantising changes our logits as it changes timm's, except for values that land on the other side of a step
    because sums round differently."""
    assert 1e-2 < (expected - exact).abs().max() < 1
    assert (out - expected).abs().max() < (expected - exact).abs().max() / 4


def dynamically_quantised(model, names):
    return torch.ao.quantization.quantize_dynamic(model, names, torch.qint8)


@with_torch(
    "quantize_dynamic of a whole model, before and after patching "
    "(the range of a layer is that of the rows that it gets)"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("patched_first", [True, False])
def test_a_quantised_model(patched_first):
    """A layer's range is taken over all rows it gets. If the last block computes only the class token, three layers get
    fewer rows."""
    x, names = images(), {name for name, module in new().named_modules() if type(module) is nn.Linear}
    fewer = {f"blocks.3.{name}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    for last, chosen in ((False, names), (True, names - fewer)):
        config, model = ATMConfig(adapt="static", schedule=(0,) * 4, cls_only_last=last), new().float()
        exact, expected = model(x), dynamically_quantised(model, chosen)(x)
        if patched_first:
            ours = dynamically_quantised(apply_patch(model, config), chosen)
        else:
            ours = apply_patch(dynamically_quantised(model, chosen), config)
        assert_quantised_alike(ours(x), expected, exact)


# ---- every kind of model


def scaled(module, args, out):
    return 1.1 * out


def hook(model, name):
    model.get_submodule(name).register_forward_hook(scaled)


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return 1.1 * self.module(*args, **options)


def wrap(model, name):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Scaled(model.get_submodule(name)))


def set_forward(model, name):
    module = model.get_submodule(name)
    module.forward = lambda *args, own=module.forward, **options: 1.1 * own(*args, **options)


CALLED_WITH_MORE = ("blocks.2.attn", "blocks.1")  # modules called with more than their tokens
REFUSALS = {
    wrap: ("blocks.2 is a Block with Scaled: only Attention of timm", "blocks.1 is a Scaled: only Block of timm"),
    set_forward: ("blocks.2 is a Block that has on attn a forward", "blocks.1 is a Block that has on itself a forward"),
}
CALLED_AS_TIMM_DOES = ("pos_drop", "blocks.0.norm1", "blocks.1.mlp", "blocks.3.attn.qkv", "blocks.3.ls2", "norm")


@with_timm("hooks, wrappers and a replaced forward on the modules of every kind of VisionTransformer")
@pytest.mark.parametrize("change", [hook, wrap, set_forward])
@every_kind
def test_every_kind_of_model_with_modules_changed(make, change):
    """All changes work after patching. Before patching they work too, except those that replace or wrap a block or its
    attention, which are refused by name."""
    torch.manual_seed(0)
    model = make(dtype=torch.float64)
    x = images_for(model, dtype=torch.float64)

    def changed(model, names=CALLED_AS_TIMM_DOES + CALLED_WITH_MORE):
        model = copy.deepcopy(model)
        for name in names:
            change(model, name)
        return model

    expected = changed(model)(x)
    assert not torch.allclose(expected, model(x), atol=1e-3)
    for adapt in ("static", "image"):
        ours = apply_patch(copy.deepcopy(model), SAME[adapt])
        for name in CALLED_AS_TIMM_DOES + CALLED_WITH_MORE:
            change(ours, name)
        assert_same(ours(x), expected)
    if change is hook:
        assert_same(apply_patch(changed(model), SAME["batch"])(x), expected)
        return
    expected = changed(model, CALLED_AS_TIMM_DOES)(x)
    assert_same(apply_patch(changed(model, CALLED_AS_TIMM_DOES), SAME["batch"])(x), expected)
    for name, refusal in zip(CALLED_WITH_MORE, REFUSALS[change], strict=True):
        with pytest.raises(TypeError, match=refusal):
            apply_patch(changed(model, (name,)), SAME["batch"])
