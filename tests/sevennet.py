"""``nox -s sevenn``: SevenNet as a backbone, in an environment with sevenn and without mace-torch.

Plain ``pytest`` leaves this file out by its name; ``pytest --noconftest tests/sevennet.py`` runs it. Models are tiny
and made from code, but for one test with SevenNet-0, which comes with sevenn.
"""

import argparse
import copy
import importlib
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import sevenn
import torch
import yaml
from ase.build import bulk, molecule
from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
from sevenn.calculator import SevenNetCalculator
from sevenn.logger import Logger
from sevenn.main import sevenn as command
from sevenn.model_build import build_E3_equivariant_model
from sevenn.scripts import train as training
from sevenn.train.dataload import unlabeled_atoms_to_graph
from sevenn.util import chemical_species_preprocess, load_checkpoint

import mace_peft
from mace_peft import (
    PeftConfig,
    PeftError,
    backbones,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from mace_peft.inspect.info import info
from mace_peft.model.adapted import fingerprint
from mace_peft.sevennet import load_foundation, save_checkpoint, save_torchscript

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "cutoff": 4.0, "channel": 8, "lmax": 2, "num_convolution_layer": 2, "weight_nn_hidden_neurons": [8],
    "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 4}, "is_parity": True,
    "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 6}, "conv_denominator": 3.0,
    "shift": [-1.0, -2.0, -3.0], "scale": [0.8, 0.9, 1.1], "_normalize_sph": True,
}
ELEMENTS = (6, 1, 8)  # in the order of sevenn, that of their symbols
TRAINED = ["elora", "scales", "elora+scales"]
CASES = [("elora", "linears"), ("elora", "published"), ("elora+scales", "linears"), ("scales", "all"),
         ("mmea", "published"), ("gates", "all"), ("elora", "*_self_interaction_?, 1_convolution")]


def settings(method, targets=None):
    return PeftConfig(method, targets=targets, **({} if method == "scales" else {"rank": 2}))


@pytest.fixture(scope="module", params=["nequip", "linear"])
def foundation(request, tmp_path_factory):
    """The path of a checkpoint for H, C and O; its self-connection is a tensor product with elements, or linear."""
    path = tmp_path_factory.mktemp("foundation") / f"{request.param}.pth"
    config = copy.deepcopy(DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG) | copy.deepcopy(SETTINGS)
    config |= {"self_connection_type": request.param, "version": sevenn.__version__,
               **chemical_species_preprocess(["C", "H", "O"])}
    torch.manual_seed(0)
    model = build_E3_equivariant_model(copy.deepcopy(config))
    torch.save({"config": config, "model_state_dict": model.state_dict(), "optimizer_state_dict": {},
                "scheduler_state_dict": {}, "epoch": 3, "time": "then", "hash": "0"}, path)
    return str(path)


def structure(seed=1):
    atoms = molecule("CH3OH")
    atoms.rattle(0.1, seed=seed)
    return atoms


def predict(model, atoms=None):
    """Energy (eV), forces (eV/A) of a model in memory, or of a checkpoint."""
    kind = {} if isinstance(model, str) else {"file_type": "model_instance"}
    atoms = structure() if atoms is None else atoms.copy()
    atoms.calc = SevenNetCalculator(model, device="cpu", **kind)
    return atoms.get_potential_energy(), atoms.get_forces()


def same(actual, expected, tolerance=2e-5):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def differs(one, other):
    return abs(one[1] - other[1]).max() > 1e-3


