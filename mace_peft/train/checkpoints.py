"""MACE's checkpoints, with what trains and its settings in the place of the whole model, and what a restart needs.

A checkpoint holds the weights that were evaluated: with ``--ema`` their moving averages. The raw ones, the state of the
average, the order of the batches and the progress of the run are in it too, and after every epoch in a file of its own,
from which ``--restart_latest`` goes on.
"""

import argparse
import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from mace.tools import CheckpointHandler, CheckpointState

from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError, one_line
from mace_peft.model.adapted import trainable_parameters
from mace_peft.train.checkpoint_files import CompleteCheckpointIO
from mace_peft.train.progress import Progress, Stage
from mace_peft.train.run_files import warn_of_earlier_results

CUEQ_WEIGHT = "products.0.symmetric_contractions.weight"  # cuEquivariance joins MACE's contractions into one
# options whose effect comes back with the state of optimizer, scheduler and moving average
RESUMED = ("lr", "lr_params_factors", "weight_decay", "amsgrad", "beta", "beta1_schedulefree", "beta2_schedulefree",
           "lr_factor", "scheduler_patience", "lr_scheduler_gamma", "ema_decay")
KEPT = ("peft_adapter", "peft_keep", "peft_keep_weight")  # which the result says of the whole run
REMEDY = "restart with the options it was made with, or give this run another --name"


