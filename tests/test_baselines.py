"""Other methods against loops written from descriptions of their code, and against their published figures."""

import copy
import math
import re
import runpy
from dataclasses import dataclass
from itertools import pairwise

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import loops
from atm_triton import ATMConfig, apply_patch, remove_patch, summary
from atm_triton.block import Step
from atm_triton.flops import cost, cost_of_each, unmerged
from atm_triton.measure.evaluate import evaluate
from atm_triton.packed import Assignment, Packed
from atm_triton.transformer import leading_tokens
from benchmarks.baselines import ALL, BASELINES, Baseline, DenseAssignment, apply_baseline, baseline
from benchmarks.baselines.dtome import DToMe, FittingBlock
from benchmarks.pages import ROOT
from loops import cosine
from models import distilled, images, images_for, small, vit, with_lora

# Each loop takes the tokens x of one image before and after attention, its keys and queries [H][N][d], its sizes and
# the block. It returns for every new token the old tokens that form it, each with its weight.


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
    """MCTF's groups; also returns the attention that each token receives, for the weights."""
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


def sampled(scores, M):
    """The positions of the scores that the M points of ATS pick, from the lowest score to the highest."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    if not any(scores):
        return order
    total, cdf = 0.0, []
    for i in order:
        total += scores[i] / sum(scores)
        cdf.append(total)
    low, high = cdf[0], cdf[-1]
    if not high > low:
        return order
    cdf = [(c - low) / (high - low) for c in cdf]
    first = min(c for c in cdf if c > 0)
    points = [first + (1 - first) * k / (M - 1) for k in range(M)]
    picks = {min(range(len(cdf)), key=lambda i: abs(cdf[i] - y)) for y in points}
    if max(picks) == 1:
        picks.remove(1)
    return [order[i] for i in sorted(picks)]


def ats(q, k, v, M, P, **_):
    H, N = len(k), len(k[0])
    rows = [attention_row(q, k, h, 0, [1] * N) for h in range(H)]
    norm = [math.sqrt(sum(c * c for h in range(H) for c in v[h][j])) for j in range(N)]
    scores = [sum(row[j] for row in rows) * norm[j] for j in range(P, N)]
    return [[(i, 1)] for i in [*range(P), *(P + i for i in sampled(scores, M))]]


def zero_tprune(
    q, k, P, block, depth, r, keep_rate, keys="mean", start="class", mass="tokens", bounds=(0.01, 0.7), **_
):
    H, N = len(k), len(k[0])
    maps = [[attention_row(q, k, h, i, [1] * N) for i in range(N)] for h in range(H)]

    def importance(nodes, votes):
        heads = []
        for h in range(H):
            s = {i: 1.0 for i in nodes}
            if start == "class":
                s[0] = math.sqrt(len(nodes))
            for _ in range(votes):
                s = {j: sum(s[i] * maps[h][i][j] for i in nodes) for j in nodes}
            scale = (len(nodes) if mass == "tokens" else 1) / sum(s.values())
            heads.append({i: scale * share for i, share in s.items()})
        mean = (1 if mass == "one" else len(nodes)) / len(nodes)
        variance = [sum((s[i] - mean) ** 2 for i in nodes) / len(nodes) for s in heads]
        accepted = [s for s, var in zip(heads, variance, strict=True) if bounds[0] <= var <= bounds[1]] or heads
        return lambda i: math.sqrt(sum(s[i] ** 2 for s in accepted) / len(accepted))

    def key(i):
        return mean_key(k, i) if keys == "mean" else [c for h in range(H) for c in k[h][i]]

    first = importance(range(N), 1)
    order = sorted(range(P, N), key=lambda i: -first(i))
    dear, cheap = order[: (N - P + 1) // 2], order[(N - P + 1) // 2 :]
    like = {i: max(cosine(key(i), key(j)) for j in dear) for i in cheap}
    gone = sorted(cheap, key=lambda i: -like[i])[:r]
    nodes = [i for i in range(N) if i not in gone]
    then = importance(nodes, 50 if block < 3 else 1 if block >= depth - 3 else 10)
    left = math.ceil(keep_rate * (N - P - len(gone)))
    kept = sorted(nodes[P:], key=lambda i: -then(i))[:left]
    return [[(i, 1)] for i in nodes if i < P or i in kept]


def tofu(k, size, P, r, merges, sizes=True, **_):
    N = len(k[0])
    pairs = loops.match([mean_key(k, i) for i in range(N)], *loops.groups(N, P))
    slots = loops.assign(N, P, *loops.groups(N, P), pairs, min(r, (N - P) // 2))
    groups = [[i for i in range(N) if slots[i] == slot] for slot in range(max(slots) + 1)]
    if merges:
        return [weighted_mean(group, size if sizes else [1.0] * N) for group in groups]
    return [[(i, 1) for i in group if i not in pairs or len(group) == 1] for group in groups]


def longest(groups, rows, combined):
    """ToFu's MLERP: a mean of several tokens gets the length of the longest of them."""
    for m, group in enumerate(groups):
        if len(group) > 1:
            length = max(math.sqrt(dot(rows[i], rows[i])) for i, _ in group)
            own = math.sqrt(dot(combined[m], combined[m]))
            combined[m] = [c * length / own for c in combined[m]]
    return combined