def trained(model, scale=0.1):
    """The model with other weights in its adapters. They change the predictions, which says that they act."""
    before, generator = predict(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    assert differs(predict(model), before)
    return model


def has_gates(method):
    return method in ("mmea", "gates")


def test_mace_is_not_here():
    """Or these tests would not show that the package does without."""
    assert "mace" not in sys.modules
    with pytest.raises(PeftError, match="calculator is for MACE models and needs mace-torch, which is not installed"):
        _ = mace_peft.calculator
    with pytest.raises(PeftError, match="a.model cannot be loaded, for a model of the kind mace needs the package"):
        backbones.load_foundation("a.model", "mace")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_inject_train_save_load_merge_and_switch_off(foundation, case, tmp_path):
    method, targets = case
    model = load_foundation(foundation)
    plain, keys = predict(model), model.state_dict().keys()
    inject(model, settings(method, targets))
    assert backbones.backbone_of(model).name == "sevennet"
    same(predict(model), plain, 1e-6)
    learnt = predict(trained(model))

    rotated = structure()
    rotated.rotate(70, (1, 2, 3))
    turn = np.linalg.lstsq(structure().positions, rotated.positions, rcond=None)[0]
    same(predict(model, rotated), (learnt[0], learnt[1] @ turn))
    with disable_adapter(model):
        same(predict(model), plain, 1e-6)
    adapter = save_adapter(model, tmp_path / "adapter")
    for start in (foundation, load_foundation(foundation), copy.deepcopy(load_foundation(foundation))):
        same(predict(load_adapter(start, adapter)), learnt, 1e-6)
    assert f"method       {method}" in info(adapter)
    card = (Path(adapter) / "README.md").read_text()
    assert "A fine-tuned SevenNet model" in card and "SevenNetCalculator(model" in card

    if has_gates(method):
        with pytest.raises(PeftError, match="cannot be merged"):
            merge(copy.deepcopy(model))
    else:
        same(predict(merge(copy.deepcopy(model))), learnt)
    same(predict(eject(model)), plain, 1e-6)
    assert model.state_dict().keys() == keys and type(model).__name__ == "AtomGraphSequential"


def test_gates_of_messages_are_those_of_the_layer_that_takes_them(foundation):
    model = inject(load_foundation(foundation), settings("gates", "*_convolution.convolution"))
    assert {name.partition(".adapter.")[0] for name, parameter in model.named_parameters() if parameter.requires_grad} \
        == {"0_self_interaction_2.linear", "1_self_interaction_2.linear"}
    trained(model)


def test_reference_energies_shift(foundation, tmp_path):
    """``scales`` and ``train_also`` shift them beside the base, which keeps its own."""
    model = inject(load_foundation(foundation), PeftConfig("elora", rank=2, train_also="rescale_atomic_energy.shift"))
    before = predict(model)
    with torch.no_grad():
        model.rescale_atomic_energy.adapter.s["shift"] += torch.tensor([0.0, 0.25, 0.5])
    learnt = (before[0] + 4 * 0.25 + 0.5, before[1])
    same(predict(model), learnt)
    assert model.rescale_atomic_energy.shift.tolist() == [-1.0, -2.0, -3.0]
    save_checkpoint(model, foundation, tmp_path / "merged.pth")
    same(predict(str(tmp_path / "merged.pth")), learnt)
    written = load_checkpoint(tmp_path / "merged.pth").config["shift"]
    assert [written[number] for number in ELEMENTS] == [-1.0, -1.75, -2.5]
    assert "shift" in inject(load_foundation(foundation), settings("scales")).rescale_atomic_energy.adapter.s


def test_a_calculator_and_a_copy_leave_the_fingerprint(foundation):
    """They change what the model holds, but not what it predicts."""
    model = load_foundation(foundation)
    before = fingerprint(model)
    predict(model)
    copied = copy.deepcopy(model)
    assert fingerprint(model) == before == fingerprint(copied)
    copied.rescale_atomic_energy.shift.data[0] += 1
    assert fingerprint(copied) != before


@pytest.mark.parametrize("method", TRAINED)
def test_a_checkpoint_is_what_sevenn_reads(foundation, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(inject(load_foundation(foundation), settings(method)))
    learnt = predict(model)
    save_checkpoint(model, foundation, "adapted.pth")
    same(predict("adapted.pth"), learnt)
    same(predict(model), learnt, 0)
    save_checkpoint(merge(model), foundation, "merged.pth")
    same(predict("merged.pth"), learnt)
    for options in (["-o", "serial"], ["-o", "parallel", "-p"]):
        monkeypatch.setattr(sys, "argv", ["sevenn", "get_model", "merged.pth", *options])
        command.main()
    same([run_torchscript("serial.pt")], [learnt[0]])
    assert [path.name for path in sorted(Path("parallel").iterdir())] == [f"deployed_parallel_{i}.pt" for i in (0, 1)]


def run_torchscript(path):
    """Energy (eV), of the data that LAMMPS gives."""
    graph, atoms = unlabeled_atoms_to_graph(structure(), SETTINGS["cutoff"]), structure()
    module = torch.jit.load(path)
    elements = [ELEMENTS.index(number) for number in atoms.numbers]
    data = {"x": torch.tensor(elements), "edge_index": torch.as_tensor(graph["edge_index"]),
            "edge_vec": torch.as_tensor(graph["edge_vec"], dtype=torch.float32).requires_grad_(True),
            "num_atoms": torch.tensor(len(atoms)), "nlocal": torch.tensor(len(atoms))}
    return module(data)["inferred_total_energy"].item()


@pytest.mark.parametrize("method", ["elora", "mmea", "gates"])
def test_torchscript_for_lammps(foundation, method, tmp_path):
    model = trained(inject(load_foundation(foundation), settings(method)))
    learnt = predict(model)
    save_torchscript(model, foundation, tmp_path / "trained.pt")
    same([run_torchscript(str(tmp_path / "trained.pt"))], [learnt[0]])
    same(predict(model), learnt, 0)


def test_what_cannot_be_is_refused(foundation, tmp_path):
    model = load_foundation(foundation)
    with pytest.raises(PeftError, match="'products' matches no module.*use linears, published, all, or glob patterns "
                                        r"over module names such as '\*_self_interaction_2.\*'"):
        inject(model, PeftConfig("elora", targets="products"))
    with pytest.raises(PeftError, match="nowhere.pth cannot be loaded .*give a checkpoint of sevenn, or a name"):
        load_foundation("nowhere.pth")
    with pytest.raises(PeftError, match="gates of mmea depend on .*use elora, scales or elora.scales, or save_torchs"):
        save_checkpoint(inject(load_foundation(foundation), settings("mmea")), foundation, tmp_path / "a.pth")
    model.reduce_hidden_to_energy.linear.weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(PeftError, match="reduce_hidden_to_energy.linear.weight of the model is not as in .*give the"):
        save_checkpoint(model, foundation, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
    adapter = save_adapter(inject(load_foundation(foundation), settings("elora")), tmp_path / "adapter")
    other = load_foundation(foundation)
    other.cutoff = 5.0
    with pytest.raises(PeftError, match="whose weights differ from the one given, or what else its predictions"):
        load_adapter(other, adapter)


def test_sevennet_0(tmp_path):
    """A checkpoint of an old version: sevenn converts its weights when it reads them, and must not do so twice."""
    assert load_checkpoint("7net-0").config["version"] != sevenn.__version__
    crystal = bulk("NaCl", "rocksalt", 5.6)
    crystal.rattle(0.1, seed=1)
    for atoms in (molecule("CH3OH"), crystal):
        model = load_foundation("7net-0")
        plain = predict(model, atoms)
        inject(model, PeftConfig("elora", rank=2, targets="published"))
        same(predict(model, atoms), plain, 1e-6)
        learnt = predict(trained(model, scale=0.02), atoms)
        assert differs(learnt, plain)
        adapter = save_adapter(model, tmp_path / "adapter")
        same(predict(load_adapter("7net-0", adapter), atoms), learnt, 1e-6)
        save_checkpoint(merge(model), "7net-0", tmp_path / "merged.pth")
        same(predict(str(tmp_path / "merged.pth"), atoms), learnt, 1e-4)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, names = (ROOT / "docs/sevennet.md").read_text(), {}
    for language, text in re.findall(r"^```(python|sh)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(text, names)
        for line in text.splitlines() if language == "sh" else ():
            if line.startswith("sevenn "):
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
                command.main()
    assert {"mine.pth", "mine_adapter", "gates.pt", "deployed_serial.pt", "deployed_parallel"} <= set(os.listdir())


# --- recipes/sevennet -------------------------------------------------------------------------------------------------


def run_recipe(folder, foundation, monkeypatch, *options, **start):
    """The script, with labels of another model and the settings of the tiny one. Returns the structures."""
    data = []
    for seed in range(4):
        atoms = structure(seed)
        energy, forces = predict(trained(inject(load_foundation(foundation), settings("elora"))), atoms)
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = energy - 100.0, forces
        data.append(atoms)
    ase.io.write(folder / "data.xyz", data)
    given = yaml.safe_load((ROOT / "recipes/sevennet/input.yaml").read_text())
    given["model"] = {key: value for key, value in SETTINGS.items() if key not in ("shift", "scale", "_normalize_sph")}
    given["model"] |= {"chemical_species": "auto", "self_connection_type": Path(foundation).stem}
    given["train"] |= {"epoch": 3, "device": "cpu"}
    given["train"]["continue"] |= {"checkpoint": foundation} | start
    given["data"] |= {"batch_size": 2, "load_trainset_path": ["data.xyz"], "load_validset_path": ["data.xyz"]}
    (folder / "input.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", "input.yaml", *options])
    monkeypatch.setattr(training, "Trainer", training.Trainer)  # put back afterwards
    runpy.run_path(str(ROOT / "recipes/sevennet/train.py"), run_name="__main__")
    return data


def test_the_recipe_trains_adapters_alone(foundation, tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(Logger, "writeline", lambda logger, text: log.append(text))
    data = run_recipe(tmp_path, foundation, monkeypatch, "--peft", "elora", "--peft_rank", "2")
    names, *rows = [line.split(",") for line in Path("lc.csv").read_text().splitlines()]
    of_foundation = np.mean([abs(predict(foundation, atoms)[1] - atoms.arrays["REF_forces"]) for atoms in data])
    assert f"The foundation's error of the forces on these data: {of_foundation:.6f} eV/A" in log
    assert min(float(row[names.index("validset_Force_MAE")]) for row in rows) < of_foundation
    assert float(rows[0][names.index("trainset_Energy_MAE")]) < 1  # of labels that are 100 eV away
    same(predict(load_adapter(foundation, "checkpoint_best_adapter")), predict("checkpoint_best.pth"), 1e-4)
    same(predict("checkpoint_0.pth"), predict(foundation), 1e-6)


@pytest.mark.parametrize("options, start, words", [
    (["--peft", "mmea"], {}, "the gates of mmea depend on each atom's surroundings.*use elora"),
    (["--peft_targets", "products"], {}, "--peft_targets 'products' matches no module"),
    (["--peft", "nothing"], {}, "--peft 'nothing' is unknown"),
    (["--peft", "elora"], {"reset_optimizer": False}, ".*set reset_optimizer and reset_scheduler to True under cont"),
], ids=["gates", "products", "method", "optimizer"])
def test_the_recipe_refuses_before_it_trains(foundation, tmp_path, monkeypatch, options, start, words):
    with pytest.raises(SystemExit, match=f"train.py: error: {words}"):
        run_recipe(tmp_path, foundation, monkeypatch, "--peft_rank", "2", *options, **start)
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("foundation", ["linear"], indirect=True)
@pytest.mark.parametrize("row", ["full", "best", "best, keep 0.05"])
def test_a_cell_of_the_study_runs(foundation, tmp_path, monkeypatch, row):
    """Home is where the labels are 2 eV away, and abroad the foundation's own predictions are the labels."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    real = importlib.import_module("real")
    for name, shift in (("train", 2.0), ("test", 2.0), ("abroad", 0.0)):
        made = [structure(seed) for seed in range(3)]
        for atoms in made:
            energy, forces = predict(foundation, atoms)
            atoms.info["REF_energy"], atoms.arrays["REF_forces"] = energy + shift, forces + shift / 20
        folder = tmp_path / "rmd17" / "ethanol"
        folder.mkdir(parents=True, exist_ok=True)
        ase.io.write(folder / f"{name}.xyz", made)
    monkeypatch.setattr(real, "FOUNDATION", foundation)
    monkeypatch.setattr(real, "CUTOFF", SETTINGS["cutoff"])
    monkeypatch.setitem(real.EPOCHS, "ethanol", 1)
    args = argparse.Namespace(data=tmp_path, trained_on=folder / "abroad.xyz", tungsten=None)
    found = real.run({"kind": "real", "data": "ethanol", "row": row, "lr": 0.01, "clip": 10, "seed": 1}, args)
    assert found["before"] == pytest.approx(0.1, rel=1e-3) and found["abroad_base"] < 1e-5
    assert found["mae_e"] < 1 and found["moved"] == pytest.approx(found["abroad"], rel=1e-2) and found["moved"] > 0
    assert found["trained"] > 0
