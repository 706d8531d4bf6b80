"""Weights of structures act with every loss, and with weights of 1 each loss is that of MACE.

What does not act is named in the log.
"""

import argparse
import types

import ase.io
import numpy as np
import pytest
import torch
from mace import modules
from mace.data import AtomicData, KeySpecification
from mace.tools.torch_geometric.dataloader import DataLoader
from test_labels import COUNT, CUTOFF, LOSSES, TABLE, predicted, whole
from tiny import configurations

from mace_peft import PeftError
from mace_peft.labels import LABELS, load_from_xyz
from mace_peft.train.data.labels_and_loss import check_labels

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_structures_act_with_every_loss(name):
    """A loss is linear in them: MACE's own huber, universal and l1l2energyforces are not."""
    items = [AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF) for config in whole()]
    off = {key: 1.01 * value.detach() + 0.001 for key, value in predicted().items()}

    def value(weights) -> float:
        for item, weight in zip(items, weights, strict=True):
            item.weight = torch.tensor(float(weight))
        return LOSSES[name]()(ref=next(iter(DataLoader(items, batch_size=COUNT, shuffle=False))), pred=off).item()

    alone = [value(row) for row in np.eye(COUNT)]
    assert min(alone) > 0
    assert value([0.5, 2, 0, 3]) == pytest.approx(np.dot([0.5, 2, 0, 3], alone), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_with_weights_of_1_losses_are_those_of_mace(name):
    items = [AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF) for config in whole()]
    for item in items:
        item.forces = 60 * item.forces / item.forces.norm(dim=-1).min()  # of all of the ranges of the universal loss
    ref = next(iter(DataLoader(items, batch_size=COUNT, shuffle=False)))
    off = {key: 1.01 * value.detach() + 0.001 for key, value in predicted().items()}
    original = getattr(modules, LOSSES[name].__name__)
    assert LOSSES[name]()(ref=ref, pred=off).item() == pytest.approx(original()(ref=ref, pred=off).item(), rel=1e-12)


@pytest.mark.parametrize("loss, given, words", [
    ("ef", {"forces_weight": 1000.0}, "--forces_weight 1000.0 has no effect with --loss ef"),
    ("weighted", {"stress_weight": 5.0}, "--stress_weight 5.0 has no effect with --loss weighted"),
    ("ef", {"swa": True}, "Stage two of --loss ef is that of --loss weighted"),
    ("universal", {"swa": True, "swa_virials_weight": 99.0}, "--swa_virials_weight 99.0 has no effect with --loss uni"),
    ("huber", {"swa": True}, "Stage two of --loss huber is that of --loss weighted"),
    ("stress", {}, "No structure of the training set of the head Default has stress under the key REF_stress"),
    ("weighted", {"energy_key": "E"}, "The keys E do not act on the head Default: HDF5"),
])
def test_what_does_not_act_is_named(caplog, loss, given, words):
    args = argparse.Namespace(**{"loss": loss, "swa": False, "energy_weight": 1.0, "forces_weight": 100.0,
                                 "stress_weight": 1.0, "virials_weight": 1.0, "dipole_weight": 1.0,
                                 "polarizability_weight": 1.0, "swa_energy_weight": 1000.0} | given)
    keys = KeySpecification({"energy": given.get("energy_key", "REF_energy"), "stress": "REF_stress"}, {})
    head = types.SimpleNamespace(head_name="Default", collections=None, key_specification=keys)
    counts = dict.fromkeys(LABELS, 0) | {"energy": 2, "forces": 2}
    both = {("Default", "train"): counts, ("Default", "valid"): counts}
    check_labels(args, [head], both, both)
    assert words in caplog.text


def test_a_set_without_a_label_for_the_loss_stops():
    args = argparse.Namespace(loss="forces_only", swa=False)
    counts = {("Default", "valid"): dict.fromkeys(LABELS, 0) | {"energy": 2}}
    with pytest.raises(PeftError, match="the validation set of the head Default has no label for --loss forces_only"):
        check_labels(args, [], counts, counts)


def test_types_that_are_numbers_have_their_weights(tmp_path):
    """ASE reads ``config_type=1`` as a number."""
    structures = configurations(2)
    structures[1].info["config_type"] = 1
    ase.io.write(tmp_path / "types.xyz", structures)
    _, read = load_from_xyz(tmp_path / "types.xyz", KeySpecification.from_defaults(), config_type_weights={"1": 5.0})
    assert [configuration.weight for configuration in read] == [1.0, 5.0]


def test_structures_that_name_another_head_are_told_of(tmp_path, caplog):
    structures = configurations(2)
    structures[1].info["head"] = "other"
    ase.io.write(tmp_path / "heads.xyz", structures)
    _, read = load_from_xyz(tmp_path / "heads.xyz", KeySpecification.from_defaults(), head_name="mine")
    assert {configuration.head for configuration in read} == {"mine"}
    assert "name the head other (--head_key head), and all go to the head mine" in caplog.text


def test_a_validation_set_without_energies_is_told_of(caplog):
    args = argparse.Namespace(loss="weighted", swa=False, energy_weight=1.0, forces_weight=1.0)
    keys = KeySpecification({"energy": "REF_energy"}, {"forces": "REF_forces"})
    head = types.SimpleNamespace(head_name="mine", collections=None, key_specification=keys)
    counts = {("mine", part): dict.fromkeys(LABELS, 0) | labels
              for part, labels in (("train", {"energy": 2, "forces": 2}), ("valid", {"forces": 1}))}
    check_labels(args, [head], counts, counts)
    assert "No structure of the validation set of the head mine has energy under the key REF_energy" in caplog.text