def combine(groups, rows):
    return [[sum(w * rows[i][c] for i, w in group) for c in range(len(rows[0]))] for group in groups]


def heads_of(block, y):
    """q, k, v as lists [H][N][d] of tokens y [N, C]."""
    attn = block.attn
    qkv = attn.qkv(torch.tensor(y, dtype=torch.float64)).reshape(len(y), 3, attn.num_heads, attn.head_dim)
    return [part.transpose(0, 1).tolist() for part in qkv.transpose(0, 1)]


METHODS = {"evit": evit, "pitome": pitome, "ats": ats, "zero_tprune": zero_tprune, "tofu": tofu}


def by_loops(model, image, name, settings):
    """Logits of one image, and the tokens after every block with their sizes."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0].tolist()
    size, record, depth = [1.0] * len(x), [], len(model.blocks)
    for index, block in enumerate(model.blocks):
        q, k, v = heads_of(block, block.norm1(torch.tensor(x, dtype=torch.float64)).tolist())
        about = {"size": size, "block": index, "depth": depth, "P": model.num_prefix_tokens, **settings}
        about["merges"] = index >= settings.get("switch", depth // 2 + 1)
        H, groups = len(q), [[(i, 1)] for i in range(len(x))]
        reduces = index in settings.get("blocks", range(depth))
        if name == "mctf" and reduces:
            groups, maps = mctf(x, q, k, **about)
            old, x = x, combine(groups, x)
            _, _, v = heads_of(block, block.norm1(torch.tensor(x, dtype=torch.float64)).tolist())
            fused = [[[sum(m[j] for j, _ in key) for key in groups] for m in head] for head in maps]
            fused = [combine(groups, head) for head in fused]
            attended = [combine([list(enumerate(row)) for row in fused[h]], v[h]) for h in range(H)]
            assert len(old) > len(x)
        else:
            n = size if name in ("mctf", "tofu") and settings.get("sizes", True) else [1.0] * len(x)
            attended = [
                combine([list(enumerate(attention_row(q, k, h, i, n))) for i in range(len(x))], v[h]) for h in range(H)
            ]
        joined = torch.tensor(attended, dtype=torch.float64).transpose(0, 1).flatten(1)
        y = torch.tensor(x, dtype=torch.float64) + block.attn.proj(joined)
        if name == "zero_tprune":
            y = y + block.mlp(block.norm2(y))
        if name != "mctf" and reduces:
            groups = METHODS[name](q=q, k=k, v=v, **about)
            merged = combine(groups, y.tolist())
            y = torch.tensor(longest(groups, y.tolist(), merged) if name == "tofu" else merged, dtype=torch.float64)
        size = [sum(size[i] for i, _ in group) for group in groups]
        x = (y if name == "zero_tprune" else y + block.mlp(block.norm2(y))).tolist()
        record.append((x, size))
    return model.forward_head(model.norm(torch.tensor(x, dtype=torch.float64))[None])[0], record


CASES = [
    ("evit", {"keep_rate": 0.7, "blocks": (1, 3)}, {"fuse": True}),
    ("evit", {"keep_rate": 0.5, "blocks": (0, 2), "fuse_token": False}, {"fuse": False}),
    ("pitome", {"ratio": 0.8}, {}),
    ("pitome", {"ratio": 0.5}, {}),
    ("mctf", {"r": 4}, {"blocks": (1, 2, 3)}),
    ("mctf", {"r": 7, "blocks": (0, 2)}, {}),
    ("mctf", {"r": 0.35, "blocks": (0, 1, 3)}, {}),
    ("mctf", {"r": 4, "tau_sim": 2, "tau_info": 5, "tau_size": 3}, {"blocks": (1, 2, 3)}),
    ("ats", {"M": 25, "blocks": (0, 1, 3)}, {}),
    ("ats", {"M": 9, "blocks": (1, 2)}, {}),
    ("ats", {"M": 1000, "blocks": (0,)}, {}),
    ("ats", {"M": 2, "blocks": (1, 2, 3)}, {}),
    ("zero_tprune", {"r": 3, "keep_rate": 0.8, "blocks": (0, 1, 3)}, {}),
    ("zero_tprune", {"r": 30, "keep_rate": 1, "blocks": (1,), "start": "uniform"}, {}),
    ("zero_tprune", {"r": 5, "keep_rate": 1, "blocks": (1, 2), "keys": "concatenated"}, {}),
    ("zero_tprune", {"r": 0, "keep_rate": 0.7, "blocks": (0, 2), "mass": "one"}, {}),
    ("zero_tprune", {"r": 2, "keep_rate": 0.7, "blocks": (1, 2), "variance": (0.05, 0.5)}, {"bounds": (0.05, 0.5)}),
    ("tofu", {"r": 3}, {}),
    ("tofu", {"r": 30, "switch": 1}, {}),
    ("tofu", {"r": 5, "switch": 0, "sizes": False}, {}),
    ("tofu", {"r": 4, "switch": 4}, {}),
]


@pytest.mark.parametrize(("name", "settings", "more"), CASES)
@torch.no_grad()
def test_a_method_is_its_loops(name, settings, more):
    check_by_loops(vit(dtype=torch.float64, embed_dim=16), name, settings, more)


@pytest.mark.parametrize(
    ("name", "settings"), [case[:2] for case in CASES if case[0] in ("ats", "zero_tprune", "tofu")]
)
@pytest.mark.parametrize(
    "make", [lambda **o: vit(reg_tokens=2, img_size=(24, 64), **o), distilled], ids=["registers", "distilled"]
)
@torch.no_grad()
def test_leading_tokens_stay(make, name, settings):
    more = {"bounds": settings["variance"]} if "variance" in settings else {}
    check_by_loops(make(dtype=torch.float64, embed_dim=16), name, settings, more)


def check_by_loops(model, name, settings, more):
    x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    expected = [by_loops(model, image, name, {**settings, **more}) for image in x]
    apply_baseline(model, name, **settings)
    tokens = Packed.of(model._pos_embed(model.patch_embed(x)))
    entering = tokens.images.N
    for number, block in enumerate(model.blocks):
        tokens = block.forward_packed(tokens, Step(tokens))
        lengths = tokens.images.lengths.tolist()
        for (_, record), rows in zip(expected, tokens.x.split(lengths), strict=True):
            torch.testing.assert_close(rows, torch.tensor(record[number][0], dtype=torch.float64), rtol=0, atol=1e-9)
        if tokens.sizes is not None:
            assert tokens.sizes.tolist() == [n for _, record in expected for n in record[number][1]]
    logits = torch.stack([logits for logits, _ in expected])
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-9)
    assert max(lengths) < entering


def recorded(model, name, **settings):
    """The record and the cost of a pass over one image with a method."""
    apply_baseline(model, name, **settings)
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    record, cost = model.blocks.last, summary(model).cost
    remove_patch(model)
    return record, cost


@pytest.fixture(scope="module")
def narrow():
    """A model with DeiT's tokens and blocks that is cheap to run."""
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
        *(("small", "tofu", {"r": r}, cost) for r, cost in TOME_S.items()),  # as many tokens as ToMe
    ],
)
def test_costs_are_the_published_ones(deit, size, name, settings, gmacs):
    _, cost = recorded(deit[size], name, **settings)
    assert f"{cost.macs / 1e9:.3f}" == gmacs


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
    """The authors count with fvcore, which includes similarities and counts 5 operations per element of every
    LayerNorm, also for tokens that pass a norm twice."""
    record, cost = recorded(deit[size], "mctf", **settings)
    norms = sum(N + M + (M if M < N else 0) for N, M in zip(record.tokens, record.rows, strict=True)) + record.rows[-1]
    counted = cost.macs + cost.matching + 5 * norms * deit[size].embed_dim
    assert f"{counted / 1e9:.{len(gflops) - 2}f}" == gflops


