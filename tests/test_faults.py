"""A full disk and places that cannot be written to: one line, exit code 2, and what was good stays good."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from forks import Forked
from runs import NAME, SEED, Run, arguments, finish, fork, train_here, write_inputs
from tiny import tiny_mace

from mace_peft.adapter.directory import read_adapter
from mace_peft.train import run_files

PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products"}
LIMIT = 80_000  # bytes: above any log of these runs, below their checkpoints, models and the adapter of all weights


# --- disks ------------------------------------------------------------------------------------------------------------


def mount(folder: Path, size: int = 8_000_000) -> bool:
    """Mount a file system of that size; whether this is allowed here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, mode: str) -> int:
    return subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], capture_output=True).returncode


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        allowed = mount(Path(folder))
        if allowed:
            unmount(Path(folder))
        return allowed


class SmallDisk:
    """A file system of 8 MB: full, or behind a read-only one from some moment on. Root has to mount it."""

    full = "No space left on device"
    unwritable = "Read-only file system"

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        assert mount(folder)

    def fill(self, process: Forked) -> None:
        with open(self.folder / "other data", "ab") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))

    def empty(self) -> None:
        (self.folder / "other data").unlink()

    def protect(self) -> None:
        assert mount(self.folder) and remount(self.folder, "ro") == 0  # it itself is busy: the run has a file open

    def allow(self) -> None:
        unmount(self.folder)

    def close(self) -> None:
        unmount(self.folder)


class LimitedFiles:
    """A folder in which a process may write no file above a size, or that a file takes the place of. Needs no root."""

    full = "File too large"
    unwritable = "File exists|Not a directory"

    def __init__(self, folder: Path):
        self.folder = folder
        self.there, self.file = folder.with_name("there"), folder.with_name("file")
        self.there.mkdir()
        self.file.touch()
        self.point_to(self.there)

    def point_to(self, path: Path) -> None:
        """At once, so that the command never finds nothing there."""
        link = self.folder.with_name("link")
        link.symlink_to(path)
        link.replace(self.folder)

    def fill(self, process: Forked) -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    def empty(self) -> None:
        pass

    def protect(self) -> None:
        self.point_to(self.file)

    def allow(self) -> None:
        self.point_to(self.there)

    def close(self) -> None:
        pass


@pytest.fixture(params=[SmallDisk if can_mount() else LimitedFiles])
def disk(request, tmp_path):
    disk = request.param(tmp_path / "disk")
    yield disk
    disk.close()


def in_one_line(run: Run) -> str:
    """What the command says as it stops; the log is on another disk."""
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("mace_run_train: error: ") and run.stderr.count("\n") == 1
    return run.stderr


def checkpoints(folder: Path) -> dict[int, dict]:
    """The checkpoints of a folder by epoch: all of them load."""
    begin = f"{NAME}_run-{SEED}_epoch-"
    found = {int(path.stem.removeprefix(begin)): torch.load(path) for path in folder.glob(f"{begin}*")}
    assert all(tensor.isfinite().all() for one in found.values() for tensor in one["model"].values())
    return found


# --- during the run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["full", "unwritable"])
def test_a_disk_that_takes_no_checkpoint_keeps_the_last_one(tmp_path, disk, fault):
    folder = write_inputs(tmp_path / "run")
    options = {**PEFT, "checkpoints_dir": disk.folder}
    process = Forked(folder, arguments(folder, **options, max_num_epochs=500))
    while not any(int(re.search(r"epoch-(\d+)", path.name)[1]) >= 2 for path in disk.folder.glob("*_epoch-*.pt")):
        assert process.poll() is None, (folder / "stderr").read_text()
        time.sleep(0.01)
    if fault == "unwritable":
        disk.protect()
    while process.poll() is None and fault == "full":
        disk.fill(process)
        time.sleep(0.01)
    said = in_one_line(finish(folder, process))
    assert re.search(rf"{disk.folder}.* cannot be written \(({getattr(disk, fault)})\).*--restart_latest", said)

    disk.allow() if fault == "unwritable" else disk.empty()
    kept = checkpoints(disk.folder)
    assert kept and max(kept) >= 2
    run = fork(folder, "--restart_latest", **options, max_num_epochs=max(kept) + 2)
    assert run.returncode == 0 and f"Loading checkpoint: {disk.folder}" in run.stdout
    assert max(checkpoints(disk.folder)) == max(kept) + 1 and not list(disk.folder.glob("*unfinished*"))


