"""The learning rates of a run: those that are given, or those that were best for its method where rates were swept; and
which parameters of an optimizer have them.
"""

import argparse
import logging
from collections.abc import Iterable

from torch import nn

from mace_peft.methods import Method

RATES = ("lr", "swa_lr")


class NotGiven(float):
    """MACE's default of an option, in the place of the same number: an option that is given has a plain one."""


def mark_defaults(parser: argparse.ArgumentParser) -> None:
    """Let what the parser reads tell whether a rate was given, on the command line or in a ``--config`` file."""
    for action in parser._actions:
        if action.dest in RATES:
            action.default = NotGiven(action.default)


def unmark(args: argparse.Namespace) -> None:
    """Plain numbers, as MACE's parser gives them: they go to files."""
    for name in RATES:
        if isinstance(getattr(args, name, None), NotGiven):
            setattr(args, name, float(getattr(args, name)))


def settle_rates(args: argparse.Namespace, method: Method) -> None:
    """Put the method's rate in the place of one that was not given, a fifth of ``--lr`` for stage two, and log both."""
    if args.lbfgs:  # which chooses its steps itself
        unmark(args)
        return
    if isinstance(args.lr, NotGiven):
        args.lr = method.lr
        logging.info(f"Learning rate {args.lr:g}, which was best for {method.title} in sweeps, for no --lr is given")
    else:
        logging.info(f"Learning rate {args.lr:g}; in sweeps {method.lr:g} was best for {method.title}")
    if args.swa and isinstance(args.swa_lr, NotGiven):
        args.swa_lr = args.lr / 5
        logging.info(f"Learning rate {args.swa_lr:g} in stage two, a fifth of --lr, for no --swa_lr is given")
    unmark(args)


def groups_of(trained: Iterable[nn.Parameter], options: dict) -> dict:
    """MACE's options of an optimizer, whose groups have what trains and nothing else; one more has what they lack."""
    left = {id(parameter): parameter for parameter in trained}
    for group in options["params"]:
        group["params"] = [left.pop(id(parameter)) for parameter in group["params"] if id(parameter) in left]
    groups = [group for group in options["params"] if group["params"]]
    if left:
        groups.append({"name": "other", "params": list(left.values()), "weight_decay": 0.0})
    return {**options, "params": groups}