SETTINGS = {
    "tome": {"r": 3},
    "threshold": {"theta": 0.5},
    "evit": {"keep_rate": 0.6, "blocks": (1, 2)},
    "mctf": {"r": 3},
    "pitome": {"ratio": 0.8},
    "ats": {"M": 12, "blocks": (1, 3)},
    "zero_tprune": {"r": 3, "keep_rate": 0.8, "blocks": (0, 2)},
    "tofu": {"r": 3},
    "dtome": {"thresholds": (0.5, 0.6, 0.7, 0.3)},
}
WANTS = {  # the error for models without a class token, or whose logits need all patch tokens
    "evit": "ranks tokens by the class token's attention",
    "ats": "ranks tokens by the class token's attention",
    "zero_tprune": "drops patch tokens",
    "tofu": "drops patch tokens",
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
    if name in WANTS and leading_tokens(model) is None:
        why = "drops patch tokens" if model.has_class_token else WANTS[name]
        with pytest.raises(ValueError, match=f"^{name} {why}"):
            apply_baseline(model, name)
        assert torch.equal(model(x), before)
        return
    assert apply_baseline(model, name, **SETTINGS[name]) is model
    logits = model(x)
    assert logits.shape == before.shape and logits.isfinite().all() and not torch.allclose(logits, before, atol=1e-4)
    assert model.forward_features(x).shape[1] == model.blocks.last.tokens[0]
    assert (torch.as_tensor(model.blocks.last.rows[-1]) < model.blocks.last.tokens[0]).all()
    alone = model(x[:1])
    if name != "threshold":
        torch.testing.assert_close(alone, logits[:1], rtol=0, atol=1e-4)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith("qkv.weight"))
    apply_baseline(model, name, cls_only_last=True, **SETTINGS[name])
    assert model(x).shape == logits.shape
    remove_patch(model)
    assert (type(model), model.blocks, list(model.blocks)) == own and torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["evit", "mctf", "pitome", "tome", "ats", "zero_tprune", "tofu", "dtome"])
