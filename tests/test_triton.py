"""backend="triton" in blocks and models equals backend="reference"; its operations as torch sees them."""

from functools import partial

import pytest
import torch

from atm_triton import ATMBlock, ATMConfig, apply_patch, library, ops, summary
from models import distilled, images, images_for, small, vit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "plain": vit,
    "distilled": distilled,
    "layerscale": partial(vit, init_values=0.3),
    "qk_norm": partial(vit, qk_norm=True),
    "registers_no_class": partial(vit, class_token=False, reg_tokens=3, global_pool="avg"),
    "head_dim_20": partial(vit, embed_dim=40),
    "lvvit_s": partial(small, "lvvit_s"),
}
CONFIGS = {
    "static": {"adapt": "static", "schedule": (3, 5, 2, 4)},
    "batch": {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05},
    "image": {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05, "adapt": "image"},
    "image_by_size": {"alpha": 0.6, "theta_min": 0.6, "adapt": "image", "split_depth": 1, "cls_only_last": False},
    "nothing": {"alpha": 1.0, "theta_min": 1.0},
    "all_tokens_last": {"adapt": "static", "schedule": (3, 5, 2, 4), "cls_only_last": False, "split_depth": 0},
    "no_log_n": {"adapt": "static", "schedule": (3, 5, 2, 4), "proportional_attention": False},
}


