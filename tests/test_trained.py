"""Trained methods: a step in float64 against loops, inference after training, costs, and interrupted runs."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atm_triton import ATMConfig, remove_patch, summary
from atm_triton.flops import block_macs, cost, cost_of_each, unmerged
from atm_triton.training.finetune import Training, finetune
from atm_triton.training.folder import RunFolder
from atm_triton.training.images import PASS, seed_all
from atm_triton.training.recipe import Recipe
from benchmarks.baselines import TRAINED, apply_baseline, baseline, ltmp_learning
from benchmarks.baselines.iared2 import Interpreter
from benchmarks.baselines.training import softmax_of_kept, through
from finetuning import Pictures
from models import images, vit

F64 = torch.float64
STEP = Recipe(epochs=1, batch_size=4, accumulate=2, mixup=0.0, cutmix=0.0, smoothing=0.1)
GATE = (2.0, 1.5)
SETTINGS = {
    "evit": {"keep_rate": 0.6, "blocks": (1, 2)},
    "tome": {"r": 3},
    "mctf": {"r": 6},
    "dynamicvit": {"keep_rate": 0.6, "blocks": (1, 2)},
    "ltmp": {},
    "avit": {"gate_scale": GATE[0], "gate_center": GATE[1]},
    "evovit": {"keep_rate": 0.6, "blocks": (1, 2)},
    "iared2": {"blocks": (0, 2), "keep_rates": (0.9, 0.5), "heads": 2},
    "bat": {"keep_rate": 0.6, "blocks": (1, 2), "share": 0.5, "neighbours": 2},
}


def new(dtype=F64, **changes):
    """A small model with the same weights each time."""
    torch.manual_seed(0)
    return vit(dtype=dtype, **{"embed_dim": 16, "img_size": 32, **changes})


def learned(name, model, **settings):
    return baseline(name, **SETTINGS[name] | settings).learning(model)


class Small(Pictures):
    """Images of 16 patches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.x = self.x[:, :, :32, :32]


def seen(n=2):
    return Small().batches()[:n]


# ------------------------------------------------------------------------------------- a step, against loops


def attention(block, x, weigh):
    """What attention adds to the tokens x [N, C] of an image, its keys [N, H, d] and its weights [H, N, N]. In every
    head weights[i] = weigh(scores of query i [N])."""
    attn, N = block.attn, len(x)
    q, k, v = attn.qkv(block.norm1(x)).view(N, 3, attn.num_heads, attn.head_dim).unbind(1)
    heads = []
    for h in range(attn.num_heads):
        rows = [
            weigh(i, torch.stack([q[i, h] @ k[j, h] for j in range(N)]) / math.sqrt(attn.head_dim)) for i in range(N)
        ]
        heads.append(torch.stack(rows))
    out = torch.cat([rows @ v[:, h] for h, rows in enumerate(heads)], dim=1)
    return attn.proj(out), k, torch.stack(heads)


def stem(model, image):
    return model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]


def cross_entropy(logits, label, smoothing=0.1):
    p = logits - logits.exp().sum().log()
    return -(1 - smoothing) * p[label] - smoothing * p.mean()


def classified(model, x):
    return F.linear(model.norm(x[0]), model.head.weight, model.head.bias)


def dynamicvit_loss(model, teacher, x, labels, keep_rate=0.6, where=(1, 2)):
    tokens, kept, B = [stem(model, image) for image in x], None, len(x)
    N = len(tokens[0])
    total, stage = 0.0, 0
    for index, block in enumerate(model.blocks):
        if index in where:
            kept = kept or [[torch.ones((), dtype=F64)] * N for _ in range(B)]
            scores = []
            for b in range(B):
                net = block.predictor
                z = [net.local(tokens[b][i]) for i in range(1, N)]
                half = len(z[0]) // 2
                there = kept[b][1:]
                whole = sum(p * u[half:] for p, u in zip(there, z, strict=True)) / sum(there)
                scores.append(torch.stack([net.out(torch.cat([u[:half], whole])) for u in z]))
            noise = -torch.empty(B, N - 1, 2, dtype=F64).exponential_().log()
            for b in range(B):
                for i in range(1, N):
                    soft = torch.softmax(scores[b][i - 1] + noise[b, i - 1], 0)
                    hard = 1.0 if soft[0] >= soft[1] else 0.0
                    kept[b][i] = (hard - soft[0].detach() + soft[0]) * kept[b][i]
            stage += 1
            for b in range(B):
                total = total + 2 / len(where) * (sum(kept[b][1:]) / (N - 1) - keep_rate**stage) ** 2 / B
        for b in range(B):
            if kept is None:
                weigh = lambda i, s: torch.softmax(s, 0)  # noqa: E731
            else:

                def weigh(i, s, p=kept[b]):
                    e = torch.stack([(s[j] - s.max().item()).exp() * (1.0 if i == j else p[j]) for j in range(N)])
                    return (e + 1e-6 / N) / (e.sum() + 1e-6)

            y = tokens[b] + attention(block, tokens[b], weigh)[0]
            tokens[b] = y + block.mlp(block.norm2(y))
    squares, count = 0.0, 0
    for b in range(B):
        logits = classified(model, tokens[b])
        with torch.no_grad():
            features = teacher.forward_features(x[b : b + 1])
            other = teacher.forward_head(features)[0]
        total = total + cross_entropy(logits, labels[b]) / B
        log_q, log_p = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
        total = total + 0.5 * (log_p.exp() * (log_p - log_q)).sum() / B
        for i in range(1, N):
            if kept[b][i] > 0.5:
                squares = squares + (model.norm(tokens[b][i]) - features[0, i]).square().sum()
                count += tokens[b].shape[1]
    assert 0 < count < B * (N - 1) * tokens[0].shape[1]
    return total + 0.5 * squares / count


