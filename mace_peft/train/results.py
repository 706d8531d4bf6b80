"""What a run leaves: its models and adapters are saved before anything else is done with them, and its last lines say
which they are."""

import argparse
import copy
import logging
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mace_peft.adapter.directory import add_training, save_adapter
from mace_peft.adapter.facts import error_table
from mace_peft.errors import PeftError, one_line
from mace_peft.fast.arithmetic import arithmetic_of_mace
from mace_peft.fast.messages import fast_messages
from mace_peft.files import complete, one_line_errors
from mace_peft.model.adapted import is_adapted
from mace_peft.model.inject import fold, freeze, settle_isolated_atoms
from mace_peft.train.progress import Progress
from mace_peft.train.record import Record
from mace_peft.train.run_files import adapter_directory, model_path
from mace_peft.train.training_plots import mended

STAGES = ("one", "two")


class Results:
    """Saves the results of a run, and keeps what MACE does after the training from ending it without a word.

    original: what MACE and torch bind to the names of ``mace_peft.train.seams``; saved: the models, by whether they are
    those of stage two; record: of the run, once its training has ended.
    """

    def __init__(self, original: types.SimpleNamespace, args: argparse.Namespace, save_file: Callable):
        self.original = original
        self.args = args
        self.save_file = save_file
        self.saved: dict[bool, nn.Module] = {}
        self.record: Record | None = None

    def save(self, model: nn.Module, stage_two: bool) -> nn.Module:
        """Save the adapter, and the model with the updates folded in, which is returned."""
        path, directory = self.paths(stage_two)
        with one_line_errors(directory):
            logging.info(f"Saved the adapter to {save_adapter(model, directory)}")
            Path(self.args.checkpoints_dir).mkdir(parents=True, exist_ok=True)  # where no epoch came, MACE misses it
        # MACE freezes or frees all parameters for its error tables
        model = fold(freeze(fast_messages(copy.deepcopy(model), fast=False)))
        self.save_file(model.to("cpu") if self.args.save_cpu else model, path)
        self.saved[stage_two] = model
        self.tell(stage_two)
        return model

    def tell(self, stage_two: bool) -> None:
        """Write into the adapter how it was trained, and log its errors, if they are measured.

        The adapter is saved by now: what fails here costs nothing but this.
        """
        model, directory = self.paths(stage_two)
        try:
            training = self.record.training(stage_two)
            if training["errors"]:
                logging.info(f"Errors of {model.name}, and of the {training['start']} with the E0s of this run:\n"
                             f"{error_table(training)}")
            add_training(directory, training)
        except Exception as error:  # such as a full disk, or names that are too long
            logging.error(f"{directory} does not say how it was trained ({one_line(error)})")

    def paths(self, stage_two: bool) -> tuple[Path, Path]:
        """Of the model and the adapter."""
        stage = "_stagetwo" if stage_two else ""
        return model_path(self.args, stage), adapter_directory(self.args, stage)

    def compile(self, model: nn.Module):
        """MACE hides a model that does not compile: say so."""
        try:
            with arithmetic_of_mace():
                return self.original.jit.compile(settle_isolated_atoms(model))  # a copy of MACE's
        except Exception as error:
            logging.error(f"No compiled model is written: TorchScript cannot compile the model ({one_line(error)})")
            raise

    def save_compiled(self, *args, **kwargs) -> None:
        """MACE hides a file that cannot be written, too."""
        try:
            complete(self.original.save_compiled)(*args, **kwargs)
        except PeftError as error:
            logging.error(f"No compiled model is written: {error}")
            raise

    def create_error_table(self, *args, **kwargs) -> object:
        """MACE's table of errors, or where it is not computed a line that says so: the next one may be."""
        self.record.loaders = kwargs["all_data_loaders"]
        try:
            return self.original.create_error_table(*args, **kwargs)
        except Exception as error:  # models and data fail in many ways
            if torch.distributed.is_initialized():
                raise  # or the other processes would wait for this one
            logging.error(f"No table of errors is computed ({type(error).__name__}: {one_line(error)})")
            return "not computed"

    def evaluate_for_table(self, model: nn.Module, **kwargs):
        """MACE's, for each set of structures in the table; the record has the errors of the start as well, once."""
        return self.record.evaluate(self.original.evaluate_for_table, model, **kwargs)

    def TrainingPlotter(self, *args, **kwargs):
        return mended(self.original.TrainingPlotter(*args, **kwargs))

    def run(self, run: Callable) -> object:
        """MACE's ``run``. Raises PeftError for what fails after the training, and says what the results are."""
        try:
            return run(self.args)
        except PeftError:
            raise
        except Exception as error:  # what MACE does with data, files and figures fails in many ways
            if self.record is None:
                raise
            raise PeftError(f"the training is done and its results are saved, and what comes after it failed "
                            f"({type(error).__name__}: {one_line(error)}): put that right, and add --restart_latest "
                            "for the files and tables that are missing") from error
        finally:
            if self.record is not None:
                self.say()

    def say(self) -> None:
        """Log errors of each result, which epoch it is of, whether it is better than the start, and how to use it."""
        heads = list(self.record.trained.valid_loaders)
        for stage_two in sorted({False, *self.saved}):
            if stage_two in self.saved:  # by the first process
                self.tell(stage_two)
            level, line = outcome(self.record.progress, stage_two, self.args.lbfgs)
            if len(heads) > 1:
                line += f" (losses of the head {heads[-1]}, by which MACE chooses)"
            model, adapter = self.paths(stage_two)
            logging.log(level, f"Result in {model.name} and {adapter.name}: {line}")
        for stage_two in self.saved:
            logging.info(f"In ASE: {self.in_ASE(stage_two)}")

    def in_ASE(self, stage_two: bool) -> str:
        """A line of Python that loads the result of the stage."""
        model, adapter = map(str, self.paths(stage_two))
        heads = list(self.record.trained.valid_loaders)
        options = f"device={self.args.device!r}" + (f", head={heads[-1]!r}" if len(heads) > 1 else "")
        if is_adapted(self.saved[stage_two]):
            return (f"from mace_peft import calculator; atoms.calc = calculator({str(self.args.foundation_model)!r}, "
                    f"{adapter!r}, {options})")
        return (f"from mace.calculators import MACECalculator; atoms.calc = MACECalculator(model_paths={model!r}, "
                f"{options})")


def outcome(progress: Progress, stage_two: bool, lbfgs: bool) -> tuple[int, str]:
    """The level and the line with which the log says what the result of the stage is. lbfgs: no rate acts on it."""
    result, own = progress.result(stage_two), progress.stages[stage_two] if stage_two < len(progress.stages) else None
    before = "for the result of stage one" if stage_two else "before the training"
    if own is not None and result is own:
        return logging.INFO, (f"epoch {own.epoch} of stage {STAGES[stage_two]}, with a validation loss of "
                              f"{own.best:.8f} ({before} {own.start:.8f})")
    what = "the start, as it was before the training" if result is None else f"epoch {result.epoch} of stage one"
    if own is None or own.epoch is None:
        return logging.WARNING, f"{what}, for no epoch of stage {STAGES[stage_two]} was trained and evaluated"
    return logging.WARNING, (f"{what}, for no epoch of stage {STAGES[stage_two]} was better: the lowest validation "
                             f"loss was {own.best:.8f} in epoch {own.epoch}, and {own.start:.8f} {before}; try "
                             + ("a run without --lbfgs" if lbfgs else f"another {'--swa_lr' if stage_two else '--lr'}"))
