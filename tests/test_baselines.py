"""The methods of others against loops written from the description of their code, and against what they published."""

import copy
import math
import runpy
from dataclasses import dataclass

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atm_triton import ATMConfig, apply_patch, remove_patch, summary
from atm_triton.block import Step
from atm_triton.measure.evaluate import evaluate
from atm_triton.packed import Packed
from atm_triton.transformer import leading_tokens
from benchmarks.baselines import BASELINES, Baseline, Plan, apply_baseline, baseline
from loops import cosine
from models import distilled, images, images_for, small, vit, with_lora

# Each loop takes the tokens x of one image before and after attention, its keys and queries [H][N][d], its sizes and
# the block, and says which old tokens, each with its weight, make up every new one.


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean_key(k, i):
    return [sum(k[h][i][c] for h in range(len(k))) / len(k) for c in range(len(k[0][0]))]


def weighted_mean(group, size):
    total = sum(size[i] for i in group)
    return [(i, size[i] / total) for i in group]


def attention_row(q, k, h, i, size):
    d = len(q[h][i])
    e = [math.exp(dot(q[h][i], key) / math.sqrt(d)) * n for key, n in zip(k[h], size, strict=True)]
    return [v / sum(e) for v in e]


def evit(q, k, size, keep_rate, fuse, **_):
    H, N = len(k), len(k[0])
    rows = [attention_row(q, k, h, 0, [1] * N) for h in range(H)]
    attention = [sum(row[i] for row in rows) / H for i in range(N)]
    left = math.ceil(keep_rate * (N - 1))
    if left == N - 1:
        return [[(i, 1)] for i in range(N)]
    order = sorted(range(1, N), key=lambda i: -attention[i])
    new = [[(0, 1)], *([(i, 1)] for i in order[:left])]
    return new + ([[(i, attention[i]) for i in order[left:]]] if fuse else [])