def softmax(i, s):
    return torch.softmax(s, 0)


def straight(soft, hard):
    return float(hard) - soft.detach() + soft


def fed(block, y):
    return y + block.mlp(block.norm2(y))


def ltmp_loss(model, x, labels, target=0.75):
    B, total, there = len(x), 0.0, [[] for _ in range(len(model.blocks) + 1)]
    for b in range(B):
        rows = list(stem(model, x[b]))
        N, d = len(rows), len(rows[0])
        m, n = [torch.ones((), dtype=F64)] * N, [torch.ones((), dtype=F64)] * N
        there[0].append(sum(m) / N)
        for index, block in enumerate(model.blocks):
            order = [i for i in range(N) if m[i] > 0.5] + [i for i in range(N) if m[i] < 0.5]
            rows, m, n = ([values[i] for i in order] for values in (rows, m, n))
            live = sum(1 for mask in m if mask > 0.5)

            def weigh(i, s, m=m, n=n, N=N):
                s = torch.stack([s[j] + n[j].log() for j in range(N)])
                e = torch.stack([(s[j] - s.max().item()).exp() * m[j] for j in range(N)])
                return (e + 1e-5 / N) / (e.sum() + 1e-5)

            added, keys, weights = attention(block, torch.stack(rows), weigh)
            rows = [row + more for row, more in zip(rows, added, strict=True)]
            keys = keys.mean(1)
            important = [sum(weights[h, i, j] for h in range(2) for i in range(live)) / 2 / live for j in range(N)]
            goes, moved = {}, {}
            for i in range(2, live, 2):
                alike = {j: F.cosine_similarity(keys[i], keys[j], dim=0) for j in range(1, live, 2)}
                mate = max(alike, key=lambda j: alike[j].item())
                gate = straight(torch.sigmoid((alike[mate] - block.merge_theta) / 0.5), alike[mate] > block.merge_theta)
                goes[i] = gate * m[i]
                moved.setdefault(mate, []).append(i)
            old, size = list(rows), list(n)
            for j, parts in moved.items():
                n[j] = size[j] + sum(goes[i] * size[i] for i in parts)
                rows[j] = (size[j] * old[j] + sum(goes[i] * size[i] * old[i] for i in parts)) / n[j]
                for i in parts:
                    if goes[i] > 0.5:
                        important[j] = torch.maximum(important[j], important[i])
            for i in range(N):
                if i in goes:
                    m[i] = m[i] * (1 - goes[i])
                if i > 0:
                    soft = torch.sigmoid((important[i] - block.prune_theta) / 0.5)
                    m[i] = m[i] * straight(soft, important[i] > block.prune_theta)
            rows = [fed(block, row) for row in rows]
            there[index + 1].append(sum(m) / N)
        total = total + cross_entropy(classified(model, rows), labels[b]) / B
    share = [sum(values) / B for values in there]
    assert share[-1] < 0.9
    flops = sum(2 * p * N * d**2 + (p * N) ** 2 * d + 4 * q * N * d**2 for p, q in pairwise(share))
    return total + 10 * (flops / len(model.blocks) / (6 * N * d**2 + N**2 * d) - target) ** 2


def avit_loss(model, x, labels, scale=GATE[0], center=GATE[1]):
    B, total, depth, ponder = len(x), 0.0, len(model.blocks), 0.0
    means, halted = [0.0] * depth, 0
    for b in range(B):
        rows = list(stem(model, x[b]))
        N = len(rows)
        c, rest, mask, out = [0.0] * N, [1.0] * N, [1.0] * N, [0.0] * N
        for index, block in enumerate(model.blocks):
            # a masked token has the value 0 but passes its gradient on
            rows = [row if m else row - row.detach() for row, m in zip(rows, mask, strict=True)]
            attn, H = block.attn, block.attn.num_heads
            y = torch.stack([block.norm1(row * m) * m for row, m in zip(rows, mask, strict=True)])
            q, k, v = attn.qkv(y).view(N, 3, H, -1).unbind(1)
            new = []
            for i in range(N):
                heads = []
                for h in range(H):
                    s = torch.stack([q[i, h] @ k[j, h] / math.sqrt(8) - 1000 * (1 - mask[j]) for j in range(N)])
                    heads.append(torch.softmax(s, 0) @ v[:, h])
                new.append(rows[i] + attn.proj(torch.cat(heads)))
            rows = [row + block.mlp(block.norm2(row * m) * m) for row, m in zip(new, mask, strict=True)]
            for i in range(N):
                h = torch.sigmoid(scale * rows[i][0] - center)
                if i > 0:
                    means[index] = means[index] + h / (N - 1) / B
                h = h if index < depth - 1 else 1.0
                c[i] = c[i] + h
                ponder = ponder + mask[i] / N / B
                if c[i] > 0.99 and mask[i]:
                    out[i] = out[i] + rest[i] * rows[i]
                    ponder = ponder + rest[i] / N / B
                    halted += index < depth - 1
                elif c[i] < 0.99:
                    out[i] = out[i] + h * rows[i]
                    rest[i] = rest[i] - h
                mask[i] = float(c[i] < 0.99)
        total = total + cross_entropy(classified(model, out), labels[b]) / B
    assert 0 < halted < B * N * (depth - 1)
    middle = round(8 / 12 * depth)
    wanted = [math.exp(-((i - middle) ** 2) / 2) for i in range(depth)]
    wanted = [0.98 * w / sum(wanted[:middle]) for w in wanted]
    shares = [torch.clamp(mean / sum(means), 0.01, 0.99) for mean in means]
    spread = sum(w * (math.log(w) - share.log()) for w, share in zip(wanted, shares, strict=True)) / depth
    assert spread > 0
    return total + 5e-4 * ponder + 1e-3 * spread


