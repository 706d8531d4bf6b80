"""MACE's checkpoints, with what trains and its settings in the place of the whole model."""

import argparse
import dataclasses
import io
import logging
import math
import os

import torch
from mace.tools import CheckpointHandler, CheckpointIO, CheckpointState, get_tag

from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError, one_line
from mace_peft.files import one_line_errors, write_complete
from mace_peft.model.adapted import trainable_parameters
from mace_peft.train.options import stop

CUEQ_WEIGHT = "products.0.symmetric_contractions.weight"  # cuEquivariance joins MACE's contractions into one


class AdapterCheckpointHandler(CheckpointHandler):
    """Saves the settings with each checkpoint, and loads only checkpoints of the same settings and the same base.

    ``mace_run_train --restart_latest`` swallows every Exception of ``load_latest`` and starts at epoch 0: so a
    checkpoint that does not fit stops the command. ``stage_two`` tells which stage was loaded last.
    """

    def __init__(self, *args, config: PeftConfig, options: argparse.Namespace, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.io = CompleteCheckpointIO(*args, **kwargs)
        self.config = config
        self.lbfgs = options.lbfgs
        self.stage_two = False
        if not options.restart_latest and not options.dry_run:
            self.io.set_earlier_aside()

    def save(self, state: CheckpointState, epochs: int, keep_last: bool = False) -> None:
        checkpoint = checkpoint_of(self.builder.create_checkpoint(state), state.model, self.config)
        self.io.save(checkpoint, epochs, keep_last)

    def load_latest(self, state: CheckpointState, swa: bool = False, device=None, strict: bool = False) -> int | None:
        # raises where there is none of that stage, which run_train counts on
        path = self.io._get_latest_checkpoint_path(swa=swa)
        if path is None:
            return None
        try:
            checkpoint, epochs = self.io.load(path, device=device)
        except Exception as error:  # a damaged file fails in many ways
            stop(PeftError(f"the checkpoint {path} cannot be read ({one_line(error)}): delete it to restart from the "
                           "one before, or from the start"))
        try:
            self.check(path, checkpoint, state.model)
            checkpoint["model"] = {**state.model.state_dict(), **checkpoint["model"]}
            self.builder.load_checkpoint(state=state, checkpoint=checkpoint, strict=True)
        except PeftError as error:
            stop(error)
        except Exception as error:
            if self.lbfgs and not isinstance(state.optimizer, torch.optim.LBFGS):
                raise  # run_train counts on it: it loads the checkpoint again once its optimizer is LBFGS
            stop(PeftError(f"the checkpoint {path} does not fit this run ({one_line(error)}): restart with the options "
                           "it was made with, or give this run another --name"))
        self.stage_two = swa
        return epochs

    def check(self, path: str, checkpoint: dict, model: torch.nn.Module) -> None:
        """Raise PeftError unless the checkpoint has these settings, but for those of the start, and this base."""
        remedy = "restart with the options it was made with, or give this run another --name"
        if "peft" not in checkpoint:
            raise PeftError(f"the checkpoint {path} was made without --peft: restart without --peft, or give this run "
                            "another --name")
        made = PeftConfig(**{**checkpoint["peft"], "init_std": self.config.init_std})
        if made != self.config:
            raise PeftError(f"the checkpoint {path} was made with {made.options()}, and this run asks for "
                            f"{self.config.options()}: {remedy}")
        made_with_cueq = CUEQ_WEIGHT in checkpoint["base"]
        if made_with_cueq != (CUEQ_WEIGHT in model.state_dict()):
            raise PeftError(f"the checkpoint {path} was made {'with' if made_with_cueq else 'without'} "
                            f"--enable_cueq True: {remedy}")
        trainable = trainable_parameters(model)
        for name, held in model.state_dict().items():
            if name not in trainable and not same(checkpoint["base"].get(name, {"shape": None}), measures(held)):
                raise PeftError(f"the checkpoint {path} was made from another foundation or other E0s, {name} differs: "
                                f"{remedy}")


def checkpoint_of(checkpoint: dict, model: torch.nn.Module, config: PeftConfig) -> dict:
    """MACE's checkpoint with the settings, and with what trains alone: the base is in the foundation model.

    Of the base it has measures, by which a restart knows that it goes on from the same one.
    """
    trained = trainable_parameters(model)
    base = {name: measures(tensor) for name, tensor in model.state_dict().items() if name not in trained}
    model_state = {name: tensor for name, tensor in checkpoint["model"].items() if name in trained}
    return {**checkpoint, "model": model_state, "peft": config.to_dict(), "base": base}


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


class CompleteCheckpointIO(CheckpointIO):
    """Writes a checkpoint in full before the last one goes: a run killed while it saves can restart."""

    def set_earlier_aside(self) -> None:
        """Rename the checkpoints that an earlier run of this name left: MACE loads the latest of all in the end."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        for path in self.of_this_run():
            os.replace(path, f"{path}.earlier")
            logging.info(f"Renamed the checkpoint of an earlier run of this name to {path}.earlier")

    def of_this_run(self) -> list[str]:
        """The paths of its checkpoints, the latest last."""
        known = [self._parse_checkpoint_path(path) for path in self._list_file_paths()]
        own = [info for info in known if info is not None and info.tag == self.tag]
        return [info.path for info in sorted(own, key=lambda info: info.epochs)]

    def save(self, checkpoint: dict, epochs: int, keep_last: bool = False) -> None:
        path = os.path.join(self.directory, self._get_checkpoint_filename(epochs, self.swa_start))
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with one_line_errors(self.directory):
            os.makedirs(self.directory, exist_ok=True)
        write_complete(path, content.getbuffer(), os.path.join(self.directory, f"{self.tag}.unfinished"))
        if not self.keep and self.old_path not in (None, path) and not keep_last:
            os.remove(self.old_path)
        self.old_path = path


def chosen_before(args: argparse.Namespace, config: PeftConfig) -> PeftConfig | None:
    """The settings with the ranks of the checkpoint that ``--restart_latest`` goes on from; None without such a one.

    Raises PeftError if that checkpoint cannot be read.
    """
    if not args.restart_latest or not os.path.isdir(args.checkpoints_dir):
        return None
    paths = CompleteCheckpointIO(args.checkpoints_dir, get_tag(args.name, args.seed)).of_this_run()
    if not paths:
        return None
    try:
        checkpoint = torch.load(paths[-1], map_location="cpu", weights_only=False)
        if "peft" not in checkpoint:
            return None  # whoever loads it says so
        made = PeftConfig(**{**checkpoint["peft"], "init_std": config.init_std})
    except Exception as error:  # a damaged file fails in many ways
        raise PeftError(f"the checkpoint {paths[-1]} has no ranks that can be read ({one_line(error)}): delete it to "
                        "restart from the one before, or from the start") from None
    chosen = dataclasses.replace(config, rank_pattern=made.rank_pattern) if made.rank == "auto" else None
    return chosen if chosen == made else None  # other settings: whoever loads it says so
