"""A patched model in ONNX Runtime."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from atm_triton import ATMConfig, apply_patch, reference, summary
from atm_triton.packed import Images

pytestmark = pytest.mark.works_with("onnxruntime", 'adapt="static" exported by torch.onnx, in batches of any size')
DOC = Path(__file__).parents[2] / "docs" / "export.md"
STATIC = ATMConfig(adapt="static", schedule=(6, 5, 4), split_depth=1)
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
MODELS = {
    "class token": "deit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "registers, LayerScale, average": "vit_little_patch16_reg4_gap_256",
}
onnx = partial(torch.onnx.export, dynamo=True, verbose=False)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)


def patched(name="deit_tiny_patch16_224", config=STATIC):
    return apply_patch(timm.create_model(name, **SMALL).eval(), config)


def images(batch):
    return torch.randn(batch, 3, 64, 64)


def run(program, *inputs):
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_at_any_batch(name):
    model = patched(name)
    program = onnx(model, (images(2),), dynamic_shapes=({0: Dim("batch")},))
    for batch in (1, 2, 5):
        x = images(batch)
        (logits,) = run(program, x)
        np.testing.assert_allclose(logits, model(x).numpy(), rtol=0, atol=1e-4)
    assert summary(model).tokens[-1] < summary(model).tokens[0]


class Merging(nn.Module):
    """Computes slots and merged rows from the keys [H, T, d] and sizes [T] of three images."""

    def __init__(self, by_size):
        super().__init__()
        self.by_size = by_size

    def forward(self, keys, sizes):
        here = Images.of(3, 19)
        pairs = reference.match(keys, sizes, 1, self.by_size, here)
        slots, _ = reference.assign(*pairs, torch.full((3,), 5), 1, here)
        return slots, *reference.merge(keys[0], sizes, slots, 3 * 14)


@pytest.mark.parametrize("by_size", [False, True], ids=["alternate", "size"])
def test_the_same_tokens_merge_where_many_are_equal(by_size):
    def given():
        keys = nn.functional.one_hot(torch.randint(3, (57,)), 4).float()  # their cosines are exactly 0 or 1
        return keys.expand(2, -1, -1).clone(), torch.randint(1, 4, (57,)).float()

    merging = Merging(by_size)
    program = onnx(merging, given())
    for _ in range(20):
        keys, sizes = given()
        slots, *merged = run(program, keys, sizes)
        want, *expected = merging(keys, sizes)
        assert slots.tolist() == want.tolist()
        for one, other in zip(merged, expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5)


@pytest.mark.parametrize("adapt", ["batch", "image"])
def test_counts_are_refused(adapt):
    model = patched(config=ATMConfig(adapt=adapt, thresholds=(0.5,) * 3))
    want = f'torch.onnx.export cannot leave open how many tokens merge with adapt="{adapt}": patch with adapt="static"'
    with pytest.raises(torch.onnx.OnnxExporterError, match=want):
        onnx(model, (images(2),))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_a_model_on_a_gpu_exports_without_kernels(gradients):
    model = patched()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(gradients):
        x = torch.randn(2, 3, 64, 64, device="cuda")
        model.cuda()
        exported = torch.export.export(model, (x,))
        assert [node for node in exported.graph.nodes if "atm_triton" in str(node.target)]
        assert not [node.domain for node in onnx(model, (x,), optimize=False).model.graph if node.domain]


def test_kernels_that_are_asked_for_are_refused():
    model = patched(config=ATMConfig(adapt="static", schedule=(6, 5, 4), backend="triton"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 3, 64, 64, device="cuda")
        with pytest.raises(torch.onnx.OnnxExporterError, match='backend="triton" cannot run: ONNX has no Triton'):
            onnx(model.cuda(), (x,))


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    (code,) = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE)
    code = code.replace('patch16_224"', 'patch16_224", depth=2').replace("* 12", "* 2")  # 12 blocks take long
    exec(compile(code, str(DOC), "exec"), names)
    x = names["images"]
    (logits,) = names["session"].run(None, {"x": x.numpy()})
    assert names["logits"].shape == (5, 1000)
    np.testing.assert_allclose(logits, names["model"](x).detach().numpy(), rtol=0, atol=1e-4)
