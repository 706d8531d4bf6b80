"""An atom without neighbours keeps what the foundation adds to its E0, and with E0s that do not train its energy."""

import copy
import io

import pytest
import torch
from ase import Atoms
from tiny import ELEMENTS, batch, configurations, predict, randomise, tiny_mace

from mace_peft import (
    PeftConfig,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from mace_peft.e3nn import compile as compile_to_torchscript
from mace_peft.methods import METHODS
from mace_peft.model.adapted import adapted_blocks
from mace_peft.model.inject import fold, settle_isolated_atoms

PLACEMENTS = ("products", "linears", "published", "all")
# of the second, something of the element stays where there is no neighbour, for its first layer has a skip connection
FOUNDATIONS = {"vanishing": {}, "residual": {"first": "RealAgnosticResidualInteractionBlock"}}
CASES = [(method, targets, ("Default",)) for method in METHODS if METHODS[method].rank != "auto"
         for targets in (PLACEMENTS if METHODS[method].targets else [None])]
CASES += [(method, "published", ("a", "b")) for method in ("mmea", "elora")]


def adapted(foundation, method, targets, heads=("Default",)):
    """What trains is random, but for the E0s that some methods train, which are as they were."""
    config = PeftConfig(method, targets=targets, rank=None if METHODS[method].rank is None else 2)
    model = inject(tiny_mace(heads=heads, **FOUNDATIONS[foundation]), config)
    for name, block in adapted_blocks(model).items():
        if name != "atomic_energies_fn":
            randomise(block.adapter)
    return randomise(model) if METHODS[method].trains_base else model


def alone(heads=("Default",)):
    return [Atoms([element], info={"head": head}) for element in ELEMENTS for head in heads]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foundation", FOUNDATIONS)
@pytest.mark.parametrize("method, targets, heads", CASES, ids=lambda value: str(value).replace(" ", ""))
def test_an_isolated_atom_keeps_its_energy(method, targets, heads, foundation):
    model = adapted(foundation, method, targets, heads)
    structures = [*alone(heads), *configurations(1)]
    count = len(structures) - 1
    energies, forces = predict(model, structures)
    with disable_adapter(model):
        before, _ = predict(model, structures)
    assert_same(energies[:count], before[:count])
    assert not torch.allclose(energies[count:], before[count:], rtol=1e-6)
    assert not forces[:count].any()
    assert_same(predict(fold(model), structures)[0], energies)  # as NAME.model has it
    assert_same(predict(settle_isolated_atoms(model), structures)[0], energies)  # as files of TorchScript have it


def test_the_foundations_are_of_both_kinds():
    for name, options in FOUNDATIONS.items():
        model = tiny_mace(**options)
        shifted = model.atomic_energies_fn.atomic_energies + model.scale_shift.shift
        kept = predict(model, alone())[0] - shifted.flatten()
        assert (kept.abs().max() < 1e-12) == (name == "vanishing")


@pytest.mark.parametrize("foundation", FOUNDATIONS)
@pytest.mark.parametrize("method, targets", [("mmea", "published"), ("elora", "published"), ("full", None)])
def test_files_keep_it(method, targets, foundation, tmp_path):
    model = adapted(foundation, method, targets)
    expected = [predict(model, structures)[0] for structures in (alone(), configurations(2))]

    def check(other):
        for structures, energies in zip((alone(), configurations(2)), expected, strict=True):
            assert_same(predict(other, structures)[0], energies)

    save_adapter(model, tmp_path / "adapter")
    check(load_adapter(tiny_mace(**FOUNDATIONS[foundation]), tmp_path / "adapter"))
    folded = fold(copy.deepcopy(model))
    check(pickled(folded))
    if method == "mmea":  # gates stay: another adapter of what is the base now
        save_adapter(folded, tmp_path / "gates")
        check(load_adapter(eject(pickled(folded)), tmp_path / "gates"))
    script = compile_to_torchscript(settle_isolated_atoms(folded))
    for structures, energies in zip((alone(), configurations(2)), expected, strict=True):
        assert_same(script(batch(model, structures), compute_force=False)["energy"], energies)


def pickled(model):
    content = io.BytesIO()
    torch.save(model, content)
    content.seek(0)
    return torch.load(content, weights_only=False)


def test_torchscript_of_what_is_not_settled_is_refused():
    gates = fold(adapted("residual", "mmea", "published"))
    with pytest.raises(NotImplementedError, match="does not support TorchScript"):
        compile_to_torchscript(gates)


def test_training_sees_the_energies_that_are_predicted():
    """The gradient of an isolated atom's energy vanishes: no step of an optimizer moves it."""
    model = adapted("residual", "elora", "all")
    inputs = batch(model, alone())
    output = model(inputs, training=True, compute_force=False)
    output["energy"].sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-12


def test_E0s_that_train_along_are_those_of_isolated_atoms():
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, train_also="atomic_energies_fn.*"))
    shift = model.atomic_energies_fn.adapter.s["atomic_energies"]
    with torch.no_grad():
        shift += 0.1 * torch.arange(1, 4)
    energies, _ = predict(model, alone())
    with disable_adapter(model):
        assert_same(energies, predict(model, alone())[0] + shift.flatten())
    assert set(trainable_parameters(model)) >= {"atomic_energies_fn.adapter.s.atomic_energies"}
    folded = fold(copy.deepcopy(model))
    assert_same(predict(folded, alone())[0], energies)
    assert folded.peft_config.train_also is None
    assert_same(predict(pickled(folded), alone())[0], energies)


def test_published_counts_have_no_E0s():
    for method in ("mmea", "elora"):
        names = trainable_parameters(inject(tiny_mace(), PeftConfig(method, targets="published", rank=2)))
        assert not any("atomic_energies" in name for name in names)
