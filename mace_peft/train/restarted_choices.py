"""What a run has chosen from its data, in the checkpoint that a restart goes on from: it is not chosen again."""

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence

import torch
from mace.tools import get_tag

from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError, one_line
from mace_peft.train.auto_candidates import AUTO, Candidate
from mace_peft.train.checkpoint_files import CompleteCheckpointIO
from mace_peft.train.checkpoints import REMEDY
from mace_peft.train.learning_rates import NotGiven


def checkpoint_before(args: argparse.Namespace) -> tuple[str, dict, PeftConfig] | None:
    """The path, content and settings of the checkpoint that ``--restart_latest`` goes on from; None without such a one.

    Raises PeftError if that checkpoint cannot be read.
    """
    if not args.restart_latest or not os.path.isdir(args.checkpoints_dir):
        return None
    path = CompleteCheckpointIO(args.checkpoints_dir, get_tag(args.name, args.seed)).newest()
    if path is None:
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        if "peft" not in checkpoint:
            return None  # whoever loads it says so
        return path, checkpoint, PeftConfig(**checkpoint["peft"])
    except Exception as error:  # a damaged file fails in many ways
        raise PeftError(f"the checkpoint {path} has no settings that can be read ({one_line(error)}): delete it to "
                        "restart from the one before, or from the start") from None


def ranks_before(args: argparse.Namespace, config: PeftConfig) -> PeftConfig | None:
    """The settings with the ranks of that checkpoint; None without such a one."""
    before = checkpoint_before(args)
    if before is None:
        return None
    _, _, made = before
    if made.method != config.method:
        return None  # whoever loads it says so, here and below
    chosen = dataclasses.replace(config, rank_pattern=made.rank_pattern) if made.rank == "auto" else None
    return chosen if chosen == made else None


def choice_before(args: argparse.Namespace, configs: Sequence[PeftConfig]) -> Candidate | None:
    """What ``--peft auto`` has chosen of these settings in that checkpoint; None without such a one.

    Raises PeftError if its method is none of them.
    """
    before = checkpoint_before(args)
    if before is None:
        return None
    path, checkpoint, made = before
    for config in configs:
        if config.method == made.method:  # the rest is compared by whoever loads it
            given = not isinstance(args.lr, NotGiven)
            choice = Candidate(config, args.lr if given else checkpoint["resume"]["options"]["lr"])
            logging.info(f"No trials: the checkpoint {path} goes on with {choice.options()}")
            return choice
    raise PeftError(f"the checkpoint {path} was made with {made.options()}, and <method> {AUTO} tries "
                    f"{', '.join(config.method for config in configs)}: {REMEDY}")
