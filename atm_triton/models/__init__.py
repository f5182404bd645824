"""The backbones of the paper that timm lacks, registered with timm when this package is imported.

``timm.create_model("lvvit_s")`` makes LV-ViT (T, S, M), ``timm.create_model("t2t_vit_t_14")`` makes T2T-ViT (14, 19)
with a Transformer or a Performer in its stem. :func:`load_checkpoint` reads the checkpoints that their authors
published.
"""

from atm_triton.models.checkpoint import load_checkpoint
from atm_triton.models.lvvit import LVViT
from atm_triton.models.t2t_vit import T2TViT

__all__ = ["LVViT", "T2TViT", "load_checkpoint"]