def class_row(weights):
    """The class token's attention to each patch token, summed over heads, as floats."""
    return [sum(weights[h, 0, j].item() for h in range(len(weights))) for j in range(1, weights.shape[2])]


def evovit_run(model, image, keep_rate=0.6, where=(1, 2), every=False):
    rows, ranks, chosen, tokens = list(stem(model, image)), None, None, []
    for index, block in enumerate(model.blocks):
        if index < where[0]:
            x = torch.stack(rows)
            added, _, weights = attention(block, x, softmax)
            rows, ranks = [fed(block, row) for row in x + added], class_row(weights)
            tokens.append(len(rows))
            continue
        if index in where or every:
            chosen = sorted(sorted(range(len(ranks)), key=lambda i: -ranks[i])[: int(keep_rate * len(ranks))])
        x = torch.stack([rows[0], *(rows[1 + i] for i in chosen)])
        added, _, weights = attention(block, x, softmax)
        done = [fed(block, row) for row in x + added]
        rows[0] = done[0]
        for place, i in enumerate(chosen):
            rows[1 + i] = done[1 + place]
            ranks[i] = (ranks[i] + class_row(weights)[place]) / 2
        tokens.append(len(done))
    return classified(model, rows), tokens


def evovit_loss(model, x, labels):
    """The loss early in training, when every block chooses."""
    logits = [evovit_run(model, image, every=True)[0] for image in x]
    return sum(cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)) / len(x)


def iared2_loss(model, x, labels, where=(0, 2), rates=(0.9, 0.5), heads=2):
    B, total = len(x), 0.0
    for b in range(B):
        rows, kept, group = stem(model, x[b]), None, 0
        N = len(rows)
        kept = [torch.ones((), dtype=F64)] * N
        for index, block in enumerate(model.blocks):
            if index in where:
                scores = interpreted(block, torch.stack([r * p for r, p in zip(rows, kept, strict=True)]), heads)
                kept = [kept[0], *(straight(s, s > 0.5) * p for s, p in zip(scores[1:], kept[1:], strict=True))]
                total = total + 2 * (sum(kept[1:]) / (N - 1) - rates[group]) ** 2 / len(where) / B
                rows, group = torch.stack([row * p for row, p in zip(rows, kept, strict=True)]), group + 1

            def weigh(i, s, kept=kept, N=N):
                e = torch.stack([(s[j] - s.max().item()).exp() * kept[j] for j in range(N)])
                return (e + 1e-6 / N) / (e.sum() + 1e-6)

            rows = torch.stack([fed(block, row) for row in rows + attention(block, rows, weigh)[0]])
        total = total + cross_entropy(classified(model, rows), labels[b]) / B
        assert 1 < sum(kept) < N
    return total


def interpreted(block, rows, heads):
    """The interpreter's scores of all tokens [N, C]."""
    C = rows.shape[1]
    qkv = [block.predictor.qkv((row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()) for row in rows]
    parts, d = [slice(h * C // heads, (h + 1) * C // heads) for h in range(heads)], C // heads
    q, keys = qkv[0][:C], [row[C : 2 * C] for row in qkv]
    return [sum(torch.sigmoid(q[p] @ k[p] / math.sqrt(d)) for p in parts) / heads for k in keys]


def mctf_loss(model, x, labels, r=6):
    logits, tokens = run(model, x, "mctf", r=r)
    teacher_logits, teacher = run(model, x, "mctf", r=int(torch.randint(8, ())))
    total, squares = 0.0, []
    for b in range(len(x)):
        total = total + (cross_entropy(logits[b], labels[b]) + cross_entropy(teacher_logits[b], labels[b])) / len(x)
        if torch.softmax(logits[b], 0)[labels[b]] > 0.4:
            squares.append((teacher[b].detach() - tokens[b]).square().mean())
    assert 0 < len(squares) < len(x)
    return total + 3 * sum(squares) / len(squares)


def run(model, x, name, **settings):
    """Logits and class tokens by a method that tests/test_baselines.py checks against its loops."""
    made = apply_baseline(model, name, **settings)
    tokens = made._run(x, None, dense=False).tokens
    token = made.norm(tokens.images.first(tokens.x, 1))[:, 0]
    remove_patch(model)
    return F.linear(token, model.head.weight, model.head.bias), token


def plain_loss(name):
    def loss(model, x, labels):
        logits = run(model, x, name, **SETTINGS[name])[0]
        return sum(cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)) / len(x)

    return loss


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradients_of_a_step_are_those_of_its_parts(name):
    """The step has two passes of two images, in float64, each with the random numbers it draws. Losses and what is
    only trained are loops. Where a method is trained as it runs afterwards, its pass is the one that test_baselines
    checks against loops."""
    model = new()
    method = learned(name, model)
    moved(name, model)
    twin = copy.deepcopy(model)
    loops = {"ltmp": ltmp_loss, "avit": avit_loss, "evovit": evovit_loss, "iared2": iared2_loss, "mctf": mctf_loss}
    loops |= {other: plain_loss(other) for other in ("evit", "tome", "bat")}
    loops["dynamicvit"] = lambda m, x, labels: dynamicvit_loss(m, method.teacher, x, labels)
    training = Training(model, replace(STEP, opt="sgd") if name == "ltmp" else STEP, 1, method)
    training.merge_by(None)
    some = [(x[:2], labels[:2]) for x, labels in seen()]
    row = training.advance(some)
    loss = 0.0
    for number, (x, labels) in enumerate(some):
        seed_all(STEP.seed, PASS, 0, number)
        loss = loss + loops[name](twin, x, labels) / 2
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-9)
    for (key, ours), parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not ours.requires_grad:
            assert ours.grad is None and (name == "ltmp" or key in ("cls_token", "pos_embed"))
            continue
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=0, atol=1e-8, msg=key)
        assert parameter.grad.abs().max() > 1e-9, key


