"""``python -m atm_triton`` is ``atm-triton``."""

import sys

from atm_triton.cli import main

sys.exit(main())
