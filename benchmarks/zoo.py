"""Which models of timm's VisionTransformer class can be merged: ``python -m benchmarks.zoo`` writes ``docs/models.md``.

Every model is built on the meta device without weights, patched and run. That checks shapes only; the tests check the
values, on a small model of every kind.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from tqdm import tqdm

import atm_triton.models  # noqa: F401 (registers them)
from atm_triton.cli.bad_input import Parser
from atm_triton.config import ATMConfig
from atm_triton.patch import apply_patch, check_model, knows_sizes
from atm_triton.summary import summary

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "lvvit", "t2t_vit")


def names() -> list[str]:
    """The names of all registered models that may be of the class, in alphabetical order."""
    return [name for name in timm.list_models() if is_model_in_modules(name, MODULES)]


def built(name: str) -> VisionTransformer:
    with torch.device("meta"):
        return timm.create_model(name).eval()


def features(model: VisionTransformer) -> str:
    """The features that a plain ViT with a class token does not have."""
    block = model.blocks[0]
    attn, mlp = block.attn, block.mlp
    prefix = model.num_prefix_tokens - model.has_class_token
    kinds = {
        "distilled": getattr(model, "dist_token", None) is not None,
        f"{model.num_reg_tokens} registers": model.num_reg_tokens > 0,
        "no class token": not model.has_class_token,
        "LayerScale": type(block.ls1).__name__ == "LayerScale",
        "scaled branches": type(block.ls1).__name__ == "SkipScale",
        "qk-norm": not isinstance(attn.q_norm, torch.nn.Identity),
        "gated attention": attn.gate is not None,
        f"heads of {attn.head_dim}": attn.attn_dim != model.embed_dim,
        type(mlp).__name__: type(mlp).__name__ != "Mlp",
        "norm before the blocks": not isinstance(model.norm_pre, torch.nn.Identity),
        type(model.patch_embed).__name__: type(model.patch_embed).__name__ != "PatchEmbed",
        "positions of patches alone": model.no_embed_class and prefix + model.has_class_token > 0,
        "no positions": model.pos_embed is None,
        f"{model.global_pool or 'no'} pool": model.global_pool != "token",
        "no log n by default": not knows_sizes(model),
        "auxiliary head": hasattr(model, "aux_head"),
    }
    return ", ".join(name for name, holds in kinds.items() if holds) or "plain"


def classified() -> Iterator[tuple[str, str | None, str]]:
    """Yield (name, reason for a refusal or None, features) for every model of the class."""
    for name in tqdm(names(), unit="model"):
        model = built(name)
        if not isinstance(model, VisionTransformer):
            continue
        try:
            check_model(model)
        except TypeError as refused:
            yield name, str(refused).partition("cannot be merged: ")[2], ""
        else:
            yield name, None, features(model)
            run(model)


def run(model: VisionTransformer) -> None:
    """Run a model with r = 0 and with r = 1 in every block: shapes must fit, and tokens must have merged."""
    for r in (0, 1):
        apply_patch(model, ATMConfig(adapt="static", schedule=(r,) * len(model.blocks)))
        images = torch.zeros(2, *resolve_model_data_config(model)["input_size"], device="meta")
        model(images)
        if summary(model).r[0] != r:
            raise RuntimeError(f"{type(model).__name__} merged {summary(model).r[0]} tokens, not {r}")


def page(rows: list[tuple[str, str | None, str]]) -> str:
    """The page in Markdown: the models that can be merged, by kind, then those that are refused, with the reason."""
    merged, refused = defaultdict(list), defaultdict(list)
    for name, reason, kind in rows:
        (merged[kind] if reason is None else refused[reason]).append(f"`{name}`")
    count = sum(map(len, merged.values()))
    lines = [
        "# Models",
        "",
        f"Of the {len(rows)} models of timm {timm.__version__} and of `atm_triton.models` that are of timm's "
        f"`VisionTransformer` class, {count} can be merged and {len(rows) - count} are refused. Made by "
        "`python -m benchmarks.zoo`.",
        "",
        "| what it has beyond a plain ViT with a class token | names |",
        "|---|---|",
        *(f"| {kind} | {', '.join(names)} |" for kind, names in sorted(merged.items(), key=lambda kv: -len(kv[1]))),
        "",
        "| refused because | names |",
        "|---|---|",
        *(f"| {reason} | {', '.join(names)} |" for reason, names in refused.items()),
        "",
        "Not of this class, and refused by name: Eva (EVA-02, DINOv3, PE: their keys are rotated by position, and a "
        "merged token has no single one), BEiT, NaFlexVit, ViTs with relative positions, CaiT, XCiT, Swin, VOLO, "
        "Hiera and all others.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    Parser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0]).parse_args(argv)
    logging.disable(logging.WARNING)  # timm warns that some names are deprecated
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(list(classified())))
    print(f"{PAGE} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
