"""Methods that are trained: a step in float64 against loops, what runs afterwards, costs, and interrupted runs."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from atm_triton import ATMConfig, remove_patch, summary
from atm_triton.flops import cost, unmerged
from atm_triton.training.finetune import Training, finetune
from atm_triton.training.folder import RunFolder
from atm_triton.training.images import PASS, seed_all
from atm_triton.training.recipe import Recipe
from benchmarks.baselines import TRAINED, apply_baseline, baseline
from benchmarks.baselines.training import softmax_of_kept, through
from finetuning import Pictures
from models import images, vit

F64 = torch.float64
STEP = Recipe(epochs=1, batch_size=4, accumulate=2, mixup=0.0, cutmix=0.0, smoothing=0.1)
SETTINGS = {
    "evit": {"keep_rate": 0.6, "blocks": (1, 2)},
    "tome": {"r": 3},
    "mctf": {"r": 6},
    "dynamicvit": {"keep_rate": 0.6, "blocks": (1, 2)},
}


def new(dtype=F64, **changes):
    """A small model, the same each time."""
    torch.manual_seed(0)
    return vit(dtype=dtype, **{"embed_dim": 16, "img_size": 32, **changes})


def learned(name, model, **settings):
    return baseline(name, **SETTINGS[name] | settings).learning(model)


class Small(Pictures):
    """Of 16 patches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.x = self.x[:, :, :32, :32]


def seen(n=2):
    return Small().batches()[:n]


# ------------------------------------------------------------------------------------- a step, against loops


def attention(block, x, weigh):
    """What attention adds to the tokens x [N, C] of an image, with weights[i] = weigh(scores of query i [N]) of every
    head; and keys [N, H, d], and the weights [H, N, N]."""
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
                    e = torch.stack([(s[j] - s.max()).exp() * (1.0 if i == j else p[j]) for j in range(N)])
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
    """Logits and class tokens by a method that tests/test_baselines.py holds against its loops."""
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


@pytest.mark.parametrize("name", ["evit", "tome", "mctf", "dynamicvit"])
def test_the_gradients_of_a_step_are_those_of_the_loops(name):
    """Of two passes of four images, in float64, with the random numbers that each pass draws."""
    model = new()
    method = learned(name, model)
    twin = copy.deepcopy(model)
    loops = {"evit": plain_loss("evit"), "tome": plain_loss("tome"), "mctf": mctf_loss}
    loops["dynamicvit"] = lambda m, x, labels: dynamicvit_loss(m, method.teacher, x, labels)
    training = Training(model, STEP, 1, method)
    training.merge_by(None)
    row = training.advance(seen())
    loss = 0.0
    for number, (x, labels) in enumerate(seen()):
        seed_all(STEP.seed, PASS, 0, number)
        loss = loss + loops[name](twin, x, labels) / 2
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-9)
    for (key, ours), parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not ours.requires_grad:
            assert ours.grad is None and key in ("cls_token", "pos_embed")
            continue
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=0, atol=1e-8, msg=key)
        assert parameter.grad.abs().max() > 1e-9, key


# ------------------------------------------------------------------------------------- what runs afterwards


def softmax(i, s):
    return torch.softmax(s, 0)


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


PLANS = {"dynamicvit": dynamicvit_plan}


