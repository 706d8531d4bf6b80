"""Several processes at one adapter directory, and links and devices in the place of its files."""

import json
import multiprocessing
import os
import queue
import time

import pytest
from test_damage import CONFIG_FILE, SETTINGS, TENSOR_FILE, meaning, small_mace
from tiny import randomise

from mace_peft import PeftConfig, PeftError, files, inject, save_adapter
from mace_peft.adapter.directory import read_adapter
from mace_peft.files import write_complete

forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the savers are forks of this process")


def adapted(number):
    return randomise(inject(small_mace(), [SETTINGS, PeftConfig("elora", rank=1, targets="linears")][number]), number)


def in_rounds(act, barrier, rounds, errors):
    """Act once each round, with all who wait at the barrier."""
    for _ in range(rounds):
        barrier.wait()
        try:
            act()
        except BaseException as error:
            errors.put(repr(error))
        barrier.wait()


@needs_fork
@forks
def test_two_savers_and_a_reader_at_one_directory(tmp_path, rounds=300):
    """What is read, meanwhile and afterwards, is the adapter of one of the two; so is the config to look at."""
    models = [adapted(number) for number in range(2)]
    written = [meaning(save_adapter(model, tmp_path / str(number))) for number, model in enumerate(models)]
    place = save_adapter(models[0], tmp_path / "shared")
    processes = multiprocessing.get_context("fork")
    barrier, errors = processes.Barrier(4), processes.Queue()

    def read():
        assert meaning(place) in written

    acts = [lambda: save_adapter(models[0], place), lambda: save_adapter(models[1], place), read]
    others = [processes.Process(target=in_rounds, args=(act, barrier, rounds, errors), daemon=True) for act in acts]
    for other in others:
        other.start()
    for _ in range(rounds):
        barrier.wait(60)
        barrier.wait(60)
        assert meaning(place) in written
        assert json.loads((place / CONFIG_FILE).read_text()) == read_adapter(place)[1]
        assert {path.name for path in place.iterdir()} == {CONFIG_FILE, TENSOR_FILE}
    for other in others:
        other.join()
    with pytest.raises(queue.Empty):
        pytest.fail(errors.get(timeout=0.1))


@needs_fork
@forks
def test_a_writer_waits_for_the_one_before(tmp_path):
    """The lock is on the unfinished file itself, which the first gives its name meanwhile."""
    path, order = tmp_path / "file", []

    def second():
        write_complete(path, b"second")

    other = multiprocessing.get_context("fork").Process(target=second)
    with files.complete_file(path, b"the first"):
        other.start()
        time.sleep(0.3)
        order.append(other.is_alive())
    other.join()
    assert order == [True] and path.read_bytes() == b"second" and [path.name for path in tmp_path.iterdir()] == ["file"]


LINKS = {
    "a link": lambda path, target: path.symlink_to(target),
    "a hard link": lambda path, target: os.link(target, path),
    "a link to nothing": lambda path, target: path.symlink_to(target.parent / "nothing"),
    "a pipe": lambda path, target: os.mkfifo(path),
    "a link to a device": lambda path, target: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("name", [TENSOR_FILE, CONFIG_FILE, f"{TENSOR_FILE}.unfinished", f"{CONFIG_FILE}.unfinished"])
def test_a_save_follows_no_link_and_waits_for_no_pipe(tmp_path, name, make):
    (tmp_path / "precious").write_text("my only copy")
    (tmp_path / "adapter").mkdir()
    make(tmp_path / "adapter" / name, tmp_path / "precious")
    save_adapter(adapted(0), tmp_path / "adapter")
    assert (tmp_path / "precious").read_text() == "my only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "precious"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG_FILE, TENSOR_FILE}
    assert not any(path.is_symlink() for path in (tmp_path / "adapter").iterdir())
    read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("make", [make for kind, make in LINKS.items() if kind != "a hard link"],
                         ids=[kind for kind in LINKS if kind != "a hard link"])
@pytest.mark.parametrize("name", [TENSOR_FILE, CONFIG_FILE])
def test_a_reader_follows_no_link_and_waits_for_no_pipe(tmp_path, name, make):
    save_adapter(adapted(0), tmp_path / "adapter")
    (tmp_path / "adapter" / name).rename(tmp_path / "target")
    make(tmp_path / "adapter" / name, tmp_path / "target")
    with pytest.raises(PeftError, match=f"{name} is (a link|no regular file): ") as error:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    save_adapter(adapted(0), tmp_path)
    os.truncate(tmp_path / TENSOR_FILE, 2**40)  # with a hole, which takes no room
    with pytest.raises(PeftError, match="has 1,099,511,627,776 bytes, of at most 536,870,912"):
        read_adapter(tmp_path)
