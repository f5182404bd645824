"""A patched model against the complete method in loops, in float64."""

import pytest
import torch
from timm.layers import set_fused_attn

import loops
from atm_triton import ATMConfig, apply_patch, summary
from models import distilled, images, vit

F64 = torch.float64


def assert_equal(model, x, config, r_of_block, size_from, **options):
    """Check logits within 1e-9, and tokens, sizes and order by dense features and the record. Returns each r."""
    with torch.no_grad():
        expected, sizes, expected_traces, taken = loops.logits(
            model, x, r_of_block, size_from, config.cls_only_last, config.proportional_attention is not False, **options
        )
        apply_patch(model, config)
        logits = model(x)
        traces = model.traces(x)
        model(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    assert list(summary(model).r) == taken
    if not config.cls_only_last:
        assert traces[-1].tolist() == expected_traces
        sizes_of = [torch.bincount(row).tolist() for row in traces[-1].long()]
        assert sizes_of == [[int(n) for n in image] for image in sizes]
    return taken


def constant(schedule):
    return lambda block, pairs, most: min(schedule[block - 1], most)


@pytest.mark.parametrize(
    "schedule",
    [(1,) * 4, (3,) * 4, (8,) * 4, (9, 6, 3, 0), (0, 2, 0, 5), (100,) * 4],
    ids=lambda s: "-".join(map(str, s)),
)
@pytest.mark.parametrize("make", [vit, distilled], ids=["plain", "distilled"])
def test_static_with_alternate_grouping_is_tome(make, schedule):
    config = ATMConfig(adapt="static", schedule=schedule, split_depth=4, cls_only_last=False)
    assert_equal(make(dtype=F64), images(2, dtype=F64), config, constant(schedule), size_from=5)


@pytest.mark.parametrize("make", [vit, distilled], ids=["plain", "distilled"])
def test_the_unfused_path_is_the_same(make):
    set_fused_attn(False)
    try:
        model = make(dtype=F64)
    finally:
        set_fused_attn(True)
    config = ATMConfig(adapt="static", schedule=(3,) * 4, split_depth=4, cls_only_last=False)
    assert_equal(model, images(2, dtype=F64), config, constant((3,) * 4), size_from=5)


def mean_count(config, depth):
    def r(block, pairs, most):
        threshold = loops.theta(block, config.alpha, config.beta, config.theta_min)
        if config.thresholds is not None:
            threshold = config.thresholds[block - 1]
        counts = [sum(s >= threshold for s, _ in image.values()) for image in pairs]
        return sum(counts) // len(counts)

    return r


@pytest.mark.parametrize("proportional", [True, False], ids=["log-size", "plain"])
@pytest.mark.parametrize("cls_only", [True, False], ids=["cls-only-last", "merge-in-last"])
@pytest.mark.parametrize(("make", "P"), [(vit, 1), (distilled, 2)], ids=["plain", "distilled"])
def test_batch_is_the_whole_method(make, P, cls_only, proportional):
    """Covers both groupings, the batch's r and a last block for the class token alone."""
    depth = 6
    config = ATMConfig(
        alpha=0.8,
        beta=0.05,
        theta_min=0.6,
        split_depth=3,
        cls_only_last=cls_only,
        proportional_attention=proportional,
    )
    model = make(dtype=F64, depth=depth, embed_dim=12)
    r = assert_equal(model, images(5, dtype=F64), config, mean_count(config, depth), size_from=4)
    working = r[:-1] if cls_only else r
    assert sum(0 < n for n in working[:3]) >= 2 and sum(0 < n for n in working[3:]) >= 1, r


def test_thresholds_override_eq_1():
    thresholds = (1.0, 0.5, 0.7, 0.6)
    config = ATMConfig(alpha=0.9, beta=0.04, theta_min=0.8, thresholds=thresholds, split_depth=4, cls_only_last=False)
    model = vit(dtype=F64, embed_dim=12)
    r = assert_equal(model, images(4, dtype=F64), config, mean_count(config, 4), size_from=5)
    assert r[0] == 0 and all(n > 0 for n in r[1:])


def test_a_batch_of_one_is_the_per_image_method():
    """Section 3.2: with one image the mean count is the image's own count."""
    config = ATMConfig(alpha=0.7, beta=0.02, theta_min=0.5, split_depth=2)
    model = vit(dtype=F64, embed_dim=12)
    assert_equal(model, images(1, dtype=F64), config, mean_count(config, 4), size_from=3)