def test_a_full_disk_keeps_the_adapter_that_was_there(tmp_path, disk):
    folder = write_inputs(tmp_path / "run", foundation=tiny_mace(channels=16))
    options = {**PEFT, "peft_train_also": "*", "model_dir": disk.folder}
    first = fork(folder, **options)
    adapter = disk.folder / f"{NAME}_adapter"
    assert first.returncode == 0 and (adapter / "adapter_model.safetensors").stat().st_size > LIMIT
    held, kept = {path.name: path.read_bytes() for path in adapter.iterdir()}, checkpoints(folder / "checkpoints")

    # it has no epoch left to train, so that the adapter is what it saves first
    process = Forked(folder, arguments(folder, "--restart_latest", **options, max_num_epochs=1))
    while not (disk.folder / f".{NAME}.lock").exists():  # with which a run begins
        time.sleep(0.001)
    disk.fill(process)
    said = in_one_line(finish(folder, process))
    assert f"{adapter} cannot be written ({disk.full})" in said and "--restart_latest" in said
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == held
    assert read_adapter(adapter) and checkpoints(folder / "checkpoints").keys() == kept.keys()


@pytest.mark.parametrize("path", [f"{NAME}.model", f"{NAME}_compiled.model", f"checkpoints/{NAME}_run-{SEED}.model"])
def test_what_has_the_name_of_a_model_and_is_no_file_is_named_before_the_training(tmp_path, capsys, path):
    (tmp_path / path).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        train_here(write_inputs(tmp_path), **PEFT)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"{tmp_path / path} is no regular file, but a directory" in said
    assert not (tmp_path / "logs").exists()


def test_the_log_says_that_a_compiled_model_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "check_regular", lambda path: None)  # as if it came during the training
    path = tmp_path / f"{NAME}_compiled.model"
    path.mkdir()
    run = train_here(write_inputs(tmp_path), **PEFT)
    assert f"ERROR: No compiled model is written: {path} is no regular file, but a directory" in run.log
    assert run.model() is not None and not list(tmp_path.glob("*unfinished*"))


# --- before the run ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_write_permission(folder: Path):
    """A folder in which this process may make no file: root is nobody for a while."""
    place, root = Path(tempfile.mkdtemp()), os.geteuid() == 0  # where others may look, too
    place.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield place
    finally:
        if root:
            os.seteuid(0)
        place.rmdir()


@contextlib.contextmanager
def read_only_disk(folder: Path):
    assert mount(folder)
    try:
        assert remount(folder, "ro") == 0
        yield folder
    finally:
        unmount(folder)


@contextlib.contextmanager
def below_a_file(folder: Path):
    (folder / "file").touch()
    yield folder / "file"


PLACES = {
    "without_permission": (without_write_permission, "Permission denied"),
    "below_a_file": (below_a_file, "Not a directory"),
    **({"read_only": (read_only_disk, "Read-only file system")} if can_mount() else {}),
}


@pytest.mark.parametrize("option", ["model_dir", "checkpoints_dir", "results_dir", "log_dir", "work_dir"])
@pytest.mark.parametrize("place, cause", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("below", ["", "new/folder"], ids=["itself", "below"])
def test_a_place_that_cannot_be_written_to_stops_before_any_data_is_read(tmp_path, capsys, option, place, cause, below):
    """There is no foundation model, which would be the next thing to be missed."""
    with place(tmp_path) as folder, pytest.raises(SystemExit) as stopped:
        train_here(Path(tempfile.gettempdir()), **PEFT | {option: folder / below})
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert str(folder / below) in said and cause in said and "give another directory" in said
    assert option in said or option == "work_dir"
