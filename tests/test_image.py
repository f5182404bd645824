"""adapt="image": an image has the tokens and logits of a batch of one, whatever else is in its batch."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atm_triton import ATMBlock, ATMConfig, apply_patch, reference, summary
from atm_triton.flops import cost_of_each
from atm_triton.packed import Images
from models import distilled, images, vit
from test_export import assert_gradients_of_one_graph

F64 = torch.float64
CONFIG = ATMConfig(alpha=0.7, beta=0.02, theta_min=0.6, split_depth=2, adapt="image")
KINDS = {
    "plain": {},
    "all_tokens_last": {"cls_only_last": False},
    "by_size": {"split_depth": 0},
    "no_log_n": {"proportional_attention": False},
    "thresholds": {"thresholds": (None, 0.8, 1.0, 0.7)},
}


def varied(batch=5):
    """Images that merge from little to much: noise on fewer and fewer patches, and the rest flat."""
    x = images(batch, dtype=F64)
    for number, image in enumerate(x):
        image[:, : 8 * number] = 0.1 * number
    return x


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", [vit, distilled], ids=["plain", "distilled"])
@torch.inference_mode()
def test_an_image_is_as_if_alone(make, changes):
    """Section 3.2: in a batch of one the mean count is the image's own count."""
    model, x, config = make(dtype=F64, embed_dim=12), varied(), replace(CONFIG, **changes)
    alone, records = [], []
    for image in x.split(1):
        alone.append(apply_patch(model, replace(config, adapt="batch"))(image))
        records.append(model.blocks.last)
    together = apply_patch(model, config)(x)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    record = summary(model).record
    for block in range(4):
        for name in ("tokens", "rows"):
            number = torch.as_tensor(getattr(record, name)[block]).expand(len(x))
            assert number.tolist() == [getattr(r, name)[block] for r in records]
    assert len(set(record.tokens[-1].tolist())) > 1


@torch.inference_mode()
def test_features_are_as_if_alone():
    model, x = apply_patch(vit(dtype=F64, embed_dim=12), CONFIG), varied()
    alone = torch.cat([model.forward_features(image) for image in x.split(1)])
    torch.testing.assert_close(model.forward_features(x), alone, rtol=0, atol=1e-12)
    one, other = model.forward_intermediates(x), [model.forward_intermediates(image) for image in x.split(1)]
    for index, features in enumerate(one[1]):
        torch.testing.assert_close(features, torch.cat([o[1][index] for o in other]), rtol=0, atol=1e-12)


@torch.inference_mode()
def test_traces_are_as_if_alone():
    model, x = apply_patch(vit(dtype=F64, embed_dim=12), CONFIG), varied()
    unmerged = torch.arange(26, dtype=torch.int32).unsqueeze(0)
    for traces in zip(model.traces(x), *map(model.traces, x.split(1)), strict=True):
        together, *alone = (unmerged if trace is None else trace for trace in traces)
        assert torch.equal(together.expand(len(x), -1), torch.cat(alone))
    assert not torch.equal(together, unmerged.expand(len(x), -1))


@torch.inference_mode()
def test_the_order_of_a_batch_is_the_order_of_its_logits():
    model, x = apply_patch(vit(dtype=F64, embed_dim=12), CONFIG), varied()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(x[order]), model(x)[order], rtol=0, atol=1e-12)


@torch.inference_mode()
def test_from_nothing_to_the_minimum():
    """A flat image merges to one patch token and stays there; the image beside it merges nothing."""
    model = vit(dtype=F64, depth=10, class_token=False, global_pool="avg", pos_embed="none")
    x = images(2, dtype=F64)
    x[0] = 0.5
    config = ATMConfig(alpha=1 - 1e-9, beta=0.0, theta_min=1 - 1e-9, adapt="image")
    apply_patch(model, config)(x)
    record = summary(model).record
    assert [int(n[0]) if isinstance(n, torch.Tensor) else n for n in record.rows] == [12, 6, 3, *[1] * 7]
    assert {int(n[1]) for n in record.rows} == {25}


