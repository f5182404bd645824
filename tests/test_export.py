"""A patched model in torch.export, torch.jit.trace, torch.compile and torch.func equals the eager model, also for batch
sizes that the exporter did not see, or is refused in one line."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap

import models
from atm_triton import ATMConfig, apply_patch, reference, summary
from atm_triton.packed import Images
from models import images

STATIC = ATMConfig(adapt="static", schedule=(3, 5, 2), split_depth=1)
IMAGE = ATMConfig(adapt="image", thresholds=(0.7, 0.6, 0.6), split_depth=1)
BATCH = ATMConfig(adapt="batch", thresholds=(0.7, 0.6, 0.6), split_depth=1)
ANY_BATCH = ({0: Dim.DYNAMIC},)
vit = partial(models.vit, depth=3)
MODELS = {
    "class token": vit,
    "distilled": partial(models.distilled, depth=3),
    "average": lambda: vit(global_pool="avg", class_token=False),
    "registers, LayerScale, norms of q and k": lambda: vit(reg_tokens=2, init_values=0.1, qk_norm=True),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """The environment of most users: without the interpreter, which tests/conftest.py turns on."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.compiler.reset()


def assert_equal_at_every_batch(exported, model, batches=(1, 2, 3, 7)):
    for batch in batches:
        x = images(batch)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
    tokens = summary(getattr(model, "model", model)).tokens
    assert tokens[-1] < tokens[1] < tokens[0]


def assert_gradients_of_one_graph(model, x):
    def gradients(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    eager = gradients(model)
    for one, other in zip(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


class Merging(nn.Module):
    """The reference's part of a block: computes slots and merged x from keys [H, T, d] and sizes [T]."""

    def __init__(self, N, r, by_size):
        super().__init__()
        self.N, self.r, self.by_size = N, r, by_size

    def forward(self, keys, sizes):
        B = keys.shape[1] // self.N
        here = Images.of(B, self.N)
        pairs = reference.match(keys, sizes, 1, self.by_size, here)
        slots, _ = reference.assign(*pairs, torch.full((B,), self.r), 1, here)
        return slots, *reference.merge(keys[0], sizes, slots, B * (self.N - self.r))

    def example(self, B=3):
        """Inputs in which many keys and sizes are equal."""
        return torch.randint(1, 3, (2, B * self.N, 2)).float(), torch.randint(1, 4, (B * self.N,)).float()


@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
@pytest.mark.parametrize("r", [1, 4, 9])
def test_an_export_merges_the_same_tokens_of_equal_ones(r, by_size):
    merging = Merging(19, r, by_size)
    keys, sizes = merging.example()
    exported = torch.export.export(merging, (keys, sizes)).module()
    for _ in range(20):
        keys, sizes = merging.example()
        (slots, *merged), (want, *expected) = exported(keys, sizes), merging(keys, sizes)
        assert torch.equal(slots, want)
        torch.testing.assert_close(merged, expected)


class Calls(nn.Module):
    """A patched model and the function that is called on it."""

    def __init__(self, config, call, make=vit):
        super().__init__()
        self.model, self.call = apply_patch(make(), config), call

    def forward(self, x):
        return self.call(self.model, x)


def features(model, x):
    return model.forward_features(x), *model.forward_intermediates(x, intermediates_only=True)


def assert_an_export_takes_any_batch(model, strict=False):
    exported = torch.export.export(model, (images(2),), dynamic_shapes=ANY_BATCH, strict=strict)
    assert_equal_at_every_batch(exported.module(), model)
    return {str(node.target) for node in exported.graph.nodes if "atm_triton" in str(node.target)}


@every_model
def test_an_export_takes_any_batch_and_runs_without_this_package(make):
    assert not assert_an_export_takes_any_batch(apply_patch(make(), STATIC))


@pytest.mark.parametrize("config", [STATIC, IMAGE], ids=["static", "image"])
def test_a_strict_export_takes_any_batch(config):
    assert_an_export_takes_any_batch(apply_patch(vit(), config), strict=True)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_an_export_takes_images_with_counts_of_their_own(gradients):
    with torch.set_grad_enabled(gradients):
        model = apply_patch(vit(), IMAGE)
        assert assert_an_export_takes_any_batch(model)
        assert summary(model).fewest[-1] < summary(model).most[-1]


@pytest.mark.parametrize("config", [STATIC, IMAGE], ids=["static", "image"])
def test_an_export_of_features_takes_any_batch(config):
    assert_an_export_takes_any_batch(Calls(config, features))


def test_an_export_leaves_the_record_alone():
    model = apply_patch(vit(), STATIC)
    model(images(3))
    before = model.blocks.last
    torch.export.export(model, (images(2),), dynamic_shapes=ANY_BATCH)
    assert model.blocks.last is before


@every_model
def test_a_trace_takes_any_batch(make):
    model = apply_patch(make(), STATIC)
    assert_equal_at_every_batch(torch.jit.trace(model, images(2)), model)


def test_counters_and_add_graph_trace_without_strictness():
    model, x = apply_patch(vit(), STATIC), images(2)
    traced = torch.jit.trace(model, x, strict=False)
    torch.testing.assert_close(traced(x), model(x))


CALLS = {
    "logits": lambda model, x: model(x),
    "features": lambda model, x: model.forward_features(x),
    "intermediates": lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    "blocks": lambda model, x: next(iter(model.blocks(model.stem(x)))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("config", [BATCH, IMAGE], ids=["batch", "image"])
def test_a_trace_that_would_fix_what_merges_is_refused(config, call):
    want = f'torch.jit.trace cannot leave open .* with adapt="{config.adapt}": patch with adapt="static"'
    with pytest.raises(ValueError, match=want):
        torch.jit.trace(Calls(config, call), images(2), check_trace=False)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_an_export_that_would_fix_what_merges_is_refused(strict):
    want = 'torch.export cannot leave open how many tokens merge with adapt="batch": patch with adapt="static"'
    with pytest.raises(ValueError, match=want):
        torch.export.export(apply_patch(vit(), BATCH), (images(2),), strict=strict)


def test_the_older_onnx_exporter_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="torch.onnx.export with dynamo=False has no stable sort: leave dynamo at True"
    ):
        torch.onnx.export(apply_patch(vit(), STATIC), (images(2),), tmp_path / "model.onnx", dynamo=False)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("config", [STATIC, IMAGE], ids=["static", "image"])
def test_one_graph_on_a_cpu(config, gradients):
    with torch.set_grad_enabled(gradients):
        model, x = apply_patch(vit(), config), images()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert summary(model).tokens[-1] < summary(model).tokens[0]


@pytest.mark.parametrize(("config", "pool"), [(STATIC, "token"), (IMAGE, "avg")], ids=["static", "image"])
def test_gradients_of_one_graph(config, pool):
    assert_gradients_of_one_graph(apply_patch(vit(global_pool=pool).train(), config), images())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_gradients_of_each_image(pool):
    model, x = apply_patch(vit(global_pool=pool), STATIC), images()
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch has no batched form of its attention
        of_each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    alone = [grad(loss)(parameters, image) for image in x]
    for name, gradient in of_each.items():
        expected = torch.stack([own[name] for own in alone])
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(1 + expected.abs().max()))


@pytest.mark.parametrize("config", [BATCH, IMAGE], ids=["batch", "image"])
def test_gradients_by_a_transform_where_counts_decide(config):
    model, x = apply_patch(vit(), config), images()
    parameters = dict(model.named_parameters())
    gradients = grad(lambda parameters: functional_call(model, parameters, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-4)