# ------------------------------------------------------------------------------------- what runs afterwards


def dynamicvit_plan(model, image, keep_rate=0.6, where=(1, 2)):
    x, stage, tokens = stem(model, image), 0, []
    whole = len(x) - 1
    for index, block in enumerate(model.blocks):
        if index in where:
            net, stage = block.predictor, stage + 1
            z = [net.local(row) for row in x[1:]]
            half = len(z[0]) // 2
            mean = sum(u[half:] for u in z) / len(z)
            scores = [net.out(torch.cat([u[:half], mean]))[0].item() for u in z]
            order = sorted(range(len(z)), key=lambda i: -scores[i])
            x = torch.stack([x[0], *(x[1 + i] for i in order[: int(keep_rate**stage * whole)])])
        y = x + attention(block, x, softmax)[0]
        x = y + block.mlp(block.norm2(y))
        tokens.append(len(x))
    return classified(model, x), tokens


def ltmp_plan(model, image):
    rows, tokens = list(stem(model, image)), []
    n = [1.0] * len(rows)
    for block in model.blocks:
        N = len(rows)

        def weigh(i, s, n=n):
            return torch.softmax(torch.stack([s[j] + math.log(n[j]) for j in range(len(s))]), 0)

        added, keys, weights = attention(block, torch.stack(rows), weigh)
        rows = [row + more for row, more in zip(rows, added, strict=True)]
        important, keys = weights.mean((0, 1)).tolist(), keys.mean(1)
        parts = {j: [j] for j in range(N)}
        for i in range(2, N, 2):
            alike = {j: F.cosine_similarity(keys[i], keys[j], dim=0).item() for j in range(1, N, 2)}
            mate = max(alike, key=alike.get)
            if alike[mate] > block.merge_theta:
                parts[mate] += parts.pop(i)
        kept = [j for j in parts if j == 0 or max(important[i] for i in parts[j]) > block.prune_theta]
        rows = [sum(n[i] * rows[i] for i in parts[j]) / sum(n[i] for i in parts[j]) for j in kept]
        rows, n = [fed(block, row) for row in rows], [sum(n[i] for i in parts[j]) for j in kept]
        tokens.append(len(rows))
    return classified(model, rows), tokens


def avit_plan(model, image, scale=GATE[0], center=GATE[1]):
    rows, out, rest, runs, tokens = list(stem(model, image)), 0.0, 1.0, True, []
    c = [0.0] * len(rows)
    for index, block in enumerate(model.blocks):
        x = torch.stack(rows)
        rows = [fed(block, row) for row in x + attention(block, x, softmax)[0]]
        last = index == len(model.blocks) - 1
        h = [1.0 if last else torch.sigmoid(scale * row[0] - center).item() for row in rows]
        c = [old + new for old, new in zip(c, h, strict=True)]
        if runs:
            out = out + rows[0] * (rest if c[0] > 0.99 else h[0])
            rest, runs = rest - h[0], c[0] < 0.99
        if not last:
            stay = [i for i in range(len(rows)) if i == 0 or (runs and c[i] < 0.99)]
            rows, c = [rows[i] for i in stay], [c[i] for i in stay]
        tokens.append(len(rows))
    return classified(model, [out]), tokens


def iared2_plan(model, image):
    rows, tokens = stem(model, image), []
    for index, block in enumerate(model.blocks):
        if index in (0, 2):
            scores = interpreted(block, rows, 2)
            rows = rows[[i for i in range(len(rows)) if i == 0 or scores[i] > 0.5]]
        rows = torch.stack([fed(block, row) for row in rows + attention(block, rows, softmax)[0]])
        tokens.append(len(rows))
    return classified(model, rows), tokens


