"""A label that is missing has no weight and is not counted: in any format, under any key, with any loss.

Labels are the foundation's own, so that every loss is 0 if, and only if, what is missing is left out.
"""

import functools
import itertools
import logging

import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from combined import train_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mace import data, modules
from mace.data import AtomicData, KeySpecification
from mace.tools import AtomicNumberTable
from mace.tools.fairchem_dataset.lmdb_dataset_tools import LMDBDatabase
from mace.tools.torch_geometric.dataloader import DataLoader
from runs import train_here, write_inputs
from tiny import ELEMENTS, batch, configurations, tiny_mace

from mace_peft import PeftError, labels
from mace_peft.train import losses, metrics
from mace_peft.train.data import datasets

pytestmark = pytest.mark.usefixtures("double_precision")

COUNT, CUTOFF, TABLE = 4, 4.0, AtomicNumberTable(ELEMENTS)
LOSSES = {
    "weighted": modules.WeightedEnergyForcesLoss, "forces_only": modules.WeightedForcesLoss,
    "virials": modules.WeightedEnergyForcesVirialsLoss, "stress": modules.WeightedEnergyForcesStressLoss,
    "huber": losses.WeightedHuberEnergyForcesStressLoss, "universal": losses.UniversalLoss,
    "l1l2energyforces": losses.WeightedEnergyForcesL1L2Loss,
    "energy_forces_dipole": losses.WeightedEnergyForcesDipoleLoss,
}
OF_STRUCTURES = ("energy", "stress", "virials", "dipole")
LABELLED = (*OF_STRUCTURES, "forces")
KEYS = {  # a key for each label: MACE's, and those that ASE takes over
    "default": dict(labels.DEFAULT_KEYS), "ase": {**labels.DEFAULT_KEYS, "energy": "energy", "forces": "forces",
                                                 "stress": "stress"}}
missing_ones = st.fixed_dictionaries({name: st.sets(st.integers(0, COUNT - 1), max_size=COUNT - 1)
                                      for name in LABELLED})


@functools.cache
def known() -> tuple[list, dict]:
    """Periodic structures, and by label what the foundation says of each."""
    structures = configurations(COUNT, periodic=True)
    for atoms in structures:
        atoms.info, atoms.arrays = {}, {name: atoms.arrays[name] for name in ("numbers", "positions")}
    output = tiny_mace()(batch(tiny_mace(), structures), training=False, compute_force=True, compute_virials=True,
                         compute_stress=True)
    said = {name: output[name].detach().numpy() for name in ("energy", "forces", "stress", "virials")}
    said["forces"] = said["forces"].reshape(COUNT, -1, 3)
    said["dipole"] = np.random.default_rng(0).normal(size=(COUNT, 3))
    return structures, said


def predicted() -> dict[str, torch.Tensor]:
    said = known()[1]
    return {name: torch.tensor(said[name].reshape(-1, 3) if name == "forces" else said[name]).requires_grad_()
            for name in LABELLED}


def specification(keys: dict) -> KeySpecification:
    arrays = {"forces": keys["forces"], "charges": keys["charges"]}
    return KeySpecification({name: keys[name] for name in (*OF_STRUCTURES, "head")}, arrays)


def labelled(missing: dict, keys: dict, nan: bool = False) -> list:
    """The structures with all labels but those; nan: these are NaN throughout."""
    structures = [atoms.copy() for atoms in known()[0]]
    for (number, atoms), (name, values) in itertools.product(enumerate(structures), known()[1].items()):
        value = np.copy(values[number])
        if number in missing[name]:
            if not nan:
                continue
            value = np.full_like(value, np.nan)
        (atoms.arrays if name == "forces" else atoms.info)[keys[name]] = value
    return structures


def whole() -> list:
    """Configurations that have all labels."""
    keys = KEYS["default"]
    return data.config_from_atoms_list(labelled(dict.fromkeys(LABELLED, ()), keys), specification(keys))