def test_the_last_block_for_the_class_token_alone_changes_no_logit(name):
    """This also holds if that block would reduce tokens after its attention, or, as MCTF does, before it."""
    settings = SETTINGS | {"evit": {"blocks": (0, 3)}, "zero_tprune": {"blocks": (0, 3)}}
    model, x = vit(dtype=torch.float64), images(dtype=torch.float64)
    whole = apply_baseline(model, name, **settings[name])(x)
    costs = summary(model).macs
    alone = apply_baseline(model, name, cls_only_last=True, **settings[name])(x)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)
    assert summary(model).macs < costs
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_saved_is_saved_of_the_plain_model(name):
    """This also holds for blocks that count their own cost."""
    model, x = vit(), images(2)
    whole = cost(model, unmerged(model, (3, 40, 40))).macs
    apply_baseline(model, name, **SETTINGS[name])(x)
    assert summary(model).unmerged.macs == whole > summary(model).macs


@pytest.mark.parametrize("more", [{}, {"qk_norm": True}])
def test_mctf_costs_what_torch_counts(more):
    model, x = vit(**more), images(1)
    for alone in (False, True):
        apply_baseline(model, "mctf", r=3, cls_only_last=alone)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        lengths = model.blocks.last.tokens[1:]  # N of the blocks that fuse; the class token is in neither group
        similarities = sum(len(range(2, N, 2)) * len(range(1, N, 2)) for N in lengths)
        assert summary(model).macs == counter.get_total_flops() // 2 - similarities * model.embed_dim


