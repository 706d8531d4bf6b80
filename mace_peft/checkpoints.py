"""MACE's checkpoints, with the settings of the adapters in them."""

from __future__ import annotations

import argparse
import os

import torch
from mace.tools import CheckpointHandler, CheckpointIO, CheckpointState

from mace_peft.config import PeftConfig, PeftError
from mace_peft.options import stop


class AdapterCheckpointHandler(CheckpointHandler):
    """Saves the settings with each checkpoint, and loads only checkpoints that were made with the same.

    ``mace_run_train --restart_latest`` swallows every Exception of ``load_latest`` and starts at epoch 0: so a
    checkpoint that does not fit stops the command. ``stage_two`` tells which stage was loaded last.
    """

    def __init__(self, *args, config: PeftConfig, options: argparse.Namespace, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.io = RunCheckpointIO(*args, restart=options.restart_latest, **kwargs)
        self.config = config
        self.lbfgs = options.lbfgs
        self.stage_two = False

    def save(self, state: CheckpointState, epochs: int, keep_last: bool = False) -> None:
        checkpoint = self.builder.create_checkpoint(state)
        checkpoint["peft"] = self.config.to_dict()
        self.io.save(checkpoint, epochs, keep_last)

    def load_latest(self, state: CheckpointState, swa: bool = False, device=None, strict: bool = False) -> int | None:
        try:
            result = self.io.load_latest(swa=swa, device=device)
        except UnboundLocalError:  # how MACE says that there is no checkpoint of that stage; run_train counts on it
            raise
        except Exception as error:
            stop(PeftError(f"the latest checkpoint of {self.io.tag} in {self.io.directory} cannot be read ({error}): "
                           "delete it to restart from the one before"))
        if result is None:
            return None
        checkpoint, epochs = result
        try:
            self.check(checkpoint)
            self.builder.load_checkpoint(state=state, checkpoint=checkpoint, strict=True)
        except PeftError as error:
            stop(error)
        except (RuntimeError, ValueError, KeyError) as error:
            if self.lbfgs and not isinstance(state.optimizer, torch.optim.LBFGS):
                raise  # run_train counts on it: it loads the checkpoint again once its optimizer is LBFGS
            cause = " ".join(str(error).split())
            stop(PeftError(f"{self.place()} does not fit this model ({cause:.300}): restart with the options it was "
                           "made with, or give this run another --name"))
        self.stage_two = swa
        return epochs

    def check(self, checkpoint: dict) -> None:
        """Raise PeftError unless the checkpoint was made with these settings, but for those of the start."""
        if "peft" not in checkpoint:
            raise PeftError(f"{self.place()} was made without --peft: restart without --peft, or give this run "
                            "another --name")
        made = PeftConfig(**{**checkpoint["peft"], "init_std": self.config.init_std})
        if made != self.config:
            raise PeftError(f"{self.place()} was made with {made.options()}, and this run asks for "
                            f"{self.config.options()}: restart with the same options, or give this run another --name")

    def place(self) -> str:
        return f"the checkpoint of {self.io.tag} in {self.io.directory}"


class RunCheckpointIO(CheckpointIO):
    """Checkpoints of this run: each is complete before the last one goes, so that a killed run can restart.

    Without ``--restart_latest``, files that an earlier run of the same name left are not this run's: MACE, which loads
    the latest at the end, would take theirs.
    """

    def __init__(self, *args, restart: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        own = [] if restart else [path for path in super()._list_file_paths() if self._is_of_this_name(path)]
        self.earlier = {path: os.stat(path).st_mtime_ns for path in own}

    def _is_of_this_name(self, path: str) -> bool:
        info = self._parse_checkpoint_path(path)
        return info is not None and info.tag == self.tag

    def _list_file_paths(self) -> list[str]:
        return [path for path in super()._list_file_paths()
                if path not in self.earlier or self.earlier[path] != os.stat(path).st_mtime_ns]

    def save(self, checkpoint: dict, epochs: int, keep_last: bool = False) -> None:
        os.makedirs(self.directory, exist_ok=True)
        path = os.path.join(self.directory, self._get_checkpoint_filename(epochs, self.swa_start))
        unfinished = os.path.join(self.directory, f"{self.tag}.unfinished")
        torch.save(obj=checkpoint, f=unfinished)
        os.replace(unfinished, path)
        if not self.keep and self.old_path not in (None, path) and not keep_last:
            os.remove(self.old_path)
        self.old_path = path
