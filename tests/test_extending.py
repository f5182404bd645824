"""A user's own method: a block with its own plan, checked against timm's blocks written out."""

import copy

import pytest
import timm
import torch

from atm_triton import ATMBlock, ATMConfig, apply_patch, remove_patch
from atm_triton.flops import cost
from atm_triton.packed import Assignment, Images

WHERE = 1  # the block that reduces


class Free(ATMBlock):
    def matching_macs(self, N):
        return 0


class PairsMerge(Free):
    """Every second patch token joins the one before it."""

    def plan(self, q, k, tokens):
        if self.block_index != WHERE:
            return None
        B, N, P = tokens.images.B, tokens.images.N, self.num_prefix_tokens
        slots = torch.arange(N)
        slots[P:] = P + (slots[P:] - P) // 2
        return Assignment.of(slots.expand(B, N), M=int(slots[-1]) + 1)


class SecondsDropped(Free):
    """Every second patch token is dropped."""

    def plan(self, q, k, tokens):
        if self.block_index != WHERE:
            return None
        B, N, P = tokens.images.B, tokens.images.N, self.num_prefix_tokens
        kept = torch.ones(N, dtype=torch.bool)
        kept[P + 1 :: 2] = False
        slots = torch.where(kept, kept.cumsum(0) - 1, -1)
        return Assignment.of(slots.expand(B, N), M=int(kept.sum()))


