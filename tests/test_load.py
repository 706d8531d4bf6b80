"""Foundation file + adapter directory is the trained model."""

import copy
import io

import pytest
import torch
from mace.tools.scripts_utils import remove_pt_head
from tiny import batch, configurations, predict, tiny_mace

from mace_peft import PeftConfig, PeftError, disable_adapter, eject, inject, load_adapter, merge, save_adapter
from mace_peft.adapter.directory import contents, read_adapter
from mace_peft.backbones.foundation import rebuild, single_head
from mace_peft.model.adapted import fingerprint, is_adapted, trainable_parameters

pytestmark = pytest.mark.usefixtures("uncompiled")

STRUCTURES = configurations(3)


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return model


def same(one, other, tolerance=1e-10):
    return all(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance) for a, b in
               zip(one, other, strict=True))


@pytest.mark.parametrize("method, targets", [
    *((method, targets) for targets in ("products", "linears", "published") for method in ("mmea", "elora")),
    ("gates", "all"), ("elora+scales", "all")])
@pytest.mark.parametrize("narrowed", [False, True])
def test_foundation_and_directory_give_the_trained_model(tmp_path, method, targets, narrowed):
    foundation = tiny_mace(elements=(1, 6, 7, 8))
    model = tiny_mace(elements=(1, 6, 7, 8))
    origin = {"name": "tiny", "head": None, "fingerprint": fingerprint(foundation)}
    if narrowed:
        model = rebuild(model, [1, 6, 8], ["Default"], [[-13.0, -1000.0, -2000.0]])
    else:
        model.atomic_energies_fn.atomic_energies.mul_(3.0)
    trained = randomise(inject(model, PeftConfig(method, rank=2, targets=targets), origin))
    save_adapter(trained, tmp_path / "a")
    loaded = load_adapter(foundation, tmp_path / "a")
    assert same(predict(trained, STRUCTURES), predict(loaded, STRUCTURES))
    assert narrowed or loaded is foundation


def test_scales_fit_a_foundation_whose_E0s_have_no_rows_of_heads(tmp_path):
    foundation, model = tiny_mace(), tiny_mace()
    energies = model.atomic_energies_fn
    energies.atomic_energies = torch.atleast_2d(energies.atomic_energies)  # as mace_run_train makes it
    origin = {"name": "tiny", "head": None, "fingerprint": fingerprint(foundation)}
    trained = randomise(inject(model, PeftConfig("scales"), origin))
    save_adapter(trained, tmp_path / "a")
    loaded = load_adapter(foundation, tmp_path / "a")
    assert loaded.atomic_energies_fn.atomic_energies.dim() == 1
    expected = predict(trained, STRUCTURES)
    assert same(predict(loaded, STRUCTURES), expected)
    assert same(predict(merge(loaded), STRUCTURES), expected)


