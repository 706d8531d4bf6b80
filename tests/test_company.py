"""Several processes at one adapter directory, and links and devices in the place of its files."""

import copy
import json
import multiprocessing
import os
import queue
import random
import resource
import shutil
import time

import pytest
import torch
from test_damage import CONFIG_FILE, SETTINGS, TENSOR_FILE, TRAINED, meaning, small_mace
from tiny import randomise

from mace_peft import PeftConfig, PeftError, eject, files, inject, load_adapter, save_adapter
from mace_peft.adapter.directory import CARD_FILE, contents, read_adapter, read_sizes
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
def test_two_savers_and_a_reader_at_one_directory(tmp_path, rounds=100):
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
        assert {path.name for path in place.iterdir()} == {CARD_FILE, CONFIG_FILE, TENSOR_FILE}
    for other in others:
        other.join()
    with pytest.raises(queue.Empty):
        pytest.fail(errors.get(timeout=0.1))


LINKS = {
    "a link": lambda path, target: path.symlink_to(target),
    "a hard link": lambda path, target: os.link(target, path),
    "a link to nothing": lambda path, target: path.symlink_to(target.parent / "nothing"),
    "a pipe": lambda path, target: os.mkfifo(path),
    "a link to a device": lambda path, target: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", ["a pipe", "a link to a device"])
@pytest.mark.parametrize("write", [lambda path: write_complete(path, b"new"),
                                   lambda path: files.complete(torch.save)({}, path)], ids=["bytes", "torch"])
def test_a_pipe_or_device_in_the_place_of_a_file_stays(tmp_path, kind, write):
    LINKS[kind](tmp_path / "out", None)
    before = os.lstat(tmp_path / "out")
    with pytest.raises(PeftError, match="out is no regular file"):
        write(tmp_path / "out")
    assert os.path.samestat(os.lstat(tmp_path / "out"), before) and len(list(tmp_path.iterdir())) == 1


def test_a_file_of_somebody_else_beside_it_stays(tmp_path):
    (tmp_path / "out.unfinished").write_text("my only copy")
    write_complete(tmp_path / "out", b"new")
    assert (tmp_path / "out.unfinished").read_text() == "my only copy"


def test_without_locks_each_writer_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with files.complete_file(tmp_path / "out", b"first"), files.complete_file(tmp_path / "out", b"second"):
        pass
    assert (tmp_path / "out").read_bytes() == b"first" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folders_that_are_made_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", lambda path: synced.append(str(path)))
    save_adapter(adapted(0), tmp_path / "deep" / "adapter")
    assert synced[:2] == [str(tmp_path), str(tmp_path / "deep")]


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



@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("name", [TENSOR_FILE, CONFIG_FILE, f".{TENSOR_FILE}.mace_peft_unfinished",
                                  f".{CONFIG_FILE}.mace_peft_unfinished", f".{CARD_FILE}.mace_peft_unfinished"])
def test_a_save_follows_no_link_and_waits_for_no_pipe(tmp_path, name, make):
    (tmp_path / "precious").write_text("my only copy")
    (tmp_path / "adapter").mkdir()
    make(tmp_path / "adapter" / name, tmp_path / "precious")
    save_adapter(adapted(0), tmp_path / "adapter")
    assert (tmp_path / "precious").read_text() == "my only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "precious"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CARD_FILE, CONFIG_FILE, TENSOR_FILE}
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


@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
def test_what_is_no_file_in_the_place_of_the_card_stays(tmp_path, make):
    (tmp_path / "precious").write_text("my only copy")
    (tmp_path / "adapter").mkdir()
    make(tmp_path / "adapter" / CARD_FILE, tmp_path / "precious")
    before = os.lstat(tmp_path / "adapter" / CARD_FILE)
    save_adapter(adapted(0), tmp_path / "adapter")
    assert os.path.samestat(before, os.lstat(tmp_path / "adapter" / CARD_FILE))
    assert (tmp_path / "precious").read_text() == "my only copy" and len(list(tmp_path.iterdir())) == 2
    read_adapter(tmp_path / "adapter")


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    save_adapter(adapted(0), tmp_path)
    os.truncate(tmp_path / TENSOR_FILE, 2**40)  # with a hole, which takes no room
    with pytest.raises(PeftError, match="has 1,099,511,627,776 bytes, of at most 134,217,728"):
        read_adapter(tmp_path)


# --- hostile directories ----------------------------------------------------------------------------------------------

BOMBS = {
    "a long text": lambda choice: "a" * choice.choice([301, 10**5, 9 * 10**5]),
    "many patterns": lambda choice: ",".join("*" * (1 + number % 9) + "?" for number in range(20_000)),
    "control codes": lambda choice: "\x1b[2J\x1b]0;owned\x07\r\nfingerprint  fine\u202e",
    "a long list": lambda choice: [choice.choice([0, 1.5, "H", None, []])] * 10**5,
    "many fields": lambda choice: {str(number): number for number in range(10**5)},
    "a deep list": lambda choice: json.loads("[" * 500 + "]" * 500),
    "a large number": lambda choice: choice.choice([10**4000, 10**9, -1, 2**63, 1e308]),
    "no number": lambda choice: choice.choice([float("nan"), float("inf"), True, None]),
    "a marked setting": lambda choice: "<rank><adapter>{0}%s",
}
TENSOR_BOMBS = {
    "many tensors": lambda tensors: tensors | {f"x.{number}": torch.zeros(0) for number in range(8000)},
    "a long name": lambda tensors: tensors | {"x" * 9 * 10**5: torch.zeros(1)},
    "a name of control codes": lambda tensors: tensors | {"\x1b[2J\n": torch.zeros(1)},
    "a large tensor": lambda tensors: tensors | {next(iter(tensors)): torch.zeros(10**6)},
    "another type": lambda tensors: {name: tensor.to(torch.complex64) for name, tensor in tensors.items()},
    "no numbers": lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()},
    "none": lambda tensors: {},
}


