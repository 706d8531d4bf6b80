"""A strength goes with the model: into what trained along, E0s, copies, files, and what merge and export make of it."""

import copy
import io

import pytest
import torch
from ase import Atoms
from mace.calculators import MACECalculator
from mace.tools.scripts_utils import extract_config_mace_model
from tiny import ELEMENTS, assert_close, assert_equal, batch, configurations, predict, randomise, tiny_mace

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
    set_strength,
    trainable_parameters,
)
from mace_peft.adapter.directory import contents, read_adapter
from mace_peft.deploy import export
from mace_peft.e3nn import compile as compile_to_torchscript
from mace_peft.inspect.info import info
from mace_peft.model.adapted import fingerprint, origin
from mace_peft.model.inject import fold, settle_isolated_atoms

STRUCTURES = configurations(2)
ALONE = [Atoms([element]) for element in ELEMENTS]
# gates and updates, with a skip connection that leaves something of isolated atoms; gates alone; what merges; E0s
CASES = {"mmea": {"targets": "published"}, "gates": {"targets": "all"}, "elora": {"targets": "linears"},
         "elora+scales": {"targets": "all"}}
# readouts, which mmea and elora adapt, too
ALONG = {"mmea": ["readouts.0.linear.weight"], "gates": [], "elora": ["readouts.0.linear.weight"], "elora+scales": []}
over_cases = pytest.mark.parametrize("method", CASES)
of_both_kinds = pytest.mark.parametrize("method", ["mmea", "elora+scales"])


def foundation():
    return tiny_mace(first="RealAgnosticResidualInteractionBlock")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A foundation, and adapters of runs with other E0s, scale and shift."""
    folder = tmp_path_factory.mktemp("strength")
    torch.save(foundation(), folder / "foundation.model")
    for method, settings in CASES.items():
        model = inject(foundation(), PeftConfig(method, rank=2, train_also=ALONG[method] or None, **settings),
                       {"name": "foundation.model", "fingerprint": fingerprint(foundation())})
        model.atomic_energies_fn.atomic_energies.mul_(3.3)
        model.scale_shift.scale.add_(0.1)
        model.scale_shift.shift.sub_(0.2)
        save_adapter(randomise(model, scale=0.2), folder / method)
    return folder


def loaded(folder, method, strength=None):
    return load_adapter(foundation(), folder / method, strength)


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def settled(model):
    """Predictions once e3nn's compiled code has warmed up."""
    predict(model, STRUCTURES)
    return predict(model, STRUCTURES)


@over_cases
def test_what_trained_along_and_what_the_run_set_lie_between(folder, method):
    base, full = foundation(), loaded(folder, method)
    before, adapter = settled(base), settled(full)
    model = loaded(folder, method, 0.25)
    start, found, end = (dict(one.named_parameters()) | dict(one.named_buffers()) for one in (base, model, full))
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, end[name])}
    assert changed == {"atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift", *ALONG[method]}
    for name, tensor in found.items():
        if name in changed:
            torch.testing.assert_close(tensor, 0.75 * start[name] + 0.25 * end[name], rtol=1e-14, atol=1e-15)
        else:
            assert torch.equal(tensor, end[name])
    assert fingerprint(model) == fingerprint(base)
    with disable_adapter(model):
        assert_equal(settled(model), before)
    assert_equal(settled(set_strength(model, 0)), before)
    assert_equal(settled(set_strength(model, 1)), adapter)
    assert_equal(settled(eject(set_strength(model, 0.25))), before)


@of_both_kinds
def test_isolated_atoms_and_forces_are_right_between(folder, method):
    model, E0s = loaded(folder, method, 0.5), [foundation().atomic_energies_fn.atomic_energies * s for s in (1, 3.3)]
    if method == "elora+scales":  # which has learnt a shift of the E0s
        E0s[1] = E0s[1] + loaded(folder, method).atomic_energies_fn.adapter.s["atomic_energies"].detach()
    base = predict(foundation(), ALONE)[0] - E0s[0]
    assert base.abs().max() > 1e-3
    torch.testing.assert_close(predict(model, ALONE)[0], (0.5 * (E0s[0] + E0s[1])).flatten() + base, rtol=0, atol=1e-12)
    step, energies = 1e-4, []
    for sign in (1, -1):
        atoms = STRUCTURES[0].copy()
        atoms.positions[1, 2] += sign * step
        energies.append(predict(model, [atoms])[0].item())
    force = predict(model, STRUCTURES[:1])[1][1, 2].item()
    assert (energies[1] - energies[0]) / (2 * step) == pytest.approx(force, rel=1e-5, abs=1e-7)


