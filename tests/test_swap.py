"""``load_adapter`` works in place, and whoever trains a model notices when its adapters change."""

import copy
import gc
import pickle

import pytest
import torch
from test_load import randomise, same
from tiny import batch, configurations, predict, tiny_mace
from torch_ema import ExponentialMovingAverage

from mace_peft import PeftConfig, PeftError, eject, inject, load_adapter, merge, save_adapter, trainable_parameters
from mace_peft.backbones.foundation import rebuild
from mace_peft.model.adapted import CLASSES, fingerprint, is_adapted
from mace_peft.model.inject import fold

STRUCTURES = configurations(2)
WATER = configurations(1, "H2O")
CONFIG = PeftConfig("mmea", rank=2, targets="products")
ELEMENTS = (1, 6, 7, 8)


def trained(config=CONFIG, seed=1):
    return randomise(inject(tiny_mace(), config), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters a and b of one shape, c of another one."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(trained(seed=1), folder / "a")
    save_adapter(trained(seed=2), folder / "b")
    save_adapter(trained(PeftConfig("elora", rank=2, targets="products"), seed=3), folder / "c")
    return folder


def save_narrowed(directory, elements, seed=1):
    foundation = tiny_mace(elements=ELEMENTS)
    origin = {"name": "tiny", "head": None, "fingerprint": fingerprint(foundation)}
    model = rebuild(foundation, list(elements), ["Default"], [[-float(element) for element in elements]])
    save_adapter(randomise(inject(model, CONFIG, origin), seed), directory)
    return model


# --- one model under two names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrowed", [False, True])
def test_loading_works_in_place_whatever_the_elements(tmp_path, narrowed):
    elements = (1, 8) if narrowed else ELEMENTS
    expected = [predict(save_narrowed(tmp_path / name, elements, seed), WATER) for seed, name in enumerate("ab")]
    foundation = tiny_mace(elements=ELEMENTS).eval()
    first = load_adapter(foundation, tmp_path / "a")
    assert first is foundation and not foundation.training and foundation.atomic_numbers.tolist() == list(elements)
    assert same(predict(foundation, WATER), expected[0])
    assert load_adapter(foundation, tmp_path / "b") is foundation
    assert same(predict(first, WATER), expected[1])


def test_elements_that_another_adapter_has_left_out_need_the_foundation_again(tmp_path):
    save_narrowed(tmp_path / "water", (1, 8))
    save_narrowed(tmp_path / "methanol", (1, 6, 8))
    model = load_adapter(tiny_mace(elements=ELEMENTS), tmp_path / "methanol")
    assert load_adapter(model, tmp_path / "water") is model
    expected = predict(model, WATER)
    with pytest.raises(PeftError, match="elements that the model has no longer, .* load it onto the foundation's"):
        load_adapter(model, tmp_path / "methanol")
    assert same(predict(model, WATER), expected)


# --- optimizers and moving averages -----------------------------------------------------------------------------------


def step(model, optimizer):
    model(batch(model, STRUCTURES), training=True)["energy"].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def held(model):
    """An optimizer that has taken a step, and a moving average."""
    parameters = list(trainable_parameters(model).values())
    optimizer, average = torch.optim.Adam(parameters, lr=0.1), ExponentialMovingAverage(parameters, 0.9)
    step(model, optimizer)
    return parameters, optimizer, average


def test_an_optimizer_goes_on_with_an_adapter_of_the_same_shape(folder):
    model = load_adapter(tiny_mace(), folder / "a")
    parameters, optimizer, average = held(model)
    load_adapter(model, folder / "b")
    assert all(parameter is one for parameter, one in zip(parameters, trainable_parameters(model).values(),
                                                          strict=True))
    expected = predict(load_adapter(tiny_mace(), folder / "b"), STRUCTURES)
    assert same(predict(model, STRUCTURES), expected)
    step(model, optimizer)
    average.update()
    assert not same(predict(model, STRUCTURES), expected)
    with average.average_parameters():
        assert not same(predict(model, STRUCTURES), expected)


def other_uses(parameters, optimizer, average):
    smooth = torch.zeros_like(parameters[0].detach()) if type(parameters[0]) is torch.nn.Parameter else torch.zeros(1)
    return [optimizer.step, optimizer.zero_grad, average.update, average.copy_to, average.store,
            lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0), lambda: smooth.mul_(0.9).add_(parameters[0].data),
            lambda: torch.optim.Adam(parameters)]


