"""The patches apply to the releases they are for, and their entry point finds the plugin without the start-up hook."""

import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
from runs import Run, arguments, environment, write_inputs
from scratch import REPOSITORY, Scratch, copy_sources

from mace_peft import PeftConfig
from mace_peft.train.plugin import SUPPORTED

VERSION = metadata.version("mace-torch")
PATCH = REPOSITORY / "patches" / f"mace-torch-{VERSION}.diff"


def test_every_supported_release_has_a_patch():
    """Each is applied to its release where that is installed: ``nox`` runs the tests with every one."""
    patches = {path.stem.removeprefix("mace-torch-") for path in PATCH.parent.glob("*.diff")}
    assert patches == set(SUPPORTED)
    assert PATCH.exists()


@pytest.fixture
def run_train(tmp_path):
    """A copy of the installed ``run_train.py``, in an otherwise empty source tree."""
    # Looking for mace.cli.run_train itself would import mace, and torch with it.
    (mace,) = util.find_spec("mace").submodule_search_locations
    copy = tmp_path / "source/mace/cli/run_train.py"
    copy.parent.mkdir(parents=True)
    return Path(shutil.copy(Path(mace, "cli/run_train.py"), copy))


def apply(program, run_train):
    root = run_train.parents[2]
    # git would otherwise take a repository around the temporary directory for the one to patch.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    subprocess.run([*program, "-p1"], cwd=root, env=environment, stdin=PATCH.open(), check=True)


PROGRAMS = [program for program in (("patch", "--fuzz=0"), ("git", "apply")) if shutil.which(program[0])]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_the_patch_applies(program, run_train):
    assert "load_plugins" not in run_train.read_text()
    apply(program, run_train)
    assert "load_plugins" in run_train.read_text()


def test_the_patched_command_finds_the_plugin(run_train, tmp_path):
    apply(PROGRAMS[-1], run_train)
    scratch = Scratch(tmp_path / "env", see_packages=True)
    scratch.install(copy_sources(tmp_path / "sources"))
    (scratch.site / "mace_peft.pth").unlink()
    assert "--peft" in scratch.run(str(run_train), "--help").stdout


def test_the_patched_command_fine_tunes_with_the_hook_off(run_train, tmp_path):
    apply(PROGRAMS[-1], run_train)
    folder = write_inputs(tmp_path / "run")
    argv = arguments(folder, peft="mmea", peft_rank=2, peft_targets="products", max_num_epochs=1)
    done = subprocess.run([sys.executable, "-S", run_train, *argv], cwd=folder, capture_output=True, text=True,
                          env=environment(PYTHONPATH=os.pathsep.join(sys.path)), timeout=600)
    assert done.returncode == 0, done.stderr
    config = PeftConfig("mmea", rank=2, targets="products")
    assert Run(folder).adapter_tensors() and Run(folder).model().peft_config == config
