"""open_clip's CLIP with a patched timm tower."""

import pytest
import torch
from open_clip.model import CLIP

from atm_triton import ATMConfig, apply_patch, summary

SAME = {
    "static": ATMConfig(adapt="static", schedule=(0,) * 12),
    "image": ATMConfig(adapt="image", alpha=1.0, beta=0.0, theta_min=1.0),
}


def clip():
    torch.manual_seed(0)
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


@pytest.mark.works_with("open_clip_torch", "a tower of timm: images and texts encoded, frozen by lock_image_tower")
@pytest.mark.parametrize("adapt", SAME)
def test_a_tower_of_timm(adapt):
    model, x, text = clip(), torch.randn(2, 3, 224, 224), torch.randint(0, 50, (2, 8))
    expected = model(x, text)
    apply_patch(model.visual.trunk, SAME[adapt])
    for one, other in zip(model(x, text), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    model.lock_image_tower(unlocked_groups=1)
    model(x, text)[0].sum().backward()
    frozen, other = clip(), [name for name, p in model.visual.named_parameters() if p.requires_grad]
    frozen.lock_image_tower(unlocked_groups=1)
    assert other == [name for name, p in frozen.visual.named_parameters() if p.requires_grad]
    assert summary(model.visual.trunk).r == (0,) * 12
    apply_patch(model.visual.trunk, ATMConfig(adapt="static", schedule=(8,) * 12))
    assert model.encode_image(x).isfinite().all()