@pytest.mark.parametrize("change", [
    lambda model, folder: load_adapter(model, folder / "c"), lambda model, folder: eject(model),
    lambda model, folder: inject(eject(model), CONFIG)], ids=["another shape", "eject", "inject again"])
def test_an_optimizer_of_what_was_taken_out_stops(folder, change):
    model = load_adapter(tiny_mace(), folder / "a")
    uses = other_uses(*held(model))
    change(model, folder)
    for use in uses:
        with pytest.raises(PeftError, match="adapter was taken out of its model, .* make a new optimizer"):
            use()


@pytest.mark.parametrize("change, config", [
    (merge, PeftConfig("elora", rank=2, targets="products")), (fold, PeftConfig("mmea", rank=2, targets="published"))])
def test_an_optimizer_of_what_was_merged_stops(change, config):
    model = trained(config)
    uses = other_uses(*held(model))
    change(model)
    with pytest.raises(PeftError, match="adapter was taken out of its model"):
        uses[0]()


def test_a_swap_that_fails_leaves_the_optimizer_its_parameters(folder, tmp_path):
    model = load_adapter(tiny_mace(), folder / "a")
    _, optimizer, average = held(model)
    save_adapter(inject(tiny_mace(seed=5), CONFIG), tmp_path)
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(PeftError):
            load_adapter(model, directory)
    before = predict(model, STRUCTURES)
    step(model, optimizer)
    average.update()
    assert not same(predict(model, STRUCTURES), before)


def test_what_a_frozen_base_has_of_gradients_does_not_move_it():
    model = tiny_mace()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(model, STRUCTURES), training=True)["energy"].sum().backward()
    known = fingerprint(model)
    inject(model, CONFIG)
    optimizer.step()
    assert fingerprint(model) == known


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("change", [
    eject, fold, lambda model: load_adapter(model, save_adapter(trained(seed=7), model.directory)),
    lambda model: randomise(model, 9)], ids=["eject", "fold", "load", "train"])
def test_what_is_done_to_a_copy_leaves_the_original_alone(tmp_path, make, change):
    model = trained(PeftConfig("elora", rank=2, targets="products", train_also="readouts.*"))
    expected, state = predict(model, STRUCTURES), {name: t.clone() for name, t in model.state_dict().items()}
    model.directory = tmp_path
    twin = make(model)
    assert same(predict(twin, STRUCTURES), expected)
    change(twin)
    assert is_adapted(model) and all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert same(predict(model, STRUCTURES), expected)
    step(model, torch.optim.Adam(trainable_parameters(model).values()))  # none of them was taken out


# --- memory -----------------------------------------------------------------------------------------------------------


def test_settings_that_no_model_has_any_more_leave_nothing():
    model = tiny_mace()
    gc.collect()
    before = len(CLASSES)
    for number in range(1, 6):
        eject(inject(model, PeftConfig("elora", rank=1, alpha=number / 7, targets="readouts.0.linear")))
    gc.collect()
    assert len(CLASSES) == before


def test_narrowing_again_makes_no_new_model(tmp_path):
    """Each model that is made costs memory for good, see ``new_model``. Elements alternate."""
    kinds = {1: (1, 8), 2: (1, 6, 8)}
    expected = [predict(save_narrowed(tmp_path / str(seed), kinds[seed], seed), WATER) for seed in kinds]
    made = []

    class Counted(type(tiny_mace())):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self)

    for seed in (1, 2, 1, 2):
        foundation = tiny_mace(elements=ELEMENTS)
        foundation.__class__ = Counted
        Counted.__name__ = "ScaleShiftMACE"
        load_adapter(foundation, tmp_path / str(seed))
        assert same(predict(foundation, WATER), expected[seed - 1])
    assert len(made) == 2


def test_of_the_models_that_were_made_a_few_are_kept(monkeypatch):
    made = {}
    monkeypatch.setattr("mace_peft.backbones.foundation.MADE", made)
    monkeypatch.setattr("mace_peft.backbones.foundation.MOST_MADE", 2)
    model = tiny_mace(channels=1, max_ell=1, elements=ELEMENTS)
    for heads in (1, 2, 1, 3):
        rebuild(model, [1], [str(number) for number in range(heads)], [[-1.0]] * heads)
    assert [len(one.heads) for one in made.values()] == [1, 3]


def test_swaps_and_loads_leave_nothing(folder):
    def objects():
        gc.collect()
        return len(gc.get_objects())

    model = load_adapter(tiny_mace(), folder / "a")
    counts = []
    for _ in range(3):
        for name in "ab":
            load_adapter(model, folder / name)
        counts.append(objects())
    assert counts[2] <= counts[1]
