"""What holds for every method, placement and dtype: an adapted model is a MACE model that starts at its base."""

import functools
import io
from copy import deepcopy

import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import torch
from ase.build import molecule
from e3nn import o3
from e3nn.util import jit
from mace import modules
from mace.calculators import MACECalculator
from mace.tools.scripts_utils import extract_config_mace_model
from tiny import assert_close, assert_equal, batch, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, disable_adapter, eject, inject, merge, set_strength, trainable_parameters
from mace_peft.methods import METHODS, MMEA, Adapter, LowRank, Method
from mace_peft.model.adapted import is_adapted
from mace_peft.model.inject import fold

# a composite, an adapter around adapters, a single module
GLOBS = "interactions.0, products.*, readouts.0.linear"
PLACEMENTS = ("products", "linears", "published", GLOBS)
DOUBLE, SINGLE = torch.float64, torch.float32
FULL = [("full", None, 1, DOUBLE), ("full", None, 1, SINGLE), ("full", None, 2, DOUBLE)]
# every kind of adapter x placement x dtype on one model, and every max_L where all kinds of modules are adapted
EVERY = [(method, targets, 1, dtype) for method in ("mmea", "elora", "scales") for targets in PLACEMENTS
         for dtype in (DOUBLE, SINGLE)]
EVERY += [(method, "published", max_L, DOUBLE) for method in ("mmea", "elora", "scales") for max_L in (0, 2, 3)]
EVERY += [(method, "all", 1, DOUBLE) for method in ("mmea", "elora", "scales", "elora+scales", "gates")]
# gates are those of mmea where there are no tensor products and convolutions; small has a row of its own, and no more
EVERY += [("gates", "published", 1, DOUBLE), ("gates", GLOBS, 1, DOUBLE), ("gates", "all", 1, SINGLE)]
EVERY += [("gates", "all", max_L, DOUBLE) for max_L in (0, 2, 3)]
EVERY += [("elora+scales", "linears", 1, SINGLE), ("small", "linears", 1, DOUBLE)]
EVERY += FULL
IN_DOUBLE = [case for case in EVERY if case[3] == DOUBLE]
ONE_MODEL = [case for case in IN_DOUBLE if case[2] == 1]
WITH_GATES = [case for case in ONE_MODEL if case[0] in ("mmea", "gates")]
COMPILED = [("mmea", "products", 1, DOUBLE), ("mmea", GLOBS, 1, DOUBLE), ("elora", "published", 1, DOUBLE),
            ("scales", "all", 1, DOUBLE), ("gates", "all", 1, DOUBLE)]


def name(case):
    method, targets, max_L, dtype = case
    return f"{method}-{'globs' if targets == GLOBS else targets}-L{max_L}-{'float64' if dtype == DOUBLE else 'float32'}"


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=name)


@functools.cache
def structures():
    return configurations(1, "CH3OH") + configurations(1, "H2O", seed=1)


# Models are made once per case and shared by the tests that only look at them; base() and adapted() give copies.


@functools.cache
def shared_base(max_L, dtype):
    return tiny_mace(max_L=max_L, max_ell=max(2, max_L), dtype=dtype)


@functools.cache
def shared(case):
    """The adapted model, with adapters as random as if it had been trained."""
    return randomise(new(case), scale=0.3)


def base(case):
    """The model before it is adapted."""
    return deepcopy(shared_base(*case[2:]))


def config_of(case, **settings):
    """The settings, but those without effect, which are refused."""
    method, targets, _, _ = case
    settings = {name: value for name, value in settings.items() if name in METHODS[method].settings}
    if method == "mmea" and targets in ("products", "linears"):
        settings.pop("alpha", None)
    return PeftConfig(method, targets=targets, **settings)


def default_case(method, dtype):
    return method, "published" if METHODS[method].targets else None, 1, dtype


def new(case):
    """The model as it is when training starts."""
    torch.manual_seed(1)
    return inject(base(case), config_of(case, rank=2, alpha=3.0))


def adapted(case):
    return deepcopy(shared(case))