def bat_plan(model, image, keep_rate=0.6, where=(1, 2), share=0.5, neighbours=2):
    rows, tokens = stem(model, image), []
    for index, block in enumerate(model.blocks):
        added, _, weights = attention(block, rows, softmax)
        groups, important = [[i] for i in range(len(rows))], [1.0, *class_row(weights)]
        if index in where:
            N = len(rows) - 1
            left = math.ceil(keep_rate * N)
            m = min(max(int(share * (N - left)), 1), left // 2)
            order = sorted(range(1, N + 1), key=lambda i: -important[i])
            mates, used = {}, set()
            alike = [
                (F.cosine_similarity(rows[i], rows[j], dim=0).item(), i, j)
                for a, i in enumerate(order[:left])
                for j in order[a + 1 : left]
            ]
            for _, i, j in sorted(alike, key=lambda pair: -pair[0]):
                if len(mates) < m and not {i, j} & used:
                    mates[i], used = j, used | {i, j}
            first = [[i, mates[i]] if i in mates else [i] for i in order[:left] if i not in mates.values()]
            rest = order[left:]
            far = {i: {j: (rows[i] - rows[j]).square().mean().item() for j in rest} for i in rest}
            density = {i: math.exp(-sum(sorted(far[i].values())[1 : neighbours + 1]) / neighbours) for i in rest}
            peak = {}
            for i in rest:
                denser = [far[i][j] for j in rest if density[j] > density[i]]
                peak[i] = density[i] * math.sqrt(min(denser) if denser else max(far[i].values()))
            centres = sorted(rest, key=lambda i: -peak[i])[:m]
            nearest = {i: min(centres, key=lambda j: far[i][j]) if i not in centres else i for i in rest}
            assert m > 1 and len(mates) == m
            groups = [[0], *first, *([i for i in rest if nearest[i] == j] for j in centres)]
        x = rows + added
        weighed = [[(i, important[i] / sum(important[j] for j in group)) for i in group] for group in groups]
        rows = torch.stack([fed(block, sum(w * x[i] for i, w in group)) for group in weighed])
        tokens.append(len(rows))
    return classified(model, rows), tokens


PLANS = {
    "dynamicvit": dynamicvit_plan,
    "ltmp": ltmp_plan,
    "avit": avit_plan,
    "evovit": evovit_run,
    "iared2": iared2_plan,
    "bat": bat_plan,
}


def moved(name, model):
    """Change the method's own weights so that they drop some tokens."""
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "predictor" in key and parameter.dim() > 1:
            parameter.data.normal_(std=0.7 * parameter.shape[1] ** -0.5)
        elif name == "iared2" and "predictor" in key:
            parameter.data.normal_(std=0.5)
        elif key.endswith("_theta"):
            parameter.data.fill_(0.2 if "merge" in key else 0.045)
    return model


def prepared(name, model, **settings):
    """A model with the method's own weights, and the method itself."""
    method = baseline(name, **SETTINGS[name] | settings)
    method.prepare(model)
    return moved(name, model), method


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_what_runs_after_training_is_its_loops(name):
    model, method = prepared(name, new())
    x = images(4, side=32, dtype=F64)
    expected = [PLANS[name](model, image) for image in x]
    before = model(x)
    method.apply(model)
    torch.testing.assert_close(model(x), torch.stack([logits for logits, _ in expected]), rtol=0, atol=1e-9)
    rows = [torch.as_tensor(n).expand(4).tolist() for n in model.blocks.last.rows]
    counted = [list(row) for row in zip(*rows, strict=True)]
    assert counted == [[17] * 4 if name == "evovit" else tokens for _, tokens in expected]
    assert min(tokens[-1] for _, tokens in expected) < 17
    own = {"ltmp", "avit", "iared2"}
    assert (len({tuple(tokens) for _, tokens in expected}) > 1) == (name in own)
    dense = model.forward_features(x)
    assert dense.shape[:2] == (4, 17)
    torch.testing.assert_close(model.forward_head(dense), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(remove_patch(model)(x), before, rtol=0, atol=0)


def test_a_mask_of_dynamicvit_is_the_tokens_left_out():
    """Training and inference differ only in which tokens stay (and in epsilon, which is 0 here)."""
    block, x = new().blocks[0], torch.randn(2, 9, 16, dtype=F64)
    kept = [0, 2, 3, 7]
    mask = torch.zeros(2, 9, dtype=F64)
    mask[:, kept] = 1
    exact = through(block, x, lambda s: softmax_of_kept(s, mask, 0.0, True))[:, kept]
    torch.testing.assert_close(exact, block(x[:, kept]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dynamicvit", "ltmp", "iared2"])
def test_a_method_without_its_weights_is_refused(name):
    model = new()
    with pytest.raises(ValueError, match=r"in this model: prepare\(model\), then load trained weights"):
        apply_baseline(model, name, **SETTINGS[name])


# ------------------------------------------------------------------------------------- costs


@pytest.fixture(scope="module")
def deit():
    return timm.create_model("deit_small_patch16_224").eval()


def counted(model, name, **settings):
    """GMACs of DeiT-S by a method, and those of its predictors."""
    model = copy.deepcopy(model)
    method = baseline(name, **settings)
    method.prepare(model)
    method.apply(model)
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    return model, summary(model)


def test_dynamicvit_costs_what_it_published(deit):
    """2.9 GMACs: 2.88 without the predictors, which ours counts too; 137, 96 and 67 patches; 241,250 weights each."""
    model, spent = counted(deit, "dynamicvit")
    assert spent.record.rows == (197,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    own = sum(model.blocks[i].predictor_macs(n) for i, n in ((3, 197), (6, 138), (9, 97)))
    assert (f"{(spent.macs - own) / 1e9:.3f}", f"{spent.macs / 1e9:.3f}") == ("2.878", "2.981")
    assert f"{(spent.macs - own) / 1e9:.1f}" == "2.9"
    assert sum(p.numel() for p in model.blocks[3].predictor.parameters()) == 241_250
    assert spent.unmerged.macs == cost(deit, unmerged(deit, (3, 224, 224))).macs


# ------------------------------------------------------------------------------------- training


def train(out, name, recipe, pictures=None, resume=False, dtype=F64, **settings):
    """Train a model. Returns the model and what ``finetune`` returned."""
    model = new(dtype)
    method = learned(name, model, **settings)
    folder = RunFolder(Path(out), {"recipe": recipe.to_dict()})
    pictures = pictures or Small()
    options = {"resume": resume, "save_every": 1, "method": method}
    return model, finetune(model, pictures, pictures.batches(), None, method.recipe(recipe), folder, **options)


def weights(out):
    return torch.load(Path(out) / "checkpoint.pt")["model"]


@pytest.mark.parametrize("name", ["dynamicvit", "iared2", "ltmp", "evovit", "mctf"])
def test_an_interrupted_run_goes_on_to_the_bit(name, tmp_path):
    """This includes predictors, random draws, a teacher, and rates that change during training."""
    recipe = replace(STEP, epochs=2, smoothing=0.0, ema=0.8)
    whole, _ = train(tmp_path / "whole", name, recipe)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", name, recipe, Small(raises=21))
    part, done = train(tmp_path / "part", name, recipe, resume=True)
    first, states = new(), [model.state_dict() for model in (part, whole)]
    assert states[0].keys() == states[1].keys() and done["config"] is None
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    before = learned(name, first) and first.state_dict()
    changed = [key for key, value in states[0].items() if not torch.equal(value, before[key])]
    assert len(changed) == 2 * 4 if name == "ltmp" else len(changed) > 20
    one, two = (torch.load(tmp_path / which / "checkpoint.pt")["model_ema"] for which in ("part", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = new()
    baseline(name, **SETTINGS[name]).prepare(again)
    again.load_state_dict(weights(tmp_path / "part"))  # the saved weights fit a prepared model


def loss_of(training, row):
    return row["loss"]


def off_target(training, row):
    """The distance of the share of tokens that the masks keep from its target."""
    answer = training.method.answer(training.merging, Small().x.float())
    method = training.method.baseline
    targets = (method.share(1), method.share(2)) if method.about.title.startswith("Dynamic") else method.keep_rates
    return sum(abs(mask.mean().item() - target) for target, mask in zip(targets, answer.masks, strict=True))


def off_flops(training, row):
    there = training.method.answer(training.merging, Small().x.float()).there
    return abs(training.method.flops(there).item() - training.method.baseline.target)


GOALS = {  # the quantity that must fall, settings and learning rate
    "evit": (loss_of, {}, 3e-3),
    "tome": (loss_of, {}, 3e-3),
    "mctf": (loss_of, {}, 3e-3),
    "dynamicvit": (off_target, {"keep_rate": 0.9}, 0.1),
    "ltmp": (off_flops, {}, 0.02),
    "avit": (loss_of, {}, 3e-3),
    "evovit": (loss_of, {}, 3e-3),
    "iared2": (off_target, {}, 3e-3),
    "bat": (loss_of, {}, 3e-3),
}


@pytest.mark.parametrize("name", GOALS)
def test_a_few_steps_lower_what_they_are_to(name):
    wanted, settings, lr = GOALS[name]
    model = new(torch.float32)
    method = learned(name, model, **settings)
    recipe = method.recipe(replace(STEP, epochs=12, smoothing=0.0))
    recipe = replace(recipe, lr=lr, min_lr=min(recipe.min_lr, lr), warmup_epochs=0)
    training = Training(model, recipe, 1, method)
    training.merge_by(None)
    values = [wanted(training, training.advance(seen())) for _ in range(12)]
    assert sum(values[-3:]) < 0.8 * sum(values[:3]), values


def test_the_rates_of_dynamicvit_are_its_authors():
    """The predictors' rate rises to 1e-3 in a sixth of the training. The other weights stay fixed for that time and
    then have a hundredth of it. Class token and positions are never trained."""
    model = new()
    method = learned("dynamicvit", model)
    recipe = method.recipe(replace(STEP, epochs=30))
    training = Training(model, recipe, 1, method)
    training.merge_by(None)
    names = {id(p): name for name, p in model.named_parameters()}
    seen_rates = {}
    for step in range(30):
        method.begin_step(training.merging, training.optimizer, step / 30)
        training.schedule.step_update(step)
        for group in training.optimizer.param_groups:
            own = {"predictor" in names[id(p)] for p in group["params"]}
            assert len(own) == 1
            seen_rates.setdefault(own.pop(), []).append(group["lr"])
            decays = {names[id(p)].endswith("weight") and p.dim() > 1 for p in group["params"]}
            assert decays == {group["weight_decay"] == 0.05}
    predictors, others = seen_rates[True][::2], seen_rates[False][::2]
    assert predictors[0] == pytest.approx(1e-6) and max(predictors) == pytest.approx(1e-3, rel=0.1)
    assert others[:5] == [0] * 5 and others[5:] == pytest.approx([rate / 100 for rate in predictors[5:]])
    trained = {names[id(p)] for group in training.optimizer.param_groups for p in group["params"]}
    assert trained == {name for name, _ in model.named_parameters()} - {"cls_token", "pos_embed"}


def test_the_keep_rate_of_evit_falls_as_its_authors_have_it():
    """It is 1 for 10 of 300 epochs, then falls along a cosine for 100; in fine-tuning it is constant."""
    model = new()
    method = baseline("evit", keep_rate=0.5, blocks=(1,), falls=True).learning(model)
    rates = [method.rate(epoch / 300) for epoch in range(300)]
    assert rates[:11] == [1] * 11 and rates[110:] == [0.5] * 190
    assert rates[60] == pytest.approx(0.75) and rates[35] == pytest.approx(0.5 + 0.25 * (math.cos(math.pi / 4) + 1))
    training = Training(model, replace(STEP, epochs=1), 300, method)
    training.merge_by(None)
    rows = []
    for step in (0, 60, 299):
        training.step = step
        training.advance(seen())
        rows.append(training.merging.blocks.last.rows[-1])
    assert rows == [17, 14, 10]  # 12 of 16 and their fused token, then 8
    fine_tuned = Training(model := new(), STEP, 300, learned("evit", model))
    fine_tuned.merge_by(None)
    fine_tuned.advance(seen())
    assert fine_tuned.merging.blocks.last.rows[-1] == 9  # 10 of 16 and their fused token, then 7 of 11


def test_a_method_of_its_own_takes_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="a method reduces tokens in a way of its own: leave config and recalibrate"):
        method = learned("tome", model := new())
        finetune(model, Small(), [], ATMConfig(), STEP, RunFolder(tmp_path, {}), method=method)
    for name, title in (("dynamicvit", "DynamicViT"), ("mctf", "MCTF")):
        with pytest.raises(
            ValueError, match=f"{title} computes its blocks in its own way .* leave grad_checkpointing out"
        ):
            Training(model := new(), replace(STEP, grad_checkpointing=True), 1, learned(name, model))
    with pytest.raises(ValueError, match="LTMP is trained by plain SGD, not by adamw"):
        Training(model := new(), STEP, 1, learned("ltmp", model))
    with pytest.raises(ValueError, match="dynamicvit: blocks=\\(1, 3\\) has the last block; give blocks before it"):
        learned("dynamicvit", new(), blocks=(1, 3))


# ------------------------------------------------------------------------------------- each image its own number


@pytest.mark.parametrize("name", ["avit", "ltmp", "iared2"])
@torch.no_grad()
def test_the_result_of_an_image_is_that_of_its_batch_of_one(name):
    """Result and cost are equal bit for bit, whatever else is in the batch."""
    model, method = prepared(name, new())
    x = images(6, side=32, dtype=F64)
    method.apply(model)
    whole, costs = model(x), cost_of_each(model, model.blocks.last).macs
    assert len(costs.unique()) > 1
    for number in range(6):
        alone = model(x[number : number + 1])
        torch.testing.assert_close(alone[0], whole[number], rtol=0, atol=1e-12)
        assert summary(model).macs == costs[number].item()


def test_a_mask_of_avit_is_the_tokens_left_out():
    """Training masks halted tokens and inference removes them; the answers are equal."""
    model, method = prepared("avit", new())
    x = images(6, side=32, dtype=F64)
    learning = method.learning(model)
    with torch.no_grad():
        patched = method.apply(model)
        masked = learning.answer(patched, x)
        torch.testing.assert_close(patched(x), masked.logits, rtol=0, atol=1e-10)
    assert 0 < (masked.depths < 4).sum() < masked.depths.numel()


def test_drop_path_is_off_where_the_authors_train_without():
    for name, rates in (("evit", [0.0] * 4), ("dynamicvit", [0.0] * 4), ("tome", [0.0, 0.1, 0.2, 0.3])):
        model = vit(depth=4, drop_path_rate=0.3)
        learned(name, model)
        assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks] == pytest.approx(rates), name


def test_interpreters_keep_most_tokens_at_first():
    """The interpreters of IA-RED² do so with scores that differ, whatever the seed."""
    x = torch.randn(2, 197, 192, dtype=F64)
    for seed in range(3):
        torch.manual_seed(seed)
        interpreter = Interpreter(192, 3).double()
        q, k = interpreter.products(x)
        scores = interpreter(q[:, :1], k)
        assert (scores > 0.5).double().mean() > 0.6 and scores.std() > 0.02


def test_ltmp_learns_what_it_runs(monkeypatch):
    """Training and inference agree without the epsilon of the masked softmax."""
    monkeypatch.setattr(ltmp_learning, "EPS", 0.0)
    model, method = prepared("ltmp", new())
    x = images(6, side=32, dtype=F64)
    learning = method.learning(copy.deepcopy(model))
    with torch.no_grad():
        patched = method.apply(model)
        torch.testing.assert_close(patched(x), learning.answer(patched, x).logits, rtol=0, atol=1e-10)
        there = [block_rows.sum().item() / (6 * 17) for block_rows in model.blocks.last.rows]
        shares = [share.item() for share in learning.answer(patched, x).there[1:]]
    assert shares == pytest.approx(there, abs=1e-12)


# ------------------------------------------------------------------------------------- more costs


def test_evo_vit_costs_what_it_published(deit):
    """3.0 GMACs: 99 tokens in the last eight blocks, 3.033. With all tokens chosen it is the plain model."""
    _, spent = counted(deit, "evovit")
    assert f"{spent.macs / 1e9:.3f}" == "3.033" and f"{spent.macs / 1e9:.1f}" == "3.0"
    assert spent.unmerged.macs == cost(deit, unmerged(deit, (3, 224, 224))).macs
    model, x = new(), images(3, side=32, dtype=F64)
    before = model(x)
    for alone in (False, True):
        after = apply_baseline(model, "evovit", keep_rate=1.0, blocks=(1, 2), cls_only_last=alone)(x)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_bat_costs_what_its_log_says(deit):
    """Its own counter gives 3.0047916 G for 139, 98 and 69 tokens; it adds no weights to the 22,050,664."""
    model, spent = counted(deit, "bat")
    assert spent.record.rows == (197,) * 3 + (139,) * 3 + (98,) * 3 + (69,) * 3
    assert f"{spent.macs / 1e9:.1f}" == "3.0" and sum(p.numel() for p in model.parameters()) == 22_050_664


def test_ia_red2_costs_what_it_published(deit):
    """3.2 GMACs, if targets are met and without the interpreters, which have 3 (C^2 + C) weights each."""
    method = baseline("iared2")
    model = copy.deepcopy(deit)
    method.prepare(model)
    lengths = [1 + round(196 * rate) for rate in method.keep_rates for _ in range(4)]
    macs = [block_macs(block, n, n, n) for block, n in zip(model.blocks, lengths, strict=True)]
    assert f"{(sum(macs) + 196 * 768 * 384 + 384_000) / 1e9:.1f}" == "3.2"
    assert sum(p.numel() for p in model.blocks[4].predictor.parameters()) == 3 * (384**2 + 384)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", [*TRAINED, "evit"])
def test_costs_are_what_torch_counts(name, alone):
    """Counted on one image. Class rows and products that torch counts differently are added. For methods with different
    lengths torch also counts padding on a CPU; there the expected cost follows from the tokens of each block."""
    model, method = prepared(name, new(torch.float32), cls_only_last=alone)
    method.apply(model)
    x = images(1, side=32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    spent = summary(model).cost
    record = model.blocks.last
    if name in ("avit", "ltmp"):
        N = [int(n) for n in (*record.tokens, record.rows[-1])]
        left = N[:-1] if name == "avit" else N[1:]
        each = [block_macs(block, *c) for block, *c in zip(model.blocks, N, N, left, strict=False)]
        if alone:
            each[-1] = block_macs(model.blocks[-1], N[-2], 1, 1)
        assert spent.macs == spent.stem + sum(each) + spent.head and N[-2] < 17
        assert (spent.matching > 0) == (name == "ltmp")
    else:
        beside = {"evit": class_rows, "evovit": class_rows, "bat": class_rows, "iared2": products}
        more = beside[name](model) if name in beside else 0
        assert spent.macs + spent.matching + more == counter.get_total_flops() // 2
    assert spent.macs < summary(model).unmerged.macs


def class_rows(model):
    """MACs of the class token's query with all keys, in blocks that compute these products again."""
    first, last = min(model.blocks[0].baseline.blocks), max(model.blocks[0].baseline.blocks)
    name = type(model.blocks[0].baseline).__name__
    if name == "EvoViT":
        return sum(n * 16 for n in (17, 10, 10, 10)[: 4 - (model.blocks.last.leading is not None)])
    distances = sum((n - 1 - math.ceil(0.6 * (n - 1))) ** 2 * 16 for n in (17, 11)) if "BAT" in name else 0
    return sum(n * 16 for i, n in enumerate(model.blocks.last.tokens) if first <= i <= last) - distances


def products(model):
    """MACs of the interpreters' products of queries and keys, which torch does not count as matrix products."""
    return -sum(16 * int(model.blocks.last.tokens[i]) for i in (0, 2))


@pytest.mark.parametrize("name", TRAINED)
def test_the_last_block_for_the_class_token_alone_changes_no_logit(name):
    model, x = new(), images(4, side=32, dtype=F64)
    whole = prepared(name, model)[1].apply(model)(x)
    costs = summary(model).macs
    remove_patch(model)
    alone = baseline(name, **SETTINGS[name], cls_only_last=True).apply(model)(x)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)
    assert summary(model).macs < costs
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TRAINED)
def test_the_table_says_which_keep_a_number_of_tokens_per_image(name):
    model, method = prepared(name, new())
    method.apply(model)(images(8, side=32, dtype=F64))
    each = [rows for rows in model.blocks.last.rows if isinstance(rows, torch.Tensor)]
    assert (method.about.own_count == "yes") == any(len(rows.unique()) > 1 for rows in each) == bool(each)
    assert method.about.training != "no"


def test_a_gate_of_avit_begins_where_hardly_a_token_halts():
    model, x = new(), images(8, side=32, dtype=F64)
    method = baseline("avit").fitted(model, [x])
    rest = method.learning(model).answer(method.apply(copy.deepcopy(model)), x).depths
    assert rest.mean() > 3.5 and method.gate_center > 0
    with pytest.raises(ValueError, match="avit: no images to fit the gate by; give batches of them"):
        baseline("avit").fitted(model, [])


BAD = [
    ("dynamicvit", {"keep_rate": 1.0}, "dynamicvit: keep_rate=1.0; want a share above 0, below 1"),
    ("ltmp", {"target": 0}, "ltmp: target=0; want a share above 0, at most 1"),
    ("avit", {"gate_scale": None}, "avit: gate_scale=None; want a number"),
    ("evovit", {"keep_rate": 2}, "evovit: keep_rate=2; want a share above 0, at most 1"),
    ("evovit", {"blocks": (0, 4)}, "evovit: blocks=(0, 4); want blocks after the first, whose attention ranks tokens"),
    ("evovit", {"layer_wise": 1}, "evovit: layer_wise=1; want True or False"),
    (
        "iared2",
        {"keep_rates": (0.5,)},
        "iared2: keep_rates=(0.5,); want a share above 0, at most 1, for each of blocks",
    ),
    ("iared2", {"heads": 0}, "iared2: heads=0; want a whole number, 1 or more"),
    ("bat", {"share": -1}, "bat: share=-1; want a share above 0, at most 1"),
    ("bat", {"neighbours": 0}, "bat: neighbours=0; want a whole number, 1 or more"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD)
def test_bad_settings_are_refused_in_one_line(name, settings, message):
    with pytest.raises(ValueError) as caught:
        baseline(name, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("avit", lambda: vit(reg_tokens=2), "avit: the model has 3 leading tokens; it wants the class token alone"),
        ("iared2", vit, "iared2: heads=6 do not divide the width 32 of the model"),
        ("ltmp", lambda: vit(class_token=False, global_pool="avg"), "ltmp ranks tokens by the class token's attention"),
        ("evovit", lambda: vit(class_token=False, global_pool="avg"), "evovit ranks tokens by the class token's"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(name, model, message):
    settings = {"blocks": (1, 2), "keep_rates": (0.5, 0.5)} if name == "iared2" else {}
    with pytest.raises(ValueError, match=message):
        baseline(name, **settings).learning(model())
