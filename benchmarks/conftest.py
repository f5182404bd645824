"""Adds versions and machine to what pytest-benchmark writes."""

from atm_triton.measure.provenance import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["environment"] = environment()
