"""The command line: ``atm-triton``."""

from atm_triton.cli.commands import main

__all__ = ["main"]
