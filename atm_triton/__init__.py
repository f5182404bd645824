"""Adaptive token merging for Vision Transformers."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

_here = Path(__file__).parent


class _Checkout:
    """Finds two folders that a checkout has beside this package and a wheel has inside it. Finds nothing else."""

    folders = {  # noqa: RUF012
        "atm_triton.kernels": _here.parent / "kernels",
        "atm_triton.digits": _here.parent / "benchmarks" / "digits",
    }

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> ModuleSpec | None:
        folder = cls.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if not (_here / "kernels").is_dir():
    sys.meta_path.insert(0, _Checkout)  # ahead of the finder of another checkout, if one is installed

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