def both(model, **config):
    """The output of a model by each backend, and whether they merged the same."""
    x = images_for(model).to(DEVICE)
    out, records = [], []
    for backend in ("reference", "triton"):
        apply_patch(model, ATMConfig(backend=backend, **config))
        out.append(model(x))
        records.append(summary(model))
    for one, other in zip(
        *(torch.broadcast_tensors(*map(torch.as_tensor, r.record.rows)) for r in records), strict=True
    ):
        assert torch.equal(one, other)
    return out


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@torch.inference_mode()
def test_a_model_by_the_kernels(make, config):
    by_reference, by_kernels = both(make().to(DEVICE), **config)
    torch.testing.assert_close(by_kernels, by_reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", ["static", "image", "image_by_size"])
@pytest.mark.parametrize("make", [vit, partial(vit, init_values=0.3)], ids=["plain", "layerscale"])
def test_gradients_by_the_kernels(make, config):
    model = make().to(DEVICE).train()
    x = images().to(DEVICE)
    grads = []
    for backend in ("reference", "triton"):
        apply_patch(model, ATMConfig(backend=backend, **CONFIGS[config]))
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("config", ["static", "image"])
def test_dense_features_by_the_kernels(config):
    model, x = vit().to(DEVICE), images().to(DEVICE)
    features = []
    for backend in ("reference", "triton"):
        apply_patch(model, ATMConfig(backend=backend, **CONFIGS[config]))
        features.append(model.forward_features(x))
    torch.testing.assert_close(features[1], features[0], rtol=2e-5, atol=2e-5)


def launches(monkeypatch, call):
    """The names of the launchers that a call reaches, in order."""
    seen, launchers = [], library._kernels()
    for name, launcher in vars(launchers).items():

        def note(*arguments, name=name, launcher=launcher, **options):
            seen.append(name)
            return launcher(*arguments, **options)

        monkeypatch.setattr(launchers, name, note)
    call()
    return seen


@torch.inference_mode()
def test_a_merging_block_launches_three_kernels_and_attention(monkeypatch):
    x, size = torch.randn(2, 26, 32, device=DEVICE), torch.ones(2, 26, device=DEVICE)
    want = ["match", "attention", "assign", "merge"]
    for name in ("batch", "image"):
        config = ATMConfig(backend="triton", **CONFIGS[name])
        block = ATMBlock(32, 2, block_index=0, depth=4, config=config).eval().to(DEVICE)
        assert launches(monkeypatch, lambda block=block: block(x, size)) == want
        monkeypatch.undo()
    packed = block(x, size)
    assert launches(monkeypatch, lambda: block(*packed)) == want


def test_a_gradient_keeps_the_block_from_fusing(monkeypatch):
    block = ATMBlock(32, 2, block_index=0, depth=4, config=ATMConfig(backend="triton", **CONFIGS["batch"])).to(DEVICE)
    x = torch.randn(2, 26, 32, device=DEVICE)
    assert launches(monkeypatch, lambda: block(x)) == ["match", "assign", "merge"]
    assert block(x)[0].requires_grad


@pytest.mark.parametrize("trained", ["norm2", "ls1"])
def test_frozen_tokens_do_not_keep_a_norm_or_a_scale_from_learning(trained):
    model, x = vit(init_values=0.3).to(DEVICE), images().to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    grads = []
    for backend in ("reference", "triton"):
        apply_patch(model, ATMConfig(backend=backend, **CONFIGS["static"]))
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(("d", "P", "over"), [(16, 17, "num_prefix=17 is above 16"), (136, 1, "d=136 is above 128")])
def test_more_than_the_kernels_take(d, P, over, monkeypatch):
    keys = torch.randn(1, 2, 30, d, device=DEVICE)
    with pytest.raises(ValueError, match=over):
        ops.match(keys, None, P, False, backend="triton")
    monkeypatch.setattr(ops, "runs_kernels", lambda backend, x: True)  # as on a GPU
    assert launches(monkeypatch, lambda: ops.match(keys, None, P, False)) == []


@pytest.mark.parametrize("affine", [{"bias": False}, {"elementwise_affine": False}], ids=["no_bias", "no_weight"])
@torch.inference_mode()
def test_a_norm_without_bias_or_weight(affine):
    x = torch.randn(2, 26, 32, device=DEVICE)
    out = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        block = ATMBlock(32, 2, block_index=0, depth=4, config=ATMConfig(backend=backend, **CONFIGS["static"])).eval()
        block.norm2 = torch.nn.LayerNorm(32, **affine)
        out.append(block.to(DEVICE)(x)[0])
    torch.testing.assert_close(out[1], out[0], rtol=2e-5, atol=2e-5)


def operands():
    """Arguments for every operation."""
    q, k, v = torch.randn(2, 9, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4)
    x, attended = torch.randn(2, 9, 16, device=DEVICE), torch.randn(2, 9, 16, device=DEVICE)
    sizes = torch.randint(1, 4, (2, 9), device=DEVICE).float()
    similarity, partner, _ = library.match(k, sizes, 1, False, 0.1)
    assignment, tokens, spans = library.assign(similarity, partner, 3, 1)
    gamma, weight, bias = torch.randn(3, 16, device=DEVICE)
    return {
        "match": (k, sizes, 1, True, 0.1),
        "assign": (similarity, partner, 3, 1),
        "lists": (assignment, 6),
        "merge": (x.requires_grad_(), sizes, assignment, tokens, spans, 6),
        "add_merge_norm": (x.detach(), attended, gamma, sizes, assignment, tokens, spans, weight, bias, 1e-6, 6),
        "unmerge": (x[:, :6].detach().clone().requires_grad_(), assignment),
        "attention": (q, k, v, sizes.log2()),
    }


@pytest.mark.parametrize("on_kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", ["match", "assign", "lists", "merge", "add_merge_norm", "unmerge", "attention"])
def test_opcheck(name, on_kernels, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(library, "interpreting", lambda: on_kernels)
    operation = getattr(torch.ops.atm_triton, name).default
    torch.library.opcheck(operation, operands()[name])


@pytest.mark.parametrize("name", ["merge", "add_merge_norm", "unmerge", "attention"])
def test_kernels_and_reference_are_one_operation(name, monkeypatch):
    arguments = operands()[name]
    run = getattr(library, name)
    by_kernels = run(*arguments)
    monkeypatch.setattr(library, "_on_kernels", lambda x: False)
    torch.testing.assert_close(by_kernels, run(*arguments), rtol=1e-5, atol=1e-5)


def test_merge_and_unmerge_have_the_gradients_of_the_reference():
    arguments = operands()["merge"]
    x, sizes, assignment = arguments[:3]
    weights = torch.randn(2, 6, 16, device=DEVICE), torch.randn(2, 9, 16, device=DEVICE)
    grads = []
    for backend in ("reference", "triton"):
        merged = ops.merge(x, sizes, assignment, 6, backend).x
        back = ops.unmerge(merged, assignment, backend)
        grads += torch.autograd.grad((merged * weights[0]).sum() + (back * weights[1]).sum(), x)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["static", "image"])
@torch.inference_mode()
def test_a_model_compiles_in_one_graph(config):
    model, x = vit().to(DEVICE), images().to(DEVICE)
    apply_patch(model, ATMConfig(backend="triton", **CONFIGS[config]))
    expected = model(x)
    graphs = []

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assign = "assign" if config == "static" else "assign_each"
    assert len(graphs) == 1 and {f"atm_triton.{name}.default" for name in ("match", assign)} < graphs[0]


def test_the_count_is_the_only_break_of_a_batch_model():
    model, x = vit().to(DEVICE), images().to(DEVICE)
    apply_patch(model, ATMConfig(backend="triton", **CONFIGS["batch"]))
    explained = torch._dynamo.explain(model)(x)
    assert explained.break_reasons
    for reason in explained.break_reasons:
        frame = reason.user_stack[-1]
        assert "batch_r" in frame.name or "batch_r" in frame.line, frame


def test_any_assignment_merges_and_dropped_tokens_stay_out():
    x = torch.randn(2, 5, 16, device=DEVICE)
    assignment = torch.tensor([[0, 2, -1, 2, 9], [3, -7, -1, 0, 3]], dtype=torch.int32, device=DEVICE)
    for operation, rows in ((ops.merge, x), (ops.unmerge, x[:, :4])):
        arguments = (rows, None, assignment, 4) if operation is ops.merge else (rows, assignment)
        one, other = (operation(*arguments, backend=backend) for backend in ("reference", "triton"))
        torch.testing.assert_close(other[:2] if operation is ops.merge else other, one[:2])


def test_wrong_types_and_devices_are_refused():
    x, assignment = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(TypeError, match="assignment has dtype torch.int64; want torch.int32"):
        ops.merge(x, None, assignment.long(), 4)
    with pytest.raises(TypeError, match="sizes has dtype torch.float64; want torch.float32"):
        ops.merge(x, torch.ones(2, 5).double(), assignment, 4)
    with pytest.raises(ValueError, match="assignment is on meta, the tokens on cpu; move one of them"):
        ops.unmerge(x, assignment.to("meta"))
