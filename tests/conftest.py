"""What every process that runs tests does first, and what tests share.

``@pytest.mark.since("0.3.15")``: what a test needs came with that release of mace-torch, see ``noxfile.py``.
``pytest --plain``: the tested code is MACE's and this package's own in every place, see ``remembered.py``.
"""

import gc
import os
import resource
import types
import unittest.mock

import pytest
import torch
from forks import PLAIN
from mace.cli import run_train
from mace.tools import cg
from releases import since
from remembered import remember_models
from remembered_graphs import remember_graphs

# The C library gives memory back to the system after each tensor, which then clears it anew. It reads this when a
# process starts, as those that run tests do after this.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
# start first: or one of them goes on alone when all others have ended
LONG = ("test_contract", "test_cueq", "test_families", "test_train")


def pytest_addoption(parser):
    parser.addoption("--plain", action="store_true", help="nothing is remembered or replaced to save time: slow")


def pytest_configure(config):
    os.environ.update(KEEP_MEMORY)
    config.addinivalue_line("markers", "since(release): deselected before that release of mace-torch")
    if config.getoption("plain"):
        os.environ[PLAIN] = "1"
        return
    remember_models()
    remember_graphs()
    gc.freeze()  # what has been imported is no garbage, and models are many objects: less often is it searched for
    gc.set_threshold(100_000)
    keep_coefficients_exact()


def keep_coefficients_exact():
    """MACE rounds the coefficients of its contractions to the default dtype, and cuEquivariance remembers them: without
    this, a float32 model would leave its rounding to the float64 ones that are built after it in the process."""
    if not cg.CUET_AVAILABLE:
        return
    as_mace_does = cg.O3_e3nn.clebsch_gordan

    def clebsch_gordan(*irreps):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return as_mace_does(*irreps)
        finally:
            torch.set_default_dtype(before)

    cg.O3_e3nn.clebsch_gordan = staticmethod(clebsch_gordan)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONG)
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


@pytest.fixture
def small_files():
    """The file systems take no file of more than 1000 bytes meanwhile, as if full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def uncompiled():
    """Runs in this module leave no compiled file, which takes most of their time: of it, others tell."""
    def give_up(model):
        raise RuntimeError("left out in this test")

    with unittest.mock.patch.object(run_train, "jit", types.SimpleNamespace(compile=give_up)):
        yield
