"""The files of a run, and whether it may write them, asked before any data is read."""

import argparse
import glob
import logging
import os
import stat
import tempfile
from pathlib import Path

from mace_peft.errors import PeftError
from mace_peft.files import check_regular

# MACE's options of folders, and where they are inside --work_dir by default
FOLDERS = {"model_dir": "", "checkpoints_dir": "checkpoints", "results_dir": "results", "log_dir": "logs"}


def folder(args: argparse.Namespace, option: str) -> Path:
    """The folder of that option, also before MACE has filled it in; in any release."""
    return Path(getattr(args, option, None) or Path(args.work_dir, FOLDERS[option]))


def check_places(args: argparse.Namespace) -> None:
    """Raise PeftError if the run could not write a file, or would write one over what it starts from."""
    for option in FOLDERS:
        check_writable(f"--{option}", folder(args, option))
    for stage in ("", "_stagetwo"):
        check_free(adapter_directory(args, stage))
    check_names_free(args)
    check_start_stays(args)


def check_writable(option: str, directory: Path) -> None:
    """Raise PeftError unless files can be made in the directory, or in what is there of it."""
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise PeftError(f"{option} {directory} cannot be written to ({there}: {error.strerror}): allow it, or give "
                        "another directory") from None


def check_free(directory: Path) -> None:
    """Raise PeftError if the adapter's directory cannot have this name."""
    try:
        taken = directory.exists() and not directory.is_dir()
    except OSError as error:
        raise PeftError(f"the adapter cannot go to {directory} ({error.strerror}): give another --name") from None
    if taken:
        raise PeftError(f"{directory} is a file, and the adapter goes to a directory of that name: remove it, or give "
                        "this run another --name")


def check_names_free(args: argparse.Namespace) -> None:
    """Raise PeftError if a link, pipe or device has the name of a file that the run writes to or reads again."""
    beginning = checkpoints_begin(args)
    for option, pattern in {"checkpoints_dir": "*.pt", "log_dir": "*.log", "results_dir": "*.txt"}.items():
        for path in folder(args, option).glob(f"{glob.escape(beginning.name)}{pattern}"):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise PeftError(f"{path} is a link, pipe or device, and the run has a file of that name: remove it, or "
                                "give this run another --name")
    for path in models(args):
        check_regular(path)


def models(args: argparse.Namespace) -> list[Path]:
    """The files of models that the run writes."""
    stages = ("", "_stagetwo") if args.swa else ("",)
    return [Path(f"{beginning}{stage}{end}") for stage in stages for end in (".model", "_compiled.model")
            for beginning in (checkpoints_begin(args), folder(args, "model_dir") / args.name)]


def check_start_stays(args: argparse.Namespace) -> None:
    """Raise PeftError if a model or adapter that the run writes takes the place of what it starts from."""
    foundation = Path(args.foundation_model)
    for path in models(args):
        if path.exists() and foundation.exists() and path.samefile(foundation):
            raise PeftError(f"--name {args.name} would write its model over the foundation {foundation}, which the "
                            "adapter needs: give this run another --name")
    adapter = getattr(args, "peft_adapter", None)
    for path in [adapter_directory(args, stage) for stage in ("", "_stagetwo")] if adapter is not None else ():
        if path.exists() and Path(adapter).exists() and path.samefile(adapter):
            raise PeftError(f"--name {args.name} would write its adapter over --peft_adapter {adapter}, from which it "
                            "starts: give this run another --name")


def warn_of_earlier_results(args: argparse.Namespace) -> None:
    """Log the results of an earlier run of this name that this run leaves as they are."""
    for path in () if args.swa else (model_path(args, "_stagetwo"), adapter_directory(args, "_stagetwo")):
        if path.exists():
            logging.warning(f"{path} is of an earlier run of this name, and stays: this run has no stage two")


def checkpoints_begin(args: argparse.Namespace) -> Path:
    """What the paths of the run's checkpoints begin with."""
    return folder(args, "checkpoints_dir") / f"{args.name}_run-{args.seed}"


def adapter_directory(args: argparse.Namespace, stage: str) -> Path:
    """Where a stage of the run ("" or "_stagetwo") saves its adapter: beside ``NAME.model``."""
    return folder(args, "model_dir") / f"{args.name}{stage}_adapter"


def model_path(args: argparse.Namespace, stage: str) -> Path:
    """The model of a stage of the run ("" or "_stagetwo"), as MACE names it."""
    return folder(args, "model_dir") / f"{args.name}{stage}.model"
