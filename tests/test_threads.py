"""A prediction changes no state: one adapted model runs in many threads, and is switched off in one of them alone."""

import copy
import threading
import time

import pytest
import torch
from tiny import assert_close, assert_equal, batch, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, disable_adapter, eject, inject, load_adapter, save_adapter
from mace_peft.backbones.foundation import default_dtype_of
from mace_peft.methods import METHODS
from mace_peft.model.adapted import fingerprint, is_adapted

THREADS = 8
PREDICTIONS = {"mmea": 200, "elora+scales": 200}  # of each thread; of other methods, which are parts of these, fewer
STRUCTURES = configurations(1, "H2O")


EACH_METHOD = pytest.mark.parametrize("method", [method for method in METHODS if method not in ("small", "best")])
SMALL = {"interactions": 1, "channels": 2, "correlation": 2}  # many predictions in little time


def adapted(method, model=None, **settings):
    ranked = {"rank": 1} if METHODS[method].rank is not None else {}
    settings = {name: value for name, value in settings.items() if name in METHODS[method].settings}
    model = tiny_mace() if model is None else model
    return randomise(inject(model, PeftConfig(method, **ranked | settings)), scale=0.3)


def in_threads(work, count=THREADS):
    """Run the work in threads; raises what the first of them raised."""
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@EACH_METHOD
def test_predictions_in_threads_are_right(method):
    base = tiny_mace(**SMALL)
    model = adapted(method, copy.deepcopy(base), targets="published")
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    predict(model, STRUCTURES)  # TorchScript looks at the first calls
    energy, forces = predict(model, STRUCTURES)
    inputs, far = batch(model, STRUCTURES), []

    def work():
        own = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        for number in range(PREDICTIONS.get(method, 30)):
            with_forces = number % 10 == 0  # they take most of the time
            output = model(dict(own), training=False, compute_force=with_forces)
            right = torch.allclose(output["energy"], energy, rtol=0, atol=1e-10)
            if with_forces:
                right = right and torch.allclose(output["forces"], forces, rtol=0, atol=1e-10)
            if not right:
                far.append(output)

    in_threads(work)
    assert not far
    assert_equal(predict(model, STRUCTURES), (energy, forces))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0] and torch.equal(tensor, state[name][1]), name
    assert fingerprint(model) == fingerprint(base) == fingerprint(eject(model))


@EACH_METHOD
def test_switched_off_in_one_thread_it_is_on_in_the_others(method):
    model = adapted(method)
    expected, base = predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES)
    on, off = threading.Event(), threading.Event()

    def other():
        on.wait()
        assert_close(predict(model, STRUCTURES), expected)
        off.set()

    def this():
        with disable_adapter(model):
            on.set()
            off.wait()
            assert_close(predict(model, STRUCTURES), base)

    works = [other, this]
    in_threads(lambda: works.pop()(), 2)
    assert_close(predict(model, STRUCTURES), expected)


def test_switched_off_twice_it_is_on_after_the_outer_one():
    model = adapted("elora")
    expected, base = predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES)
    with disable_adapter(model):
        with pytest.raises(KeyError), disable_adapter(model):
            raise KeyError
        assert_close(predict(model, STRUCTURES), base)
    assert_close(predict(model, STRUCTURES), expected)


def test_another_model_stays_on():
    model, other = adapted("elora"), adapted("elora")
    expected = predict(other, STRUCTURES)
    with disable_adapter(model):
        assert_close(predict(other, STRUCTURES), expected)


def test_what_loading_and_training_along_changed_counts_as_before(tmp_path):
    model = adapted("scales", train_also="readouts.*")
    with torch.no_grad():
        model.atomic_energies_fn.atomic_energies += 1.0
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_mace(), tmp_path / "adapter")
    expected, base = predict(model, STRUCTURES), predict(tiny_mace(), STRUCTURES)
    assert_close(predict(loaded, STRUCTURES), expected)
    with disable_adapter(loaded):
        assert_close(predict(loaded, STRUCTURES), base)
    assert_close(predict(loaded, STRUCTURES), expected)


@EACH_METHOD
@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_that_is_made_while_it_is_off_is_on(method, make):
    model = adapted(method)
    expected = predict(model, STRUCTURES)
    with disable_adapter(model):
        twin = make(model)
        assert_close(predict(twin, STRUCTURES), expected)
    assert is_adapted(twin)
    eject(twin)  # and leaves the other as it was
    assert_close(predict(model, STRUCTURES), expected)


@pytest.mark.parametrize("change", [eject, lambda model: inject(model, PeftConfig("elora"))])
def test_a_model_that_is_off_is_not_changed(change):
    model = adapted("elora")
    with disable_adapter(model), pytest.raises(PeftError, match="switched off: leave disable_adapter first"):
        change(model)


def test_one_thread_at_a_time_has_its_own_default_dtype():
    """MACE builds models in torch's, which is that of all threads."""
    models, before = [tiny_mace(**SMALL), tiny_mace(torch.float32, **SMALL)] * (THREADS // 2), torch.get_default_dtype()

    def work():
        model = models.pop()
        for _ in range(50):
            with default_dtype_of(model):
                time.sleep(1e-6)  # to let others run
                assert torch.get_default_dtype() == next(model.parameters()).dtype

    in_threads(work)
    assert torch.get_default_dtype() == before
