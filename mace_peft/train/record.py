"""What a run tells of itself: its data, settings and errors, for its adapters, their cards and the end of its log."""

import argparse
import datetime
import logging
import math
import types
from collections.abc import Callable
from pathlib import Path

from mace.tools import build_default_arg_parser
from torch import nn

from mace_peft.train.checkpoints import AdapterCheckpointHandler, holding
from mace_peft.train.metrics import without_stress
from mace_peft.train.no_effect import without_effect
from mace_peft.train.progress import Progress
from mace_peft.train.start import Start

# options of MACE that a methods section needs, the last ones if they are given; weights of the loss are in its own text
OPTIONS = ("lr", "swa", "start_swa", "swa_lr", "batch_size", "max_num_epochs", "optimizer", "lbfgs",
           "weight_decay", "clip_grad", "scheduler", "lr_scheduler_gamma", "lr_factor", "scheduler_patience", "ema",
           "ema_decay", "seed", "error_table")
LISTED = "mae_", "rmse_"  # beginnings of the names of errors that are kept
IF_GIVEN = ("patience", "config_type_weights", "weight_pt_head", "peft_keep", "peft_keep_weight")


class Record:
    """Collects the errors of a run that has been trained, by set of structures.

    heads: MACE's configuration of each. checkpoints: have the weights of the start. trained: the arguments of
    ``mace.tools.train.train``. loaders: those of the next table of errors, by MACE's names.
    """

    def __init__(self, args: argparse.Namespace, start: Start, heads: list,
                 checkpoints: AdapterCheckpointHandler, trained: types.SimpleNamespace):
        self.args = args
        self.start = start
        self.heads = heads
        self.checkpoints = checkpoints
        self.trained = trained
        self.loaders: dict[str, object] = {}
        self.sizes: dict[str, int] = {}
        self.of_start: dict[str, dict[str, float]] = {}
        self.of_result: dict[bool, dict[str, dict[str, float]]] = {False: {}, True: {}}

    @property
    def progress(self) -> Progress:
        return self.checkpoints.progress

    def evaluate(self, evaluate: Callable, model: nn.Module, *, data_loader, output_args: dict[str, bool], **kwargs
                 ) -> tuple[float, dict]:
        """Loss and errors of the model, the result of the stage that was loaded last; those of the start are noted too.

        evaluate: ``mace.tools.evaluate``. All processes of a run call it.
        """
        def measure() -> tuple[float, dict]:
            loss, errors = evaluate(model, data_loader=data_loader, output_args=output_args, **kwargs)
            return loss, without_stress(errors, output_args)

        name = self.name_of(data_loader)
        loss, errors = measure()
        finite = plain(errors)
        self.sizes[name], self.of_result[self.checkpoints.stage_two][name] = len(data_loader.dataset), finite
        if len(finite) < sum(key.startswith(LISTED) for key in errors):
            logging.warning(f"Errors on the set {name} are NaN or infinite, and the table and the adapter leave them "
                            "out: the model is far off for some of its structures")
        if name not in self.of_start:
            with holding(self.trained.model, self.progress.weights):
                self.of_start[name] = plain(measure()[1])
        return loss, errors

    def name_of(self, loader) -> str:
        """What the set of structures is called: train, valid or test, with the head or the type where there are more.
        """
        single = len(self.heads) == 1
        for config in self.heads:
            name = config.head_name
            for part, held in (("train", config.train_loader), ("valid", self.trained.valid_loaders[name])):
                if held is loader:
                    return part if single else f"{part} {name}"
        (name,) = [name for name, held in self.loaders.items() if held is loader]
        name = name.removeprefix("Default_")  # MACE's name is made of the type and the head
        if single:
            name = name.removesuffix(self.heads[0].head_name).removesuffix("_")
        return f"test {name}".rstrip()

    def training(self, stage_two: bool) -> dict:
        """What the adapter of the stage holds of it, see ``mace_peft.adapter.description.TRAINING``."""
        stage, result = self.progress.result(stage_two), self.of_result[stage_two]
        two = stage_two and self.progress.in_stage_two
        loss = self.trained.swa.loss_fn if two else self.trained.loss_fn
        default = build_default_arg_parser().get_default
        said = {name: getattr(self.args, name, None) for name in (*OPTIONS, *IF_GIVEN)
                if name not in without_effect(self.args)}
        if said["peft_keep"] is not None:
            (said["peft_keep"],) = names_of(said["peft_keep"])
        return {
            "date": datetime.date.today().isoformat(),
            "heads": {config.head_name: self.data_of(config) for config in self.heads},
            "loss": " ".join(str(loss).split()),
            "options": {name: value if isinstance(value, (int, float)) and math.isfinite(value) else str(value)
                        for name, value in said.items()
                        if value not in (None, False) and (name in OPTIONS or value != default(name))},
            "epochs": self.progress.epoch,
            "best_epoch": None if stage is None else stage.epoch,
            "stage": None if stage is None else ("one", "two")[self.progress.stages.index(stage)],
            "start": "adapter" if self.start.adapted is not None else
                     "random gates" if self.start.config.init_std else "foundation",
            "errors": {name: {"structures": self.sizes[name], "start": self.of_start[name], "result": errors}
                       for name, errors in result.items() if name in self.of_start},
        }

    def data_of(self, config) -> dict:
        """Files, without the folders of this machine, and numbers of structures of a head."""
        files = {part: names_of(getattr(config, part)) for part in ("train_file", "valid_file", "test_file")}
        words = str(config.E0s)
        return {"E0s": "numbers" if words.startswith("{") else words, **files,
                "test_file": files["test_file"] + names_of(config.test_dir),
                "train": len(config.train_loader.dataset),
                "valid": len(self.trained.valid_loaders[config.head_name].dataset)}


def names_of(files: str | list[str] | None) -> list[str]:
    return [Path(file).name for file in ([files] if isinstance(files, str) else files or [])]


def plain(errors: dict) -> dict[str, float]:
    """Mean absolute and root mean square errors by MACE's names, in eV and A."""
    return {name: float(value) for name, value in errors.items()
            if name.startswith(LISTED) and math.isfinite(value)}
