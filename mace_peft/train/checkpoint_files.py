"""The files of a run's checkpoints: complete or not there, none that the run no longer needs, and none of another."""

import io
import logging
import os

import torch
from mace.tools import CheckpointIO

from mace_peft.errors import PeftError
from mace_peft.files import make_folder, one_line_errors, write_complete
from mace_peft.train.progress import Progress


class CompleteCheckpointIO(CheckpointIO):
    """Writes a checkpoint in full before the last one goes: a run killed while it saves can restart.

    Where a file system has no locks, nothing keeps a second run of the same name away (``sole_run``). Whichever of the
    two comes next finds that its files are not those it wrote, and stops.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.written: dict[str, tuple | None] = {}  # what this run wrote, by path: what tells it from another file

    @property
    def restart(self) -> str:
        """The name of the file from which a restart goes on."""
        return f"{self.tag}_restart.pt"

    def set_earlier_aside(self, results: str) -> None:
        """Rename what an earlier run of this name left, its checkpoints and, in the folder of results, its errors by
        epoch: a restart would go on from the first, and MACE would append to the second."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        for path in self.of_this_run():
            os.replace(path, f"{path}.earlier")
            logging.info(f"Renamed the checkpoint of an earlier run of this name to {path}.earlier")
        for path in (os.path.join(self.directory, self.restart), os.path.join(results, f"{self.tag}_train.txt")):
            if os.path.exists(path):
                os.replace(path, f"{path}.earlier")

    def of_this_run(self) -> list[str]:
        """The paths of its checkpoints, the latest last."""
        return [info.path for info in self.known()]

    def known(self) -> list:
        """Path, tag and epoch of this run's checkpoints, as MACE reads them in the names; the latest last."""
        known = [self._parse_checkpoint_path(path) for path in self._list_file_paths()]
        own = [info for info in known if info is not None and info.tag == self.tag]
        return sorted(own, key=lambda info: info.epochs)

    def newest(self) -> str | None:
        """The path of the file that knows most of the run."""
        restart = os.path.join(self.directory, self.restart)
        return restart if os.path.isfile(restart) else next(reversed(self.of_this_run()), None)

    def write(self, name: str, content: dict) -> None:
        written = io.BytesIO()
        torch.save(content, written)
        with one_line_errors(self.directory):
            make_folder(self.directory)
        self.check_own()
        path = os.path.join(self.directory, name)
        write_complete(path, written.getbuffer(), self.tag)
        self.written[path] = identity(path)

    def check_own(self) -> None:
        """Raise PeftError if another file is in the place of one that this run wrote, or if none can be looked at.

        One that is gone says nothing of another run: a disk may be gone.
        """
        for path, known in self.written.items():
            with one_line_errors(self.directory):
                found = identity(path)
            if found not in (known, None):
                raise PeftError(f"the checkpoint {path} is not the one that this run wrote: another run of the same "
                                "--name writes there, too; start one of them again with another --name")

    def remove_others(self, progress: Progress, keep: bool) -> None:
        """Remove checkpoints of epochs that come again and, unless all are kept, those that are not the best ones."""
        best = {stage.file for stage in progress.stages}
        for info in self.known():
            if info.epochs >= progress.epoch or not (keep or os.path.basename(info.path) in best):
                os.remove(info.path)
                self.written.pop(info.path, None)


def identity(path: str) -> tuple | None:
    """What tells a file from another that has taken its place; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
