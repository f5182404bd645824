"""The engine against the blocks, with Triton's interpreter, where it replays calls in place of graphs."""

import copy
import pickle
import re
import threading
import warnings
from functools import cache, partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atm_triton import ATMConfig, apply_patch, engine, ops, remove_patch, summary
from atm_triton.captured import Modules
from atm_triton.engine import FLOAT32, recorded
from atm_triton.graphs import Replays
from atm_triton.record import Record
from atm_triton.stage import LEFT, stages
from models import distilled, images_for, vit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tiny = partial(vit, img_size=24, depth=3)  # 9 patch tokens
KINDS = {
    "plain": tiny,
    "distilled": partial(distilled, img_size=24, depth=3),
    "layerscale": partial(tiny, init_values=0.3),
    "registers": partial(tiny, reg_tokens=3),
    "qk_norm": partial(tiny, qk_norm=True),
    "no_class_token": partial(tiny, class_token=False, global_pool="avg"),
}
CONFIGS = {
    "static": {"adapt": "static", "schedule": (2, 1, 3)},
    "batch": {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05},
    "image": {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05, "adapt": "image"},
}
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")]


class Counting(Replays):
    """Counts how often stages run eagerly, are captured and are replayed."""

    def __init__(self, fails=None, holds=0.0):
        super().__init__(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
        self.eager, self.captured, self.replayed, self.fails, self.holds = 0, 0, 0, fails, holds

    def eagerly(self, run):
        self.eager += 1
        return run()

    def capture(self, run):
        if self.fails is not None:
            raise self.fails
        self.captured += 1

        def replay():
            self.replayed += 1
            return run()

        return replay

    def mib(self):
        return self.holds


def patched(model, engine=True, **config):
    """A patched model whose engine reads after every merge and has buckets of few rows."""
    model = apply_patch(model.to(DEVICE), ATMConfig(backend="triton", engine=engine, **config))
    model.engine.step, model.engine.read_gflop = 4, 0
    return model


def batch(model, size=2, seed=0):
    torch.manual_seed(seed)
    return images_for(model, size).to(DEVICE)


def by_blocks(model, x, **config):
    """The output of the blocks for x, and their record."""
    y = patched(model, engine=False, **config)(x)
    return y, model.blocks.last


def assert_same(model, x, expected, record):
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    ours = model.blocks.last
    assert ours.way == "engine", ours.way
    assert ours.matched == record.matched and ours.leading == record.leading
    for name in ("tokens", "rows"):
        for one, other in zip(getattr(ours, name), getattr(record, name), strict=True):
            assert torch.equal(*torch.broadcast_tensors(torch.as_tensor(one), torch.as_tensor(other).cpu()))
    for one, other in zip(ours.counts, record.counts, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other.cpu()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@torch.inference_mode()
def test_logits_and_what_merges_are_those_of_the_blocks(make, config):
    """A second batch in the same buffers must match too: rows beyond its last image hold values of the first batch."""
    model = make()
    for seed in range(2):
        expected = by_blocks(model, batch(model, seed=seed), **config)
        if seed == 0:
            ours = patched(copy.deepcopy(model), **config)
        assert_same(ours, batch(model, seed=seed), *expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_features_of_all_tokens(config):
    model = tiny()
    x = batch(model)
    expected = patched(model, engine=False, **config).forward_features(x)
    ours = patched(model, **config)
    for _ in range(2):
        torch.testing.assert_close(ours.forward_features(x), expected, rtol=0, atol=1e-5)
        assert ours.blocks.last.way == "engine"


@torch.inference_mode()
def test_how_the_model_pools_may_change_between_passes():
    """The pooling decides whether attention uses sizes and what follows the blocks; no other check would notice it."""
    model = tiny(global_pool="avg")
    x = batch(model)
    ours, expected = patched(copy.deepcopy(model), **CONFIGS["image"]), patched(model, False, **CONFIGS["image"])
    seen = {}
    for pool in ("avg", "max", "token"):
        expected.global_pool = pool
        seen[pool] = expected(x)
    for pool in (*seen, *seen, "avg", "max"):
        ours.global_pool = pool
        torch.testing.assert_close(ours(x), seen[pool], rtol=0, atol=1e-5)
        assert ours.blocks.last.way == "engine"
    for one, other in combinations(seen.values(), 2):
        assert not torch.allclose(one, other, atol=1e-3)
    assert len(ours.engine.passes) == 3  # each has its own graphs


@torch.inference_mode()
def test_a_block_in_anothers_place_is_refused_before_it_is_captured():
    model = patched(tiny(), **CONFIGS["image"])
    x = batch(model)
    model(x)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    assert model.engine.refusal(x) == "blocks.1 is not the block that apply_patch left there"
    with pytest.raises(TypeError, match="blocks.1 is ATMBlock; want the block that apply_patch left"):
        model(x)


@pytest.mark.parametrize("step", [1, 7, 1000], ids=["on the edge", "off it", "all rows"])
@torch.inference_mode()
def test_what_lies_beyond_the_last_image_reaches_nothing(step):
    model = tiny()
    config = CONFIGS["image"]
    expected = [by_blocks(model, batch(model, seed=seed), **config) for seed in range(2)]
    ours = patched(model, **config)
    ours.engine.step = step
    for seed in (0, 1, 0):
        assert_same(ours, batch(model, seed=seed), *expected[seed])
        (passes,) = ours.engine.passes.values()
        for pending, _ in passes.buffers:
            for tensor in pending:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)


def counted(model, **options):
    """A model whose engine counts how it runs its stages."""
    counting = Counting(**options)
    model.engine.make_replays = lambda device: counting
    return counting


@torch.inference_mode()
def test_the_second_pass_captures_and_the_third_replays():
    ours = patched(tiny(), **CONFIGS["image"])
    counting, x = counted(ours), batch(ours)
    ours(x)
    stages = counting.eager
    assert stages == 3 and counting.captured == 0  # a merge in each block but the last
    ours(x)
    assert (counting.eager, counting.captured, counting.replayed) == (stages, stages, stages)
    (passes,) = ours.engine.passes.values()
    addresses = [tensor.data_ptr() for pending, _ in passes.buffers for tensor in pending]
    ours(x)
    assert (counting.eager, counting.captured, counting.replayed) == (stages, stages, 2 * stages)
    assert [tensor.data_ptr() for pending, _ in passes.buffers for tensor in pending] == addresses
    ours(batch(ours, size=1))  # a last, smaller batch, seen once
    assert (counting.eager, counting.captured) == (2 * stages, stages)


@torch.inference_mode()
def test_graphs_outlive_that_all_workspaces_of_cublas_are_freed():
    """torch.compile frees them. On a GPU so many engines follow each other that they share streams."""
    on_gpu, model = DEVICE == "cuda", tiny()
    x = batch(model)
    expected = patched(copy.deepcopy(model), **CONFIGS["static"])(x)
    for _ in range(40 if on_gpu else 1):
        ours = patched(copy.deepcopy(model), **CONFIGS["static"])
        ours(x), ours(x)
        if on_gpu:
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_given_schedule_is_one_stage():
    ours = patched(tiny(), **CONFIGS["static"])
    counting, x = counted(ours), batch(ours, 1)
    for _ in range(3):
        ours(x)
    assert (counting.eager, counting.captured, counting.replayed) == (1, 1, 2)


@cache
def five_blocks(make, adapt):
    """A model of five blocks, batches for it, and what its blocks make of them."""
    torch.manual_seed(0)
    model = make(depth=5)
    batches = [batch(model, seed=seed) for seed in range(3)]
    return model, batches, [by_blocks(model, x, **CONFIGS[adapt]) for x in batches]


@pytest.mark.parametrize(
    ("make", "adapt", "reads"),
    [
        *((tiny, adapt, reads) for adapt in ("batch", "image") for reads in (4, 1, 0)),
        (KINDS["registers"], "image", 1),
        (KINDS["no_class_token"], "batch", 1),
    ],
)
@torch.inference_mode()
def test_blocks_merge_within_a_stage_where_a_read_does_not_pay(make, adapt, reads):
    """The counts of the last stage are read when someone asks for them, or by the next pass."""
    (model, batches, expected), config = five_blocks(make, adapt), CONFIGS[adapt]
    ours = patched(copy.deepcopy(model), **config)
    rows = len(batches[0]) * (9 + ours.num_prefix_tokens)
    gflop = 2e-9 * rows * sum(parameter.numel() for parameter in ours.blocks[0].parameters())
    ours.engine.read_gflop = FLOAT32 * {4: 0, 1: 0.3 * gflop, 0: 9 * gflop}[reads]
    counting, facts = counted(ours), []
    for x, (y, _) in zip(batches, expected, strict=True):
        torch.testing.assert_close(ours(x), y, rtol=0, atol=1e-5)
        facts.append(ours.blocks._last)
    (passes,) = ours.engine.passes.values()
    assert len(passes.stages) - 1 == reads
    assert (counting.eager + counting.captured > 2) == (reads > 0)
    for each, (_, record) in zip(facts, expected, strict=True):
        on_host = [None if counts is None else counts.cpu() for counts in record.counts]
        assert list(map(str, recorded(each).counts)) == list(map(str, on_host))
    assert_same(ours, batches[-1], *expected[-1])
    if reads != 1:
        return
    features = ours.forward_features(batches[0])
    of_blocks = patched(model, engine=False, **config).forward_features(batches[0])
    norm = ours.fc_norm  # if the pooled feature is normalised, the tokens are not, and rounding grows with them
    torch.testing.assert_close(norm(features), norm(of_blocks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", [(0.5,) * 6, (None, 0.5, 0.5, None, 0.5, 0.5), (None,) * 6])
@pytest.mark.parametrize("leading", [1, None])
def test_the_host_reads_where_all_takes_the_least(theta, leading):
    blocks = [SimpleNamespace(theta=each, parameters=lambda: [torch.empty(10**6)]) for each in theta]
    may = [index for index, each in enumerate(theta[: 5 if leading else 6]) if each is not None]

    def cost(ends, read):
        left, total, now = 1.0, read, 1.0
        for index in range(6):
            total += 2 * now  # GFLOP, of 1000 rows
            left *= LEFT if index in may else 1
            if index in ends:
                total, now = total + read, left
        return total

    ways = [ends for number in range(len(may) + 1) for ends in combinations(may, number)]
    seen = set()
    for read in (0.0, 0.1, 0.3, 0.6, 1.0, 1e9):
        cut = stages(blocks, leading, 1000, read)
        ends = tuple(stage.last for stage in cut[:-1])
        assert cost(ends, read) <= min(cost(way, read) for way in ways) + 1e-9
        assert [stage.start for stage in cut] == [0, *(end + 1 for end in ends)] and cut[-1].last is None
        assert [index for stage in cut for index in stage.counted] == may
        seen.add(len(ends))
    assert len(seen) > 2 or not may
    assert ends == () and len(stages(blocks, leading, 1000, 0.0)) >= len(may)


@torch.inference_mode()
def test_float32_takes_longer_so_that_a_read_pays_earlier():
    ours = patched(tiny(), **CONFIGS["image"])
    ours.engine.read_gflop = 8.0
    x = batch(ours)
    ours(x)
    with torch.autocast(DEVICE, torch.float16):
        ours(x)
    assert [passes.read for passes in ours.engine.passes.values()] == [8.0 / FLOAT32, 8.0]


@torch.inference_mode()
def test_batches_of_any_size_and_outputs_that_are_the_callers_own():
    model, config = tiny(), CONFIGS["batch"]
    batches = [batch(model, size, seed) for seed, size in enumerate((2, 1, 2))]
    expected = [by_blocks(model, x, **config) for x in batches]
    ours = patched(model, **config)
    for _ in range(2):
        out = [ours(x) for x in batches]
        for one, (other, _) in zip(out, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapt", ["batch", "image"])
@pytest.mark.parametrize("theta", [1.0, -1.0], ids=["nothing merges", "all that can"])
@torch.inference_mode()
def test_from_nothing_to_the_least(theta, adapt):
    model = tiny(class_token=False, global_pool="avg")
    config = {"adapt": adapt, "alpha": theta, "beta": 0.0, "theta_min": theta}
    x = batch(model)
    expected = by_blocks(model, x, **config)
    assert_same(patched(model, **config), x, *expected)
    (rows,) = {int(torch.as_tensor(rows).max()) for rows in model.blocks.last.rows[-1:]}
    assert rows == (9 if theta == 1 else 1)


@torch.inference_mode()
def test_under_autocast_as_the_blocks():
    model, config = tiny(init_values=0.3), CONFIGS["image"]
    x = batch(model)
    with torch.autocast(DEVICE, torch.float16):
        expected, record = by_blocks(model, x, **config)
        ours = patched(model, **config)
        for _ in range(2):
            out = ours(x)
            assert ours.blocks.last.way == "engine" and out.dtype == expected.dtype
            torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        assert [
            counts is None or torch.equal(counts, other.cpu())
            for counts, other in zip(ours.blocks.last.counts, record.counts, strict=True)
        ] == [True] * 3
    full = ours(x)  # another kind of pass, which uses no graph of the first
    assert full.dtype == torch.float32 and len(ours.engine.passes) == 2


def overlapping():
    model = tiny()
    model.patch_embed.proj = nn.Conv2d(3, 32, 10, stride=8, padding=1).eval()
    return model


def doubled():
    model = tiny()
    model.pos_drop = Doubled().eval()
    return model


def with_own_positions():
    model = tiny()
    model._pos_embed = lambda x: 2 * type(model)._pos_embed(model, x)
    return model


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


STEMS = {  # how images of this many rows are cut into tokens, and how often the stem's kernel runs
    "positions of patches alone": (partial(tiny, no_embed_class=True), 24, 1),
    "any size": (partial(tiny, dynamic_img_size=True), 32, 1),
    "norm before the blocks": (partial(tiny, pre_norm=True), 24, 1),
    "no positions": (partial(tiny, pos_embed="none"), 24, 1),
    "overlapping": (overlapping, 24, 0),
    "a dropout of its own": (doubled, 24, 0),
    "positions of its own": (with_own_positions, 24, 0),
    "padded": (partial(tiny, dynamic_img_size=True, dynamic_img_pad=True), 28, 0),
}


@pytest.mark.parametrize(("make", "side", "launches"), STEMS.values(), ids=STEMS)
@torch.inference_mode()
def test_patches_are_rows_of_a_matrix_where_they_do_not_overlap(make, side, launches, monkeypatch):
    model = make()
    x = torch.randn(2, 3, side, 24, device=DEVICE)
    expected, record = by_blocks(model, x, **CONFIGS["static"])
    seen = []
    monkeypatch.setattr(ops, "stem", lambda *args, run=ops.stem: seen.append(1) or run(*args))
    assert_same(patched(model, **CONFIGS["static"]), x, expected, record)
    assert len(seen) == launches


def with_mlp(**changes):
    """A model whose MLP is wide enough for two tiles of the kernel."""
    model = tiny(mlp_ratio=16)
    for block in model.blocks:
        for name, module in changes.items():
            setattr(block.mlp, name, module.eval())
    return model


MLPS = {  # also the number of blocks whose first layer and GELU are one kernel; the last serves its class token alone
    "plain": (with_mlp, 2),
    "no bias": (lambda: with_mlp(fc1=nn.Linear(32, 512, bias=False)), 2),
    "tanh": (lambda: with_mlp(act=nn.GELU(approximate="tanh")), 0),
    "another activation": (lambda: with_mlp(act=nn.ReLU()), 0),
    "a norm": (lambda: with_mlp(norm=nn.LayerNorm(512)), 0),
    "a dropout of its own": (lambda: with_mlp(drop1=Doubled()), 0),
    "an adapter": (lambda: with_mlp(fc1=Adapter(nn.Linear(32, 512))), 0),
    "few rows": (tiny, 0),
}


@pytest.mark.parametrize(("make", "launches"), MLPS.values(), ids=MLPS)
@torch.inference_mode()
def test_the_first_layer_of_an_mlp_and_its_gelu_are_one_kernel_in_16_bits(make, launches, monkeypatch):
    model = make()
    x = batch(model, 8)
    config = {"adapt": "static", "schedule": (0, 0, 0)}  # in 16 bits different tokens may merge
    exact, _ = by_blocks(model, x, **config)
    seen, kernels = [], ops._kernels()
    run = kernels.linear_gelu
    monkeypatch.setattr(kernels, "linear_gelu", lambda *args: seen.append(1) or run(*args))
    with torch.autocast(DEVICE, torch.float16):
        rounded, _ = by_blocks(model, x, **config)
        assert not seen
        out = patched(model, **config)(x)
    assert (out - exact).norm() <= 2 * (rounded - exact).norm()
    assert len(seen) == (launches if DEVICE == "cpu" else 0)  # too few rows for a GPU
    torch.testing.assert_close(patched(model, **config)(x), exact, rtol=0, atol=1e-5)
    assert len(seen) == (launches if DEVICE == "cpu" else 0)  # not in float32


@pytest.mark.parametrize("channels", [1, 4])
@torch.inference_mode()
def test_images_of_other_channels_are_refused_as_ever(channels):
    ours = patched(tiny(), **CONFIGS["static"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            ours(torch.randn(2, channels, 24, 24, device=DEVICE))


class Adapter(nn.Module):
    """A low-rank update around a linear layer, as LoRA wraps it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


@torch.inference_mode()
def test_modules_that_are_not_plain_are_called():
    model, config = tiny(), CONFIGS["image"]
    for block in list(model.blocks)[1:3]:
        block.attn.proj, block.mlp.fc1 = Adapter(block.attn.proj), Adapter(block.mlp.fc1)
        block.norm1, block.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
    x = batch(model.eval())
    expected = by_blocks(model, x, **config)
    assert_same(patched(model, **config), x, *expected)


@torch.inference_mode()
def test_weights_loaded_in_place_keep_the_graphs_and_replaced_ones_drop_them():
    ours = patched(tiny(), **CONFIGS["static"])
    counting, x = counted(ours), batch(ours, 1)
    for _ in range(2):
        before = ours(x)
    state = {name: 0.5 * tensor for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(state)
    after = ours(x)
    assert not torch.equal(before, after) and (counting.eager, counting.captured, counting.replayed) == (1, 1, 2)
    ours.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    torch.testing.assert_close(ours(x), after, rtol=0, atol=1e-6)
    ours.blocks[1].mlp.act = nn.ReLU().eval()
    assert not torch.equal(ours(x), after)
    assert (counting.eager, counting.replayed) == (
        3,
        3,
    )  # the change was noticed during a replay, which was discarded


class Switched(Adapter):
    """As in PEFT, whether it is active, and its scale, are not tensors."""

    def __init__(self, linear):
        super().__init__(linear)
        self.active, self.scaling = ["default"], {"default": 2.0, "other": -1.0}

    def forward(self, x):
        return self.linear(x) + sum(self.scaling[name] * self.up(self.down(x)) for name in self.active)


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter: adapter.active.clear(),
        lambda adapter: setattr(adapter, "active", ["other"]),
        lambda adapter: adapter.scaling.update(default=0.5),
    ],
    ids=["off", "another", "scaled"],
)
@torch.inference_mode()
def test_an_adapter_that_is_switched_is_captured_anew(change):
    model, config = tiny(), CONFIGS["static"]
    adapter = model.blocks[1].mlp.fc1 = Switched(model.blocks[1].mlp.fc1).eval()
    x = batch(model, 1)
    twin = copy.deepcopy(model)
    change(twin.blocks[1].mlp.fc1)
    expected, _ = by_blocks(twin, x, **config)
    ours = patched(model, **config)
    counting = counted(ours)
    for _ in range(2):
        before = ours(x)
    change(adapter)
    out = ours(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(out, before, atol=1e-3)
    assert (counting.eager, counting.replayed) == (2, 2)  # that replay was discarded
    ours(x), ours(x)
    assert (counting.eager, counting.captured, counting.replayed) == (2, 2, 4)


def test_a_move_that_moves_nothing_keeps_the_graphs():
    """This also holds outside inference mode, where the engine would not run."""
    ours = patched(tiny(), **CONFIGS["static"])
    counting, x = counted(ours), batch(ours, 1)
    for _ in range(3):
        with torch.inference_mode():
            ours(x)
        ours.to(DEVICE).float()
    assert (counting.eager, counting.captured, counting.replayed) == (1, 1, 2)


@torch.inference_mode()
def test_cast_unpatched_and_patched_anew_while_warm():
    model, config = tiny().to(DEVICE), CONFIGS["batch"]
    x = batch(model, 1)
    plain = model(x)
    expected, _ = by_blocks(model, x, **config)
    ours = patched(model, **config)
    for _ in range(3):
        ours(x)
    with pytest.raises(ValueError, match="the kernels take float16, bfloat16 or float32, not float64"):
        ours.double()(x.double())
    assert not ours.engine.graphs and ours.engine.seen is None  # they would keep memory that the model no longer uses
    torch.testing.assert_close(ours.float()(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(remove_patch(ours)(x), plain)
    unmerged = patched(model, adapt="static", schedule=(0,) * 3)
    torch.testing.assert_close(unmerged(x), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapt", ["static", "image"])
@torch.inference_mode()
def test_a_copy_has_an_engine_and_weights_of_its_own(adapt):
    ours = patched(tiny(), **CONFIGS[adapt])
    ours.engine.read_gflop = 1e9  # the counts are still on their way
    x = batch(ours)
    for _ in range(2):
        expected = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.engine.model is other and not other.engine.graphs
        assert (other.engine.step, other.engine.read_gflop) == (4, 1e9)
        assert isinstance(other.blocks._last, Record) and str(other.blocks.last) == str(ours.blocks.last)
        ours(x)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(other(x), expected)
        assert other.blocks.last.way == "engine"
    assert torch.equal(ours(x), expected)


@torch.inference_mode()
def test_a_drop_path_that_does_something_in_inference_is_called():
    """The blocks run then, and call it also in a block that merges."""
    base, logits = tiny(), []
    x = batch(base)
    for backend in ("triton", "reference"):
        model = apply_patch(copy.deepcopy(base).to(DEVICE), ATMConfig(backend=backend, **CONFIGS["static"]))
        plain = model(x)
        model.blocks[0].drop_path1 = Doubled().eval()
        logits.append(model(x))
        assert not torch.allclose(logits[-1], plain, atol=1e-3)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_norm_with_a_forward_of_its_own_is_called():
    """The blocks run then, and call it also between the residual sum and a merge."""
    base, logits = tiny(), []
    x = batch(base)
    for backend in ("triton", "reference"):
        model = apply_patch(copy.deepcopy(base).to(DEVICE), ATMConfig(backend=backend, **CONFIGS["static"]))
        plain = model(x)
        model.blocks[0].norm2.forward = torch.zeros_like
        logits.append(model(x))
        assert not torch.allclose(logits[-1], plain, atol=1e-3)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_no_python_of_a_changed_module_runs_in_a_pass_that_is_thrown_away():
    """The second stage has no graph yet, because no pass has reached its bucket."""
    ours = patched(tiny(), **CONFIGS["image"])
    x, seen = batch(ours), []
    for _ in range(3):
        ours(x)
    for key in [key for key in ours.engine.graphs if key[1] == 1]:
        del ours.engine.graphs[key]
    ours.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    assert refused(ours, x)[1].startswith("blocks.1.mlp.fc1 has hooks") and len(seen) == 1


def test_two_threads_on_one_model():
    ours = patched(tiny(), **CONFIGS["image"])
    batches = [batch(ours, 2, seed) for seed in range(2)]
    logits = {0: [], 1: []}

    def work(number):
        with torch.inference_mode():
            for _ in range(3):
                logits[number].append(ours(batches[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in logits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in logits.values():
        assert len(out) == 3 and torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    with torch.inference_mode():
        for number, x in enumerate(batches):
            torch.testing.assert_close(by_blocks(ours, x, **CONFIGS["image"])[0], logits[number][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted\nat all")])
@torch.inference_mode()
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(error):
    ours = patched(tiny(), **CONFIGS["static"])
    counting, x = counted(ours, fails=error), batch(ours, 1)
    expected = ours(x)
    with pytest.warns(UserWarning, match="could not be captured and runs eagerly from now on") as caught:
        assert torch.equal(ours(x), expected)
    assert len(caught) == 1 and "at all" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(ours(x), expected)
    assert counting.eager == 3


@torch.inference_mode()
def test_graphs_are_limited_in_number_and_in_memory():
    ours = patched(tiny(), **CONFIGS["image"])
    counting, x = counted(ours), batch(ours)
    ours.engine.max_graphs = 2
    for _ in range(2):
        expected = ours(x)
    assert len(ours.engine.graphs) == 2
    assert counting.captured == 0  # each of three stages is evicted before it runs again
    ours.engine.max_graphs = 9
    ours(x)
    counting.holds = ours.engine.max_mib
    with pytest.warns(UserWarning, match="graphs hold 4096 MiB: .*; raise engine.max_mib"):
        for _ in range(2):
            assert torch.equal(ours(x), expected)


def refused(model, x):
    out = model(x)
    way = model.blocks.last.way
    assert way == f"blocks: {model.engine.refusal(x)}"
    return out, way.removeprefix("blocks: ")


def hooked(model):
    model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: 2 * out)


def own_forward(model):
    model.blocks[2].attn.proj.forward = lambda x: 0 * x


def in_training(model):
    model.blocks[0].mlp.drop1.train()


def hooked_around(name):
    def change(model):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out + 1)

    return change


def another_dropout(model):
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.attn_drop = Doubled().eval()


def another_attention(model):
    model.blocks[1].attn = Around(model.blocks[1].attn).eval()


def another_block(model):
    model.blocks[1] = Around(model.blocks[1]).eval()


class Around(nn.Module):
    """A wrapper that exposes what it wraps, as torch's own wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return 2 * self.module(*args, **options)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked_around("blocks.1"), "blocks.1 has hooks of its own, which graphs would skip"),
        (hooked_around("blocks.0.attn"), "blocks.0.attn has hooks of its own, which graphs would skip"),
        (another_dropout, "a dropout is of a class of its own"),
        (another_attention, "blocks.1.attn is of a class of its own, Around"),
        (another_block, "blocks.1 is of a class of its own, Around"),
        (hooked, "blocks.1.mlp.fc1 has hooks of its own, which graphs would skip"),
        (own_forward, "blocks.2.attn.proj has a forward of its own, which graphs would skip"),
        (in_training, "blocks.0.mlp.drop1 is in training mode"),
    ],
)
@torch.inference_mode()
def test_what_python_does_in_a_pass_is_not_skipped(change, reason):
    ours = patched(tiny(), **CONFIGS["static"])
    x = batch(ours, 1)
    for _ in range(3):
        before = ours(x)
    change(ours)
    out, why = refused(ours, x)
    assert why == reason and (change is in_training or not torch.allclose(out, before, atol=1e-4))


@torch.inference_mode()
def test_the_last_kinds_of_passes_keep_their_buffers_and_graphs(monkeypatch):
    monkeypatch.setattr(engine, "KINDS", 2)
    model, config = tiny(), CONFIGS["batch"]
    batches = [batch(model, size) for size in (1, 2, 3)]
    expected = [by_blocks(model, x, **config) for x in batches]
    ours = patched(model, **config)
    for number, kept in ((0, [1]), (1, [1, 2]), (0, [2, 1]), (2, [1, 3]), (1, [3, 2])):
        for _ in range(2):
            assert_same(ours, batches[number], *expected[number])
        assert [kind.shape[0] for kind in ours.engine.passes] == kept
        assert {id(passes) for passes, *_ in ours.engine.graphs} == set(map(id, ours.engine.passes.values()))


@torch.inference_mode()
def test_a_projection_without_a_bias():
    model, config = tiny(), CONFIGS["static"]
    for block in model.blocks:
        block.attn.proj.bias = None
    x = batch(model)
    expected = by_blocks(model, x, **config)
    ours = patched(model, **config)
    for _ in range(3):
        assert_same(ours, x, *expected)


@torch.inference_mode()
def test_a_hook_on_all_modules_and_a_parameter_of_a_class_of_its_own_are_refused():
    ours = patched(tiny(), **CONFIGS["static"])
    x, seen = batch(ours, 1), []
    ours(x), ours(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    assert refused(ours, x)[1] == "a hook on all modules" and seen
    handle.remove()
    assert ours.engine.refusal(x) is None
    norm = ours.blocks[1].norm1
    norm.weight = type("Own", (nn.Parameter,), {})(norm.weight.data)
    assert refused(ours, x)[1] == "a parameter is of a class of its own"


def test_refusals():
    ours = patched(tiny(), **CONFIGS["static"])
    x = batch(ours)
    assert refused(ours, x)[1] == "gradients are on: torch.inference_mode() or no_grad() around the call"
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    assert ours.engine.refusal(x) is None
    assert ours.engine.refusal(x.clone().requires_grad_()) == "the images require a gradient"
    with torch.no_grad():
        assert refused(ours, x[:0])[1] == "there are no images"
        assert ours.engine.refusal(nn.Parameter(x)) == "the images are a Parameter, not a plain tensor"
        by_reference = apply_patch(tiny().to(DEVICE), ATMConfig(backend="reference", **CONFIGS["static"]))
        assert refused(by_reference, x)[1] == "the reference computes: asked for"
        assert refused(patched(tiny(), engine=False, **CONFIGS["static"]), x)[1] == "engine=False in the configuration"
        with FlopCounterMode(display=False):
            assert ours.engine.refusal(x) == "a transform or a mode of torch watches every operation"
        seen = []
        torch.jit.trace(lambda images: seen.append(ours.engine.refusal(images)) or 2 * images, x, check_trace=False)
        assert seen == ["a compiler traces the model"]
        scripted = patched(tiny(), **CONFIGS["static"])
        scripted.blocks[1].mlp.act = torch.jit.script(nn.GELU()).eval()
        assert scripted.engine.refusal(x) == "blocks.1.mlp.act is compiled by torch.jit and cannot be inspected"
        ours.blocks[0].attn.proj_drop = nn.Sequential().eval()
        assert ours.engine.refusal(x) == "a dropout is of a class of its own"
    with pytest.raises(TypeError, match="engine must be True or False, got 1"):
        ATMConfig(engine=1)


@torch.inference_mode()
def test_the_summary_says_which_way_a_pass_ran():
    ours = patched(tiny(), **CONFIGS["image"])
    x = batch(ours)
    for _ in range(2):
        ours(x)
    way = r"run by: engine, 3 graphs \(at most 512\) of \d+ MiB \(at most 4096\)"
    assert re.fullmatch(way, str(summary(ours)).splitlines()[-1])
    ours.train()(x)
    assert str(summary(ours)).splitlines()[-1].startswith("run by: blocks: ")


def test_counts_that_did_not_arrive_are_no_counts():
    mailbox = Replays(torch.device(DEVICE)).mailbox(2)
    with pytest.raises(RuntimeError, match=r"did not reach the host: ATMConfig\(engine=False\) runs the blocks"):
        mailbox.receive()
    mailbox.send(torch.tensor([3, 0]))
    assert mailbox.receive() == [3, 0]
    with pytest.raises(RuntimeError, match="did not reach the host"):  # those of the pass before
        mailbox.receive()


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch():
    ours, config = tiny(), CONFIGS["image"]
    x = batch(ours, 3)
    patched(ours, **config)
    together, record = ours(x), ours.blocks.last
    for index in range(3):
        torch.testing.assert_close(ours(x[index : index + 1]), together[index : index + 1], rtol=0, atol=1e-5)
        alone = ours.blocks.last
        assert [int(rows) for rows in alone.rows[:-1]] == [int(rows[index]) for rows in record.rows[:-1]]


def test_what_a_graph_has_run_through_may_not_change_unseen():
    """The interpreter reruns stages and would notice a change; a graph would not."""
    model = patched(tiny(), **CONFIGS["static"])
    with torch.inference_mode():
        now = Modules(model)
        assert now.obstacle is None and all(part.same() for part in now.parts)
        model.blocks[1].attn.scale *= 2
        assert Modules(model) != now and not all(part.same() for part in now.parts)
        now = Modules(model)
        model.pool = lambda x, *_: x[:, 0]
        assert Modules(model) != now and not all(part.same() for part in now.parts)
        assert Modules(model).obstacle is None  # captured like any other stem or head
