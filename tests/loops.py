"""The paper's method in loops over images, tokens and channels. The reference must equal it.

Nothing from atm_triton is used here. Lists hold Python floats (float64). Gradients go through :func:`logits`.
"""

import math

import torch
import torch.nn.functional as F


def theta(block, alpha, beta, theta_min):
    return max(alpha - (math.exp(beta * (block - 1)) - 1), theta_min)


def groups(N, P, sizes=None):
    """The positions of A and B; grouped by size if sizes are given."""
    if sizes is None:
        return [i for i in range(P, N) if i % 2 == 0], [i for i in range(P, N) if i % 2 == 1]
    order = sorted(range(P, N), key=lambda i: (sizes[i], i))
    half = (N - P) // 2
    return sorted(order[:half]), sorted(order[half:])


def most_pairs(N, P, by_size):
    """The number of tokens in A, each of which has a partner unless B is empty."""
    a, b = groups(N, P, [1.0] * N if by_size else None)
    return len(a) if b else 0


def cosine(u, v):
    dot = sum(p * q for p, q in zip(u, v, strict=True))
    return dot / (math.sqrt(sum(p * p for p in u)) * math.sqrt(sum(q * q for q in v)))


def mean_keys(keys):
    """The mean over heads of a tensor [H, N, d], as N lists of d floats."""
    H, N, d = keys.shape
    return [[sum(keys[h, i, c].item() for h in range(H)) / H for c in range(d)] for i in range(N)]


def match(k, a, b):
    """{i of A: (similarity, position in B)}; of equal similarities the first in B."""
    pairs = {}
    for i in a:
        best = None
        for j in b:
            s = cosine(k[i], k[j])
            if best is None or s > best[0]:
                best = (s, j)
        if best is not None:
            pairs[i] = best
    return pairs


def assign(N, P, a, b, pairs, r):
    """The assignment of r merges, as a list of N slots."""
    if r == 0:
        return list(range(N))
    joining = sorted(pairs, key=lambda i: (-pairs[i][0], i))[:r]
    order = list(range(P)) + [i for i in a if i not in joining] + list(b)
    place = {i: slot for slot, i in enumerate(order)}
    return [place[i] if i in place else place[pairs[i][1]] for i in range(N)]


def merge(x, n, assignment):
    """Size-weighted means: x [N, C] tensor, n list of floats; tokens with slot -1 are dropped."""
    M = max(assignment) + 1
    new_n, total = [0.0] * M, [0.0] * M
    for i, slot in enumerate(assignment):
        if slot < 0:
            continue
        new_n[slot] += n[i]
        total[slot] = total[slot] + n[i] * x[i]
    return torch.stack([t / new_n[m] for m, t in enumerate(total)]), new_n


def unmerge(x, assignment):
    """The value of each token's slot: x [M, C] tensor -> [N, C]; 0 for a dropped token."""
    return torch.stack([x[slot] if slot >= 0 else torch.zeros_like(x[0]) for slot in assignment])


def attention(q, k, v, n):
    """Attention with log n: q [H, Nq, d], k and v [H, N, d], n list of floats -> [H, Nq, d]."""
    H, Nq, d = q.shape
    out = torch.zeros_like(q)
    for h in range(H):
        for i in range(Nq):
            scores = torch.stack([q[h, i] @ k[h, j] / math.sqrt(d) + math.log(n[j]) for j in range(k.shape[1])])
            out[h, i] = torch.softmax(scores, 0) @ v[h]
    return out


def logits(model, images, r_of_block, size_from, cls_only_last, proportional=True):
    """Run a whole timm ViT with plain blocks, image by image, merging tokens in each block.

    ``r_of_block(block, similarities)`` gets the best similarities of every image (a list of dicts) and returns r.
    Blocks count from 1; from block ``size_from`` on tokens are grouped by size. Returns logits, sizes and traces."""
    P = model.num_prefix_tokens
    heads = 2 if getattr(model, "dist_token", None) is not None else 1
    tokens = list(model.norm_pre(model._pos_embed(model.patch_embed(images))))
    n = [[1.0] * len(x) for x in tokens]
    traces = [list(range(len(x))) for x in tokens]
    taken = []
    for block, blk in enumerate(model.blocks, start=1):
        last = block == len(model.blocks)
        attn, planned = blk.attn, []
        for b, x in enumerate(tokens):
            N = len(x)
            q, k, v = attn.qkv(blk.norm1(x)).view(N, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
            a, bb = groups(N, P, n[b] if block >= size_from else None)
            planned.append((a, bb, match(mean_keys(k), a, bb)))
            weights = n[b] if proportional else [1.0] * N
            y = attention(q, k, v, weights).permute(1, 0, 2).reshape(N, -1)
            tokens[b] = x + attn.proj(y)
        if last and cls_only_last:
            r = 0
            tokens = [x[:heads] for x in tokens]
        else:
            r = r_of_block(block, [pairs for *_, pairs in planned], (N - P) // 2)
            for b, (a, bb, pairs) in enumerate(planned):
                assignment = assign(len(tokens[b]), P, a, bb, pairs, r)
                tokens[b], n[b] = merge(tokens[b], n[b], assignment)
                traces[b] = [assignment[slot] for slot in traces[b]]
        taken.append(r)
        tokens = [x + blk.mlp(blk.norm2(x)) for x in tokens]
    features = [model.norm(x) for x in tokens]
    out = torch.stack([_classify(model, f, heads) for f in features])
    return out, n, traces, taken


def _classify(model, features, heads):
    if heads == 2:
        return (model.head(features[0]) + model.head_dist(features[1])) / 2
    return F.linear(features[0], model.head.weight, model.head.bias)