def test_gradients_are_those_of_each_image_alone():
    model, x = vit(dtype=F64, embed_dim=12).train(), varied()

    def gradients(config, batches):
        apply_patch(model, config)
        model.zero_grad()
        for batch in batches:
            model(batch).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    alone = gradients(replace(CONFIG, adapt="batch"), x.split(1))
    for one, other in zip(gradients(CONFIG, [x]), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_drop_path_drops_whole_images():
    block = ATMBlock(12, 2, block_index=0, depth=4, config=CONFIG, drop_path=0.5).train()
    images = Images.of_lengths(torch.tensor([3, 4] * 20))
    dropped = block.drop_images(block.drop_path1, torch.ones(140, 12), images)
    of_images = dropped[images.cu_seqlens[:-1].long(), :1]
    assert set(of_images.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, reference.of_tokens(of_images, images, 140).expand(-1, 12))


def test_a_block_alone_passes_packed_tokens_on():
    config = replace(CONFIG, alpha=0.3, theta_min=0.0)
    first, second = (ATMBlock(12, 2, block_index=i, depth=4, config=config).eval() for i in range(2))
    packed = first(torch.randn(3, 17, 12))
    assert packed.x.shape == (int(packed.images.cu_seqlens[-1]), 12) and not packed.images.equal
    assert packed.images.lengths.sum() == len(packed.x) == len(packed.sizes)
    again = second(packed)
    assert len(again.x) == int(again.images.cu_seqlens[-1]) < len(packed.x)
    assert [int(n.sum()) for n in again.sizes.split(again.images.lengths.tolist())] == [17] * 3
    with pytest.raises(ValueError, match="packed images in a block with adapt='batch'; want adapt=\"image\""):
        ATMBlock(12, 2, block_index=0, depth=4, config=replace(config, adapt="batch"))(packed)


def test_summary_tells_the_fewest_and_the_most():
    model, x = apply_patch(vit(dtype=F64, embed_dim=12), CONFIG), varied()
    model(x)
    told = summary(model)
    assert told.tokens[0] == told.fewest[0] == told.most[0] == 26
    assert told.fewest[-1] < told.tokens[-1] < told.most[-1]
    costs, alone = cost_of_each(model, told.record).macs, []
    for image in x.split(1):
        model(image)
        alone.append(summary(model).macs)
    assert costs.tolist() == alone
    assert told.macs == pytest.approx(sum(alone) / len(alone)) and 0 < told.saved < 1
    assert "fewest" in str(told) and f"{told.tokens[-1]:.1f}" in str(told)
    model(x[:1])
    assert isinstance(summary(model).tokens[-1], float)


@torch.inference_mode()
def test_one_graph_for_every_batch(monkeypatch):
    """It has no graph break and is recompiled only for the first change of batch size."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the reference
    model = apply_patch(vit(), CONFIG)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in range(50):
        x = images(3 + batch % 4)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 3
    assert summary(model).fewest[-1] < summary(model).most[-1]


def test_training_compiles_in_one_graph(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_gradients_of_one_graph(apply_patch(vit().train(), CONFIG), images())


class Masks(TorchDispatchMode):
    """Notes the addresses of the masks that torch's attention gets, forward and backward."""

    def __init__(self):
        super().__init__()
        self.begin = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        mask = (kwargs or {}).get("attn_mask")
        if "scaled_dot_product" in str(operation) and mask is not None:
            self.begin.append(mask.data_ptr())
        return operation(*args, **(kwargs or {}))


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "differ"])
def test_every_mask_begins_on_16_bytes(equal, dtype):
    """CUDA's kernels read a mask in wide words and fault if it does not start on one."""
    images = Images.of(3, 7) if equal else Images.of_lengths(torch.tensor([5, 3, 7, 1, 5]))
    sizes = torch.rand(22)[1:]  # starts inside another tensor's memory
    q, k, v = torch.randn(3, 2, 21, 8, dtype=dtype)
    with Masks() as masks:
        reference.attention(q, k, v, sizes, images)
    assert len(masks.begin) == (1 if equal else 5) and not any(begin % 16 for begin in masks.begin)


@dtypes
@pytest.mark.parametrize("way", ["inference", "training", "checkpointing"])
def test_every_mask_of_a_model_begins_on_16_bytes(way, dtype):
    model, x = apply_patch(vit(dtype=dtype, embed_dim=12), replace(CONFIG, backend="reference")), varied().to(dtype)
    model.train(way != "inference").set_grad_checkpointing(way == "checkpointing")
    with Masks() as masks, torch.set_grad_enabled(way != "inference"):
        logits = model(x)
        forward = len(masks.begin)
        if way != "inference":
            logits.float().square().sum().backward()
    merged = [n for n in summary(model).record.tokens if isinstance(n, torch.Tensor)]
    assert any((n % 4 != 0).any() for n in merged) and forward == len(merged) * len(x) > 0
    assert len(masks.begin) == {"inference": 1, "training": 2, "checkpointing": 3}[way] * forward
    assert not any(begin % 16 for begin in masks.begin)
