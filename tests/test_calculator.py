"""What the calculator, its model and ``export`` do where something is not as it should be."""

import copy
import os

import numpy as np
import pytest
import torch
from mace.tools.scripts_utils import extract_config_mace_model
from test_load import randomise
from tiny import configurations, predict, tiny_mace

from mace_peft import (
    PeftConfig,
    PeftError,
    calculator,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from mace_peft.blocks.adapted import adapted_blocks
from mace_peft.deploy import export
from mace_peft.model.adapted import fingerprint

STRUCTURES = configurations(1)


@pytest.fixture
def folder(tmp_path):
    """A foundation and an adapter of gates and low-rank updates."""
    torch.save(tiny_mace(), tmp_path / "foundation.model")
    save_adapter(randomise(inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="published"))), tmp_path / "mine")
    return tmp_path


# --- predictions that are not finite ----------------------------------------------------------------------------------


def exploding(folder):
    """The calculator of an adapter whose gates overflow, as published ones may."""
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products", gate="exp"))
    with torch.no_grad():
        for block in model.products:
            block.adapter.b2.fill_(1e4)
    save_adapter(model, folder / "exploding")
    return calculator(tiny_mace(), folder / "exploding")


@pytest.mark.parametrize("ask", ["get_potential_energy", "get_forces"])
def test_a_prediction_that_is_no_number_names_the_adapter_and_the_structure(folder, ask):
    atoms = STRUCTURES[0].copy()
    atoms.calc = exploding(folder)
    for _ in range(2):  # nothing is left for who asks again
        with pytest.raises(PeftError, match=r"the adapter .*exploding gives energy, .*forces.* of NaN or infinity for "
                                            r"CH4O \(6 atoms\), .*: check the structure, or use the foundation$"):
            getattr(atoms, ask)()
    assert not atoms.calc.results


NONE = {
    "positions": (lambda atoms: atoms.positions.__setitem__((0, 0), np.nan),
                  r"the positions or the cell of CH4O \(6 atoms\) hold NaN or infinity"),
    "cell": (lambda atoms: atoms.set_cell(np.diag([np.inf] * 3)), r"the positions or the cell of CH4O \(6 atoms\)"),
    "no cell": (lambda atoms: atoms.set_pbc((True, False, False)), r"CH4O \(6 atoms\) is periodic, and has no cell"),
    "no atoms": (lambda atoms: atoms.__delitem__(slice(None)), "has no atoms"),
}


@pytest.mark.parametrize("spoil, words", NONE.values(), ids=NONE)
def test_a_structure_that_is_none_is_named(folder, spoil, words):
    atoms = STRUCTURES[0].copy()
    atoms.calc = calculator(tiny_mace(), folder / "mine")
    spoil(atoms)
    with pytest.raises(PeftError, match=words):
        atoms.get_potential_energy()


@pytest.mark.parametrize("options, words", [
    ({"head": "Defualt"}, "'Defualt' is none of the model, which has Default, did you mean"),
    ({"device": "nonsense"}, "nonsense cannot be used"),
    ({"compile_mode": "default"}, "compile_mode default does not go with gates"),
    ({"defualt_dtype": "float32"}, "no option defualt_dtype, did you mean default_dtype"),
    ({"strenght": 0}, "no option strenght, did you mean strength"),
    ({"model_paths": "a.model"}, "no option model_paths")],
    ids=["head", "device", "compile", "unknown", "strength", "models"])
def test_an_option_that_cannot_be_is_named(folder, options, words):
    with pytest.raises(PeftError, match=words):
        calculator(tiny_mace(), folder / "mine", **options)


def test_a_foundation_that_is_none_is_named(folder):
    with pytest.raises(PeftError, match="is no model: give one"):
        calculator([tiny_mace()], folder / "mine")


def test_one_of_several_heads_has_to_be_chosen(tmp_path):
    model = randomise(inject(tiny_mace(heads=("pbe", "other")), PeftConfig("scales")))
    save_adapter(model, tmp_path / "mine")
    foundation = tiny_mace(heads=("pbe", "other"))
    with pytest.raises(PeftError, match="has the heads pbe, other: choose one"):
        calculator(foundation, tmp_path / "mine")
    atoms = STRUCTURES[0].copy()
    atoms.calc = calculator(foundation, tmp_path / "mine", head="other")
    atoms.info["head"] = "other"
    assert atoms.get_potential_energy() == pytest.approx(predict(model, [atoms])[0].item(), rel=1e-10)


@pytest.mark.parametrize("number, name", [(92, "U"), (150, "150")])
def test_an_element_that_was_not_trained_for_is_named(folder, number, name):
    atoms = STRUCTURES[0].copy()
    atoms.calc = calculator(tiny_mace(), folder / "mine")
    atoms.numbers[0] = number
    with pytest.raises(PeftError, match=rf"\b{name}\b"):
        atoms.get_potential_energy()
    for call in (atoms.calc.get_hessian, atoms.calc.get_descriptors):
        with pytest.raises(PeftError, match=rf"\b{name}\b"):
            call(atoms)


