"""Parameters and FLOPs of the paper's models and of ToMe, beside what they should be.

The paper prints GFLOPs and rounded parameters (for LV-ViT those of its authors), and ToMe prints tokens. Parameters to
0.01 M and ToMe's GMACs were derived by hand from the architectures. Our counts come from shapes; each is compared with
torch's own counter, unmerged and merged.
"""

from typing import Any

import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import atm_triton.models  # noqa: F401 (registers them)
from atm_triton import ATMConfig, apply_patch, summary
from atm_triton.flops import cost, scheduled, unmerged

IMAGE = (3, 224, 224)
MERGED = 4  # r of every block in the static schedule that torch's counter also counts
MAE = {"global_pool": "avg", "num_classes": 1000}
MODELS = {  # the paper's name: our or timm's name, arguments, the paper's GFLOPs, millions of parameters
    "DeiT-T": ("deit_tiny_patch16_224", {}, 1.25, 5.72),
    "DeiT-S": ("deit_small_patch16_224", {}, 4.60, 22.05),
    "DeiT-B": ("deit_base_patch16_224", {}, 17.57, 86.57),
    "MAE ViT-B": ("vit_base_patch16_224.mae", MAE, 17.57, 86.57),
    "T2T-ViT_t-14": ("t2t_vit_t_14", {}, 6.09, 21.54),
    "T2T-ViT_t-19": ("t2t_vit_t_19", {}, 9.79, 39.17),
    "LV-ViT-T": ("lvvit_t", {}, 2.87, 8.53),
    "LV-ViT-S": ("lvvit_s", {}, 6.57, 26.15),
    "LV-ViT-M": ("lvvit_m", {}, 12.74, 55.83),
}
TOME_ON_DEIT_S = {8: 3.416, 11: 2.986, 13: 2.703, 16: 2.291}  # GMACs by r of every block
TOME_ON_VIT_L_384 = {8: 377, 16: 177, 22: 27, 24: 8}  # number of blocks that merge 25: tokens left


def measure() -> dict[str, Any]:
    """All figures, from models with random weights on one image."""
    models = [_model_row(name, *entry) for name, entry in tqdm(MODELS.items(), desc="models", unit="model")]
    tome = [_tome_row(r, published) for r, published in TOME_ON_DEIT_S.items()]
    lengths = [_length_row(blocks, published) for blocks, published in TOME_ON_VIT_L_384.items()]
    return {"models": models, "tome_on_deit_s": tome, "tome_on_vit_l_384": lengths}


def _model_row(name: str, model_name: str, options: dict[str, Any], gflops: float, millions: float) -> dict[str, Any]:
    fused = use_fused_attn()
    set_fused_attn(False)  # torch's counter does not see fused attention
    try:
        model = timm.create_model(model_name, **options).eval()
    finally:
        set_fused_attn(fused)
    whole = cost(model, unmerged(model, IMAGE))
    counted = _counted(model)
    apply_patch(model, ATMConfig(adapt="static", schedule=(MERGED,) * len(model.blocks)))
    merged_counted = _counted(model)
    merged = summary(model).cost
    return {
        "paper": name,
        "model": model_name,
        "arguments": options,
        "parameters": sum(p.numel() for p in model.parameters()),
        "expected_millions": millions,
        "paper_gflops": whole.paper_gflops,
        "published_gflops": gflops,
        "macs": whole.macs,
        "macs_by_torch": counted,
        "merged_macs": merged.macs,
        "merged_macs_by_torch": merged_counted - merged.matching,
    }


def _counted(model: VisionTransformer) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, *IMAGE))
    return counter.get_total_flops() // 2


def _meta(name: str) -> VisionTransformer:
    with torch.device("meta"):
        return timm.create_model(name).eval()


def _tome_row(r: int, published: float) -> dict[str, Any]:
    model = _meta("deit_small_patch16_224")
    record = scheduled(model, IMAGE, (r,) * 12, cls_only_last=False)
    return {"r": r, "gmacs": cost(model, record).macs / 1e9, "expected_gmacs": published}


def _length_row(blocks: int, published: int) -> dict[str, Any]:
    model = _meta("vit_large_patch16_384")
    record = scheduled(model, (3, 384, 384), (25,) * blocks + (0,) * (24 - blocks), cls_only_last=False)
    return {"blocks": blocks, "tokens": record.rows[-1], "published_tokens": published}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        f"| | parameters, M (expected) | GFLOPs (the paper's) | MACs | MACs, r = {MERGED} in every block |",
        "|---|---|---|---|---|",
    ]
    for row in result["models"]:
        lines.append(
            f"| {row['paper']}, `{row['model']}` | {row['parameters'] / 1e6:.2f} ({row['expected_millions']:.2f}) "
            f"| {row['paper_gflops']:.2f} ({row['published_gflops']:.2f}) | {row['macs']:,} | {row['merged_macs']:,} |"
        )
    tome = (f"{row['gmacs']:.3f} ({row['expected_gmacs']:.3f}) at r = {row['r']}" for row in result["tome_on_deit_s"])
    left = (
        f"{row['tokens']} ({row['published_tokens']}) after {row['blocks']} blocks"
        for row in result["tome_on_vit_l_384"]
    )
    lines += [
        "",
        f"{_by_torch(result['models'])} ToMe on DeiT-S has, in GMACs (expected), {', '.join(tome)}. Of the 577 tokens "
        f"of ViT-L/16 at 384 pixels it leaves with r = 25 (as published) {', '.join(left)}.",
    ]
    return "\n".join(lines)


def _by_torch(rows: list[dict[str, Any]]) -> str:
    pairs = [(row["paper"], row[name], row[f"{name}_by_torch"]) for row in rows for name in ("macs", "merged_macs")]
    different = [f"{name}: {ours:,}, by torch {torchs:,}" for name, ours, torchs in pairs if ours != torchs]
    if different:
        return f"Torch's counter differs: {'; '.join(different)}."
    return f"Torch's own counter, less the similarities, finds the same MACs to the integer in all {len(pairs)} cases."
