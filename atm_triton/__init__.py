"""Adaptive token merging for Vision Transformers."""

from pathlib import Path

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # a checkout: what a wheel holds in here lies beside us there
    __path__ += [str(_here.parent), str(_here.parent / "benchmarks")]

from atm_triton.block import ATMBlock  # noqa: E402
from atm_triton.calibration.calibrate import Calibration, Target, calibrate  # noqa: E402
from atm_triton.config import ATMConfig  # noqa: E402
from atm_triton.patch import apply_patch, remove_patch  # noqa: E402
from atm_triton.summary import summary  # noqa: E402

__all__ = [
    "ATMBlock",
    "ATMConfig",
    "Calibration",
    "Target",
    "apply_patch",
    "calibrate",
    "remove_patch",
    "summary",
]
__version__ = "0.1.0"
