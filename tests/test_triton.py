"""backend="triton" equals backend="reference" in blocks and models, and its operations work as torch operations."""

import inspect
import sys
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode

from atm_triton import ATMBlock, ATMConfig, apply_patch, ops, summary
from atm_triton.block import Step
from atm_triton.packed import Assignment, Images, Packed
from models import distilled, images, images_for, small, vit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "plain": vit,
    "distilled": distilled,
    "registers_no_class": partial(vit, class_token=False, reg_tokens=3, global_pool="avg"),
    "layerscale_qk_norm_head_dim_20": partial(vit, init_values=0.3, qk_norm=True, embed_dim=40),
    "lvvit_s": partial(small, "lvvit_s"),
}
CONFIGS = {
    "static": {"adapt": "static", "schedule": (3, 5, 2, 4)},
    "batch": {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05},
    "image": {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05, "adapt": "image"},
    "image_by_size": {
        "alpha": 0.6,
        "beta": 0.0,
        "theta_min": 0.6,
        "adapt": "image",
        "split_depth": 1,
        "cls_only_last": False,
    },
    "nothing": {"alpha": 1.0, "beta": 0.0, "theta_min": 1.0},
    "all_tokens_last": {"adapt": "static", "schedule": (3, 5, 2, 4), "cls_only_last": False, "split_depth": 0},
    "no_log_n": {"adapt": "static", "schedule": (3, 5, 2, 4), "proportional_attention": False},
}


def both(model, **config):
    """The output of a model by each backend; both must merge the same numbers."""
    x = images_for(model).to(DEVICE)
    out, records = [], []
    for backend in ("reference", "triton"):
        apply_patch(model, ATMConfig(backend=backend, engine=False, **config))
        out.append(model(x))
        records.append(summary(model))
    for one, other in zip(
        *(torch.broadcast_tensors(*map(torch.as_tensor, r.record.rows)) for r in records), strict=True
    ):
        assert torch.equal(one, other)
    return out


@pytest.mark.parametrize("H", [7, 12, 16])
@pytest.mark.parametrize("by_size", [False, True])
def test_keys_of_many_heads_are_averaged(H, by_size):
    """They are loaded some at a time, and those that are left over by themselves."""
    keys, images_of = torch.randn(H, 34, 16, device=DEVICE), Images.of(2, 17, DEVICE)
    sizes = torch.randint(1, 4, (34,), device=DEVICE).float()
    want, ours = (
        ops.match(keys, sizes, images_of, 1, by_size, backend=backend).similarity for backend in ("reference", "triton")
    )
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-6)


EACH = ("batch", "image_by_size", "no_log_n")  # covers all that differs between kinds of model
CELLS = [(kind, config) for kind in KINDS for config in (CONFIGS if kind == "plain" else EACH)]


@pytest.mark.parametrize(("kind", "config"), CELLS)
@torch.inference_mode()
def test_a_model_by_the_kernels(kind, config):
    by_reference, by_kernels = both(KINDS[kind]().to(DEVICE), **CONFIGS[config])
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
    """The names of the launchers that a call reaches, in their order."""
    seen, launchers = [], ops._kernels()
    for name, launcher in vars(launchers).items():

        def note(*arguments, name=name, launcher=launcher, **options):
            seen.append(name)
            return launcher(*arguments, **options)

        monkeypatch.setattr(launchers, name, note)
    call()
    return seen


@pytest.mark.parametrize(("N", "sized", "by_kernel"), [(5, True, True), (5, False, False), (9, False, True)])
def test_the_kernel_attends_where_log_n_is_added_or_lengths_differ(N, sized, by_kernel, monkeypatch):
    of_images = Images.of(2, 5, DEVICE)
    of_images = of_images if N == 5 else Images(of_images.cu_seqlens.new_tensor([0, 9, 10]), N, False)
    q, sizes = torch.randn(2, 10, 16, device=DEVICE), torch.ones(10, device=DEVICE) if sized else None
    seen = launches(monkeypatch, lambda: ops.attention(q, q, q, sizes, of_images, backend="triton"))
    assert seen == ["attention"] * by_kernel


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
    assert not packed.images.equal
    assert launches(monkeypatch, lambda: block(packed)) == want


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
    keys, one = torch.randn(2, 30, d, device=DEVICE), Images.of(1, 30, DEVICE)
    with pytest.raises(ValueError, match=over):
        ops.match(keys, None, one, P, False, backend="triton")
    monkeypatch.setattr(ops, "runs_kernels", lambda backend, x: True)  # as on a GPU
    assert launches(monkeypatch, lambda: ops.match(keys, None, one, P, False)) == []


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


OPERATIONS = ["match", "assign", "merge", "add_merge_norm", "unmerge", "attention", "leading attention"]
IMAGES = {"equal": Images.of(3, 9, DEVICE), "differ": Images.of_lengths(torch.tensor([7, 1, 19], device=DEVICE))}

every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_batch = pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)


