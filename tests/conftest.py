"""``@pytest.mark.since("0.3.15")``: what a test needs came with that release of mace-torch, see ``noxfile.py``."""

import pytest
import torch
from forks import remember_sources
from releases import since


def pytest_configure(config):
    remember_sources()
    config.addinivalue_line("markers", "since(release): deselected before that release of mace-torch")


def pytest_collection_modifyitems(config, items):
    early = [item for item in items if not all(since(mark.args[0]) for mark in item.iter_markers("since"))]
    if early:
        config.hook.pytest_deselected(items=early)
        items[:] = [item for item in items if item not in early]


@pytest.fixture(autouse=True)
def default_dtype():
    """A run that fails leaves torch's default dtype as it set it: not to the next test."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def double_precision():
    """As in a run: MACE's loss and metrics, and its conversions to cuEquivariance, have the default dtype."""
    torch.set_default_dtype(torch.float64)