class AdapterCheckpointHandler(CheckpointHandler):
    """Saves the settings with each checkpoint, and loads only checkpoints of the same settings and the same base.

    foundation: its fingerprint. ``progress`` is None until the training begins; ``stage_two`` tells which stage's
    result was loaded last.
    """

    def __init__(self, *args, config: PeftConfig, foundation: str, options: argparse.Namespace, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.io = CompleteCheckpointIO(*args, **kwargs)
        self.config = config
        self.foundation = foundation
        self.options = {name: getattr(options, name, None) for name in (*RESUMED, *KEPT)}  # releases differ in them
        for name in ("peft_adapter", "peft_keep"):
            if self.options[name] is not None:  # the folder may be given in another way
                self.options[name] = Path(self.options[name]).name
        self.keep = self.io.keep or options.save_all_checkpoints
        self.progress: Progress | None = None
        self.stage_two = False
        self.base: dict[str, dict] = {}  # measures, which take a while
        if not options.restart_latest and not options.dry_run:
            self.io.set_earlier_aside(options.results_dir)
            warn_of_earlier_results(options)

    def file(self, epoch: int) -> str:
        """The name of the epoch's checkpoint in the present stage, as MACE's."""
        return self.io._get_checkpoint_filename(epoch, 0 if self.progress.in_stage_two else None)

    def save_progress(self, state: CheckpointState, ema, loader, averaged: contextlib.AbstractContextManager | None,
                      epoch: int) -> None:
        """Save what a restart needs; and a checkpoint of the epoch, with the weights that the context gives, if any."""
        whole = checkpoint_of(self.builder.create_checkpoint(state), state.model, self.config, self.base)
        self.base = whole["base"]
        whole |= {"foundation": self.foundation, "resume": {
            "weights": whole["model"], "kinds": kinds(state), "options": self.options,
            "ema": None if ema is None else ema.state_dict(), "order": loader.generator.get_state(),
            "progress": self.progress.to_dict()}}
        if averaged is not None:
            with averaged:
                weights = copies(trainable_parameters(state.model))
            self.io.write(self.file(epoch), {**whole, "model": weights})
        self.io.write(self.io.restart, whole)
        self.io.remove_others(self.progress, self.keep)

    def resume(self, state: CheckpointState, ema, loader, swa) -> Progress | None:
        """Go on after the last epoch of an earlier process: returns its progress, None if there is none.

        Raises PeftError if the files do not fit this run, or cannot be read.
        """
        path = self.io.newest()
        if path is None:
            logging.info(f"No checkpoint of {self.io.tag} in {self.io.directory}: the run starts at epoch 0")
            return None
        checkpoint = self.read(path, state.model)
        given = [dict(group) for group in state.optimizer.param_groups]
        resume = checkpoint["resume"]
        if resume["kinds"] != kinds(state):
            raise PeftError(f"the checkpoint {path} was made with {' and '.join(resume['kinds'])}, and this run has "
                            f"{' and '.join(kinds(state))}: {REMEDY}")
        changed = [name for name, value in self.options.items() if resume["options"][name] != value]
        if changed:
            before, now = resume["options"][changed[0]], self.options[changed[0]]
            made = f"without --{changed[0]}" if before is None else f"with --{changed[0]} {before}"
            raise PeftError(f"the checkpoint {path} was made {made}, with which a restart goes on, and this run "
                            f"{'has none' if now is None else f'asks for {now}'}: {REMEDY}")
        try:
            state.model.load_state_dict({**state.model.state_dict(), **resume["weights"]})
            state.optimizer.load_state_dict(checkpoint["optimizer"])
            state.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
            loader.generator.set_state(resume["order"].cpu())
            progress = Progress.from_dict(resume["progress"])
        except Exception as error:  # of other groups of parameters, in many ways
            raise PeftError(f"the checkpoint {path} does not fit this run ({one_line(error)}): {REMEDY}") from error
        if (ema is None) != (resume["ema"] is None):
            raise PeftError(f"the checkpoint {path} was made {'with' if ema is None else 'without'} --ema: {REMEDY}")
        if ema is not None:
            ema.load_state_dict(resume["ema"])
        if progress.in_stage_two and swa is None:
            raise PeftError(f"the checkpoint {path} is one of stage two: add --swa")
        for group, now in zip(state.optimizer.param_groups, given, strict=True):  # the first run may lack stage two
            group.update({name: value for name, value in now.items() if name not in group or name == "swa_lr"})
        for stage in progress.stages:
            if stage.file is not None:
                self.read(os.path.join(self.io.directory, stage.file), state.model)  # in the end it is too late to stop
        logging.info(f"Loading checkpoint: {path}, to go on with epoch {progress.epoch}")
        return progress

    def load_latest(self, state: CheckpointState, swa: bool = False, device=None, strict: bool = False) -> int | None:
        """Load the result of the stage into the model: its best epoch, -1 for the start of the run.

        Before the training there is none: MACE's attempt to restart finds nothing, for ``resume`` does that.
        """
        if self.progress is None:
            return None
        self.stage_two = swa
        stage = self.progress.result(swa)
        state.model.load_state_dict({**state.model.state_dict(), **self.weights(state.model, stage)})
        return -1 if stage is None else stage.epoch

    def weights(self, model: torch.nn.Module, stage: Stage | None) -> dict[str, torch.Tensor]:
        """What trains, as it was after the best epoch of the stage; of None at the start of the run."""
        if stage is None:
            return self.progress.weights
        return self.read(os.path.join(self.io.directory, stage.file), model)["model"]

    def result_in(self, model: torch.nn.Module, stage_two: bool) -> contextlib.AbstractContextManager:
        """Meanwhile the model has the weights of the result of stage one, or two."""
        return holding(model, self.weights(model, self.progress.result(stage_two)))

    def read(self, path: str, model: torch.nn.Module) -> dict:
        """What the file holds. Raises PeftError if it cannot be read, is another run's, or does not fit the model."""
        self.io.check_own()
        try:
            checkpoint = torch.load(path, map_location=next(model.parameters()).device, weights_only=False)
        except Exception as error:  # a damaged file fails in many ways
            raise PeftError(f"the checkpoint {path} cannot be read ({one_line(error)}): delete it and what is newer to "
                            "restart from the one before, or start again without --restart_latest") from error
        self.check(path, checkpoint, model)
        return checkpoint

    def check(self, path: str, checkpoint: dict, model: torch.nn.Module) -> None:
        """Raise PeftError unless the checkpoint has these settings and this base."""
        if "peft" not in checkpoint:
            raise PeftError(f"the checkpoint {path} was made without --peft: restart without --peft, or give this run "
                            "another --name")
        made = PeftConfig(**checkpoint["peft"])
        if made != self.config:
            raise PeftError(f"the checkpoint {path} was made with {made.options()}, and this run asks for "
                            f"{self.config.options()}: {REMEDY}")
        made_with_cueq = CUEQ_WEIGHT in checkpoint["base"]
        if made_with_cueq != (CUEQ_WEIGHT in model.state_dict()):
            raise PeftError(f"the checkpoint {path} was made {'with' if made_with_cueq else 'without'} "
                            f"--enable_cueq True: {REMEDY}")
        trainable = trainable_parameters(model)
        for name, held in model.state_dict().items():
            if name not in trainable and not same(checkpoint["base"].get(name, {"shape": None}), measures(held)):
                raise PeftError(f"the checkpoint {path} was made from another foundation or other E0s, {name} differs: "
                                f"{REMEDY}")
        if checkpoint["foundation"] != self.foundation:  # of the same tensors
            raise PeftError(f"the checkpoint {path} was made from another foundation, whose settings such as r_max or "
                            f"avg_num_neighbors differ (fingerprints {checkpoint['foundation'][:12]} and "
                            f"{self.foundation[:12]}): {REMEDY}")


def kinds(state: CheckpointState) -> list[str]:
    """Of the optimizer and the scheduler, whose states do not fit others."""
    return [type(state.optimizer).__name__, state.lr_scheduler.scheduler]


@contextlib.contextmanager
def holding(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Meanwhile what trains in the model has these weights."""
    trained = trainable_parameters(model)
    now = copies(trained)
    fill(trained, weights)
    try:
        yield
    finally:
        fill(trained, now)


@torch.no_grad()
def fill(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def checkpoint_of(checkpoint: dict, model: torch.nn.Module, config: PeftConfig, base: dict | None = None) -> dict:
    """MACE's checkpoint with the settings, and with what trains alone: the base is in the foundation model.

    Of the base it has measures, by which a restart knows that it goes on from the same one; base: those of before.
    """
    trained = trainable_parameters(model)
    base = base or {name: measures(tensor) for name, tensor in model.state_dict().items() if name not in trained}
    return {**checkpoint, "model": copies(trained), "peft": config.to_dict(), "base": base}


def measures(tensor: torch.Tensor) -> dict:
    """Type, shape, norm, and a sum with a weight for each place: another tensor has others, but for rounding."""
    values = tensor.detach().flatten().cpu().double()  # some devices have no double precision
    waves = torch.arange(len(values), dtype=torch.double).cos()
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "norm": values.norm().item(),
            "sum": (values @ waves).item()}


def same(measured: dict, other: dict) -> bool:
    """But for rounding: also E0s of thousands of eV have to agree to less than a fine-tune corrects."""
    if measured["shape"] != other["shape"]:
        return False
    single = "torch.float32" in (measured["dtype"], other["dtype"])
    tolerance = (1e-6 if single else 1e-8) * other["norm"]
    return all(math.isclose(measured[key], other[key], rel_tol=0, abs_tol=tolerance) for key in ("norm", "sum"))