def pitome(k, size, ratio, block, depth, **_):
    N = len(k[0])
    keys = {i: mean_key(k, i) for i in range(1, N)}
    T = N - 1
    r = math.floor(T - T * ratio)
    margin = 0.75 - 0.75 * block / depth

    def energy(i):
        gaps = [cosine(keys[i], keys[j]) - margin for j in keys]
        return sum(g if g > 0 else math.exp(g) - 1 for g in gaps) / T

    order = sorted(keys, key=lambda i: -energy(i))
    best = lambda i, among: max(among, key=lambda j: cosine(keys[i], keys[j]))  # noqa: E731
    if block < math.ceil(depth / 2):
        a, b = order[::2], order[1::2]
        a.sort(key=lambda i: -cosine(keys[i], keys[best(i, b)]))
        sources, first = a[:r], a[r:]
    else:
        sources, b, first = order[: 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
    groups = {j: [j] for j in b}
    for i in sources:
        groups[best(i, b)].append(i)
    return [weighted_mean(group, size) for group in [[0], *([i] for i in first), *groups.values()]]


def mctf(x, q, k, size, r, tau_sim=1, tau_info=20, tau_size=40, **_):
    """Also the attention each token receives, for the weights."""
    H, N = len(k), len(k[0])
    maps = [[attention_row(q, k, h, i, size) for i in range(N)] for h in range(H)]
    received = [sum(maps[h][i][j] for h in range(H) for i in range(N)) / (H * N) for j in range(N)]
    r = int((N - 1) * r) if r < 1 else r
    r = min(N - 10 if N - r < 10 else r, (N - 1) // 2)
    info = [1 / v for v in received]
    info = [v / max(info) for v in info]
    small = [1 / n for n in size]
    small = [v / max(small) for v in small]
    A, B = list(range(0, N, 2)), list(range(1, N, 2))

    def score(i, j):
        if i == 0:
            return -math.inf
        alike = ((cosine(x[i], x[j]) + 1) / 2) ** (1 / tau_sim)
        return alike * (info[i] * info[j]) ** (1 / tau_info) * (small[i] * small[j]) ** (1 / tau_size)

    best = {i: max(B, key=lambda j: score(i, j)) for i in A}
    sources = sorted(A, key=lambda i: -score(i, best[i]))[: r // 2]
    groups = {j: [j] for j in B}
    for i in sources:
        groups[best[i]].append(i)
    kept = [i for i in A if i not in sources]
    back = {j: max(kept, key=lambda i: score(i, j)) for j in B}
    order = sorted(B, key=lambda j: -score(back[j], j))
    own = {i: [i] for i in kept}
    for j in order[: r - r // 2]:
        own[back[j]] += groups[j]
    worth = [v * n for v, n in zip(received, size, strict=True)]
    return [weighted_mean(g, worth) for g in [*own.values(), *(groups[j] for j in order[r - r // 2 :])]], maps


def combine(groups, rows):
    return [[sum(w * rows[i][c] for i, w in group) for c in range(len(rows[0]))] for group in groups]


def heads_of(block, y):
    """q, k, v as lists [H][N][d] of tokens y [N, C]."""
    attn = block.attn
    qkv = attn.qkv(torch.tensor(y, dtype=torch.float64)).reshape(len(y), 3, attn.num_heads, attn.head_dim)
    return [part.transpose(0, 1).tolist() for part in qkv.transpose(0, 1)]


def by_loops(model, image, name, settings):
    """Logits of one image, and the tokens after every block with how many patches each stands for."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0].tolist()
    size, record = [1.0] * len(x), []
    for index, block in enumerate(model.blocks):
        q, k, v = heads_of(block, block.norm1(torch.tensor(x, dtype=torch.float64)).tolist())
        H, about = len(q), {"size": size, "block": index, "depth": len(model.blocks), **settings}
        reduces = index in settings.get("blocks", range(len(model.blocks)))
        groups = [[(i, 1)] for i in range(len(x))]
        if name == "mctf" and reduces:
            groups, maps = mctf(x, q, k, **about)
            old, x = x, combine(groups, x)
            _, _, v = heads_of(block, block.norm1(torch.tensor(x, dtype=torch.float64)).tolist())
            fused = [[[sum(m[j] for j, _ in key) for key in groups] for m in head] for head in maps]
            fused = [combine(groups, head) for head in fused]
            attended = [combine([list(enumerate(row)) for row in fused[h]], v[h]) for h in range(H)]
            assert len(old) > len(x)
        else:
            n = size if name == "mctf" else [1.0] * len(x)
            attended = [
                combine([list(enumerate(attention_row(q, k, h, i, n))) for i in range(len(x))], v[h]) for h in range(H)
            ]
        joined = torch.tensor(attended, dtype=torch.float64).transpose(0, 1).flatten(1)
        y = torch.tensor(x, dtype=torch.float64) + block.attn.proj(joined)
        if name != "mctf" and reduces:
            groups = {"evit": evit, "pitome": pitome}[name](q=q, k=k, **about)
            y = torch.tensor(combine(groups, y.tolist()), dtype=torch.float64)
        size = [sum(size[i] for i, _ in group) for group in groups]
        x = (y + block.mlp(block.norm2(y))).tolist()
        record.append((x, size))
    return model.head(model.norm(torch.tensor(x, dtype=torch.float64))[0]), record


CASES = [
    ("evit", {"keep_rate": 0.7, "blocks": (1, 3)}, {"fuse": True}),
    ("evit", {"keep_rate": 0.5, "blocks": (0, 2), "fuse_token": False}, {"fuse": False}),
    ("pitome", {"ratio": 0.8}, {}),
    ("pitome", {"ratio": 0.5}, {}),
    ("mctf", {"r": 4}, {"blocks": (1, 2, 3)}),
    ("mctf", {"r": 7, "blocks": (0, 2)}, {}),
    ("mctf", {"r": 0.35, "blocks": (0, 1, 3)}, {}),
    ("mctf", {"r": 4, "tau_sim": 2, "tau_info": 5, "tau_size": 3}, {"blocks": (1, 2, 3)}),
]


@pytest.mark.parametrize(("name", "settings", "more"), CASES)
@torch.no_grad()
def test_a_method_is_its_loops(name, settings, more):
    model, x = vit(dtype=torch.float64, embed_dim=16), images(2, dtype=torch.float64)
    expected = [by_loops(model, image, name, {**settings, **more}) for image in x]
    apply_baseline(model, name, **settings)
    tokens = Packed.of(model._pos_embed(model.patch_embed(x)))
    for number, block in enumerate(model.blocks):
        tokens = block.forward_packed(tokens, Step(tokens))
        loop_x, loop_sizes = zip(*(record[number] for _, record in expected), strict=True)
        merged = tokens.images.shaped(tokens.x)
        torch.testing.assert_close(merged, torch.tensor(loop_x, dtype=torch.float64), rtol=0, atol=1e-9)
        if tokens.sizes is not None:
            assert tokens.images.shaped(tokens.sizes).tolist() == list(loop_sizes)
    logits = torch.stack([logits for logits, _ in expected])
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-8)
    assert tokens.images.N < 20


def recorded(model, name, **settings):
    """The record and the cost of a pass over one image by a method."""
    apply_baseline(model, name, **settings)
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    record, found = model.blocks.last, summary(model).cost
    remove_patch(model)
    return record, found


@pytest.fixture(scope="module")
def narrow():
    """DeiT's tokens and blocks, cheap to run."""
    return timm.create_model("deit_tiny_patch16_224", embed_dim=48, num_heads=3).eval()


PUBLISHED_LENGTHS = [
    ("tome", {"r": 13}, "184 171 158 145 132 119 106 93 80 67 54 41"),
    ("tome", {"r": 16}, "181 165 149 133 117 101 85 69 53 37 21 11"),
    ("mctf", {"r": 16}, "197 181 165 149 133 117 101 85 69 53 37 21"),
    ("mctf", {"r": 0.35, "blocks": (3, 6, 9)}, "197 197 197 129 129 129 85 85 85 56 56 56"),
    ("evit", {"keep_rate": 0.8}, "197 197 197 159 159 159 129 129 129 105 105 105"),
    ("evit", {"keep_rate": 0.6}, "197 197 197 120 120 120 74 74 74 46 46 46"),
    ("evit", {"keep_rate": 0.9}, "197 197 197 179 179 179 163 163 163 148 148 148"),
    ("evit", {"keep_rate": 0.7}, "197 197 197 140 140 140 100 100 100 72 72 72"),
    ("evit", {"keep_rate": 0.7, "fuse_token": False}, "197 197 197 139 139 139 98 98 98 69 69 69"),
    ("evit", {"keep_rate": 0.5}, "197 197 197 100 100 100 52 52 52 28 28 28"),
    ("evit", {"keep_rate": 0.5, "fuse_token": False}, "197 197 197 99 99 99 50 50 50 26 26 26"),
    ("pitome", {"ratio": 0.9}, "178 161 145 131 118 107 97 88 80 73 66 60"),
    ("pitome", {"ratio": 0.95}, "188 179 171 163 155 148 141 134 128 122 116 111"),
    ("pitome", {"ratio": 0.975}, "193 189 185 181 177 173 169 165 161 157 154 151"),
]


@pytest.mark.parametrize(("name", "settings", "expected"), PUBLISHED_LENGTHS)
def test_token_counts_are_the_published_ones(narrow, name, settings, expected):
    assert recorded(narrow, name, **settings)[0].rows == tuple(map(int, expected.split()))


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        ((13, -1), "26 23 21 18 16 14 11 9 7 4 2 0"),
        ((13, 1), "0 2 4 7 9 11 14 16 18 21 23 26"),
        ((16, -1), "32 29 26 23 20 17 14 11 8 5 2 0"),
        ((8, -0.5), "12 11 10 9 9 8 7 6 6 5 4 4"),
        ([5, 3], "5 3 0 0 0 0 0 0 0 0 0 0"),
        (7, "7 7 7 7 7 7 7 7 7 7 7 7"),
    ],
)
def test_tome_reads_r_as_its_authors_do(r, expected):
    assert BASELINES["tome"](r=r).schedule(12) == tuple(map(int, expected.split()))


@pytest.fixture(scope="module")
def deit():
    return {size: timm.create_model(f"deit_{size}_patch16_224").eval() for size in ("tiny", "small")}


TOME_S = {1: "4.448", 2: "4.299", 3: "4.150", 4: "4.001", 8: "3.416", 10: "3.129", 11: "2.986", 12: "2.844"}
TOME_S |= {13: "2.703", 16: "2.291"}
TOME_T = {1: "1.211", 2: "1.169", 8: "0.924", 9: "0.885", 13: "0.731", 16: "0.622"}
EVIT_S = {0.9: "4.022", 0.8: "3.477", 0.7: "3.029", 0.6: "2.635", 0.5: "2.309"}
EVIT_S_UNFUSED = {0.9: "3.988", 0.8: "3.444", 0.7: "2.997", 0.6: "2.608", 0.5: "2.282"}
EVIT_T = {0.9: "1.092", 0.8: "0.942", 0.7: "0.821", 0.6: "0.715", 0.5: "0.629"}
PITOME_S = {0.975: "4.006", 0.95: "3.439", 0.925: "2.991", 0.9: "2.595"}


@pytest.mark.parametrize(
    ("size", "name", "settings", "gmacs"),
    [
        *(("small", "tome", {"r": r}, cost) for r, cost in TOME_S.items()),
        *(("tiny", "tome", {"r": r}, cost) for r, cost in TOME_T.items()),
        ("small", "tome", {"r": (13, -1)}, "2.112"),
        ("small", "tome", {"r": (13, 1)}, "3.428"),
        *(("small", "evit", {"keep_rate": rate}, cost) for rate, cost in EVIT_S.items()),
        *(("small", "evit", {"keep_rate": rate, "fuse_token": False}, cost) for rate, cost in EVIT_S_UNFUSED.items()),
        *(("tiny", "evit", {"keep_rate": rate}, cost) for rate, cost in EVIT_T.items()),
        *(("small", "pitome", {"ratio": ratio}, cost) for ratio, cost in PITOME_S.items()),
    ],
)
def test_costs_are_the_published_ones(deit, size, name, settings, gmacs):
    _, found = recorded(deit[size], name, **settings)
    assert f"{found.macs / 1e9:.3f}" == gmacs


FAST = {"r": 0.35, "blocks": (3, 6, 9)}
MCTF_S = {4: "4.122", 8: "3.603", 10: "3.348", 12: "3.096", 13: "2.972", 16: "2.602", 20: "2.194"}
MCTF_T = {2: "1.204", 10: "0.912", 11: "0.877", 16: "0.709"}


@pytest.mark.parametrize(
    ("size", "settings", "gflops"),
    [
        ("tiny", {"r": 16}, "0.71"),
        ("tiny", FAST, "0.75"),
        ("small", {"r": 16}, "2.60"),
        ("small", FAST, "2.76"),
        *(("small", {"r": r}, cost) for r, cost in MCTF_S.items()),
        *(("tiny", {"r": r}, cost) for r, cost in MCTF_T.items()),
    ],
)
def test_costs_of_mctf_are_the_published_ones(deit, size, settings, gflops):
    """By its own counter, fvcore's: with the similarities, and every LayerNorm at 5 operations an element, also where
    it sees tokens twice."""
    record, found = recorded(deit[size], "mctf", **settings)
    norms = sum(N + M + (M if M < N else 0) for N, M in zip(record.tokens, record.rows, strict=True)) + record.rows[-1]
    counted = found.macs + found.matching + 5 * norms * deit[size].embed_dim
    assert f"{counted / 1e9:.{len(gflops) - 2}f}" == gflops


SETTINGS = {
    "tome": {"r": 3},
    "threshold": {"theta": 0.5},
    "evit": {"keep_rate": 0.6, "blocks": (1, 2)},
    "mctf": {"r": 3},
    "pitome": {"ratio": 0.8},
}
MAKES = {
    "plain": vit,
    "distilled": distilled,
    "registers": lambda **o: vit(reg_tokens=3, **o),
    "no class token": lambda **o: vit(class_token=False, global_pool="avg", **o),
    "qk_norm": lambda **o: vit(qk_norm=True, init_values=0.3, **o),
    "lvvit_s": lambda **o: small("lvvit_s", **o),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("name", BASELINES)
def test_a_method_runs_in_every_kind_of_model_and_is_taken_away_again(name, make):
    model = make()
    x = images_for(model)
    own, before = (type(model), model.blocks, list(model.blocks)), model(x)
    if name == "evit" and leading_tokens(model) is None:
        why = "drops patch tokens" if model.has_class_token else "ranks tokens by the class token's attention"
        with pytest.raises(ValueError, match=f"^evit {why}"):
            apply_baseline(model, name)
        assert torch.equal(model(x), before)
        return
    assert apply_baseline(model, name, **SETTINGS[name]) is model
    logits = model(x)
    assert logits.shape == before.shape and logits.isfinite().all() and not torch.allclose(logits, before, atol=1e-4)
    assert model.forward_features(x).shape[1] == model.blocks.last.tokens[0]
    assert model.blocks.last.rows[-1] < model.blocks.last.tokens[0]
    alone = model(x[:1])
    if name != "threshold":
        torch.testing.assert_close(alone, logits[:1], rtol=0, atol=1e-4)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith("qkv.weight"))
    apply_baseline(model, name, cls_only_last=True, **SETTINGS[name])
    assert model(x).shape == logits.shape
    remove_patch(model)
    assert (type(model), model.blocks, list(model.blocks)) == own and torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["evit", "mctf", "pitome", "tome"])
def test_the_last_block_for_the_class_token_alone_changes_no_logit(name):
    """Also where that block would reduce tokens after its attention, or as MCTF before it."""
    settings = {"evit": {"blocks": (0, 3)}, "mctf": {"r": 3}, "pitome": {"ratio": 0.8}, "tome": {"r": 3}}
    model, x = vit(dtype=torch.float64), images(dtype=torch.float64)
    whole = apply_baseline(model, name, **settings[name])(x)
    costs = summary(model).macs
    alone = apply_baseline(model, name, cls_only_last=True, **settings[name])(x)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)
    assert summary(model).macs < costs
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True}])
def test_mctf_costs_what_torch_counts(more):
    model, x = vit(**more), images(1)
    for alone in (False, True):
        apply_baseline(model, "mctf", r=3, cls_only_last=alone)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        lengths = model.blocks.last.tokens[1:]  # of the blocks that fuse; the class token is in neither group
        similarities = sum(len(range(2, N, 2)) * len(range(1, N, 2)) for N in lengths)
        assert summary(model).macs == counter.get_total_flops() // 2 - similarities * model.embed_dim


def test_tome_and_one_threshold_are_the_engines():
    model, x = vit(dtype=torch.float64), images(dtype=torch.float64)
    tome = apply_baseline(model, "tome", r=4)(x)
    by_hand = ATMConfig(adapt="static", schedule=(4,) * 4, split_depth=4, cls_only_last=False)
    assert torch.equal(tome, apply_patch(model, by_hand)(x))
    constant = apply_baseline(model, "threshold", theta=0.6, adapt="image")(x)
    by_hand = ATMConfig(thresholds=(0.6,) * 4, split_depth=4, cls_only_last=False, adapt="image")
    assert torch.equal(constant, apply_patch(model, by_hand)(x))


@pytest.mark.parametrize("name", BASELINES)
def test_a_method_runs_in_16_bits(name):
    model, x = vit(), images()
    logits = apply_baseline(model, name, **SETTINGS[name])(x)
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.shape == logits.shape and half.isfinite().all()


def test_mctf_calls_a_qkv_that_is_more_than_its_matrix():
    """With an adapter it does what it does with the adapter's product added to the weights."""
    model, x = vit(dtype=torch.float64), images(dtype=torch.float64)
    adapted = copy.deepcopy(model)
    for block, other in zip(model.blocks, adapted.blocks, strict=True):
        adapter = other.attn.qkv = with_lora(other.attn.qkv)
        block.attn.qkv.weight.data += adapter.up.weight @ adapter.down.weight
    expected, got = (apply_baseline(each, "mctf", r=4)(x) for each in (model, adapted))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_a_method_is_evaluated_as_a_configuration_is():
    model = vit()
    batches = [(images(4), torch.arange(4)), (images(3), torch.arange(3))]
    by_hand = ATMConfig(adapt="static", schedule=(4,) * 4, split_depth=4, cls_only_last=False)
    assert evaluate(model, batches, baseline("tome", r=4).apply) == evaluate(model, batches, by_hand)
    assert evaluate(model, batches, baseline("evit", blocks=(1,)).apply).saved > 0.1


@dataclass(frozen=True)
class FirstTwo(Baseline):
    """A method in a few lines: the first two patch tokens of every block become one."""

    def plan(self, block, q, k, tokens):
        slots = torch.arange(k.shape[2]) - (torch.arange(k.shape[2]) > block.num_prefix_tokens).int()
        return Plan(slots.int().expand(len(k), -1), k.shape[2] - 1)


def test_a_sixth_method_is_a_class_and_an_entry(monkeypatch):
    monkeypatch.setitem(BASELINES, "first two", FirstTwo)
    model, x = vit(), images()
    apply_baseline(model, "first two")(x)
    assert model.blocks.last.rows == (25, 24, 23, 22)
    with pytest.raises(ValueError, match="^first two has no setting 'r'; it has cls_only_last"):
        apply_baseline(vit(), "first two", r=3)


def test_mctf_leaves_ten_tokens():
    model = vit()
    for r, rows in ((99, (26, 14, 10, 10)), (0, (26,) * 4), (0.0, (26,) * 4)):
        apply_baseline(model, "mctf", r=r)(images())
        assert model.blocks.last.rows == rows


BAD = [
    ("tomme", {}, "method 'tomme' is unknown; choose one of tome, threshold, evit, mctf, pitome; did you mean tome?"),
    ("evit", {"ratio": 0.5}, "evit has no setting 'ratio'; it has cls_only_last, keep_rate, blocks, fuse_token"),
    ("evit", {"keep_rate": 0}, "evit: keep_rate=0; want a share above 0"),
    ("evit", {"keep_rate": "x"}, "evit: keep_rate='x'; want a share above 0"),
    ("evit", {"fuse_token": "no"}, "evit: fuse_token='no'; want True or False"),
    ("evit", {"blocks": 3}, "evit: blocks=3; want different blocks, counted from 0"),
    ("evit", {"blocks": (-1,)}, r"evit: blocks=\(-1,\); want different blocks, counted from 0"),
    ("evit", {"blocks": (1, 30)}, r"blocks=\(1, 30\): the model has 4, counted from 0; give blocks below 4"),
    ("mctf", {"tau_sim": float("nan")}, "mctf: tau_sim=nan; want a number, 0 or more"),
    ("mctf", {"r": float("inf")}, "mctf: r=inf; want a whole number of tokens, or a share below 1"),
    ("mctf", {"r": None}, "mctf: r=None; want a whole number of tokens, or a share below 1"),
    ("tome", {"r": (8, "up")}, "tome: r=.*; want whole numbers from 0"),
    ("pitome", {"ratio": 0.4}, "pitome: ratio=0.4; want a share from 0.5 to 1"),
    ("mctf", {"r": 1.5}, "mctf: r=1.5; want a whole number of tokens, or a share below 1"),
    ("mctf", {"tau_info": -1}, "mctf: tau_info=-1; want a number, 0 or more"),
    ("tome", {"r": -1}, "tome: r=-1; want whole numbers from 0"),
    ("tome", {"r": (4, 2)}, r"tome: r=\(4, 2\); want whole numbers from 0, or \(r, inflect\)"),
    ("threshold", {"theta": 2}, "threshold: theta=2; want a cosine similarity"),
    ("threshold", {"adapt": "static"}, "threshold: adapt='static'; want batch or image"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD)
def test_bad_settings_are_refused_in_one_line(name, settings, message):
    model = vit()
    with pytest.raises(ValueError, match=message) as caught:
        apply_baseline(model, name, **settings)
    assert "\n" not in str(caught.value)
    assert type(model).__name__ == "VisionTransformer"


def test_no_model_but_a_vit_is_reduced():
    for name in BASELINES:
        with pytest.raises(TypeError, match="ResNet cannot be merged"):
            apply_baseline(timm.create_model("resnet18"), name)


def test_the_list_names_all_settings(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.baselines"])
    runpy.run_module("benchmarks.baselines.__main__", run_name="__main__")
    listed = capsys.readouterr().out
    for line in (
        "    keep_rate=0.7, blocks=(3, 6, 9), fuse_token=True, cls_only_last=False",
        "mctf: Fuses tokens",
        "(3, 6, 9).",
    ):
        assert line in listed
    assert all(name in listed for name in BASELINES)