@pytest.mark.parametrize("more", [{}, {"qk_norm": True}, {"reg_tokens": 2}])
@pytest.mark.parametrize("name", ["zero_tprune", "tofu", "ats"])
def test_costs_and_matching_are_what_torch_counts(name, more):
    """ATS differs, because its authors' code also multiplies the queries of dropped tokens with all keys."""
    model, x = vit(**more), images(1)
    for alone in (False, True):
        apply_baseline(model, name, cls_only_last=alone, **SETTINGS[name])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        record, cost = model.blocks.last, summary(model).cost
        served = zip(record.tokens[: len(record.tokens) - alone], record.rows, strict=False)
        left_out = sum(N * (N - M) * model.embed_dim for N, M in served) if name == "ats" else 0
        assert cost.macs + cost.matching == counter.get_total_flops() // 2 + left_out
        assert cost.matching > 0 or name == "ats"


def test_ats_costs_follow_from_the_tokens_of_each_image(deit):
    """On DeiT-S the N tokens that enter a block cost queries, keys, values and all products of queries and keys; the M
    tokens that leave it cost the rest."""
    model = apply_baseline(deit["small"], "ats")
    with torch.inference_mode():
        model(torch.randn(2, 3, 224, 224))
    record, costs, C = model.blocks.last, cost_of_each(model, model.blocks.last), 384
    remove_patch(model)
    assert record.tokens[:4] == (197,) * 4 and (record.rows[3] < 197).all()
    for image in range(2):
        N = [
            tokens if isinstance(tokens, int) else tokens[image].item() for tokens in (*record.tokens, record.rows[-1])
        ]
        assert all(1 < after < before for before, after in pairwise(N[3:]))
        blocks = sum(3 * n * C**2 + n**2 * C + m * n * C + 9 * m * C**2 for n, m in pairwise(N))
        assert costs.macs[image].item() == 196 * C * 768 + blocks + C * 1000


@pytest.mark.parametrize("name", ["ats", "dtome"])
def test_an_image_keeps_its_own_number_whatever_is_beside_it(name):
    settings = {"ats": {"M": 20, "blocks": (0, 1, 3)}, "dtome": SETTINGS["dtome"]}[name]
    model, x = vit(dtype=torch.float64), images(5, dtype=torch.float64)
    apply_baseline(model, name, **settings)
    logits, features, rows = model(x), model.forward_features(x), model.blocks.last.rows
    assert all(len(of.unique()) > 1 for of in rows[:2])
    for image in range(5):
        torch.testing.assert_close(model(x[image : image + 1])[0], logits[image], rtol=0, atol=1e-12)
        assert [int(of) for of in model.blocks.last.rows] == [of[image].item() for of in rows]
        alone = model.forward_features(x[image : image + 1])[0]
        torch.testing.assert_close(alone, features[image], rtol=0, atol=1e-12)


@pytest.mark.parametrize("M", [2, 3, 7, 50, 1000])
def test_ats_samples_scores_of_any_number_and_equal_ones(M):
    """One batch has images of 0 to 30 tokens. Scores are whole numbers, whose sums are exact; some are equal, some
    0."""
    n = [*range(31), 12, 12]
    scores = torch.randint(0, 4, (len(n), 31), dtype=torch.float64)
    scores[-2], scores[-1, 1:], scores[2] = 0, 0, scores[2] + 1  # no score is above 0; one is; all are
    there = torch.arange(31) < torch.tensor(n).unsqueeze(1)
    order, kept = BASELINES["ats"](M=M).sampled(scores, there)
    for image, length in enumerate(n):
        taken = order[image][kept[image]].tolist()
        assert taken == sampled(scores[image, :length].tolist(), M)
        assert len(taken) <= max(M, length * (not scores[image, :length].any()))
    assert kept[2].sum() == 0 and scores[2, :2].all()  # of two tokens with scores above 0 none stays
    assert kept[1].sum() == 1 and kept[-2].sum() == 12