def write_text(path, structures, keys: dict) -> None:
    """As extended XYZ of many digits, with the names as they are: ASE itself would rename some."""
    with open(path, "w") as file:
        for atoms in structures:
            forces = atoms.arrays.get(keys["forces"])
            info = " ".join(f'{key}="{" ".join(f"{x:.17g}" for x in np.ravel(value))}"' for key, value in
                            atoms.info.items())
            lattice = " ".join(map(str, atoms.cell.array.ravel()))
            column = "" if forces is None else f":{keys['forces']}:R:3"
            file.write(f'{len(atoms)}\nLattice="{lattice}" Properties=species:S:1:pos:R:3{column} {info} pbc="T T T"\n')
            for number, symbol in enumerate(atoms.symbols):
                row = [*atoms.positions[number], *([] if forces is None else forces[number])]
                file.write(f"{symbol} {' '.join(f'{x:.17g}' for x in row)}\n")


def read_xyz(folder, missing, keys, nan):
    write_text(folder / "data.xyz", labelled(missing, keys, nan), keys)
    _, configs = labels.load_from_xyz(str(folder / "data.xyz"), specification(keys))
    datasets.log_dataset_contents(configs, "Training set")
    return [AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF) for config in configs]


def read_hdf5(folder, missing, keys, nan):
    """With the weights of 1 that MACE writes for labels which are not there, if their keys are those of ASE."""
    configs = data.config_from_atoms_list(labelled(missing, keys, nan), specification(keys))
    for config in configs:
        config.property_weights = dict.fromkeys(config.property_weights, 1.0)
    with h5py.File(folder / "data.h5", "w") as file:
        data.save_configurations_as_HDF5(configs, 0, file)
    return items_of(datasets.HDF5Dataset(str(folder / "data.h5"), CUTOFF, TABLE))


