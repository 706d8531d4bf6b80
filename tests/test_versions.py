"""``--peft`` runs with the releases of mace-torch that it knows; other runs are MACE's own with every release."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
from runs import environment, reach_training, write_inputs
from scratch import REPOSITORY

from mace_peft.model.adapted import is_adapted
from mace_peft.train import plugin

INSTALLED = metadata.version("mace-torch")


@pytest.fixture
def another_release(monkeypatch):
    monkeypatch.setattr(plugin, "SUPPORTED", ("0.3.98", "0.3.99"))


def test_the_installed_release_is_supported():
    assert INSTALLED in plugin.SUPPORTED


def test_another_release_stops_and_names_those_that_are_supported(another_release, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        reach_training(write_inputs(tmp_path), peft="mmea", peft_rank=2)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mace_run_train: error: ")]
    assert f"mace-torch {INSTALLED} is not supported" in line and "0.3.98, 0.3.99" in line and "pip install" in line


def test_another_release_runs_without_peft(another_release, tmp_path):
    assert not is_adapted(reach_training(write_inputs(tmp_path))["model"])


def test_a_run_without_peft_imports_nothing_that_depends_on_the_release():
    """Neither what knows MACE, nor names of e3nn that are not public: these are gone here."""
    program = """
import sys
import e3nn.o3._tensor_product._codegen as private
vars(private).clear()
from mace.cli import run_train
assert hasattr(run_train.run, "without_peft")
print(*(name for name in sys.modules if name.startswith("mace_peft.")))
"""
    variables = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # e3nn is imported before mace
    said = subprocess.check_output([sys.executable, "-c", program], env=environment(**variables), text=True)
    loaded = {name.removeprefix("mace_peft.") for name in said.splitlines()[-1].split()}
    assert {name for name in loaded if name.startswith("train.")} == {
        "train.plugin", "train.options", "train.run_files", "train.auto_candidates", "train.sole_run",
        "train.learning_rates"}
    assert {name.split(".")[0] for name in loaded} == {"startup", "train", "config", "methods", "errors", "patching",
                                                       "restore", "e3nn", "files", "quiet"}


def test_releases_are_the_same_wherever_they_are_listed():
    nox = re.search(r"RELEASES = \((.*)\)", (REPOSITORY / "noxfile.py").read_text())[1]
    assert tuple(re.findall(r"[\d.]+", nox)) == plugin.SUPPORTED
    assert f"mace-torch>={plugin.SUPPORTED[0]}\n" in (REPOSITORY / "setup.cfg").read_text()
    assert f"mace-torch {plugin.SUPPORTED[0]} to {plugin.SUPPORTED[-1]}" in (REPOSITORY / "README.md").read_text()