def prepared(name, model, **settings):
    """A model with the method's own weights, which differ from where they begin, and the method."""
    method = baseline(name, **SETTINGS[name] | settings)
    before = {key for key, _ in model.named_parameters()}
    method.prepare(model)
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if key not in before and parameter.dim() > 1:
            parameter.data.normal_(std=0.7 * parameter.shape[1] ** -0.5)
    return model, method


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
    assert [list(row) for row in zip(*rows, strict=True)] == [tokens for _, tokens in expected]
    dense = model.forward_features(x)
    assert dense.shape[:2] == (4, 17)
    torch.testing.assert_close(model.forward_head(dense), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(remove_patch(model)(x), before, rtol=0, atol=0)


def test_a_mask_of_dynamicvit_is_the_tokens_left_out():
    """What it trains and what it runs differ in which tokens stay, and in nothing else (but its epsilon, 0 here)."""
    block, x = new().blocks[0], torch.randn(2, 9, 16, dtype=F64)
    kept = [0, 2, 3, 7]
    mask = torch.zeros(2, 9, dtype=F64)
    mask[:, kept] = 1
    exact = through(block, x, lambda s: softmax_of_kept(s, mask, 0.0, True))[:, kept]
    torch.testing.assert_close(exact, block(x[:, kept]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TRAINED)
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
    """2.9: 2.88 without the predictors, whose cost ours has too; 137, 96 and 67 patches; 241,250 weights each."""
    model, found = counted(deit, "dynamicvit")
    assert found.record.rows == (197,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    own = sum(model.blocks[i].predictor_macs(n) for i, n in ((3, 197), (6, 138), (9, 97)))
    assert (f"{(found.macs - own) / 1e9:.3f}", f"{found.macs / 1e9:.3f}") == ("2.878", "2.981")
    assert f"{(found.macs - own) / 1e9:.1f}" == "2.9"
    assert sum(p.numel() for p in model.blocks[3].predictor.parameters()) == 241_250
    assert found.unmerged.macs == cost(deit, unmerged(deit, (3, 224, 224))).macs


# ------------------------------------------------------------------------------------- training


def train(out, name, recipe, pictures=None, resume=False, dtype=F64, **settings):
    """The model after it, and what was returned."""
    model = new(dtype)
    method = learned(name, model, **settings)
    folder = RunFolder(Path(out), {"recipe": recipe.to_dict()})
    pictures = pictures or Small()
    options = {"resume": resume, "save_every": 1, "method": method}
    return model, finetune(model, pictures, pictures.batches(), None, method.recipe(recipe), folder, **options)


def weights(out):
    return torch.load(Path(out) / "checkpoint.pt")["model"]


@pytest.mark.parametrize("name", ["dynamicvit"])
def test_an_interrupted_run_goes_on_to_the_bit(name, tmp_path):
    """With its predictors, its random draws, its teacher, and rates that change on the way."""
    torch.set_num_threads(1)
    recipe = replace(STEP, epochs=2, smoothing=0.0, ema=0.8)
    whole, _ = train(tmp_path / "whole", name, recipe)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", name, recipe, Small(raises=21))
    part, done = train(tmp_path / "part", name, recipe, resume=True)
    first, states = new(), [model.state_dict() for model in (part, whole)]
    assert states[0].keys() == states[1].keys() and done["config"] is None
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    moved = [key for key, value in first.state_dict().items() if not torch.equal(value, states[0][key])]
    assert len(moved) > 20
    one, two = (torch.load(tmp_path / which / "checkpoint.pt")["model_ema"] for which in ("part", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = new()
    baseline(name, **SETTINGS[name]).prepare(again)
    again.load_state_dict(weights(tmp_path / "part"))  # what a run leaves is a prepared model's


def loss_of(training, row):
    return row["loss"]


def off_target(training, row):
    """How far the share of tokens that the masks keep is from its target."""
    answer = training.method.answer(training.merging, Small().x.float())
    target = training.method.baseline.share
    return sum(abs(mask.mean().item() - target(i)) for i, mask in enumerate(answer.masks, start=1))


GOALS = {  # what is to fall, with which settings and learning rate
    "evit": (loss_of, {}, 3e-3),
    "tome": (loss_of, {}, 3e-3),
    "mctf": (loss_of, {}, 3e-3),
    "dynamicvit": (off_target, {"keep_rate": 0.9}, 0.1),
}


@pytest.mark.parametrize("name", GOALS)
def test_a_few_steps_lower_what_they_are_to(name):
    wanted, settings, lr = GOALS[name]
    model = new(torch.float32)
    method = learned(name, model, **settings)
    recipe = method.recipe(replace(STEP, epochs=12, smoothing=0.0))
    training = Training(model, replace(recipe, lr=lr, warmup_epochs=0), 1, method)
    training.merge_by(None)
    values = [wanted(training, training.advance(seen())) for _ in range(12)]
    assert sum(values[-3:]) < 0.8 * sum(values[:3]), values


def test_the_rates_of_dynamicvit_are_its_authors():
    """Predictors rise to 1e-3 in a sixth of the training; the rest waits for that long, and then has a hundredth;
    class token and positions are never trained."""
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
    """1 for 10 of 300 epochs, then along a cosine for 100; in fine-tuning as it is from the start."""
    model = new()
    method = baseline("evit", keep_rate=0.5, blocks=(1,)).learning(model, warms=True)
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
    assert learned("evit", new()).warms is False


def test_a_method_of_its_own_takes_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="a method reduces tokens in a way of its own: leave config and recalibrate"):
        method = learned("tome", model := new())
        finetune(model, Small(), [], ATMConfig(), STEP, RunFolder(tmp_path, {}), method=method)
    with pytest.raises(ValueError, match="DynamicViT masks tokens in training: leave grad_checkpointing out"):
        Training(model := new(), replace(STEP, grad_checkpointing=True), 1, learned("dynamicvit", model))
    with pytest.raises(ValueError, match="dynamicvit: blocks=\\(1, 3\\) has the last block; give blocks before it"):
        learned("dynamicvit", new(), blocks=(1, 3))
