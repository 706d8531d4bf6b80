"""A save that is killed at any moment leaves a directory with the old adapter or the new one."""

import os
import random
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from test_damage import SETTINGS, meaning, small_mace
from test_storage import fail_at
from tiny import randomise

from mace_peft import PeftConfig, PeftError, inject, load_adapter, save_adapter, trainable_parameters
from mace_peft.adapter import directory as storage
from mace_peft.adapter.directory import CONFIG_FILE, TENSOR_FILE

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed save runs in a fork of the process")
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Models of different settings and weights, and what a directory of each says."""
    settings = [SETTINGS, SETTINGS, PeftConfig("elora", rank=1, targets="linears"), PeftConfig("scales")]
    models = [randomise(inject(small_mace(), one), seed) for seed, one in enumerate(settings)]
    return [(model, meaning(save_adapter(model, tmp_path_factory.mktemp("version")))) for model in models]


def killed(model, directory, prepare, *arguments):
    """Whether a copy of this process, so prepared, was killed while it saved the model."""
    child = os.fork()
    if not child:
        try:
            prepare(*arguments)
            save_adapter(model, directory)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def at_moment(moment):
    """Kill this process at that one of the calls to the file system, and the lines of directory.py that follow one."""
    passed = 0

    def tick(started):
        nonlocal passed
        passed += started
        if passed == moment:
            kill()

    def trace(frame, *_):
        if frame.f_code.co_filename != storage.__file__:
            return None
        tick(started=passed > 0)
        return trace

    sys.addaudithook(lambda event, _: tick(started=event == "open" or event.startswith("os.")))
    sys.settrace(trace)


def within(method, number):
    """Kill this process at that call of the method of Path: a write after half of the content."""
    original, calls = getattr(Path, method), []

    def killing(path, argument):
        calls.append(path)
        if len(calls) == number:
            if method == "write_bytes":
                original(path, argument[:len(argument) // 2])
            kill()
        return original(path, argument)

    setattr(Path, method, killing)


def state(directory):
    """What the directory says, or None where that is refused in a line."""
    try:
        return meaning(directory)
    except PeftError as error:
        assert "is no adapter directory" in str(error) and "\n" not in str(error)
        return None


@needs_fork
@forks
@pytest.mark.parametrize("there_already", [True, False])
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_adapter(versions, tmp_path, there_already):
    (old_model, old), (new_model, new) = versions[0], versions[2]
    states, moment, alive = [], 0, False
    while not alive:
        moment += 1
        directory = tmp_path / str(moment) / "adapter"
        if there_already:
            save_adapter(old_model, directory)
        alive = not killed(new_model, directory, at_moment, moment)
        states.append(state(directory))
        save_adapter(old_model, directory)
        assert state(directory) == old and {path.name for path in directory.iterdir()} == {CONFIG_FILE, TENSOR_FILE}
    before = old if there_already else None
    switch = states.index(new)
    assert states == [before] * switch + [new] * (len(states) - switch)
    assert switch > 10 and len(states) - switch > 2


@needs_fork
@forks
@pytest.mark.parametrize("there_already", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_a_save_killed_within_a_file_leaves_what_was_there(versions, tmp_path, number, there_already):
    (old_model, old), (new_model, new) = versions[0], versions[1]
    if there_already:
        save_adapter(old_model, tmp_path)
    assert killed(new_model, tmp_path, within, "write_bytes", number)
    assert state(tmp_path) == (old if there_already else None)
    save_adapter(new_model, tmp_path)
    assert state(tmp_path) == new


@needs_fork
@forks
def test_saves_killed_one_after_the_other_leave_the_old_or_the_new_adapter(versions, tmp_path):
    choice, current, seen = random.Random(0), None, set()
    for number in range(100):
        model, new = choice.choice([version for version in versions if version[1] != current])
        if choice.random() < 0.7:
            killed(model, tmp_path, at_moment, choice.randint(1, 40))
        else:
            killed(model, tmp_path, within, "write_bytes", choice.randint(1, 2))
        found = state(tmp_path)
        assert found in (current, new), number
        seen.add((found == new, frozenset(path.name for path in tmp_path.iterdir())))
        current = found
    assert len(seen) > 3


@needs_fork
@forks
def test_what_a_killed_save_left_loads_as_the_trained_model(versions, tmp_path):
    """The tensors are in place, and their config is not yet."""
    model, _ = versions[2]
    save_adapter(versions[0][0], tmp_path)
    assert killed(model, tmp_path, within, "replace", 2)
    loaded = load_adapter(small_mace(), tmp_path)
    expected = trainable_parameters(model)
    assert loaded.peft_config == model.peft_config
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trainable_parameters(loaded).items())


@needs_fork
@forks
@pytest.mark.parametrize("there_already", [True, False])
@pytest.mark.parametrize("method, number", [("write_bytes", 1), ("write_bytes", 2), ("replace", 1), ("replace", 2)])
def test_a_save_killed_over_what_a_killed_one_left_leaves_that(versions, tmp_path, method, number, there_already):
    (first_model, _), (second_model, second), (third_model, third) = versions[:3]
    if there_already:
        save_adapter(first_model, tmp_path)
    assert killed(second_model, tmp_path, within, "replace", 2)
    assert killed(third_model, tmp_path, within, method, number)
    assert state(tmp_path) == second
    save_adapter(third_model, tmp_path)
    assert state(tmp_path) == third


@needs_fork
@forks
@pytest.mark.parametrize("method, number", [("write_bytes", 1), ("write_bytes", 2), ("replace", 1), ("replace", 2)])
def test_a_save_that_fails_over_what_a_killed_one_left_leaves_that(versions, tmp_path, monkeypatch, method, number):
    (first_model, _), (second_model, second), (third_model, _) = versions[:3]
    save_adapter(first_model, tmp_path)
    assert killed(second_model, tmp_path, within, "replace", 2)
    fail_at(monkeypatch, method, number)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(third_model, tmp_path)
    assert state(tmp_path) == second
