"""What the wheel carries, and what installing and uninstalling it does."""

import csv
import io
import zipfile

import pytest
from scratch import Scratch, copy_sources

HOOK = "mace_peft.pth"
TRAIN_HELP = ("-c", "from mace.cli.run_train import main; main()", "--help")


@pytest.fixture
def sources(tmp_path):
    return copy_sources(tmp_path / "sources")


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path / "env", see_packages=True)


def test_the_wheel_carries_the_hook_and_records_it(sources, scratch, tmp_path):
    scratch.pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sources))
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read(HOOK).decode() == "import mace_peft.startup\n"
        (record,) = (name for name in wheel.namelist() if name.endswith("RECORD"))
        recorded = [row[0] for row in csv.reader(io.StringIO(wheel.read(record).decode()))]
        top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert HOOK in recorded
    assert top_level == {HOOK, "mace_peft", record.split("/")[0]}


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["regular", "editable"])
def test_an_install_reaches_mace_and_leaves_without_a_trace(sources, scratch, options):
    before = scratch.files()
    assert "--peft" not in scratch.run(*TRAIN_HELP).stdout

    scratch.install(sources, *options)
    assert (scratch.site / HOOK).is_file()
    assert "--peft" in scratch.run(*TRAIN_HELP).stdout
    where = scratch.run("-c", "import mace_peft; print(mace_peft.__file__)").stdout
    assert where.startswith(str(sources if options else scratch.site))

    scratch.pip("uninstall", "-y", "mace-peft")
    assert scratch.files() == before
    done = scratch.run("-c", "pass")
    assert done.stdout + done.stderr == ""