@pytest.mark.parametrize("path", ["drop_path1", "drop_path2"])
def test_ats_drops_whole_images_from_a_residual_sum(path):
    """Stochastic depth in training drops whole images, also when images have different lengths."""
    model = vit(dtype=torch.float64, drop_path_rate=0.5)
    tokens = Packed.of(model._pos_embed(model.patch_embed(images(40, dtype=torch.float64))))
    apply_baseline(model, "ats", M=20, blocks=(0, 1))
    tokens, block = model.blocks[0].forward_packed(tokens, Step(tokens)), model.blocks[1].train()
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1 - 1e-12  # always drops attention and MLP
    without = block.forward_packed(tokens, Step(tokens))
    getattr(block, path).drop_prob = 0.9
    some = block.forward_packed(tokens, Step(tokens))
    by_image = (of.x.split(of.images.lengths.tolist()) for of in (some, without))
    same = [torch.equal(*rows) for rows in zip(*by_image, strict=True)]
    assert not some.images.equal and 20 < sum(same) < 40


def test_zero_tprune_costs_the_mlp_of_what_it_drops(deit):
    """On DeiT-S with the defaults. It prunes between blocks, so a whole block, MLP included, sees all tokens that
    enter."""
    record, cost = recorded(deit["small"], "zero_tprune")
    N, C, entering = 197, 384, []
    for block in range(12):
        entering.append(N)
        if block in (0, 2, 5, 8, 10):
            N = 1 + math.ceil(0.9 * (N - 1 - 10))
    assert record.tokens == tuple(entering) and record.rows[-1] == N
    assert cost.macs == 196 * C * 768 + sum(12 * n * C**2 + 2 * n**2 * C for n in entering) + C * 1000
    paper = sum(2 * n * C for n in entering) + N * C  # norms
    assert cost.paper == cost.macs + paper


def test_tofu_of_opposite_tokens_is_zero():
    """Two tokens whose mean is 0 become 0, not NaN."""
    model = apply_baseline(vit(dtype=torch.float64), "tofu", r=1, switch=0)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    tokens = Packed.of(x[None])
    merged, _ = model.blocks[0].reduced(tokens, Assignment.of(torch.tensor([[0, 1, 0, 2]]), 3))
    assert merged.x.tolist() == [[0, 0], [3, 4], [3, 4]] and merged.sizes.tolist() == [2, 1, 1]


def dtome(model, batch, r_of):
    """Logits and lengths of a batch whose images merge in each block as many pairs as ``r_of(block, pairs)`` returns.
    ``pairs`` has the pairs of each image, {i of A: (similarity, partner)}."""
    P = model.num_prefix_tokens
    tokens = list(model._pos_embed(model.patch_embed(batch)))
    sizes, lengths = [[1.0] * len(x) for x in tokens], []
    for number, block in enumerate(model.blocks):
        attn, pairs = block.attn, []
        for b, x in enumerate(tokens):
            q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
            pairs.append(loops.match(loops.mean_keys(k), *loops.groups(len(x), P)))
            tokens[b] = x + attn.proj(loops.attention(q, k, v, sizes[b]).permute(1, 0, 2).reshape(len(x), -1))
        for b, r in enumerate(r_of(number, pairs)):
            slots = loops.assign(len(tokens[b]), P, *loops.groups(len(tokens[b]), P), pairs[b], r)
            x, sizes[b] = loops.merge(tokens[b], sizes[b], slots)
            tokens[b] = x + block.mlp(block.norm2(x))
        lengths.append([len(x) for x in tokens])
    return torch.stack([model.head(model.norm(x)[0]) for x in tokens]), lengths


def fitted(model, batches, schedule):
    """Fit DToMe's thresholds by loops over all pairs of a batch."""
    noted = [[] for _ in model.blocks]

    def best_of_batch(block, pairs):
        ranked = sorted(((-of[i][0], b, i) for b, of in enumerate(pairs) for i in of))
        taken = ranked[: len(pairs) * schedule[block]]
        noted[block].append(max(-ranked[len(taken)][0], 0) if len(taken) < len(ranked) else 0)
        return [sum(b == image for _, b, _ in taken) for image in range(len(pairs))]

    for batch in batches:
        dtome(model, batch, best_of_batch)
    return [sum(of) / len(of) for of in noted]