@of_both_kinds
def test_files_and_copies_keep_it(folder, method, tmp_path):
    model, full = loaded(folder, method, 0.5), predict(loaded(folder, method), STRUCTURES)
    expected = settled(model)
    for copied in (copy.deepcopy(model), through_file(model)):
        assert copied.peft_strength == 0.5
        assert_equal(settled(copied), expected)
        assert_close(predict(set_strength(copied, 1), STRUCTURES), full)
    save_adapter(model, tmp_path / "half")
    config, description, tensors = read_adapter(tmp_path / "half")
    _, before, learnt = read_adapter(folder / method)
    assert description.pop("strength") == 0.5 and "strength" not in before
    assert {**description, "sha256": None} == {**before, "sha256": None}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in learnt.items()) and len(tensors) == len(learnt)
    assert "\nstrength     0.5\n" in info(str(tmp_path / "half")) and "\nstrength " not in info(str(folder / method))
    assert_close(predict(load_adapter(foundation(), tmp_path / "half"), STRUCTURES), expected)
    swapped = load_adapter(loaded(folder, "gates", 0.25), tmp_path / "half")
    assert_close(predict(swapped, STRUCTURES), expected)
    assert_close(predict(load_adapter(swapped, folder / method), STRUCTURES), full)
    assert_close(predict(load_adapter(foundation(), tmp_path / "half", strength=1), STRUCTURES), full)


@pytest.mark.parametrize("method", ["mmea", "elora"])
def test_what_is_folded_merged_and_compiled_has_it(folder, method):
    model = loaded(folder, method, 0.5)
    expected = predict(model, STRUCTURES)
    if method == "elora":
        merged = merge(copy.deepcopy(model))
        assert type(merged) is type(foundation())
        assert_close(predict(merged, STRUCTURES), expected)
        zero = merge(loaded(folder, method, 0)).state_dict()
        assert all(torch.equal(zero[name], tensor) for name, tensor in foundation().state_dict().items())
    folded = fold(model)
    assert_close(predict(folded, STRUCTURES), expected)
    assert_close(predict(through_file(folded), STRUCTURES), expected)
    assert_close(predict(compile_to_torchscript(settle_isolated_atoms(folded)), STRUCTURES), expected)


@pytest.mark.parametrize("method", ["mmea", "elora"])
def test_exports_and_calculators_have_it(folder, method, tmp_path):
    expected = predict(loaded(folder, method, 0.5), STRUCTURES[:1])
    atoms = STRUCTURES[0].copy()
    for format in ("model", "torchscript", "lammps", "lammps-mliap"):
        export(str(folder / "foundation.model"), str(folder / method), str(tmp_path / format), format, strength=0.5)
    calculators = [calculator(folder / "foundation.model", folder / method, strength=0.5),
                   MACECalculator(tmp_path / "model", device="cpu", default_dtype="float64")]
    for calc in calculators:
        atoms.calc = calc
        assert atoms.get_potential_energy() == pytest.approx(expected[0].item(), rel=1e-12)
    assert_close(predict(torch.jit.load(tmp_path / "torchscript"), STRUCTURES[:1]), expected)
    for model in (torch.jit.load(tmp_path / "lammps").model,
                  torch.load(tmp_path / "lammps-mliap", weights_only=False).model.model):
        found = model(batch(foundation(), STRUCTURES[:1]), compute_force=True)
        assert_close((found["energy"].detach(), found["forces"].detach()), expected)


