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

from mace_peft.errors import PeftError, one_line
from mace_peft.train.data.heads import read_heads, replays

LEAST = {"batch_size": 1, "valid_batch_size": 1, "eval_interval": 1, "num_workers": 0, "lr": 0, "swa_lr": 0,
         "weight_decay": 0, "clip_grad": 0, "patience": 1, "huber_delta": 0, "weight_pt_head": 0, "energy_weight": 0,
         "forces_weight": 0, "stress_weight": 0, "virials_weight": 0, "dipole_weight": 0, "swa_energy_weight": 0,
         "swa_forces_weight": 0, "swa_stress_weight": 0, "swa_virials_weight": 0, "swa_dipole_weight": 0}
OF_REPLAY = ("pt_valid_file", "pseudolabel_replay")
SAID_BY = {"torchrun": "RANK", "mpi": "OMPI_COMM_WORLD_RANK"}  # launchers of MACE and what they tell their processes


def check_first_mistakes(args: argparse.Namespace) -> None:
    """Raise PeftError for options of MACE that cannot be followed, before any data or model are read."""
    check_device(args.device)
    heads = read_heads(args)
    for name, head in heads.items():
        if args.train_file is None and head.get("train_file") is None:
            raise PeftError(f"there is no --train_file for the head {name}: give a file of structures with labels")
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise PeftError(f"--{name} {value} is not a number from {least} up: give one")
    for name, read in (("foundation_model_kwargs", ast.literal_eval), ("lr_params_factors", json.loads)):
        check_mapping(name, getattr(args, name, None), read)
    check_replay(args)
    if args.loss == "forces_only" and (args.swa or args.start_swa is not None):
        raise PeftError("stage two cannot go with --loss forces_only, of which MACE has none: leave out --swa and "
                        "--start_swa, or use --loss weighted")
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


def check_mapping(name: str, text: str | None, read: Callable[[str], object]) -> None:
    """Raise PeftError unless the option is the text of a dictionary, as MACE reads it."""
    try:
        good = text is None or isinstance(read(text), dict)
    except (ValueError, SyntaxError):
        good = False
    if not good:
        raise PeftError(f"--{name} {text} is no dictionary: give one such as '{{\"name\": 1.0}}'")


def check_replay(args: argparse.Namespace) -> None:
    """Raise PeftError for options of replay that nothing comes of."""
    if replays(args):
        if str(args.E0s).lower() == "average":
            raise PeftError("--E0s average cannot go with --multiheads_finetuning True, for MACE takes none with "
                            "replay: use estimated or foundation, or give the E0s")
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