def test_two_heads(tmp_path):
    foundation = tiny_mace()
    origin = {"name": "tiny", "head": None, "fingerprint": fingerprint(foundation)}
    model = rebuild(tiny_mace(), [1, 6, 8], ["a", "b"], [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    trained = randomise(inject(model, PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*"), origin))
    save_adapter(trained, tmp_path / "a")
    loaded = load_adapter(foundation, tmp_path / "a")
    assert loaded.heads == ["a", "b"]
    assert same(predict(trained, STRUCTURES), predict(loaded, STRUCTURES))


def test_a_float32_foundation_takes_an_adapter_of_a_float64_one(tmp_path):
    trained = randomise(inject(tiny_mace(), PeftConfig("elora", rank=2, targets="products")))
    save_adapter(trained, tmp_path / "a")
    loaded = load_adapter(tiny_mace().float(), tmp_path / "a")
    assert next(loaded.parameters()).dtype == torch.float32
    assert same(predict(trained, STRUCTURES), predict(loaded, STRUCTURES), 1e-4)


def test_another_adapter_swaps_the_one_that_is_there(tmp_path):
    expected = {}
    for name, config in {"m": PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*"),
                         "e": PeftConfig("elora", rank=3, targets="linears")}.items():
        trained = randomise(inject(tiny_mace(), config))
        save_adapter(trained, tmp_path / name)
        expected[name] = predict(trained, STRUCTURES)
    model = foundation = tiny_mace()
    for name in "mem":
        model = load_adapter(model, tmp_path / name)
        assert model is foundation
        assert same(predict(model, STRUCTURES), expected[name])


@pytest.mark.parametrize("method, targets", [("mmea", "products"), ("elora", "products"), ("gates", "all"),
                                             ("elora+scales", "all")])
def test_switched_off_and_ejected_it_is_the_base(method, targets):
    base = predict(tiny_mace(), STRUCTURES)
    model = randomise(inject(tiny_mace(), PeftConfig(method, rank=2, targets=targets, train_also="readouts.*")))
    adapted = predict(model, STRUCTURES)
    with disable_adapter(model):
        assert all(torch.equal(a, b) for a, b in zip(predict(model, STRUCTURES), base, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(predict(model, STRUCTURES), adapted, strict=True))
    assert not torch.equal(adapted[0], base[0])
    eject(model)
    assert all(torch.equal(a, b) for a, b in zip(predict(model, STRUCTURES), base, strict=True))


def test_switched_off_and_ejected_a_loaded_adapter_leaves_the_foundation(tmp_path):
    """Its E0s go with it: the base's predictions are the foundation's, bit for bit."""
    trained = tiny_mace()
    trained.atomic_energies_fn.atomic_energies.mul_(3.0)
    trained.scale_shift.shift.add_(0.1)
    origin = {"name": "tiny", "head": None, "fingerprint": fingerprint(tiny_mace())}
    trained = inject(trained, PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*"), origin)
    save_adapter(randomise(trained), tmp_path / "a")
    foundation = tiny_mace()
    base, state = predict(foundation, STRUCTURES), {name: t.clone() for name, t in foundation.state_dict().items()}
    model = load_adapter(foundation, tmp_path / "a")
    assert same(predict(model, STRUCTURES), predict(trained, STRUCTURES))
    with disable_adapter(model):
        assert all(torch.equal(a, b) for a, b in zip(predict(model, STRUCTURES), base, strict=True))
    assert same(predict(model, STRUCTURES), predict(trained, STRUCTURES))
    assert fingerprint(model) == origin["fingerprint"]
    eject(model)
    assert model is foundation and list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def two_headed(head, seed):
    """An adapter as a run with ``--foundation_head`` trains it."""
    foundation = tiny_mace(heads=("a", "b"))
    origin = {"name": "tiny", "head": head, "fingerprint": fingerprint(foundation)}
    model = rebuild(single_head(foundation, head), [1, 6, 8], ["Default"], [[-1.0, -2.0, -3.0]])
    return randomise(inject(model, PeftConfig("mmea", rank=2, targets="products"), origin), seed)


def test_an_adapter_of_another_head_is_not_swapped_in(tmp_path):
    for seed, head in enumerate("ab"):
        save_adapter(two_headed(head, seed), tmp_path / head)
    model = load_adapter(tiny_mace(heads=("a", "b")), tmp_path / "a")
    assert same(predict(model, STRUCTURES), predict(two_headed("a", 0), STRUCTURES))
    with pytest.raises(PeftError, match="trained for other heads"):
        load_adapter(model, tmp_path / "b")
    assert same(predict(model, STRUCTURES), predict(two_headed("a", 0), STRUCTURES))


def test_a_model_that_is_switched_off_stays_an_adapted_one(tmp_path):
    """Its calls are those of the base, and nothing else."""
    config = PeftConfig("elora", rank=2, targets="products", train_also="readouts.*")
    model = randomise(inject(tiny_mace(), config))
    save_adapter(model, tmp_path / "a")
    trainable, cls = trainable_parameters(model), type(model)
    with disable_adapter(model):
        assert is_adapted(model) and type(model) is cls and fingerprint(model) == fingerprint(tiny_mace())
        assert trainable_parameters(model).keys() == trainable.keys()
        for attempt in (lambda: save_adapter(model, tmp_path / "b"), lambda: eject(model), lambda: merge(model),
                        lambda: inject(model, config), lambda: load_adapter(model, tmp_path / "a")):
            with pytest.raises(PeftError, match="switched off: leave disable_adapter first$"):
                attempt()
    assert not (tmp_path / "b").exists()
    assert all(trainable_parameters(model)[name] is parameter for name, parameter in trainable.items())
    assert same(predict(load_adapter(tiny_mace(), tmp_path / "a"), STRUCTURES), predict(model, STRUCTURES))


@pytest.mark.parametrize("config", [PeftConfig("mmea", rank=2), PeftConfig("scales")],
                         ids=lambda config: config.method)
def test_copies_of_a_model_that_is_switched_off_are_on(config):
    model, file = randomise(inject(tiny_mace(), config)), io.BytesIO()
    expected, base = predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES)
    with disable_adapter(model):
        torch.save(model, file)
        file.seek(0)
        copies = copy.deepcopy(model), torch.load(file, weights_only=False)
        for twin in copies:
            assert is_adapted(twin) and same(predict(twin, STRUCTURES), expected)
        with disable_adapter(copies[0]):  # each on its own
            assert same(predict(copies[0], STRUCTURES), base) and same(predict(copies[1], STRUCTURES), expected)
        assert same(predict(copies[0], STRUCTURES), expected) and same(predict(model, STRUCTURES), base)
    for one in (model, *copies):
        assert same(predict(one, STRUCTURES), expected)


def test_a_model_that_is_switched_off_can_be_switched_off_again_and_takes_no_other_adapters():
    model = randomise(inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*")))
    expected = predict(model, STRUCTURES)
    with disable_adapter(model):
        with disable_adapter(model):
            assert same(predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES))
        assert same(predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES))
        with pytest.raises(PeftError, match="switched off: leave disable_adapter first"):
            inject(model, PeftConfig("mmea", rank=1, targets="products"))
    assert same(predict(model, STRUCTURES), expected)


@pytest.mark.parametrize("config", [PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*"),
                                    PeftConfig("scales")], ids=lambda config: config.method)
def test_switching_off_does_not_disturb_a_backward_pass(config):
    def gradients(before_forward):
        model = randomise(inject(tiny_mace(), config))
        if before_forward:
            with disable_adapter(model):
                model(inputs, compute_force=True)
        energy = model(inputs, compute_force=False)["energy"].square().sum()
        if not before_forward:
            with disable_adapter(model):
                model(inputs, compute_force=True)
        return torch.autograd.grad(energy, list(trainable_parameters(model).values()))

    inputs = batch(tiny_mace(), STRUCTURES)
    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_switching_off_keeps_what_was_trained_in_a_finer_dtype():
    config = PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*")
    model = randomise(inject(tiny_mace(dtype=torch.float32), config).double())
    predict(model, STRUCTURES)  # the first call of e3nn's compiled code may differ in the last bit
    expected = predict(model, STRUCTURES)
    with disable_adapter(model):
        pass
    assert all(torch.equal(a, b) for a, b in zip(predict(model, STRUCTURES), expected, strict=True))


def test_a_model_of_other_weights_has_another_origin(tmp_path):
    """What a state dict or a rebuild by MACE puts in may not be the foundation any more."""
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products"))
    model.load_state_dict(model.state_dict())
    assert model.peft_foundation["fingerprint"] == fingerprint(tiny_mace())
    other = inject(tiny_mace(seed=3), PeftConfig("mmea", rank=2, targets="products"))
    model.load_state_dict(other.state_dict())
    save_adapter(model, tmp_path / "a")
    with pytest.raises(PeftError, match="weights differ"):
        load_adapter(tiny_mace(), tmp_path / "a")
    assert same(predict(load_adapter(tiny_mace(seed=3), tmp_path / "a"), STRUCTURES), predict(model, STRUCTURES))


def test_an_adapter_beside_a_base_that_was_trained_does_not_go_with_the_foundation(tmp_path):
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products"))
    with torch.no_grad():
        model.products[0].linear.weight += 1e-3
    with pytest.warns(UserWarning, match="the weights of the base have changed .* train them by train_also"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(PeftError, match="weights differ"):
        load_adapter(tiny_mace(), tmp_path / "a")


def test_a_rebuilt_model_is_its_own_origin(tmp_path):
    model = randomise(inject(tiny_mace(heads=("a", "b")), PeftConfig("mmea", rank=2, targets="products")))
    torch.set_default_dtype(torch.float64)
    try:
        single = remove_pt_head(model, "b")
    finally:
        torch.set_default_dtype(torch.float32)
    save_adapter(single, tmp_path / "a")
    with pytest.raises(PeftError, match="weights differ"):
        load_adapter(tiny_mace(heads=("a", "b")), tmp_path / "a")
    expected = predict(single, STRUCTURES)
    assert same(predict(load_adapter(eject(single), tmp_path / "a"), STRUCTURES), expected)


def test_weights_that_would_lose_adapters_are_refused_inside_another_module():
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products"))
    state = {f"0.{name}": value for name, value in tiny_mace().state_dict().items()}
    with pytest.raises(PeftError, match="products.0.adapter"):
        torch.nn.Sequential(model).load_state_dict(state, strict=False)


def test_a_model_that_holds_an_adapted_one_takes_no_adapters(tmp_path):
    model = randomise(inject(tiny_mace(), PeftConfig("elora", rank=2, targets="products")))
    expected, outer = predict(model, STRUCTURES), torch.nn.Sequential(model)
    with pytest.raises(PeftError, match=r"^0\.products\..* has an adapter already, .* inside of this one: eject that"):
        inject(outer, PeftConfig("elora", rank=1))
    assert is_adapted(model) and same(predict(model, STRUCTURES), expected)
    inject(torch.nn.Sequential(eject(model)), PeftConfig("elora", rank=1))


def test_the_path_of_a_foundation_will_do(tmp_path):
    model = randomise(inject(tiny_mace(), PeftConfig("elora", rank=2)))
    path = tmp_path / "foundation.model"
    torch.save(tiny_mace(), path)
    save_adapter(model, tmp_path / "mine")
    for one in (path, str(path)):
        assert same(predict(load_adapter(one, tmp_path / "mine"), STRUCTURES), predict(model, STRUCTURES))
    with pytest.raises(PeftError, match="nowhere.model is neither a file nor a name that MACE knows"):
        load_adapter("nowhere.model", tmp_path / "mine")


@pytest.mark.parametrize("spoil, named", [
    (lambda description, tensors: next(iter(tensors.values())).fill_(1e300), ".*adapter"),
    (lambda description, tensors: description.update(E0s=[[-1.0, 1e300, -3.0]]), "E0s")], ids=["weight", "E0s"])
def test_numbers_that_are_too_large_for_the_dtype_of_the_foundation_are_refused(tmp_path, spoil, named):
    save_adapter(inject(tiny_mace(), PeftConfig("elora", rank=2, targets="products")), tmp_path)
    _, description, tensors = read_adapter(tmp_path)
    spoil(description, tensors)
    for name, content in contents(description, tensors).items():
        (tmp_path / name).write_bytes(content)
    foundation = tiny_mace().float()
    expected = predict(foundation, STRUCTURES)
    with pytest.raises(PeftError, match=f"does not fit: '{named}.*' holds what is no number in float32: train again"):
        load_adapter(foundation, tmp_path)
    assert not is_adapted(foundation) and same(predict(foundation, STRUCTURES), expected)
    assert is_adapted(load_adapter(tiny_mace(), tmp_path))


def test_a_load_that_fails_leaves_gradients_and_shared_memory(tmp_path):
    config = PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*")
    save_adapter(randomise(inject(tiny_mace(), config)), tmp_path)
    _, description, tensors = read_adapter(tmp_path)
    description |= {"shift": None, "E0s": [[9.0, 9.0, 9.0]]}  # the last of all that is set
    for name, content in contents(description, tensors).items():
        (tmp_path / name).write_bytes(content)
    adapted = randomise(inject(tiny_mace(), config), 3)
    for model in (tiny_mace(), adapted):
        model.share_memory()
        model(batch(model, STRUCTURES), training=True)["energy"].sum().backward()
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state = {name: (tensor, tensor.data_ptr(), tensor.detach().clone(), tensor.grad)
                 for name, tensor in held.items()}
        with pytest.raises(PeftError, match="does not fit"):
            load_adapter(model, tmp_path)
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert now.keys() == state.keys()
        for name, (tensor, place, value, gradient) in state.items():
            assert now[name] is tensor and tensor.data_ptr() == place and tensor.is_shared(), name
            assert torch.equal(tensor, value) and tensor.grad is gradient, name


def test_other_weights_are_refused_and_left_alone(tmp_path):
    save_adapter(inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products")), tmp_path / "a")
    other = tiny_mace(seed=5)
    with pytest.raises(PeftError, match="weights differ"):
        load_adapter(other, tmp_path / "a")
    assert not hasattr(other, "peft_config")


def test_a_model_whose_adapter_is_switched_off_takes_no_other(tmp_path):
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products"))
    save_adapter(model, tmp_path)
    with disable_adapter(model), pytest.raises(PeftError, match="leave disable_adapter first"):
        load_adapter(model, tmp_path)
