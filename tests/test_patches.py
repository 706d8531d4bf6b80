"""The patches apply to the releases they are for, and their entry point finds the plugin without the start-up hook."""

import os
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path

import pytest
from scratch import REPOSITORY, Scratch, copy_sources

VERSION = metadata.version("mace-torch")
PATCH = REPOSITORY / "patches" / f"mace-torch-{VERSION}.diff"

pytestmark = pytest.mark.skipif(not PATCH.exists(), reason=f"no patch for mace-torch {VERSION}")


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


@pytest.mark.parametrize("program", [("patch", "--fuzz=0"), ("git", "apply")], ids=lambda program: program[0])
def test_the_patch_applies(program, run_train):
    if shutil.which(program[0]) is None:
        pytest.skip(f"no {program[0]} here")
    assert "load_plugins" not in run_train.read_text()
    apply(program, run_train)
    assert "load_plugins" in run_train.read_text()


def test_the_patched_command_finds_the_plugin(run_train, tmp_path):
    apply(("git", "apply"), run_train)
    scratch = Scratch(tmp_path / "env", see_packages=True)
    scratch.install(copy_sources(tmp_path / "sources"))
    (scratch.site / "mace_peft.pth").unlink()
    assert "--peft" in scratch.run(str(run_train), "--help").stdout
