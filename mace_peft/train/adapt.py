"""From MACE's model to the one that trains: the settings get from the data what they lack, method and rate among it."""

import argparse
import copy
import functools
import logging
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mace.tools.torch_geometric.dataloader import DataLoader
from torch import nn

from mace_peft.adapter.description import check_size
from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError
from mace_peft.fast.messages import fast_messages
from mace_peft.model.adapted import trainable_parameters
from mace_peft.model.ranks import choose_ranks, start_along_gradients, untrained_updates
from mace_peft.patching import replaced
from mace_peft.train.auto_candidates import AUTO, Candidate, candidates
from mace_peft.train.auto_trials import choose, training
from mace_peft.train.gradients import differentiate
from mace_peft.train.learning_rates import NotGiven, groups_of
from mace_peft.train.restarted_choices import choice_before, ranks_before
from mace_peft.train.start import Start, go_on, let_fitted_E0s_train


class Given(NamedTuple):
    """What the run has when MACE makes its model.

    valid_set: of the last head, by which MACE chooses among epochs. asked: the E0s that each head asks for. original:
    MACE's functions, by the names of their stand-ins. fast: whether cheaper arithmetic takes the place of MACE's.
    """

    args: argparse.Namespace
    start: Start
    train_loader: DataLoader
    valid_set: Sequence
    loss: nn.Module
    output_args: dict[str, bool]
    asked: Sequence[object]
    original: types.SimpleNamespace
    fast: bool


def adapt(given: Given, model: nn.Module, config: PeftConfig, adapted: nn.Module | None = None) -> list[str]:
    """Put adapters of the settings into the model, from those of the adapted one, if any; names of what starts anew.

    The model has the settings, with E0s that train along and chosen ranks. Raises PeftError where they do not fit.
    """
    config = let_fitted_E0s_train(config, given.args, given.asked)
    look = functools.partial(differentiate, given.args, given.train_loader.dataset, given.loss, given.output_args)
    if config.rank == "auto" and config.rank_pattern is None:
        config = ranks_before(given.args, config) or choose_ranks(model, config, look)
    new = go_on(model, config, given.start.foundation, adapted)
    if config.start == "gradient" and untrained_updates(model):
        start_along_gradients(model, look)
    fast_messages(model, given.fast)
    return new


def choose_method(given: Given, model: nn.Module) -> Candidate:
    """What ``--peft auto`` chooses, by trials on copies of the model, or in the run that a restart goes on from.

    The random numbers of the run stay as they are. Raises PeftError for a run that is too short for trials.
    """
    args, start = given.args, given.start
    for method, reason in start.refused.items():
        logging.info(f"--peft {AUTO} does not try {method}: {PeftError(reason).on_command_line()}")
    before = choice_before(args, start.tried)
    if before is not None:
        return before
    if args.peft_keep is not None:
        logging.info(f"--peft {AUTO} tries methods without --peft_keep {args.peft_keep}, which the run then has")
    table = candidates(those_that_fit(start.tried, model), None if isinstance(args.lr, NotGiven) else args.lr)
    steps = args.max_num_epochs * len(given.train_loader)
    with torch.random.fork_rng(devices=[]):  # loaders draw numbers, too
        return choose(table, steps, functools.partial(begin_trial, given, model))


def those_that_fit(configs: Sequence[PeftConfig], model: nn.Module) -> list[PeftConfig]:
    """The settings whose result an adapter directory can hold; the log says why not the others.

    Raises PeftError if that of the only ones is too large.
    """
    size, fitting = sum(parameter.nbytes for parameter in model.parameters()), []
    for config in configs:
        try:
            check_size(size if config.row.trains_base else 0, config)
            fitting.append(config)
        except PeftError as error:
            if len(configs) == 1:
                raise
            logging.info(f"--peft {AUTO} does not try {config.method}: {error.on_command_line()}")
    return fitting


def begin_trial(given: Given, model: nn.Module, candidate: Candidate) -> Callable[[int], float]:
    """Adapt a copy of the model as the run would; returns what trains it, see ``training``."""
    args, trial = copy.copy(given.args), copy.deepcopy(model)
    args.lr = candidate.lr
    # what is drawn and said here, the run with these options draws and says again
    with torch.random.fork_rng(devices=[]), replaced(logging.getLogger(), "disabled", True):
        adapt(given, trial, candidate.config)
    trial.to(args.device)
    groups = groups_of(trainable_parameters(trial).values(), given.original.get_params_options(args, trial))
    return training(given.original, args, trial, groups, given.loss, given.output_args, given.train_loader,
                    given.valid_set)
