"""``mace_run_train --peft`` on foundations of every family: it fine-tunes them, or says which it cannot."""

import json
import sys

import ase.io
import mace  # noqa: F401  before e3nn
import pytest
import torch
from ase import Atoms
from mace import modules
from runs import E0S, FEWER_ELEMENTS, MOLECULE, fork, train_here, write_inputs
from test_families import (
    DIPOLES,
    NON_LINEAR,
    NOT_BEFORE_0_3_15,
    NOT_TAKEN_OVER,
    OPTIONS,
    dipole_model,
    families,
)
from tiny import batch, configurations, predict, tiny_mace

from mace_peft import load_adapter
from mace_peft.model.isolated import interaction_energies

pytestmark = pytest.mark.usefixtures("uncompiled")

PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "published", "lr": 0.001}
# a stand-in for the package les, which is on no index: charges that attract and repel at all distances
LES = """
from typing import Dict, Optional
import torch

class Les(torch.nn.Module):
    def __init__(self, les_arguments: dict):
        super().__init__()
        self.strength = les_arguments.get("strength", 1.0)

    def forward(self, latent_charges: torch.Tensor, positions: torch.Tensor, cell: torch.Tensor, batch: torch.Tensor,
                compute_energy: bool = True, compute_bec: bool = False,
                bec_output_index: Optional[int] = None) -> Dict[str, Optional[torch.Tensor]]:
        squares = (positions[:, None] - positions[None]).pow(2).sum(-1) + 1.0
        pairs = latent_charges[:, None] * latent_charges[None] / squares.sqrt() * (batch[:, None] == batch[None])
        energies = torch.zeros(int(batch.max()) + 1, dtype=positions.dtype)
        return {"E_lr": self.strength * energies.index_add(0, batch, pairs.sum(-1)), "BEC": None}
"""


@pytest.fixture(scope="module")
def les(tmp_path_factory):
    """Makes the stand-in importable, also in the processes that runs fork."""
    folder = tmp_path_factory.mktemp("les")
    (folder / "les.py").write_text(LES)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("les", None)


def maceles(**options) -> torch.nn.Module:
    from mace.modules.extensions import MACELES

    class Model(MACELES, modules.ScaleShiftMACE):  # tiny_mace gives a scale and a shift to a ScaleShiftMACE
        pass

    model = tiny_mace(model_class=Model, les_arguments={"strength": 2.0}, **options)
    model.__class__ = MACELES
    return model


def assert_fine_tunes(folder, foundation, *flags, elements=None, **options):
    """The run lowers its loss, and foundation file + adapter directory give its model."""
    molecule = FEWER_ELEMENTS if elements is None else elements
    write_inputs(folder, molecule, foundation)
    for file in folder.glob("*.xyz") if "dipole" in options.get("loss", "") else ():
        structures = ase.io.read(file, ":")
        for atoms in structures:
            atoms.info["REF_dipole"] = [0.3, -0.2, 0.5]
        ase.io.write(file, structures)
    run = fork(folder, *flags, **PEFT | {"E0s": E0S[molecule], "test_file": None, "max_num_epochs": 1} | options)
    assert run.returncode == 0, run.stderr
    structures = configurations(2, molecule, seed=9)
    expected = predict(run.model(), structures)
    base = torch.load(folder / "foundation.model", weights_only=False)
    loaded = load_adapter(base, run.adapter())
    assert type(loaded).__name__ == type(foundation).__name__ == type(run.model()).__name__
    for a, b in zip(predict(loaded, structures), expected, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()
    losses = [line["loss"] for line in run.metrics if line["mode"] == "eval"]
    assert losses[-1] < losses[0]
    assert_isolated_atoms_are_kept(run, foundation, loaded)
    return run


def assert_isolated_atoms_are_kept(run, foundation, loaded):
    """An atom without neighbours has the run's E0 and what the foundation adds."""
    elements = loaded.atomic_numbers.tolist()
    alone = [Atoms([element]) for element in elements]
    E0s = json.loads((run.adapter() / "adapter_config.json").read_text())["E0s"][0]
    adds = dict(zip(foundation.atomic_numbers.tolist(), torch.atleast_2d(interaction_energies(foundation))[0].tolist(),
                    strict=True))
    expected = torch.tensor([E0 + adds[element] for E0, element in zip(E0s, elements, strict=True)],
                            dtype=torch.float64)
    for model in (loaded, run.model()):
        torch.testing.assert_close(predict(model, alone)[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", families(*{"scalars only", "max_L 2", "max_L 3", "density", "repulsion", "non-linear",
                                            "OMOL"} - NOT_TAKEN_OVER.keys()))
