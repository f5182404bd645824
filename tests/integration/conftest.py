"""Tests with libraries that ``make test`` does not install; ``make test-integration`` runs them and skips none."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("works_with") is None:
            raise pytest.UsageError(f"{item.nodeid} has no mark works_with(library, what), so no table would show it")