class LongKeysStay(Free):
    """Each image keeps the patch tokens whose keys are longer than its mean, so numbers differ between images."""

    def plan(self, q, k, tokens):
        if self.block_index != WHERE:
            return None
        B, N, P = tokens.images.B, tokens.images.N, self.num_prefix_tokens
        length = k.norm(dim=(0, 2)).view(B, N)
        kept = length > length.mean(dim=1, keepdim=True)
        kept[:, :P] = True
        slots = torch.where(kept.flatten(), kept.flatten().cumsum(0) - 1, -1)
        return Assignment(slots.int(), int(kept.sum()), Images.of_lengths(kept.sum(1), N))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, num_classes=7).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stepped(model, image, reduce):
    """The logits of one image from timm's own blocks. ``reduce(x, keys)`` runs after attention of block :data:`WHERE`,
    on x [1, N, C]. Later blocks have attention with log n written out."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image.unsqueeze(0)))))
    sizes = torch.ones(x.shape[1], dtype=x.dtype)
    for index, block in enumerate(model.blocks):
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).reshape(x.shape[1], 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k, v = qkv.unbind(0)
        scores = q @ k.transpose(1, 2) * attn.scale + sizes.log()
        x = x + attn.proj((scores.softmax(2) @ v).transpose(0, 1).flatten(1)).unsqueeze(0)
        if index == WHERE:
            x, sizes = reduce(x, k)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))[0]


def pairs(x, keys):
    groups = [[0], *([i, i + 1] for i in range(1, x.shape[1] - 1, 2))]
    merged = torch.stack([x[0, group].mean(0) for group in groups]).unsqueeze(0)
    return merged, torch.tensor([len(group) for group in groups], dtype=x.dtype)


def dropped(x, keys):
    kept = [0, *range(1, x.shape[1], 2)]
    return x[:, kept], torch.ones(len(kept), dtype=x.dtype)


def long(x, keys):
    length = keys.norm(dim=(0, 2))
    kept = [0, *(i for i in range(1, x.shape[1]) if length[i] > length.mean())]
    return x[:, kept], torch.ones(len(kept), dtype=x.dtype)


@pytest.mark.parametrize("block_class, reduce", [(PairsMerge, pairs), (SecondsDropped, dropped), (LongKeysStay, long)])
def test_a_plan_is_what_the_blocks_do(model, images, block_class, reduce):
    with torch.inference_mode():
        want = torch.stack([stepped(model, image, reduce) for image in images])
        apply_patch(model, block_class=block_class)
        try:
            got, record = model(images), model.blocks.last
            costs = cost(model, record)
        finally:
            remove_patch(model)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert not torch.allclose(got, model(images), atol=1e-4)
    assert record.matched == (False, True, False) and costs.matching == 0
    assert "a class of its own" in record.way or "blocks" in record.way


def test_features_of_merged_tokens_are_shared_and_gradients_flow(model, images):
    apply_patch(model, block_class=PairsMerge)
    try:
        features = model.forward_features(images[:1])
        features.square().sum().backward()
        assert features.shape[1] == 17
        torch.testing.assert_close(features[:, 1::2], features[:, 2::2])
        assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    finally:
        remove_patch(model)
        model.zero_grad()


def test_a_config_beside_a_plan_still_counts(model, images):
    """The field tested here is that attention ignores sizes."""
    outputs = []
    for proportional in (True, False):
        config = ATMConfig(adapt="static", schedule=(0, 0, 0), proportional_attention=proportional)
        apply_patch(model, config, PairsMerge)
        outputs.append(model(images))
        remove_patch(model)
    assert not torch.allclose(*outputs, atol=1e-6)


def test_what_is_no_block_or_costs_nobody_knows_what_is_refused(model):
    class Silent(ATMBlock):
        def plan(self, q, k, tokens):
            return None

    with pytest.raises(TypeError, match=r"Silent has a plan of its own; give it matching_macs\(N\)"):
        apply_patch(model, block_class=Silent)
    with pytest.raises(TypeError, match="block_class is 3; want ATMBlock or a subclass of it"):
        apply_patch(model, block_class=3)
    with pytest.raises(ValueError, match="no thresholds"):  # without its own plan it needs thresholds
        apply_patch(model, block_class=Free)
    assert type(model.blocks) is torch.nn.Sequential


def _numbered(text):
    return torch.tensor([[int(slot) for slot in text.split()]] * 2)


@pytest.mark.parametrize(
    ("slots", "M", "message"),
    [
        ("0 1 -1 2 -1 4", 4, r"slots has 4, where each image keeps M=4 tokens; want 0 to M - 1 for those that stay"),
        ("0 1 -2 2", 3, "slots has -2, where each image keeps M=3 tokens"),
        ("0 1 -1 3 3", 4, "no token of image 0 has slot 2, of M=4; number those that stay from 0 without gaps"),
        ("0 1 2", 0, "M=0 is too small; want the number of tokens that each image keeps, 1 or more"),
    ],
)
def test_slots_that_would_reach_into_the_next_image_are_refused(slots, M, message):
    with pytest.raises(ValueError, match=message):
        Assignment.of(_numbered(slots), M)


def _pairs(B, N, **changed):
    """Neighbours merge, the class token and the first patch too. ``changed``: the slot of the class token."""
    slots = torch.arange(N) // 2
    slots[0] = changed.get("first", 0)
    return Assignment.of(slots.expand(B, N), M=(N + 1) // 2)


BROKEN = {
    "the class token is dropped": (
        lambda B, N: _pairs(B, N, first=-1),
        "a plan moves or drops token 0 of image 0, one of the 1 at its start",
    ),
    "a patch joins the class token": (
        _pairs,
        "a plan merges tokens into the 1 at the start of an image",
    ),
    "an image is missing": (
        lambda B, N: Assignment.of(torch.arange(N).expand(1, N), M=N),
        r"a plan has slots \[17\] for 51 tokens; give one per token",
    ),
    "no assignment": (lambda B, N: torch.arange(N), "a plan must return an Assignment or None, got Tensor"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_plan_that_does_not_fit_is_refused(what, model, images):
    plan, message = BROKEN[what]

    class Broken(Free):
        def plan(self, q, k, tokens):
            return plan(tokens.images.B, tokens.images.N)

    broken = apply_patch(copy.deepcopy(model), block_class=Broken)
    with pytest.raises((ValueError, TypeError), match=message):
        broken(images)


def test_slots_of_an_assignment():
    assert Assignment.of(_numbered("0 1 -1 1"), 2).slots.tolist() == [0, 1, -1, 1, 2, 3, -1, 3]
