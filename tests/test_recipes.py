"""Every recipe runs, for an epoch on a small foundation; the data sets are fetched, checked and split."""

import importlib
import re
import subprocess
from argparse import Namespace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from forks import Forked
from runs import finish, write_inputs
from tiny import configurations, tiny_mace

from mace_peft.train.options import read_settings

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
YAMLS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "sevennet")  # which is for sevenn


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files for what a recipe leaves to its user: crystals with stresses, so that they do for every recipe."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), foundation=tiny_mace(channels=16))
    for part in ("train", "valid", "test"):
        structures = configurations(12, seed=len(part))
        for atoms in structures:
            atoms.set_cell([9.0, 9.0, 9.0])
            atoms.pbc = True
            atoms.info["REF_stress"] = np.full(9, 1e-3)
        ase.io.write(folder / f"{part}.xyz", structures)
    return folder


@pytest.mark.since("0.3.16")  # as the recipes' E0s and stage two
@pytest.mark.parametrize("recipe", YAMLS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_the_recipe_runs(recipe, inputs, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    replaced = {
        "work_dir": tmp_path, "device": "cpu", "max_num_epochs": 1, "valid_batch_size": 5, "batch_size": 5,
        **{key: inputs / "foundation.model" for key in ("foundation_model",) if key in settings},
        **{key: inputs / f"{key.split('_')[-2]}.xyz" for key in ("train_file", "valid_file", "test_file")
           if key in settings},
        **({"pt_train_file": inputs / "valid.xyz"} if "pt_train_file" in settings else {}),
        **({"peft_rank": 2} if "peft" in settings else {"E0s": "average", "num_channels": 4}),
    }
    run = finish(tmp_path, Forked(tmp_path, [f"--config={recipe}", *(f"--{k}={v}" for k, v in replaced.items())]))
    assert run.returncode == 0, run.stderr[-2000:]
    name = settings["name"]
    assert (tmp_path / f"{name}.model").exists()
    assert ("peft" in settings) == (tmp_path / f"{name}_adapter").exists()


@pytest.mark.parametrize("recipe", [path for path in YAMLS if path.parent == RECIPES], ids=lambda path: path.stem)
def test_the_readme_names_the_recipe_and_its_data(recipe):
    readme = (RECIPES / "README.md").read_text()
    assert f"[{recipe.name}]({recipe.name})" in readme


def test_each_method_that_the_readme_names_goes_with_the_recipe_for_ones_own_data():
    rows = re.findall(r"`(--lr [^`]* --peft [^`]*)`", (RECIPES.parent / "README.md").read_text())
    recipe = {name: value for name, value in yaml.safe_load((RECIPES / "own_data.yaml").read_text()).items()
              if name.startswith("peft")}
    assert len(rows) >= 4 and recipe
    for row in rows:
        options = dict(re.findall(r"--(peft\w*) (\S+)", row))
        assert read_settings(Namespace(**recipe | options)) == read_settings(Namespace(**options)), row


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.reload(importlib.import_module("data"))


@pytest.fixture
def repository(tmp_path):
    """A set as the public repositories have them: ASE reads its labels as a calculator's results."""
    folder = tmp_path / "repository" / "dataset_acac"
    folder.mkdir(parents=True)
    for name, count in {"train_300K": 500, "test_MD_300K": 3, "test_MD_600K": 4}.items():
        (atoms,) = configurations(1)
        atoms.arrays["forces"] = atoms.arrays.pop("REF_forces")
        structures = [atoms.copy() for _ in range(count)]
        for number, atoms in enumerate(structures):
            atoms.info = {"number": number, "energy": -float(number)}
        ase.io.write(folder / f"{name}.xyz", structures)
    return folder.parent


def split(data, monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr("sys.argv", ["data.py", "acac", f"--to={tmp_path}/data", *map(str, arguments)])
    data.main()
    return tmp_path / "data" / "acac"


def test_a_set_is_fetched_at_its_commit_and_split(data, repository, tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("config", "uploadpack.allowFilter", "true")
    git("add", ".")
    git("commit", "-qm", "data")
    commit = git("rev-parse", "HEAD")
    git("rm", "-qr", "dataset_acac")
    git("commit", "-qm", "gone since")
    monkeypatch.setattr(data, "SOURCES", {"acac": (f"file://{repository}", commit, "dataset_acac")})
    monkeypatch.setattr(data, "checksums", dict)
    folder = split(data, monkeypatch, tmp_path)
    parts = {path.stem: ase.io.read(path, ":") for path in folder.glob("*.xyz")}
    counts = {name: len(part) for name, part in parts.items()}
    assert counts == {"train": 450, "valid": 50, "test_300K": 3, "test_600K": 4}
    assert sorted(atoms.info["number"] for name in ("train", "valid") for atoms in parts[name]) == list(range(500))
    everything = [atoms for part in parts.values() for atoms in part]
    assert all(atoms.info["REF_energy"] == -atoms.info["number"] and atoms.arrays["REF_forces"].shape == (6, 3)
               for atoms in everything)


def test_a_local_copy_is_checked(data, repository, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy" / "acac"
    copy.parent.mkdir()
    (repository / "dataset_acac").rename(copy)
    with pytest.raises(SystemExit, match="train_300K.xyz is not the published"):
        split(data, monkeypatch, tmp_path, f"--from={copy.parent}")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(data, "checksums", dict)
    split(data, monkeypatch, tmp_path, f"--from={copy.parent}")
    assert "acac/train_300K.xyz: no checksum is known, not checked" in capsys.readouterr().out


def test_what_cannot_be_fetched_is_said(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="test_MD_300K|train_300K.xyz is missing: it is a part of acac"):
        split(data, monkeypatch, tmp_path, f"--from={tmp_path}")
    monkeypatch.setattr(data, "SOURCES", {"acac": (f"file://{tmp_path}/nowhere", "0" * 40, "dataset_acac")})
    with pytest.raises(SystemExit, match="cannot be fetched .* --from FOLDER"):
        split(data, monkeypatch, tmp_path)