def test_a_foundation_of_the_family_is_fine_tuned(name, tmp_path):
    assert_fine_tunes(tmp_path, tiny_mace(**OPTIONS[name]))


@pytest.mark.since("0.3.14")
def test_a_foundation_with_les_is_fine_tuned_with_its_settings_as_a_stand_in_shows(les, tmp_path):
    run = assert_fine_tunes(tmp_path, maceles(), model="MACELES")
    assert run.model().les.strength == 2.0


@pytest.mark.since("0.3.16")
def test_a_polar_foundation_is_fine_tuned(tmp_path):
    polar = tiny_mace(model_class=modules.PolarMACE, add_local_electron_energy=True, atomic_multipoles_max_l=1,
                      field_feature_max_l=1, first=NON_LINEAR, later=NON_LINEAR)
    run = assert_fine_tunes(tmp_path, polar, model="PolarMACE", loss="energy_forces_dipole",
                            dipole_key="REF_dipole")
    assert "rmse_mu_per_atom" in run.metrics[-1]
    own = ("field_dependent_charges_maps.", "local_electron_energy.", "lr_source_maps.", "fukui_source_map.",
           "layer_feature_mixer.")
    assert all(any(name.startswith(layers) for name in run.adapter_tensors()) for layers in own)


@pytest.mark.parametrize("loss", ["stress", "universal", "virials"])
def test_stresses_of_periodic_systems_are_fitted(loss, tmp_path):
    """Of a foundation with other weights: stresses of a smaller model are labels."""
    folder = write_inputs(tmp_path)
    teacher = tiny_mace(seed=1)
    for part in ("train", "valid"):
        structures = configurations(8, "CH3OH", seed=len(part), periodic=True)
        output = teacher(batch(teacher, structures), compute_stress=True)
        for atoms, stress in zip(structures, output["stress"].detach().numpy(), strict=True):
            atoms.info["REF_stress"], atoms.info["REF_virials"] = stress, -stress * atoms.get_volume()
        ase.io.write(folder / f"{part}.xyz", structures)
    run = train_here(folder, **PEFT | {"test_file": None, "max_num_epochs": 2}, loss=loss, compute_stress=True,
                     **{f"{kind}_weight": 0.0 for kind in ("energy", "forces")})
    errors = [line[f"rmse_{'virials' if loss == 'virials' else 'stress'}"] for line in run.metrics
              if line["mode"] == "eval"]
    assert errors[-1] < errors[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(capsys, tmp_path):
    """Runs the command with this foundation in this process; returns the line with which it stops."""

    def refuse(foundation, **options) -> str:
        if hasattr(foundation, "atomic_energies_fn"):
            write_inputs(tmp_path, foundation=foundation)
        else:
            write_inputs(tmp_path)
            torch.save(foundation, tmp_path / "foundation.model")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train_here(tmp_path, **PEFT | options)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("mace_run_train: error: ") and message.endswith("\n") and message.count("\n") == 1
        return message

    return refuse


@pytest.mark.parametrize("name, words", [
    ("attention", ["RealAgnosticAttResidualInteractionBlock", "skip_tp"]),
    ("three interactions", ["3 RealAgnosticInteractionBlock, RealAgnosticResidualInteractionBlock"]),
    ("correlations 1 and 3", ["mace_run_train cannot", "ScaleShiftMACE"]),
    ("MACE", ["is a MACE", "ScaleShiftMACE"]),
    *(pytest.param(name, ["cannot", "ScaleShiftMACE"], marks=family.marks)
      for family in families(*NOT_BEFORE_0_3_15) for name in family.values if name in NOT_TAKEN_OVER),
])
def test_a_foundation_that_mace_cannot_take_over_is_refused_by_name(refusal, name, words):
    message = refusal(tiny_mace(**OPTIONS[name]))
    assert all(word in message for word in words) and "give" in message


@pytest.mark.parametrize("name", DIPOLES)
def test_a_foundation_for_dipoles_is_refused_by_name(refusal, name):
    message = refusal(dipole_model(name))
    assert f"is a {name}" in message and "cannot fine-tune that class" in message


@pytest.mark.since("0.3.14")
def test_les_of_several_heads_is_refused_as_a_stand_in_shows(les, refusal, tmp_path):
    """MACE would leave its charges at random."""
    files = {f"{part}_file": str(tmp_path / f"{part}.xyz") for part in ("train", "valid")}
    heads = {head: {**files, "E0s": E0S[MOLECULE]} for head in ("one", "two")}
    message = refusal(maceles(), model="MACELES", heads=str(heads), test_file=None)
    assert "les_readouts." in message and "one, two" in message
