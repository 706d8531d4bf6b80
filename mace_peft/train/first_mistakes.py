"""First mistakes with MACE's own options, which end in a traceback of MACE or act on nothing: one line instead."""

import argparse
import ast
import contextlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Iterator

import torch
from mace.tools.scripts_utils import check_path_ase_read

from mace_peft.errors import PeftError, did_you_mean, one_line
from mace_peft.labels import LABELS
from mace_peft.train.data.heads import OF_MP, read_heads, replays, replays_own_file

LEAST = {"batch_size": 1, "valid_batch_size": 1, "eval_interval": 1, "patience": 1, **dict.fromkeys((
    "num_workers", "max_num_epochs", "scheduler_patience", "weight_decay", "ema_decay", "weight_pt_head",
    *(f"{stage}{label}_weight" for stage in ("", "swa_") for label in LABELS)), 0)}
ABOVE_ZERO = ("lr", "swa_lr", "clip_grad", "huber_delta", "lr_factor", "lr_scheduler_gamma")
UP_TO_ONE = ("lr_factor", "ema_decay")
FACTORS = tuple(f"{part}_lr_factor" for part in ("embedding", "interactions", "products", "readouts"))
OF_REPLAY = ("pt_valid_file", "pseudolabel_replay")
NAMES = ("name", "work_dir", "model_dir", "checkpoints_dir", "results_dir", "log_dir")
SAID_BY = {"torchrun": "RANK", "mpi": "OMPI_COMM_WORLD_RANK"}  # launchers of MACE and what they tell their processes


def check_first_mistakes(args: argparse.Namespace) -> None:
    """Raise PeftError for options of MACE that cannot be followed, before any data or model are read."""
    check_device(args.device)
    for option in NAMES:
        if getattr(args, option) == "":
            raise PeftError(f"--{option} is empty: give one, or leave it out")
    if not isinstance(logging.getLevelName(args.log_level), int):
        raise PeftError(f"--log_level {args.log_level} is no level of logs: use DEBUG, INFO, WARNING or ERROR")
    heads = read_heads(args)
    for name, head in heads.items():
        if args.train_file is None and head.get("train_file") is None:
            raise PeftError(f"there is no --train_file for the head {name}: give a file of structures with labels")
    check_numbers(args)
    check_mapping("foundation_model_kwargs", getattr(args, "foundation_model_kwargs", None), ast.literal_eval)
    check_factors(args)
    if not args.compute_forces:
        raise PeftError(f"--compute_forces False leaves --loss {args.loss} no forces, which it takes: leave it out")
    check_replay(args)
    if args.loss == "forces_only" and (args.swa or args.start_swa is not None):
        raise PeftError("--loss forces_only has no stage two in MACE: leave out --swa and --start_swa, or use --loss "
                        "weighted")
    for option, wanted, package in (("optimizer", "schedulefree", "schedulefree"), ("wandb", True, "wandb")):
        if getattr(args, option) == wanted and importlib.util.find_spec(package) is None:
            raise PeftError(f"--{option} {wanted} needs {package}, which is not installed: pip install {package}, or "
                            "leave it out")
    told = SAID_BY.get(getattr(args, "launcher", None))
    if args.distributed and told is not None and told not in os.environ:
        raise PeftError(f"--launcher {args.launcher} has not started this process ({told} is not set): start "
                        "mace_run_train by it, or leave out --distributed")


def check_device(device: str) -> None:
    """Raise PeftError for a device that this machine, or this torch, does not have."""
    kind, _, number = device.partition(":")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(kind, lambda: True)
    if not there():
        raise PeftError(f"--device {device} is not there for this torch ({torch.__version__}): use --device cpu, or "
                        "install a driver and a torch for it")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise PeftError(f"--device {device} is not there, for this machine has {torch.cuda.device_count()}: count "
                        "from 0")


def check_numbers(args: argparse.Namespace) -> None:
    """Raise PeftError for numbers with which nothing trains, or torch fails."""
    for name in dict.fromkeys((*LEAST, *ABOVE_ZERO)):
        value = getattr(args, name, None)  # releases differ in their options
        if value is None:
            continue
        least, most = LEAST.get(name, 0), 1 if name in UP_TO_ONE else math.inf
        if not (math.isfinite(value) and least <= value <= most) or name in ABOVE_ZERO and value == 0:
            beginning = "above 0" if name in ABOVE_ZERO else f"from {least} up"
            raise PeftError(f"--{name} {value} is not a number {beginning}{' to 1' if most == 1 else ''}: give one")


def check_mapping(name: str, text: str | None, read: Callable[[str], object]) -> dict:
    """The dictionary that the option is the text of, as MACE reads it. Raises PeftError if it is none."""
    try:
        held = {} if text is None else read(text)
    except (ValueError, SyntaxError):
        held = None
    if not isinstance(held, dict):
        raise PeftError(f"--{name} {text} is no dictionary: give one such as '{{\"name\": 1.0}}'")
    return held


def check_factors(args: argparse.Namespace) -> None:
    """Raise PeftError for learning rates of parts that MACE does not read, or that are none."""
    text = getattr(args, "lr_params_factors", None)  # releases differ in their options
    for name, factor in check_mapping("lr_params_factors", text, json.loads).items():
        if name not in FACTORS:
            raise PeftError(f"--lr_params_factors has {name!r}, which MACE does not read{did_you_mean(name, FACTORS)}: "
                            f"use {', '.join(FACTORS)}")
        if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise PeftError(f"--lr_params_factors has {factor!r} for {name}: give a number from 0 up")


def check_replay(args: argparse.Namespace) -> None:
    """Raise PeftError for options of replay that nothing comes of."""
    if replays(args):
        if str(args.E0s).lower() == "average":
            raise PeftError("--E0s average cannot go with --multiheads_finetuning True, for MACE takes none with "
                            "replay: use estimated or foundation, or give the E0s")
        if args.pt_train_file is not None and args.foundation_model in OF_MP:
            raise PeftError(f"--pt_train_file {args.pt_train_file} is not read with --foundation_model "
                            f"{args.foundation_model}, for which MACE replays mp: leave it out, or give the foundation "
                            "as a file")
        if replays_own_file(args) and args.statistics_file is None and not check_path_ase_read(args.pt_train_file):
            raise PeftError(f"--pt_train_file {args.pt_train_file} is not an XYZ file, and MACE takes the elements of "
                            "replay from those alone, or from --statistics_file: give one")
        return
    if args.pt_train_file is not None:
        raise PeftError(f"--pt_train_file {args.pt_train_file} has no effect without --multiheads_finetuning True: add "
                        "it, or leave the file out")
    for name in OF_REPLAY:
        if getattr(args, name, None):
            raise PeftError(f"--{name} {getattr(args, name)} has no effect without --pt_train_file: add it, or leave "
                            "the option out")
    if args.weight_pt_head != 1:
        raise PeftError(f"--weight_pt_head {args.weight_pt_head} has no effect without --pt_train_file: add it, or "
                        "leave the option out")


@contextlib.contextmanager
def one_line_before_training(begun: Callable[[], bool]) -> Iterator[None]:
    """Raise PeftError in the place of an error of MACE before the training, with its text; the debug log has the rest.

    begun: tells whether the training has begun.
    """
    try:
        yield
    except PeftError:
        raise
    except Exception as error:  # MACE fails in as many ways as there are inputs
        if begun():
            raise
        logging.debug("MACE failed before the training", exc_info=True)
        raise PeftError(f"MACE failed before the training ({type(error).__name__}: {one_line(error)}): check the data "
                        "and options that its log names last; the debug log has the traceback") from error
