"""Models that accelerate offloads, dispatches or prepares."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState

from atm_triton import apply_patch, remove_patch, summary
from models import images
from test_citizen import SAME, STATIC, assert_same, new

CPU = torch.device("cpu")


def dispatched(model, folder):
    """Dispatch the model with every other block offloaded to disk."""
    places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    places |= {name: "cpu" for name in ("cls_token", "pos_embed")}
    places |= {f"blocks.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatch_model": dispatched,
}
with_accelerate = partial(pytest.mark.works_with, "accelerate")


@with_accelerate(f"{', '.join(WAYS)} after patching (before it: refused by name)")
@pytest.mark.parametrize("config", [*SAME.values(), STATIC], ids=[*SAME, "merging"])
@pytest.mark.parametrize("offload", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_offloaded(offload, config, tmp_path):
    x = images(dtype=torch.float64)
    expected = new()(x) if config is not STATIC else apply_patch(new(), STATIC)(x)
    model = offload(apply_patch(new(), config), tmp_path)
    assert model.blocks[3].attn.qkv.weight.is_meta
    assert_same(model(x), expected)
    with pytest.raises(TypeError, match="costs are not counted: patch_embed cannot run on meta tensors"):
        summary(model)
    with pytest.raises(TypeError, match=r"the model .* got a forward of its own while it was patched"):
        remove_patch(model)
    remove_hook_from_submodules(model)
    assert_same(remove_patch(model)(x), new()(x))


@with_accelerate(f"{', '.join(WAYS)} after patching (before it: refused by name)")
@pytest.mark.parametrize("offload", WAYS.values(), ids=WAYS)
def test_offloaded_before_patching(offload, tmp_path):
    with pytest.raises(TypeError, match="this one has a forward of its own, set on the object"):
        apply_patch(offload(new(), tmp_path))


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(True)


@with_accelerate("Accelerator.prepare and backward, mixed precision")
@pytest.mark.parametrize("adapt", SAME)
def test_prepared(accelerator, adapt):
    plain, ours = accelerator.prepare(new().float(), apply_patch(new().float(), SAME[adapt]))
    x = images()
    out, expected = ours(x), plain(x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 if accelerator.mixed_precision == "no" else 0.03}  # for a bfloat16 logit
    torch.testing.assert_close(out, expected, **tolerance)
    for each in (out, expected):
        accelerator.backward(each.square().mean())
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.999
    assert summary(accelerator.unwrap_model(ours)).r == (0,) * 4
