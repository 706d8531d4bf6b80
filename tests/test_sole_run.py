"""Two runs of one name do not touch each other's files."""

import argparse
import contextlib
import errno
import functools
import os
import time
import unittest.mock
from pathlib import Path

import pytest
import torch
from forks import SERVER, Forked
from runs import NAME, SEED, arguments, finish, train_here, write_inputs

from mace_peft import PeftError
from mace_peft.train import sole_run as module
from mace_peft.train.checkpoint_files import CompleteCheckpointIO
from mace_peft.train.checkpoints import AdapterCheckpointHandler
from mace_peft.train.sole_run import lock_files, sole_run

run_without_peft = functools.partial(sole_run, with_peft=False)
PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products", "max_num_epochs": 1}
GOING_ON = r"a run of the same --name is going on \(process \d+ on .*\), which writes to .*: wait for its end"


def options(folder, **changed):
    directories = dict.fromkeys(("model_dir", "log_dir", "checkpoints_dir", "results_dir"))
    return argparse.Namespace(**{"name": NAME, "seed": SEED, "work_dir": str(folder), **directories,
                                 "distributed": False, "swa": True, **changed})


def hold(begin, args, ready):
    """A process of its own: locks are those of processes."""
    with begin(args):
        Path(ready).touch()
        time.sleep(600)


@contextlib.contextmanager
def running(folder, begin=sole_run, **changed):
    """Another run has the locks; gives its process."""
    ready = folder / "ready"
    process = SERVER.Process(target=hold, args=(begin, options(folder, **changed), ready))
    process.start()
    while not ready.exists():
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.kill()
        process.join()
        ready.unlink()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("peft", [PEFT, {"max_num_epochs": 1}], ids=["with", "without"])
def test_a_second_run_stops_before_it_writes_anything(inputs, tmp_path, capsys, peft):
    with running(tmp_path):
        before = files(tmp_path)
        with pytest.raises(SystemExit, match="2"):
            train_here(inputs, work_dir=tmp_path, **peft)
        assert files(tmp_path) == before
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "a run of the same --name is going on (process" in said[0]


@pytest.mark.parametrize("changed, goes", [
    ({"name": "other"}, True), ({"work_dir": "elsewhere"}, True), ({"seed": 2}, False),
    ({"work_dir": "elsewhere", "model_dir": "."}, False), ({"work_dir": "elsewhere", "log_dir": "logs"}, False),
    ({"work_dir": "elsewhere", "checkpoints_dir": "checkpoints"}, False),
    ({"seed": 2, "model_dir": "elsewhere"}, True), ({"name": f"{NAME}_stagetwo"}, False)], ids=str)
def test_runs_stop_each_other_where_they_write_to_the_same_files(tmp_path, changed, goes):
    changed = {name: str(tmp_path / value) if name.endswith("_dir") else value for name, value in changed.items()}
    with running(tmp_path):
        for begin in (sole_run, run_without_peft):
            with contextlib.nullcontext() if goes else pytest.raises(PeftError, match=GOING_ON), \
                    begin(options(tmp_path, **changed)):
                pass


def test_runs_without_peft_go_side_by_side_and_one_with_stops(tmp_path):
    with running(tmp_path, run_without_peft):
        with run_without_peft(options(tmp_path)):
            pass
        with pytest.raises(PeftError, match=GOING_ON), sole_run(options(tmp_path)):
            pass


def test_a_lock_file_that_is_no_text_is_a_lock(tmp_path):
    with running(tmp_path):
        for path in lock_files(options(tmp_path)):
            path.write_bytes(b"\xff\xfe")
        for check in (lambda args: sole_run(args).__enter__(), lambda args: run_without_peft(args).__enter__()):
            with pytest.raises(PeftError, match="a run of the same --name is going on"):
                check(options(tmp_path))


def test_a_run_that_was_killed_leaves_no_lock(tmp_path):
    with running(tmp_path) as process:
        process.kill()
        process.join()
        assert all(path.exists() for path in lock_files(options(tmp_path)))
        with sole_run(options(tmp_path)):
            pass
    assert not any(path.exists() for path in lock_files(options(tmp_path)))