def settled(model):
    """Energies and forces once e3nn's compiled code has warmed up: the first call may differ in the last bit."""
    predict(model, structures())
    return predict(model, structures())


@functools.cache
def base_prediction(max_L, dtype):
    return settled(shared_base(max_L, dtype))


@functools.cache
def prediction(case):
    return settled(shared(case))


def assert_same_shape(model, original):
    """The same modules, of the same classes, with the same attributes.

    But for the code that e3nn and torch generate: it changes with a copy.
    """
    generated = (torch.jit.ScriptModule, torch.fx.GraphModule)
    shape, expected = ({key: (type(module), sorted(vars(module))) for key, module in either.named_modules()
                        if not isinstance(module, generated)} for either in (model, original))
    assert shape == expected


def assert_same_modules(model, original):
    """The same modules and the same state, to the last bit."""
    assert_same_shape(model, original)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == {
        key: p.requires_grad for key, p in original.named_parameters()}
    assert_same_state(model.state_dict(), original.state_dict())


def assert_same_state(state, expected):
    assert sorted(state) == sorted(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


def dump(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def load(content):
    return torch.load(io.BytesIO(content), weights_only=False)


def loss_of(model, energy=True):
    labelled = batch(model, structures())
    output = model(labelled, training=True, compute_force=True)
    loss = (output["forces"] - labelled["forces"]).pow(2).mean()
    return loss + (output["energy"] - labelled["energy"]).pow(2).mean() if energy else loss


# --- the start --------------------------------------------------------------------------------------------------------


@over(EVERY)
def test_step_0_is_the_base_to_the_last_bit(case):
    assert_equal(settled(new(case)), base_prediction(*case[2:]))


@over(EVERY)
def test_random_adapters_change_energies_and_forces(case):
    """Otherwise what is tested below would hold for adapters that do nothing."""
    for a, b in zip(prediction(case), base_prediction(*case[2:]), strict=True):
        assert (a - b).norm() > 1e-4 * b.norm()


@over(EVERY)
def test_the_base_keeps_its_state_dict(case):
    original = shared_base(*case[2:])
    state = shared(case).state_dict()
    added = [key for key in state if ".adapter." in key]
    assert bool(added) == (case not in FULL)
    assert [key for key in state if key not in added] == list(original.state_dict())
    trainable = trainable_parameters(shared(case))
    frozen = {key: value for key, value in state.items() if key not in trainable}
    assert_same_state(frozen, {key: value for key, value in original.state_dict().items() if key in frozen})


@over(EVERY)
def test_adapters_have_the_dtype_of_the_base(case):
    assert {p.dtype for p in trainable_parameters(shared(case)).values()} == {case[3]}


@over(EVERY)
def test_only_trainable_parameters_require_grad(case):
    model = shared(case)
    trainable = trainable_parameters(model)
    assert trainable == {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".adapter." in key for key in trainable) == (case not in FULL)
    assert case not in FULL or list(trainable) == [key for key, p in model.named_parameters() if p.numel()]


@pytest.mark.parametrize("switched", [True, False])
def test_trainable_parameters_do_not_depend_on_requires_grad(switched):
    """MACE switches it on every parameter while it evaluates."""
    model = inject(base(EVERY[0]), PeftConfig("mmea", rank=2, targets="products", train_also="readouts.0.*"))
    expected = list(trainable_parameters(model))
    assert list(trainable_parameters(model.requires_grad_(switched))) == expected
    assert "readouts.0.linear.weight" in expected


# --- training ---------------------------------------------------------------------------------------------------------


@over(ONE_MODEL)
def test_training_moves_every_adapter_and_no_base_tensor(case):
    original, model = shared_base(*case[2:]), new(case)
    before = {key: p.detach().clone() for key, p in trainable_parameters(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = model.state_dict()
    kept = {key: value for key, value in original.state_dict().items() if key not in before}
    assert_same_state({key: state[key] for key in kept}, kept)
    for key, parameter in trainable_parameters(model).items():
        assert not parameter.numel() or not torch.equal(parameter, before[key]), key


@over(IN_DOUBLE)
def test_a_force_loss_reaches_every_trainable_parameter(case):
    model = adapted(case)
    loss_of(model, energy=False).backward()
    unused = {key for key, p in trainable_parameters(model).items() if p.grad is None}
    # forces do not depend on a constant that is added to an atom's energy
    assert unused == {"atomic_energies_fn.adapter.s.atomic_energies"} & set(trainable_parameters(model))
    loss_of(model).backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == set(trainable_parameters(model))


# --- symmetry ---------------------------------------------------------------------------------------------------------


def moved(change):
    """A copy of the structures, each with positions (and cell) changed."""
    copies = [atoms.copy() for atoms in structures()]
    for atoms in copies:
        change(atoms)
    return copies


@over(IN_DOUBLE)
def test_energies_are_invariant_and_forces_equivariant(case):
    model, (energies, forces) = shared(case), prediction(case)
    torch.manual_seed(3)
    rotation = o3.rand_matrix(dtype=DOUBLE)
    for matrix in (rotation, -torch.eye(3, dtype=DOUBLE), -rotation):
        rotated = moved(lambda atoms, matrix=matrix: atoms.set_positions(atoms.positions @ matrix.numpy().T))
        assert_close(predict(model, rotated), (energies, forces @ matrix.T))

    translated = moved(lambda atoms: atoms.translate([3.0, -1.0, 0.5]))
    assert_close(predict(model, translated), (energies, forces))

    orders = [np.random.default_rng(0).permutation(len(atoms)) for atoms in structures()]
    permuted = [atoms[order] for atoms, order in zip(structures(), orders, strict=True)]
    starts = np.cumsum([0, *map(len, structures())])
    everywhere = np.concatenate([start + order for start, order in zip(starts, orders, strict=False)])
    assert_close(predict(model, permuted), (energies, forces[torch.from_numpy(everywhere)]))


@over(COMPILED)
def test_forces_are_the_derivative_of_the_energy(case):
    model, step = shared(case), 1e-4
    _, forces = prediction(case)

    def energy(shift):
        atoms = structures()[0].copy()
        atoms.positions[1, 2] += shift
        return predict(model, [atoms])[0].item()

    assert -(energy(step) - energy(-step)) / (2 * step) == pytest.approx(forces[1, 2].item(), rel=1e-5, abs=1e-7)


# --- copies and files -------------------------------------------------------------------------------------------------


@over(ONE_MODEL)
@pytest.mark.parametrize("copy", [deepcopy, lambda model: load(dump(model))], ids=["deepcopy", "pickle"])
def test_copies_are_adapted_models_of_their_own(copy, case):
    model, expected = shared(case), prediction(case)
    twin = copy(model)
    assert_same_modules(twin, model)
    assert twin.peft_config == model.peft_config and twin.peft_foundation == model.peft_foundation
    assert list(trainable_parameters(twin)) == list(trainable_parameters(model))
    assert_equal(settled(twin), expected)
    randomise(twin, seed=5)
    assert_equal(predict(model, structures()), expected)


@over(COMPILED)
def test_torchscript_gives_the_same_energies_and_forces(case, tmp_path):
    model, expected = shared(case), prediction(case)
    jit.compile(fold(deepcopy(model))).save(tmp_path / "compiled.model")
    content = (tmp_path / "compiled.model").read_bytes()
    compiled = torch.jit.load(io.BytesIO(content))
    for _ in range(3):  # the first calls profile, the next ones run what they optimized
        assert_close(predict(compiled, structures()), expected)
    assert_equal(predict(model, structures()), expected)


def test_torchscript_refuses_updates_that_are_not_folded():
    with pytest.raises(Exception, match="does not support TorchScript"):
        jit.compile(adapted(("elora", "products", 1, DOUBLE)))


@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_of_an_adapted_model_can_change(method):
    model = adapted(default_case(method, DOUBLE))
    expected = predict(model, structures())
    energies, forces = predict(model.float(), structures())
    assert energies.dtype == forces.dtype == SINGLE
    assert_close((energies.double(), forces.double()), expected, 1e-4)


# --- the way back -----------------------------------------------------------------------------------------------------


@over(EVERY)
def test_eject_restores_the_base_to_the_last_bit(case):
    model = adapted(case)
    assert eject(model) is model
    assert_same_modules(model, shared_base(*case[2:]))
    assert_equal(settled(model), base_prediction(*case[2:]))
    assert not is_adapted(model)
    with pytest.raises(PeftError, match="no adapters"):
        eject(model)
    assert b"mace_peft" not in dump(model)


@over(ONE_MODEL)
def test_an_ejected_model_can_be_adapted_again(case):
    model = inject(eject(adapted(case)), config_of(case, rank=1))
    assert_equal(settled(model), base_prediction(*case[2:]))


@over(WITH_GATES)
def test_gates_that_are_left_can_be_injected_again(case):
    """By the settings that the model of a run has: its updates are folded."""
    model = fold(adapted(case))
    gates, config = set(trainable_parameters(model)), model.peft_config
    assert set(trainable_parameters(inject(eject(model), config))) == gates


def test_eject_restores_the_parameters_that_trained_along():
    model = inject(base(EVERY[0]), PeftConfig("mmea", rank=2, targets="products", train_also="readouts.0.*"))
    original = shared_base(*EVERY[0][2:])
    assert not torch.equal(randomise(model).readouts[0].linear.weight, original.readouts[0].linear.weight)
    assert_same_modules(eject(model), original)


def test_merge_keeps_the_parameters_that_trained_along():
    model = inject(base(EVERY[0]), PeftConfig("elora", rank=2, targets="products", train_also="readouts.0.*"))
    weight = randomise(model).readouts[0].linear.weight.detach().clone()
    assert torch.equal(merge(model).readouts[0].linear.weight, weight)
    assert_same_shape(model, shared_base(*EVERY[0][2:]))


@over(ONE_MODEL)
def test_switched_off_it_is_the_base_until_switched_on_again(case):
    model = adapted(case)
    with pytest.raises(KeyError), disable_adapter(model):
        assert_equal(settled(model), base_prediction(*case[2:]))
        raise KeyError
    assert_same_modules(model, shared(case))
    assert_equal(settled(model), prediction(case))


@over([case for case in EVERY if not METHODS[case[0]].has_gates])
def test_merge_gives_a_plain_model_with_the_same_predictions(case):
    model, original, expected = adapted(case), base(case), prediction(case)
    assert b"mace_peft" in dump(model)
    assert merge(model) is model
    assert b"mace_peft" not in dump(model)
    assert_close(predict(model, structures()), expected, 1e-10 if case[3] == DOUBLE else 1e-4)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, original.state_dict()[key])]
    original.load_state_dict(model.state_dict())
    assert_same_modules(model, original)
    assert changed
    with pytest.raises(PeftError, match="no adapters"):
        merge(model)


@over(WITH_GATES)
def test_merge_refuses_gates_and_leaves_the_model_as_it_was(case):
    model, before = adapted(case), shared(case)
    with pytest.raises(PeftError, match=r"cannot be merged.*environment.*TorchScript") as error:
        merge(model)
    assert "\n" not in str(error.value)
    assert_same_modules(model, before)


def test_fold_leaves_the_gates_of_a_hybrid():
    model, expected = adapted(("mmea", "published", 1, DOUBLE)), prediction(("mmea", "published", 1, DOUBLE))
    fold(model)
    assert is_adapted(model)
    gates = {key.partition(".adapter.")[0] for key in trainable_parameters(model)}
    assert gates == {key for key, module in model.named_modules() if isinstance(module, o3.Linear)}
    assert_close(predict(model, structures()), expected)


@pytest.mark.parametrize("method, targets", [
    ("mmea", "published"), ("mmea", "interactions.1.*,readouts.*"), ("both", "*.conv_tp,*.symmetric_contractions")])
def test_the_settings_of_a_folded_hybrid_give_its_gates(method, targets, monkeypatch):
    monkeypatch.setitem(METHODS, "both", Method("both", {"convolution": MMEA, "contraction": LowRank}, "all", 0.01))
    model = randomise(inject(tiny_mace(), PeftConfig(method, rank=2, targets=targets)))
    fold(model)
    config, shapes = model.peft_config, {name: weight.shape for name, weight in trainable_parameters(model).items()}
    inject(eject(model), config)
    assert {name: weight.shape for name, weight in trainable_parameters(model).items()} == shapes


# --- strength ---------------------------------------------------------------------------------------------------------


def weights_between(adapter, weights):
    """The weights at the adapter's strength, as the docstring of ``set_strength`` says."""
    return {key: weights[key] + adapter.strength * (made - weights[key]) for key, made in adapter(weights).items()}


def gate_between(gate, x, h):
    """The same of the features that a gate gives, irrep by irrep."""
    gains, shifts = gate.coefficients(x)
    outputs, irreps = [], o3.Irreps(gate.irreps_out)
    for (mul, ir), columns in zip(irreps, irreps.slices(), strict=True):
        before = h[..., columns]
        if ir == o3.Irrep("0e"):
            shift, shifts = shifts[..., :mul], shifts[..., mul:]
            outputs.append(before + gate.strength * shift)
        else:
            gain, gains = gains[..., :mul], gains[..., mul:]
            outputs.append((before.unflatten(-1, (mul, ir.dim)) * gain.unsqueeze(-1) ** gate.strength).flatten(-2))
    return torch.cat(outputs, -1)


@over([case for case in EVERY if case[2] == 1])
def test_a_strength_lies_between_the_foundation_and_the_adapter(case, monkeypatch):
    expected, original = prediction(case), base_prediction(*case[2:])
    model = shared(case)  # a copy would have to warm up
    try:
        assert_equal(settled(set_strength(model, 0)), original)
        found = predict(set_strength(model, 0.3), structures())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        monkeypatch.setattr(Adapter, "at_strength", weights_between)
        monkeypatch.setattr(MMEA, "forward", gate_between)
        assert_close(found, predict(model, structures()), 1e-10 if case[3] == DOUBLE else 1e-4)
        monkeypatch.undo()
    finally:
        set_strength(model, 1)
    assert all((one - other).norm() > 1e-4 * other.norm() for end in (expected, original)
               for one, other in zip(found, end, strict=True))
    assert_equal(settled(model), expected)
    assert trainable_parameters(model) == {key: p for key, p in model.named_parameters() if p.requires_grad}


# --- MACE's own tools -------------------------------------------------------------------------------------------------


@over(ONE_MODEL)
def test_the_model_and_its_blocks_stay_instances_of_their_classes(case):
    model = shared(case)
    assert isinstance(model, modules.ScaleShiftMACE) and type(model).__name__ == "ScaleShiftMACE"
    for key, module in shared_base(*case[2:]).named_modules():
        classes = [cls.__qualname__ for cls in type(model.get_submodule(key)).__mro__]
        assert type(module).__qualname__ in classes, key


@over(IN_DOUBLE)
def test_mace_reads_the_same_configuration_from_it(case):
    expected, config = (extract_config_mace_model(model) for model in (shared_base(*case[2:]), shared(case)))
    assert "error" not in expected and list(config) == list(expected)
    for key, value in expected.items():
        if isinstance(value, np.ndarray | torch.Tensor):
            assert np.array_equal(config[key], value), key
        else:
            assert config[key] == value, key


@over([default_case(method, dtype) for method in METHODS for dtype in (DOUBLE, SINGLE)])
def test_the_calculator_runs_it(case):
    model = adapted(case)
    energies, forces = predict(model, [molecule("CH3OH")])
    dtype = "float64" if case[3] == DOUBLE else "float32"
    atoms = molecule("CH3OH")
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype=dtype)
    tolerance = 1e-10 if case[3] == DOUBLE else 1e-4
    assert atoms.get_potential_energy() == pytest.approx(energies.item(), rel=tolerance)
    np.testing.assert_allclose(atoms.get_forces(), forces.numpy(), rtol=tolerance, atol=tolerance)
