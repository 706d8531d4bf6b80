"""A save that is killed at any moment leaves a directory with the old adapter or the new one."""

import os
import random
import signal
import sys
import traceback

import pytest
from test_damage import SETTINGS, meaning, small_mace
from tiny import randomise

from mace_peft import PeftConfig, PeftError, inject, save_adapter
from mace_peft.adapter.directory import CARD_FILE, CONFIG_FILE, TENSOR_FILE

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed save runs in a fork of the process")
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Models of different settings and weights, and what a directory of each says."""
    settings = [SETTINGS, SETTINGS, PeftConfig("elora", rank=1, targets="linears"), PeftConfig("scales")]
    models = [randomise(inject(small_mace(), one), seed) for seed, one in enumerate(settings)]
    return [(model, meaning(save_adapter(model, tmp_path_factory.mktemp("version")))) for model in models]


def killed(model, path, prepare, *arguments):
    """Whether a copy of this process, so prepared, was killed while it saved the model."""
    child = os.fork()
    if not child:
        try:
            prepare(*arguments)
            save_adapter(model, path)
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
    """Kill this process right before that one of its calls to the file system: between two, nothing on it changes."""
    passed = 0

    def tick(event, _):
        nonlocal passed
        passed += event == "open" or event.startswith(("os.", "fcntl."))
        if passed == moment:
            kill()

    sys.addaudithook(tick)


def within_write(number):
    """Kill this process at that time when a file goes to the disk, which has half of its content by then."""
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            kill()

    os.fsync = fsync


def state(path):
    """What the directory says, or None where that is refused in a line."""
    try:
        return meaning(path)
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
        path = tmp_path / str(moment) / "adapter"
        if there_already:
            save_adapter(old_model, path)
        alive = not killed(new_model, path, at_moment, moment)
        states.append(state(path))
        save_adapter(old_model, path)
        assert state(path) == old
        assert {file.name for file in path.iterdir()} == {CARD_FILE, CONFIG_FILE, TENSOR_FILE}
    before = old if there_already else None
    switch = states.index(new)
    assert states == [before] * switch + [new] * (len(states) - switch)
    assert switch > 5 and len(states) - switch > 2


@needs_fork
@forks
@pytest.mark.parametrize("there_already", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_save_killed_within_a_file_leaves_what_was_there(versions, tmp_path, number, there_already):
    (old_model, old), (new_model, new) = versions[0], versions[1]
    if there_already:
        save_adapter(old_model, tmp_path)
    assert killed(new_model, tmp_path, within_write, number)
    assert state(tmp_path) == (old if there_already else None)
    save_adapter(new_model, tmp_path)
    assert state(tmp_path) == new


@needs_fork
@forks
def test_saves_killed_one_after_the_other_leave_the_old_or_the_new_adapter(versions, tmp_path):
    choice, current, seen = random.Random(0), None, set()
    for number in range(40):
        model, new = choice.choice([version for version in versions if version[1] != current])
        if choice.random() < 0.7:
            killed(model, tmp_path, at_moment, choice.randint(1, 40))
        else:
            killed(model, tmp_path, within_write, choice.randint(1, 3))
        found = state(tmp_path)
        assert found in (current, new), number
        seen.add((found == new, frozenset(path.name for path in tmp_path.iterdir())))
        current = found
    assert len(seen) > 3