def read_lmdb(folder, missing, keys, nan):
    with LMDBDatabase(folder / "data.aselmdb") as database:
        for number, atoms in enumerate(known()[0]):
            held = {name: known()[1][name][number] for name in ("energy", "forces", "stress")
                    if number not in missing[name]}
            if "stress" in held:
                held["stress"] = held["stress"][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            atoms = atoms.copy()
            atoms.calc = SinglePointCalculator(atoms, **held)
            database.write(atoms)
    missing.update(dict.fromkeys(("virials", "dipole"), set(range(COUNT))))  # MACE's writer of LMDB files mixes them up
    return items_of(datasets.LMDBDataset(str(folder / "data.aselmdb"), CUTOFF, TABLE))


def items_of(dataset) -> list[AtomicData]:
    return [dataset[index] for index in range(len(dataset))]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(missing=missing_ones, keys=st.sampled_from(sorted(KEYS)), nan=st.booleans(),
       read=st.sampled_from([read_xyz, read_hdf5, read_lmdb]))
def test_missing_labels_cost_nothing_and_are_not_counted(tmp_path_factory, caplog, missing, keys, nan, read):
    caplog.clear()
    caplog.set_level(logging.INFO)
    items = read(tmp_path_factory.mktemp("data"), missing, KEYS[keys], nan)
    line = caplog.messages[-1]
    assert all(f"{name}: {COUNT - len(missing[name])}," in line for name in LABELLED), line
    ref, pred = next(iter(DataLoader(items, batch_size=COUNT, shuffle=False))), predicted()
    for name, loss in LOSSES.items():
        assert loss()(ref=ref, pred=pred).item() == pytest.approx(0, abs=1e-10), name
    check_errors(ref, missing)


def check_errors(ref, missing: dict) -> None:
    """Of predictions that are off by 1 for one atom's worth, those of labels that are there, and of no others."""
    metric = metrics.MACELoss(LOSSES["weighted"]())
    off = {name: (value + 1).detach() for name, value in predicted().items()}
    metric.update(ref, off)
    atoms = len(known()[0][0])
    _, errors = metric.compute()
    for name, end in (("energy", "e"), ("forces", "f"), ("stress", "stress"), ("virials", "virials"),
                      ("dipole", "mu")):
        there = len(missing[name]) < COUNT
        assert (f"rmse_{end}" in errors) == there
        if there:
            assert errors[f"rmse_{end}"] == pytest.approx(1, abs=1e-8)
            assert errors.get(f"rmse_{end}_per_atom", 1 / atoms) == pytest.approx(1 / atoms, abs=1e-8)


@pytest.mark.parametrize("head", ["one", "two"])
def test_hdf5_structures_go_to_their_head(tmp_path, head):
    """MACE gives those of all heads to the last one."""
    with h5py.File(tmp_path / "data.h5", "w") as file:
        data.save_configurations_as_HDF5(whole(), 0, file)
    dataset = datasets.HDF5Dataset(str(tmp_path / "data.h5"), CUTOFF, TABLE, heads=["one", "two", "three"], head=head)
    assert {item.head.item() for item in items_of(dataset)} == {["one", "two"].index(head)}


# --- labels that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value, words", [
    ("energy", np.inf, "energy of structure 1 of .* holds NaN or infinity"),
    ("forces", "one component", "forces of structure 1 of .* holds NaN or infinity"),
    ("stress", np.ones(4), r"stress of structure 1 of .* has the shape \(4,\)"),
    ("energy", np.ones(2), r"energy of structure 1 of .* has the shape \(2,\)"),
])
def test_a_label_that_is_none_in_part_or_of_another_shape_stops(tmp_path, name, value, words):
    keys = KEYS["default"]
    structures = labelled(dict.fromkeys(LABELLED, ()), keys)
    if name == "forces":
        structures[1].arrays[keys[name]][2, 0] = np.nan
    else:
        structures[1].info[keys[name]] = value
    write_text(tmp_path / "data.xyz", structures, keys)
    with pytest.raises(PeftError, match=words):
        labels.load_from_xyz(str(tmp_path / "data.xyz"), specification(keys))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_log_of_a_run_tells_of_the_labels_that_are_there(tmp_path, capsys):
    """Under keys that ASE takes over, with a loss that knows no weights in MACE; a stress of virials is none."""
    folder = write_inputs(tmp_path)
    missing = {"energy": {0}, "forces": {1}, "stress": {0, 1, 2}, "virials": {3}, "dipole": set(range(COUNT))}
    for part in ("train", "valid"):
        write_text(folder / f"{part}.xyz", labelled(missing, KEYS["ase"]), KEYS["ase"])
    options = {"energy_key": "energy", "forces_key": "forces", "stress_key": "stress", "test_file": None,
               "E0s": "foundation", "max_num_epochs": 1}
    run, _ = train_only(folder, "huber", loss="huber", **options)
    assert "Training set 1/1 [energy: 3, forces: 3, stress: 1, virials: 3, dipole: 0," in run.log
    first = run.metrics[0]
    assert [first[name] == pytest.approx(0, abs=1e-8) for name in ("loss", "rmse_e_per_atom", "rmse_f", "rmse_stress")]
    run, _ = train_only(folder, "virials", loss="virials", **options)
    assert run.metrics[0]["rmse_virials"] == pytest.approx(0, abs=1e-8)
    assert "RMSE_virials_per_atom=" in run.log and "RMSE_stress" not in run.log
    assert "--loss virials leaves out the 1 labels of stress (--stress_key stress)" in run.log
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_here(folder, peft="elora", peft_rank=1, **options | {"forces_key": "force"})
    said = capsys.readouterr().err
    assert "--forces_key force: no structure of the training set of the head Default has" in said and "forces" in said
    assert isinstance(ase.io.read(folder / "train.xyz").calc, SinglePointCalculator)  # as ASE reads these keys