def operands(images, dtype=torch.float32):
    """Arguments for every operation, with 27 tokens."""
    cu_seqlens, N, T = images.cu_seqlens, images.N, 27
    q, k, v = torch.randn(T, 3, 2, 16, device=DEVICE).to(dtype).permute(1, 2, 0, 3)
    x, attended = torch.randn(2, T, 16, device=DEVICE).to(dtype)
    gamma, weight, bias = torch.randn(3, 16, device=DEVICE).to(dtype)
    sizes = torch.randint(1, 4, (T,), device=DEVICE).float()
    similarity, partner, counts = ops._match(k, sizes, cu_seqlens, 1, False, 0.1, N)
    r = torch.full_like(counts, 3) if images.equal else counts
    to_assign = (similarity, partner, r, cu_seqlens, 1, N, T - 3 * 3 if images.equal else -1)
    slots, tokens, spans, merged_cu_seqlens = ops._assign(*to_assign)
    assignment = (sizes, slots, tokens, spans, merged_cu_seqlens)
    return {
        "match": (k, sizes, cu_seqlens, 1, True, 0.1, N),
        "assign": to_assign,
        "merge": (x.requires_grad_(), *assignment),
        "add_merge_norm": (x.detach(), attended, gamma, *assignment, weight, bias, 1e-6),
        "unmerge": (x[: len(spans)].detach().clone().requires_grad_(), slots),
        "attention": (q, k, v, sizes.log2(), cu_seqlens, cu_seqlens, N, N),
        "leading attention": (
            q[:, cu_seqlens[:-1].long()],
            k,
            v,
            sizes.log2(),
            Images.of(3, 1, DEVICE).cu_seqlens,
            cu_seqlens,
            1,
            N,
        ),
    }


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("r", "same"), [(3, [3] * 3), ("batch", None), ("image", None)], ids=str)
def test_what_says_r_is_the_same_to_both_backends(r, same, backend, traced, monkeypatch):
    """Each source of r gives the same as r of each image. ``traced``: through torch's dispatcher."""
    images = Images.of(3, 19, DEVICE)
    keys = torch.randn(2, 57, 16, device=DEVICE)
    pairs = ops.match(keys, None, images, 1, False, 0.3, backend)
    assert pairs.theta == 0.3
    of_each = {"batch": pairs.counts.sum() // 3 * torch.ones_like(pairs.counts), "image": pairs.counts}.get(r)
    of_each = torch.tensor(same, device=DEVICE) if of_each is None else of_each
    assert pairs.counts.unique().numel() > 1 and int(pairs.counts.sum()) % 3
    T = 57 - int(of_each.sum())
    want = ops.assign(pairs, of_each, images, 1, T, r != "image", "reference")
    if traced:
        monkeypatch.setattr(ops, "_plain", lambda arguments: False)
    got = ops.assign(pairs, r, images, 1, T, r != "image", backend)
    assert torch.equal(got.slots, want.slots) and torch.equal(got.images.cu_seqlens, want.images.cu_seqlens)
    assert (got.num_slots, got.images[1:]) == (want.num_slots, want.images[1:])


@pytest.mark.parametrize("on_kernels", [True, False], ids=["kernels", "reference"])
@every_batch
@every_operation
def test_opcheck(name, images, on_kernels, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "interpreting", lambda: on_kernels)
    torch.library.opcheck(getattr(torch.ops.atm_triton, name.removeprefix("leading ")).default, operands(images)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_batch
@every_operation
def test_kernels_and_reference_are_one_operation(name, images, dtype, monkeypatch):
    arguments, run = operands(images, dtype)[name], getattr(ops, "_" + name.removeprefix("leading "))
    by_kernels = run(*arguments)
    monkeypatch.setattr(ops, "_on_kernels", lambda x: False)
    within = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(by_kernels, run(*arguments), rtol=within, atol=within)


@every_batch
def test_opcheck_of_attention_with_a_derivative(images):
    q, k, v, *others = operands(images)["attention"]
    asked = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.atm_triton.attention_forward.default, (*asked, *others))
    out, lse = torch.ops.atm_triton.attention_forward(q, k, v, *others)
    backward = (torch.randn_like(out), q, k, v, *others[:3], out, lse, *others[3:])
    torch.library.opcheck(torch.ops.atm_triton.attention_backward.default, backward)


def test_attention_has_no_second_derivative():
    """Otherwise torch would return 0 with a warning."""
    q, k, v = (torch.randn(2, 5, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out = ops.attention(q, k, v, torch.ones(5, device=DEVICE), Images.of(1, 5, DEVICE), backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative; patch the model with"):
        grad.sum().backward()


@every_batch
def test_merge_and_unmerge_have_the_gradients_of_the_reference(images):
    x, sizes, slots, tokens, spans, cu_seqlens = operands(images)["merge"]
    T = len(spans)
    assignment = Assignment(slots, T, Images(cu_seqlens, images.N, False), tokens, spans)
    weights = torch.randn(T, 16, device=DEVICE), torch.randn(27, 16, device=DEVICE)
    grads = []
    for backend in ("reference", "triton"):
        lists = {"order": None, "spans": None} if backend == "reference" else {}
        merged = ops.merge(Packed(x, sizes, images), assignment._replace(**lists), backend).x
        back = ops.unmerge(merged, slots, backend)
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
    assert len(graphs) == 1 and {f"atm_triton.{name}.default" for name in ("match", "assign")} < graphs[0]


@pytest.mark.parametrize(("backend", "grad"), [("reference", True), ("triton", True), ("triton", False)])
def test_the_count_is_the_only_break_of_a_batch_model(backend, grad):
    """Only kernels do something else where no gradient is wanted."""
    model, x = vit(depth=2).to(DEVICE), images().to(DEVICE)
    apply_patch(model, ATMConfig(backend=backend, **CONFIGS["batch"]))
    with torch.set_grad_enabled(grad):
        explained = torch._dynamo.explain(model)(x)
    assert explained.break_reasons
    for reason in explained.break_reasons:
        assert "int(ops.read(copy).sum())" in reason.user_stack[-1].line, reason.user_stack


def strangers(value):
    """The objects that a compiler may be unable to rebuild after a graph break: ours and torch's, except tensors,
    modules and tuples, and except steps, whose class is known where they are made."""
    if isinstance(value, tuple):
        return [other for member in value for other in strangers(member)]
    known = isinstance(value, torch.Tensor | torch.nn.Module | Step)
    return [value] if type(value).__module__.startswith(("atm_triton", "torch")) and not known else []


@torch.inference_mode()
def test_what_lives_over_the_break_of_a_batch_model_are_tensors_and_tuples(monkeypatch):
    model, x = vit(depth=3).to(DEVICE), images().to(DEVICE)
    apply_patch(model, ATMConfig(**CONFIGS["batch"]))
    expected, read, alive = model(x), ops.read, {"forward": [], "forward_packed": [], "assign": []}

    @torch.compiler.disable
    def watched(copy):
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == inspect.getfile(ATMBlock):
                alive[frame.f_code.co_name].append(strangers(tuple(frame.f_locals.values())))
            frame = frame.f_back
        return read(copy)

    monkeypatch.setattr(ops, "read", watched)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)
    assert alive == {name: [[]] * 2 for name in alive}  # for each block that merges


def test_a_compiled_graph_hands_counts_on_as_they_are():
    """It does not pass on a host copy and an event, which no graph can hold. Torch takes the tensor for a CUDA
    tensor."""
    with FakeTensorMode():
        r = torch.ones(3, dtype=torch.int64, device="cuda")
        on_host, copied = torch.compile(ops.to_host, backend="eager", fullgraph=True)(r)
    assert on_host.is_cuda and copied is None


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_any_assignment_merges_and_dropped_tokens_stay_out(backend):
    slots = torch.tensor([0, 2, -1, 2, 9, 3, -7, -1, 0, 3], dtype=torch.int32, device=DEVICE)
    x = torch.randn(10, 16, device=DEVICE)
    merged = ops.merge(Packed(x, None, Images.of(2, 5, DEVICE)), Assignment(slots, 4, Images.of(1, 4, DEVICE)), backend)
    torch.testing.assert_close(merged.x, torch.stack([x[0] + x[8], 0 * x[0], x[1] + x[3], x[5] + x[9]]) / 2)
    assert merged.sizes.tolist() == [2, 0, 2, 2]
    kept = [0, 1, 3, 5, 8, 9]
    back = ops.unmerge(merged.x, slots, backend)
    assert torch.equal(back[kept], merged.x[slots[kept].long()]) and back.count_nonzero() == len(kept) * 16


def forward_derivative(model, x):
    with torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    ("follow", "who"),
    [
        (lambda model, x: torch.jit.trace(model, x), "torch.jit.trace"),
        (lambda model, x: torch.func.grad(lambda x: model(x).sum())(x), "a transform of torch.func"),
        (lambda model, x: torch.func.vmap(lambda x: model(x[None]))(x), "a transform of torch.func"),
        (forward_derivative, "forward-mode differentiation"),
    ],
    ids=["trace", "grad", "vmap", "jvp"],
)
def test_what_follows_every_operation_cannot_follow_kernels(follow, who):
    """A trace would freeze the sizes of a launch, and a derivative would be lost silently."""
    model, x = vit().to(DEVICE), images().to(DEVICE)
    apply_patch(model, ATMConfig(backend="triton", **CONFIGS["static"]))
    with pytest.raises(ValueError, match=f'backend="triton" cannot run: {who} cannot follow kernels; use "auto"'):
        follow(model, x)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_the_interpreter_is_not_trusted_with_bfloat16():
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Triton's interpreter computes bfloat16 wrongly; take float16 or float32"):
        ops.attention(x, x, x, torch.ones(5), Images.of(1, 5), backend="triton")