def test_a_file_that_its_run_removes_meanwhile_is_no_lock(tmp_path):
    path, opened = tmp_path / "lock", []

    def removed_first(file, path, kind, original=module.take_lock):
        original(file, path, kind)
        if not opened:
            path.unlink()
        opened.append(file)

    with unittest.mock.patch.object(module, "take_lock", removed_first):
        file = module.open_locked(path, module.fcntl.LOCK_EX)
    assert len(opened) == 2 and opened[0].closed and os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    file.close()


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_of_several_processes_the_first_has_the_lock(tmp_path, monkeypatch, name):
    for other in module.RANKS:
        monkeypatch.delenv(other, raising=False)
    with running(tmp_path):
        monkeypatch.setenv(name, "1")
        with sole_run(options(tmp_path, distributed=True)):
            pass
        monkeypatch.setenv(name, "0")
        with pytest.raises(PeftError, match=GOING_ON):
            sole_run(options(tmp_path, distributed=True)).__enter__()


def test_a_file_system_without_locks_is_told_of(tmp_path):
    error = OSError(errno.ENOLCK, "No locks available")
    with unittest.mock.patch.object(module.fcntl, "lockf", side_effect=error), \
            pytest.warns(UserWarning, match="has no locks: start no second run of this name"), \
            sole_run(options(tmp_path)):
        pass


def test_without_such_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    with run_without_peft(options(tmp_path)), sole_run(options(tmp_path)):
        assert not list(tmp_path.iterdir())


def test_without_locks_neither_of_two_runs_takes_checkpoints_of_the_other_for_its_own(tmp_path):
    first, second = (CompleteCheckpointIO(str(tmp_path), "run_run-1") for _ in range(2))
    first.write(first.restart, {"of": "first"})
    first.check_own()
    second.set_earlier_aside(str(tmp_path))
    first.check_own()
    second.write(second.restart, {"of": "second"})
    with pytest.raises(PeftError, match="is not the one that this run wrote: another run of the same --name"):
        first.check_own()  # before the run reads its result
    with pytest.raises(PeftError, match="is not the one that this run wrote"):
        first.write(first.restart, {"of": "first"})
    second.check_own()
    assert torch.load(tmp_path / second.restart, weights_only=True) == {"of": "second"}


def test_without_locks_a_run_stops_where_another_has_its_checkpoints(inputs, tmp_path, monkeypatch, capsys):
    read = AdapterCheckpointHandler.read

    def another_comes_first(self, path, model):
        other = CompleteCheckpointIO(self.io.directory, self.io.tag)
        other.write(os.path.basename(path), torch.load(path, weights_only=False))
        return read(self, path, model)

    monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setattr(AdapterCheckpointHandler, "read", another_comes_first)
    with pytest.raises(SystemExit, match="2"):
        train_here(inputs, work_dir=tmp_path, **PEFT)
    assert "is not the one that this run wrote" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / f"{NAME}.model").exists() and not (tmp_path / f"{NAME}_adapter").exists()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / f".{NAME}.lock").symlink_to(target)
    with pytest.raises(PeftError, match="cannot be written"):
        sole_run(options(tmp_path)).__enter__()
    assert target.read_text() == "precious"


def test_of_two_equal_runs_that_start_together_one_ends_with_its_own(inputs, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    started = [Forked(folder, arguments(inputs, work_dir=tmp_path / "shared", lr=lr, **PEFT))
               for folder, lr in zip(folders, (0.01, 0.02), strict=True)]
    runs = [finish(folder, process) for folder, process in zip(folders, started, strict=True)]
    winner = [run.returncode for run in runs].index(0)
    assert runs[1 - winner].returncode == 2 and "is going on" in runs[1 - winner].stderr
    alone = train_here(inputs, work_dir=tmp_path / "alone", lr=(0.01, 0.02)[winner], **PEFT)
    saved = [torch.load(folder / f"{NAME}.model", weights_only=False).state_dict()
             for folder in (tmp_path / "shared", tmp_path / "alone")]
    assert alone and all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])
    assert not list(tmp_path.glob("shared/**/*.lock"))
