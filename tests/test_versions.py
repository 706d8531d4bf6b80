"""``--peft`` runs with the releases of mace-torch that it knows; other runs are MACE's own with every release."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from runs import environment, reach_training, write_inputs

from mace_peft import plugin
from mace_peft.models import is_adapted

REPOSITORY = Path(plugin.__file__).resolve().parents[1]
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
    program = """
import sys
from mace.cli import run_train
assert hasattr(run_train.run, "without_peft")
print(*(name for name in sys.modules if name.startswith("mace_peft.")))
"""
    said = subprocess.check_output([sys.executable, "-c", program], env=environment(), text=True).splitlines()[-1]
    loaded = {name.removeprefix("mace_peft.") for name in said.split()}
    assert loaded == {"startup", "plugin", "options", "config", "replaced"}


def test_releases_are_the_same_wherever_they_are_listed():
    nox = re.search(r"RELEASES = \((.*)\)", (REPOSITORY / "noxfile.py").read_text())[1]
    assert tuple(re.findall(r"[\d.]+", nox)) == plugin.SUPPORTED
    assert f"mace-torch>={plugin.SUPPORTED[0]}\n" in (REPOSITORY / "setup.cfg").read_text()
    assert f"mace-torch {plugin.SUPPORTED[0]} to {plugin.SUPPORTED[-1]}" in (REPOSITORY / "README.md").read_text()