@pytest.mark.parametrize(("r", "schedule"), [(4, (4, 4, 4, 4)), ([1, 9, 0, 5], (1, 9, 0, 5)), ((3, -1), (6, 4, 2, 0))])
@torch.no_grad()
def test_dtome_is_its_loops(r, schedule):
    """Thresholds are fitted to batches of different sizes and run on other images. One block merges all its pairs, so
    that no next pair is left."""
    model = vit(dtype=torch.float64, embed_dim=16)
    batches, x = [images(n, dtype=torch.float64) for n in (3, 2)], images(3, dtype=torch.float64)
    method = DToMe.fitted(model, [batches[0], (batches[1], None)], r)
    thresholds = fitted(model, batches, schedule)
    assert method.thresholds == pytest.approx(thresholds, abs=1e-9)

    def above(block, pairs):
        return [sum(similarity > thresholds[block] for similarity, _ in of.values()) for of in pairs]

    expected, lengths = dtome(model, x, above)
    logits = method.apply(model)(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    assert [of.tolist() for of in model.blocks.last.rows] == lengths
    assert any(len(set(of)) > 1 for of in lengths)
    by_hand = apply_patch(vit(dtype=torch.float64, embed_dim=16), method.config(4)).blocks.config
    assert (by_hand.adapt, by_hand.split_depth, by_hand.cls_only_last) == ("image", 4, False)


def test_dtome_merges_above_a_threshold_and_no_pair_at_it():
    """The first pair that a single batch leaves has exactly the threshold as its similarity, so it does not merge in
    float32, the dtype of similarities."""
    model, x = vit(), images(4)
    method = DToMe.fitted(model, [x], r=2)
    method.apply(model)(x)
    assert model.blocks.last.rows[0].sum() == 4 * (26 - 2)
    config = DToMe(thresholds=(1.0, 0.25, 1 / 3, -1.0)).config(4)
    assert config.thresholds[0] is None
    for theta, above in zip((0.25, 1 / 3, -1.0), config.thresholds[1:], strict=True):
        assert above > theta and torch.tensor(above).item() == above  # a float32 number
        assert torch.tensor(above).nextafter(torch.tensor(-2.0)).item() <= theta


def test_dtome_fits_no_threshold_below_0():
    """Of two pairs it merges one, as asked. The other has a cosine of -1, and the threshold becomes 0."""
    model, config = vit(dtype=torch.float64), ATMConfig(adapt="image", thresholds=(0.0,) * 4)
    block = FittingBlock.of(model.blocks[0], config, 0, 4, 1)
    block.of_image, block.thresholds = 1, []
    keys = torch.tensor([[1, 0], [1, 0], [-1, 1], [1, 0], [-1, 0]], dtype=torch.float64).expand(2, -1, -1)
    pairs = block.match(keys, Packed.of(torch.zeros(1, 5, 32, dtype=torch.float64)))
    assert block.thresholds == [0.0] and pairs.counts.tolist() == [1]
    assert pairs.similarity[[2, 4]].tolist() == pytest.approx([-(0.5**0.5), -1])


@pytest.mark.parametrize(
    ("batches", "r", "message"),
    [
        ([], 8, "dtome: no images to fit thresholds by; give batches of them"),
        ([images(2)], -1, "r=-1; want whole numbers from 0"),
    ],
)
def test_dtome_refuses_to_fit_by_nothing(batches, r, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        DToMe.fitted(model, batches, r)
    with pytest.raises(ValueError, match="patched already"):
        DToMe.fitted(apply_baseline(model, "tome"), [images(2)])
    with pytest.raises(ValueError, match="training mode"):
        DToMe.fitted(vit().train(), [images(2)])


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
    """The result with an adapter equals that with the adapter's product added to the weights."""
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
        return DenseAssignment(slots.int().expand(len(k), -1), k.shape[2] - 1)


def test_another_method_is_a_class_and_an_entry(monkeypatch):
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
    (
        "tomme",
        {},
        "method 'tomme' is unknown; choose one of tome, threshold, evit, mctf, pitome, ats, .*; did you mean tome?",
    ),
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
    ("ats", {"M": 1}, "ats: M=1; want a whole number of points, 2 or more"),
    ("ats", {"M": True}, "ats: M=True; want a whole number of points, 2 or more"),
    ("ats", {"blocks": (2, 2)}, r"ats: blocks=\(2, 2\); want different blocks, counted from 0"),
    ("ats", {}, r"blocks=\(3, 4, .*\): the model has 4, counted from 0; give blocks below 4"),
    ("zero_tprune", {"r": -1}, "zero_tprune: r=-1; want a whole number of tokens"),
    ("zero_tprune", {"keep_rate": 1.5}, "zero_tprune: keep_rate=1.5; want a share above 0, at most 1"),
    ("zero_tprune", {"blocks": 3}, "zero_tprune: blocks=3; want different blocks, counted from 0"),
    (
        "zero_tprune",
        {"iterations": (50, 10)},
        r"zero_tprune: iterations=\(50, 10\); want three whole numbers, 1 or more",
    ),
    ("zero_tprune", {"start": "cls"}, "zero_tprune: start='cls'; want class or uniform"),
    ("zero_tprune", {"keys": None}, "zero_tprune: keys=None; want mean or concatenated"),
    ("zero_tprune", {"mass": 1}, "zero_tprune: mass=1; want tokens or one"),
    (
        "zero_tprune",
        {"variance": (0.7, 0.01)},
        r"zero_tprune: variance=\(0.7, 0.01\); want two numbers, 0 or more, that",
    ),
    ("tofu", {"r": 2.5}, "tofu: r=2.5; want a whole number of tokens"),
    ("tofu", {"switch": -1}, "tofu: switch=-1; want the first block that merges, counted from 0, or None"),
    ("tofu", {"sizes": None}, "tofu: sizes=None; want True or False"),
    ("dtome", {}, r"dtome: no thresholds; DToMe.fitted\(model, batches, r\) finds those of a model"),
    (
        "dtome",
        {"thresholds": (0.5, 2)},
        r"dtome: thresholds=\(0.5, 2\); want a cosine similarity, -1 to 1, for each block",
    ),
    ("dtome", {"thresholds": (0.5,) * 3}, "thresholds has 3 values for a model of 4 blocks; give one for each"),
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


@pytest.mark.parametrize("name", BASELINES)
def test_the_table_says_which_methods_keep_a_number_of_tokens_per_image(name):
    own_count = {"no": [{}], "yes": [{}], 'with adapt="image"': [{"adapt": "batch"}, {"adapt": "image"}]}
    about = BASELINES[name].about
    for settings in own_count[about.own_count]:
        model = apply_baseline(vit(), name, **SETTINGS[name], **settings)
        model(images(8))
        each = [rows for rows in model.blocks.last.rows if isinstance(rows, torch.Tensor)]
        assert bool(each) == (about.own_count == "yes" or settings == {"adapt": "image"})
        assert not each or any(len(rows.unique()) > 1 for rows in each)


def test_the_list_names_all_settings(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.baselines"])
    runpy.run_module("benchmarks.baselines.__main__", run_name="__main__")
    listed = capsys.readouterr().out
    for line in (
        "    keep_rate=0.7, blocks=(3, 6, 9), fuse_token=True, falls=False, cls_only_last=False",
        "mctf: Fuses tokens",
        "(3, 6, 9).",
    ):
        assert line in listed
    assert all(name in listed and f"| `{name}` |" in listed for name in ALL)
    assert "| ATS (ECCV 2022) | `ats` | Apache-2.0 | no | yes | yes, the class row beside it |" in listed
    assert "Left out is MaMe" in listed
    files = re.findall(r"`(benchmarks/baselines/\w+\.py)` \|$", listed, re.MULTILINE)
    assert len(files) == len(ALL) and all((ROOT / file).is_file() for file in files)
