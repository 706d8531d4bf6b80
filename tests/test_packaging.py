"""What the wheel carries, and what installing and uninstalling it does."""

import csv
import io
import re
import tarfile
import zipfile

import pytest
import yaml
from scratch import REPOSITORY, Scratch, copy_sources

import mace_peft

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
    assert {HOOK, "mace_peft/py.typed", "mace_peft/__init__.pyi"} <= set(recorded)
    assert top_level == {HOOK, "mace_peft", record.split("/")[0]}


def test_the_sdist_makes_the_same_wheel(sources, scratch, tmp_path):
    build = f"import os, setuptools.build_meta as backend; os.chdir({str(sources)!r}); "
    scratch.run("-c", f"{build} backend.build_sdist({str(tmp_path)!r})")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        sdist.extractall(tmp_path, filter="data")
    assert re.sub("-", "_", path.name) == f"mace_peft_{mace_peft.__version__}.tar.gz"  # by release of setuptools
    contents = []
    for number, tree in enumerate((sources, tmp_path / path.name.removesuffix(".tar.gz"))):
        out = tmp_path / str(number)
        scratch.pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree))
        with zipfile.ZipFile(*out.glob("*.whl")) as wheel:
            contents.append(sorted(wheel.namelist()))
    assert contents[0] == contents[1] and HOOK in contents[0]


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


def test_what_is_to_be_cited_is_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == mace_peft.__version__
    assert [reference["notes"] for reference in citation["references"]] == ["--peft mmea", "--peft elora",
                                                                            "every fine-tune"]


def test_the_workflows_run_every_session_of_nox():
    """And CI's command, which is the README's."""
    text = (REPOSITORY / "noxfile.py").read_text()
    releases = re.findall(r'"([\d.]+)"', re.search("RELEASES = (.*)", text)[1])
    sessions = {name: re.search(rf"parametrize.*\ndef {name}\(", text) for name in
                re.findall(r"^def (\w+)\(session", text, re.MULTILINE)}
    expected = {f"{name}({release})" for name, each in sessions.items() if each for release in releases}
    expected |= {name for name, each in sessions.items() if not each}
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/test.yml").read_text())
    matrix = workflow["jobs"]["nox"]["strategy"]["matrix"]
    # the newest release is what a newcomer gets
    assert {*matrix["session"], *(row["session"] for row in matrix["include"])} == expected - {f"tests({releases[-1]})"}
    assert [step["run"] for step in workflow["jobs"]["newcomer"]["steps"] if "run" in step] == ["bash .ci/run"]
    readme = (REPOSITORY / "README.md").read_text()
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] in readme
