"""Two processes share a patched model: ``torchrun --nproc-per-node 2 sharding.py CASE``."""

import sys

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from atm_triton import ATMConfig, apply_patch, remove_patch, summary
from models import images, vit

EASY = {"alpha": 0.5, "theta_min": 0.3, "beta": 0.05}
CONFIGS = {
    "static": ATMConfig(adapt="static", schedule=(3, 5, 2, 4)),
    "batch": ATMConfig(**EASY),
    "image": ATMConfig(**EASY, adapt="image"),
}


def shard_blocks(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_parts(model, mesh):
    for block in model.blocks:
        for part in (block.attn.qkv, block.attn, block.mlp):
            fully_shard(part, mesh=mesh)
    fully_shard(model.blocks, mesh=mesh)
    fully_shard(model, mesh=mesh)


def new(dtype=torch.float64):
    torch.manual_seed(0)
    return vit(dtype=dtype).train()


def gradients(model):
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}


def assert_same(sharded, alone, x):
    out, expected = sharded(x), alone(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    for one, other in zip(sharded.blocks.last.rows, alone.blocks.last.rows, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert sum(summary(alone).r) > 0
    refused(summary, sharded, "costs of a model that is sharded as a whole are not counted")
    out.square().sum().backward()
    expected.square().sum().backward()
    of_alone = gradients(alone)
    for name, gradient in gradients(sharded).items():
        torch.testing.assert_close(gradient, of_alone[name], rtol=0, atol=1e-9)


def after_patching(shard, mesh, x):
    for config in CONFIGS.values():
        alone = apply_patch(new(), config)
        sharded = apply_patch(new(), config)
        shard(sharded, mesh)
        assert_same(sharded, alone, x)
        with torch.no_grad():
            torch.testing.assert_close(sharded.eval()(x), alone.eval()(x), rtol=0, atol=1e-9)
    low = apply_patch(new(torch.float32), CONFIGS["image"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for block in low.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    out = low(x.float())  # needs sizes in float32
    assert out.isfinite().all() and sum(summary(low).r) > 0


def model_first(mesh, x):
    for config in CONFIGS.values():
        alone, sharded = apply_patch(new(), config), new()
        fully_shard(sharded, mesh=mesh)
        assert_same(apply_patch(sharded, config), alone, x)
        torch.testing.assert_close(remove_patch(sharded)(x), remove_patch(alone)(x), rtol=0, atol=1e-9)


def refused(call, model, message):
    try:
        call(model)
    except TypeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{call.__name__} did not refuse: {message}")


def refusals(mesh, x):
    model = new()
    shard_blocks(model, mesh)
    refused(apply_patch, model, "blocks.0 is a FSDPBlock: only Block of timm is supported; wrap and shard blocks after")
    model = new()
    fully_shard(model.blocks, mesh=mesh)
    refused(apply_patch, model, "blocks is FSDPSequential; want nn.Sequential")
    for part, name in (("blocks.1", "blocks.1 (FSDPATMBlock)"), ("", "the model (FSDPATMVisionTransformer)")):
        model = apply_patch(new(), CONFIGS["image"])
        fully_shard(model.get_submodule(part), mesh=mesh)
        for call in (remove_patch, apply_patch):
            refused(call, model, f"{name} got another class while it was patched, as by fully_shard")
        model(x)
        with torch.no_grad():
            why = model.eval().engine.refusal(x)
        assert why == "a parameter is of a class of its own" or "CPU" in why or "reference" in why, why


def distributed_data_parallel(mesh, x):
    """DDP: each process has its own images; gradients are the mean over both."""
    mine = x.roll(dist.get_rank(), dims=2)
    for config in CONFIGS.values():
        alone = apply_patch(new(), config)
        (alone(x).square().sum() / 2 + alone(x.roll(1, dims=2)).square().sum() / 2).backward()
        model = DistributedDataParallel(apply_patch(new(), config))
        model(mine).square().sum().backward()
        assert sum(summary(model.module).r) > 0
        expected = gradients(alone)
        for name, gradient in gradients(model.module).items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9)


def tensor_parallel(mesh, x):
    """Each process has half of an MLP's inner channels and half of the outputs of ``qkv`` before they are gathered."""
    plan = {"attn.qkv": ColwiseParallel(output_layouts=Replicate())}
    plan |= {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    for config in CONFIGS.values():
        alone, ours = apply_patch(new(), config), apply_patch(new(), config)
        for block in ours.blocks:
            parallelize_module(block, mesh, plan)
        assert isinstance(ours.blocks[3].attn.qkv.weight, DTensor)
        out, expected = ours(x), alone(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        assert summary(ours).r == summary(alone).r and sum(summary(ours).r) > 0
        out.square().sum().backward()
        expected.square().sum().backward()
        of_alone = gradients(alone)
        for name, gradient in gradients(ours).items():
            torch.testing.assert_close(gradient, of_alone[name], rtol=0, atol=1e-9)
        remove_patch(ours)
        torch.testing.assert_close(ours(x), remove_patch(alone)(x), rtol=0, atol=1e-9)
    first = new()
    for block in first.blocks:
        parallelize_module(block, mesh, plan)
    apply_patch(first, CONFIGS["image"])
    torch.testing.assert_close(first(x), apply_patch(alone, CONFIGS["image"])(x), rtol=0, atol=1e-9)


def fully_sharded_data_parallel(mesh, x):
    """The older FSDP, which replaces each block by a wrapper."""
    for config in CONFIGS.values():
        alone = apply_patch(new(), config)
        options = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "device_id": torch.device("cpu")}
        sharded = FullyShardedDataParallel(apply_patch(new(), config), use_orig_params=True, **options)
        assert isinstance(sharded.module.blocks[0], FullyShardedDataParallel)
        out, expected = sharded(x), alone(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        out.square().sum().backward()
        expected.square().sum().backward()
        with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
            for one, other in zip(sharded.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-9)


def parallel(mesh, x):
    distributed_data_parallel(mesh, x)
    fully_sharded_data_parallel(mesh, x)
    tensor_parallel(mesh, x)


OTHERS = {"refusals": refusals, "model first": model_first, "parallel": parallel}


def main(case):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x = images(dtype=torch.float64)
    if case in OTHERS:
        OTHERS[case](mesh, x)
    else:
        after_patching({"blocks": shard_blocks, "parts": shard_parts}[case], mesh, x)
    dist.barrier()
    print("the same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