def test_the_calculator_of_gates_takes_another_one(folder):
    """Which has put its isolated atoms right by the E0s, at the strength of before."""
    atoms = STRUCTURES[0].copy()
    atoms.calc = calculator(folder / "foundation.model", folder / "gates")
    for strength in (1, 0.5, 0, 1):
        set_strength(atoms.calc.models[0], strength)
        expected = predict(loaded(folder, "gates", strength), STRUCTURES[:1])[0].item()
        assert atoms.get_potential_energy() == pytest.approx(expected, rel=1e-12)


def rebuilt(model):
    """As ``mace_select_head`` and conversions to other layers do it."""
    other = type(model)(**extract_config_mace_model(model)).double()
    other.load_state_dict(model.state_dict())
    return other


def test_a_model_that_mace_rebuilds_has_it(folder):
    model = set_strength(randomise(inject(foundation(), PeftConfig("gates", rank=2)), scale=0.2), 0.5)
    assert_close(predict(rebuilt(model), STRUCTURES), predict(model, STRUCTURES))
    with pytest.raises(PeftError, match="trained along, and its value before is not in this model"):
        set_strength(rebuilt(loaded(folder, "mmea", 0.5)), 1)


def test_nothing_trains_between(folder):
    model = loaded(folder, "mmea", 0.5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = trainable_parameters(set_strength(model, 1)).values()
    assert trained and all(parameter.requires_grad for parameter in trained)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "half", True, None])
def test_another_number_is_refused_and_changes_nothing(folder, strength):
    model = loaded(folder, "elora", 0.5)
    expected = settled(model)
    with pytest.raises(PeftError, match="^strength .* is not allowed: use a number from 0, the foundation, to 1"):
        set_strength(model, strength)
    assert_equal(settled(model), expected)


def test_what_cannot_have_another_one_is_refused(folder, tmp_path):
    with pytest.raises(PeftError, match="has no adapters"):
        set_strength(foundation(), 0.5)
    with pytest.raises(PeftError, match="^strength 2 is not allowed") as error:
        loaded(folder, "elora", 2)
    assert error.value.on_command_line().startswith("--strength 2 ")
    model = fold(loaded(folder, "mmea", 0.5))
    with pytest.raises(PeftError, match=r"folded into its weights at strength 0.5, so that it takes no other"):
        set_strength(model, 1)
    with pytest.raises(PeftError, match=r"folded into its weights at strength 0.5.*save the model itself"):
        save_adapter(model, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    with disable_adapter(model := loaded(folder, "elora")), pytest.raises(PeftError, match="leave disable_adapter"):
        set_strength(model, 0.5)


def test_gates_of_a_further_run_beside_what_the_first_has_folded_take_no_other(folder, tmp_path):
    """Without them, what is left is neither the foundation nor what the further run started from."""
    first = fold(loaded(folder, "mmea"))
    further = inject(eject(copy.deepcopy(first)), first.peft_config, origin(first))
    save_adapter(randomise(further), tmp_path / "further")
    expected = predict(further, STRUCTURES)
    model = load_adapter(copy.deepcopy(first), tmp_path / "further")
    assert_close(predict(model, STRUCTURES), expected)
    with pytest.raises(PeftError, match="folded into"):
        set_strength(model, 0.5)
    with pytest.raises(PeftError, match="folded into"), disable_adapter(model):
        pass
    with pytest.raises(PeftError, match="does not fit: .*folded into"):
        load_adapter(copy.deepcopy(first), tmp_path / "further", 0.5)


def test_an_adapter_that_says_another_number_is_refused(folder, tmp_path):
    _, description, tensors = read_adapter(folder / "elora")
    for name, content in contents({**description, "strength": 7.0}, tensors).items():
        (tmp_path / name).write_bytes(content)
    model = foundation()
    with pytest.raises(PeftError, match="does not fit: strength 7.0 is not allowed"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "peft_config")


def test_an_adapter_that_explodes_is_the_foundation_at_0():
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, gate="exp"))
    before = settled(tiny_mace())
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if name.endswith(("b2", "B.weight")):
                parameter.fill_(1e200)
    assert not torch.isfinite(predict(model, STRUCTURES)[0]).all()
    assert_equal(settled(set_strength(model, 0)), before)
