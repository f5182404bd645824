"""What proves the package: micro-benchmarks, the paper's experiments, the digits model and result files."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
