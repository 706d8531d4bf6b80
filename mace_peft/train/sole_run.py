"""One run of a name at a time: two would take each other's checkpoints, model and adapter for their own.

What says so is a lock on a file, which a process has until it ends, however that is: one that is killed leaves none.
"""

import argparse
import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mace_peft.errors import PeftError
from mace_peft.files import one_line_errors
from mace_peft.train.run_files import FOLDERS, folder

try:
    import fcntl
except ModuleNotFoundError:  # where there are no such locks, as on Windows
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what a file system without locks says
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # set by who starts the processes of a distributed run


@contextlib.contextmanager
def sole_run(args: argparse.Namespace, with_peft: bool = True) -> Iterator[None]:
    """While this lasts, no other run writes to files of the same names; runs without ``--peft`` keep out those with it.

    Raises PeftError if one does so already. Of a distributed run, the first process has the locks for all.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None and is_first(args):
            for path in lock_files(args):
                # a run without --peft writes where it can, and has no lock elsewhere
                with one_line_errors(path) if with_peft else contextlib.suppress(OSError):
                    stack.enter_context(locked(path, fcntl.LOCK_EX if with_peft else fcntl.LOCK_SH))
        yield


def is_first(args: argparse.Namespace) -> bool:
    given = [os.environ[name] for name in RANKS if os.environ.get(name, "").isdigit()]
    return not args.distributed or not given or int(given[0]) == 0


def lock_files(args: argparse.Namespace) -> list[Path]:
    """A hidden file in each directory that a run writes to, in an order that is the same for all runs."""
    tag = f"{args.name}_run-{args.seed}"
    stages = ("", "_stagetwo") if getattr(args, "swa", False) else ("",)  # in any release
    # model and adapter have no seed in their names
    paths = {folder(args, "model_dir") / f".{args.name}{stage}.lock" for stage in stages}
    paths |= {folder(args, option) / f".{tag}.lock" for option in FOLDERS if option != "model_dir"}
    return sorted(path.absolute() for path in paths)


@contextlib.contextmanager
def locked(path: Path, kind: int) -> Iterator[None]:
    """kind: the lock of ``fcntl``, exclusive or shared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_locked(path, kind)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the lock counts, not the file; another may share it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        file.close()


def open_locked(path: Path, kind: int) -> TextIO:
    """The file, opened and locked. What is written in it tells others which process has the lock."""
    while True:
        file = open(path, "r+", errors="replace",
                    opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        try:
            take_lock(file, path, kind)
            if is_at(file, path):
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # of a run that has just ended and removed it


def take_lock(file: TextIO, path: Path, kind: int) -> None:
    """Raise PeftError if another process has the lock. Those that this one forks, such as data loaders, do not."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            whose = file.read(200) or "another process"
            raise PeftError(f"a run of the same --name is going on ({whose}), which writes to {path.parent}, too: wait "
                            "for its end, or give this run another --name") from None
        if error.errno not in NO_LOCKS or kind == fcntl.LOCK_SH:
            raise
        warnings.warn(f"the file system of {path} has no locks: start no second run of this name while this one lasts",
                      stacklevel=2)


def is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