def hostile(choice, folder, description, tensors):
    """Make a directory that somebody might send; returns what is wrong with it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    description = copy.deepcopy(description)
    kind = choice.choice(["field", "field", "field", "tensors", "place"])
    if kind == "field":
        description["training"] = copy.deepcopy(TRAINED)
        inside = choice.choice([description, description["peft"], description["foundation"], description["versions"],
                                description["training"], description["training"]["options"]])
        name, bomb = choice.choice([*inside, "more\n\x1b[1m"]), choice.choice([*BOMBS])
        inside[name] = BOMBS[bomb](choice)
        what = name, bomb
    elif kind == "tensors":
        what = choice.choice([*TENSOR_BOMBS])
        tensors = TENSOR_BOMBS[what](tensors)
    for name, content in contents(description, tensors).items():
        (folder / name).write_bytes(content)
    if kind == "place":
        name, what = choice.choice([CONFIG_FILE, TENSOR_FILE]), choice.choice([*LINKS, "a hole", "a folder", "nothing"])
        (folder / name).rename(folder / "target")
        if what in LINKS:
            LINKS[what](folder / name, folder / "target")
        elif what == "a hole":
            (folder / name).touch()
            os.truncate(folder / name, choice.choice([2**20 + 1, 2**29 + 1, 2**40]))
        elif what == "a folder":
            (folder / name).mkdir()
    return what


@pytest.mark.parametrize("names", [["x" * 301], [f"x.{number}" for number in range(5001)]], ids=["long", "many"])
def test_long_and_many_names_are_refused_before_their_tensors_are_loaded(tmp_path, monkeypatch, names):
    """A table of them would pad each row to the longest one."""
    _, description, tensors = read_adapter(save_adapter(adapted(0), tmp_path))
    for name, content in contents(description, tensors | dict.fromkeys(names, torch.zeros(0))).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("mace_peft.adapter.directory.load", None)
    for read in (read_adapter, read_sizes):
        with pytest.raises(PeftError, match="more than 5,000 tensors, or one whose name is longer than 300 signs"):
            read(tmp_path)


def test_info_loads_no_tensor_and_checks_what_was_saved(tmp_path, monkeypatch):
    _, description, tensors = read_adapter(save_adapter(adapted(0), tmp_path))
    monkeypatch.setattr("mace_peft.adapter.directory.load", None)
    assert read_sizes(tmp_path) == (description, {name: tensor.numel() for name, tensor in tensors.items()})
    with open(tmp_path / TENSOR_FILE, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(PeftError, match="checksum differs"):
        read_sizes(tmp_path)


def test_hostile_directories_end_in_a_line_soon_and_cost_little(tmp_path, rounds=80):
    foundation = small_mace()
    _, description, tensors = read_adapter(save_adapter(adapted(0), tmp_path / "good"))
    choice, peak = random.Random(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(rounds):
        what = hostile(choice, tmp_path / "hostile", description, tensors)
        start = time.process_time()
        try:
            eject(load_adapter(foundation, tmp_path / "hostile"))
        except PeftError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 2000, (number, what)
        assert time.process_time() - start < 2, (number, what)
    assert refused > 0.8 * rounds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000