# --- updates that are folded ------------------------------------------------------------------------------------------


def test_gates_whose_updates_are_folded_cannot_be_switched_off(folder, tmp_path):
    model = calculator(tiny_mace(), folder / "mine").models[0]
    torch.save(model, tmp_path / "folded.model")
    rebuilt = type(model)(**extract_config_mace_model(model))  # as MACE does
    for folded in (model, torch.load(tmp_path / "folded.model", weights_only=False), rebuilt):
        with pytest.raises(PeftError, match="updates of this model are folded into its weights, .* use the foundation"):
            disable_adapter(folded).__enter__()
    loaded = load_adapter(tiny_mace(), folder / "mine")
    with disable_adapter(loaded):
        assert all(torch.equal(one, other) for one, other in
                   zip(predict(loaded, STRUCTURES), predict(tiny_mace(), STRUCTURES), strict=True))


def test_gates_alone_are_switched_off_in_a_calculator(tmp_path):
    save_adapter(randomise(inject(tiny_mace(), PeftConfig("gates", rank=2))), tmp_path)
    model = calculator(tiny_mace(), tmp_path).models[0]
    with disable_adapter(model):
        assert all(torch.equal(one, other) for one, other in
                   zip(predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES), strict=True))
    assert fingerprint(model) == fingerprint(tiny_mace())


def test_weights_that_are_no_numbers_are_not_folded(folder):
    model = randomise(inject(tiny_mace(), PeftConfig("scales")))
    blocks = adapted_blocks(model)
    with torch.no_grad():
        list(blocks.values())[-2].adapter.g.fill_(1000.0)  # after others that could be folded
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapter(model, folder / "large")
    with pytest.raises(PeftError, match="makes weights of NaN or infinity, so that it is not folded"):
        merge(model)
    assert adapted_blocks(model) == blocks
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(PeftError, match="makes weights of NaN or infinity"):
        export(str(folder / "foundation.model"), str(folder / "large"), str(folder / "out.model"), "model")
    assert not (folder / "out.model").exists()


# --- what ASE keeps ---------------------------------------------------------------------------------------------------


def energy_of(model):
    return predict(model, STRUCTURES)[0][0].item()


@pytest.fixture
def gated(tmp_path):
    """Two adapters that differ, and atoms with the calculator of the first one."""
    for seed in (1, 2):
        save_adapter(randomise(inject(tiny_mace(), PeftConfig("gates", rank=2)), seed), tmp_path / str(seed))
    atoms = STRUCTURES[0].copy()
    atoms.calc = calculator(tiny_mace(), tmp_path / "1")
    return atoms


@pytest.mark.parametrize("ask", [lambda atoms: atoms.get_potential_energy(),
                                 lambda atoms: atoms.calc.get_potential_energy()], ids=["atoms", "calculator"])
def test_an_energy_is_that_of_the_adapter_that_is_on_now(gated, tmp_path, ask):
    model, base = gated.calc.models[0], energy_of(tiny_mace())
    first, second = (energy_of(load_adapter(tiny_mace(), tmp_path / name)) for name in "12")
    gated.get_potential_energy()
    with disable_adapter(model):
        assert ask(gated) == pytest.approx(base, rel=1e-12)
    assert ask(gated) == pytest.approx(first, rel=1e-12)
    load_adapter(model, tmp_path / "2")
    assert ask(gated) == pytest.approx(second, rel=1e-12)
    assert abs(first - second) > 1e-6 and abs(first - base) > 1e-6
    eject(model)
    assert ask(gated) == pytest.approx(base, rel=1e-12)


def test_an_energy_that_is_known_is_not_computed_again(gated, monkeypatch):
    expected = gated.get_potential_energy()
    with disable_adapter(gated.calc.models[0]):
        pass
    for calc in (gated.calc, copy.deepcopy(gated.calc)):
        monkeypatch.setattr(calc, "calculate", None)
        assert calc.get_potential_energy(gated) == expected


# --- what export would destroy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [
    "mine/adapter_model.safetensors", "mine/adapter_config.json", "mine/new.model", "linked/adapter_config.json",
    "soft_link", "hard_link", "mine/../mine/adapter_config.json"])
def test_an_export_over_the_adapter_is_refused(folder, out):
    (folder / "linked").symlink_to("mine")
    (folder / "soft_link").symlink_to("mine/adapter_model.safetensors")
    os.link(folder / "mine/adapter_config.json", folder / "hard_link")
    before = {path.name: path.read_bytes() for path in (folder / "mine").iterdir()}
    for adapter in ("mine", "linked"):
        with pytest.raises(PeftError, match="is in the directory of the adapter or a link to a file of it"):
            export(str(folder / "foundation.model"), str(folder / adapter), str(folder / out), "model")
    assert {path.name: path.read_bytes() for path in (folder / "mine").iterdir()} == before
