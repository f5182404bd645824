"""Names what pyproject.toml cannot: two folders of the checkout live inside the package once it is installed."""

from setuptools import setup

setup(
    packages=[
        "atm_triton",
        "atm_triton.calibration",
        "atm_triton.cli",
        "atm_triton.measure",
        "atm_triton.models",
        "atm_triton.training",
        "atm_triton.kernels",
        "atm_triton.digits",
    ],
    package_dir={
        "atm_triton": "atm_triton",
        "atm_triton.kernels": "kernels",
        "atm_triton.digits": "benchmarks/digits",
    },
    package_data={
        "atm_triton": ["py.typed", "operating_points.json"],
        "atm_triton.digits": ["*.safetensors", "*.json"],
    },
)
