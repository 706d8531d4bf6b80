"""``--peft auto``: short trials on the run's own data choose the method and its learning rate.

They are halved again and again (successive halving): all candidates train for some steps, those with the higher losses
on the validation set are dropped, and the others train on, until one is left. Each round takes as many steps in all.
Every trial begins as the run with its options would: the same start, batches and optimizer, without schedule, moving
average and kept structures.
"""

import argparse
import dataclasses
import itertools
import logging
import math
import types
from collections.abc import Callable, Sequence

import torch
from mace.tools.scripts_utils import get_optimizer
from mace.tools.torch_geometric.dataloader import DataLoader
from prettytable import PrettyTable
from torch import nn

from mace_peft.errors import PeftError
from mace_peft.fast.backward import backward_to
from mace_peft.model.adapted import trainable_parameters
from mace_peft.model.inject import trainability_kept
from mace_peft.patching import replaced
from mace_peft.train.auto_candidates import AUTO, METHODS_TRIED, Candidate

SHARE = 5  # the trials take at most one in so many of the run's steps
LEAST = 10  # steps of a trial before any is dropped


@dataclasses.dataclass
class Trial:
    """A candidate, the steps that it has trained for, its validation loss after them, and what has become of it."""

    candidate: Candidate
    steps: int = 0
    loss: float = math.inf
    end: str = ""


def rounds(count: int, steps: int) -> list[tuple[int, int]]:
    """How many of the candidates are left in each round, and the steps for each of these, of so many steps in all."""
    left = [count]
    while left[-1] > 2:
        left.append((left[-1] + 1) // 2)
    return [(number, steps // (len(left) * number)) for number in left]


def affordable(count: int, steps: int) -> int:
    """How many of the candidates the run's steps suffice for. Raises PeftError for fewer than two."""
    enough = [number for number in range(2, count + 1) if rounds(number, steps // SHARE)[0][1] >= LEAST]
    if not enough:
        raise PeftError(f"<method> {AUTO} has too few steps for its trials, which take at least {2 * LEAST} and at "
                        f"most a fifth of the run's {steps}: use <method> {METHODS_TRIED[0]}, or more --max_num_epochs")
    return enough[-1]


def choose(candidates: Sequence[Candidate], steps: int, begin: Callable[[Candidate], Callable[[int], float]]
           ) -> Candidate:
    """The candidate whose validation loss is the lowest of those that are left to the end.

    steps: of the run. begin: starts the trial of a candidate; what it gives trains for so many more steps and returns
    the validation loss. Logs the trials and how to repeat the run without them. Raises PeftError for a run that is too
    short, and if no loss is finite.
    """
    if len(candidates) == 1:
        logging.info(f"--peft {AUTO} has one candidate, and no trials: {candidates[0].options()}")
        return candidates[0]
    trials = [Trial(candidate) for candidate in candidates[:affordable(len(candidates), steps)]]
    plan = rounds(len(trials), steps // SHARE)
    logging.info(f"Trials of {len(trials)} methods and rates, for {sum(map(math.prod, plan)):,} of the run's {steps:,} "
                 "steps in all")
    alive, training = trials, {trial.candidate: begin(trial.candidate) for trial in trials}
    for number, (_, more) in enumerate(plan, 1):
        for trial in alive:
            trial.steps += more
            trial.loss = training[trial.candidate](more)
        share_losses(alive)
        alive, dropped = halves(alive)
        for trial in dropped:
            trial.end = f"dropped in round {number}"
            del training[trial.candidate]  # with its model
    (best,) = alive
    best.end = "chosen"
    if best.loss == math.inf:
        raise PeftError(f"no trial of <method> {AUTO} has ended with a finite validation loss: check the data and "
                        "--E0s, or give a lower --lr")
    second = min((trial for trial in trials if trial.steps == best.steps and trial is not best),
                 key=lambda trial: trial.loss)
    logging.info(f"{listing(trials)}\nChosen: {best.candidate.options()}, with a validation loss of {best.loss:.8f} "
                 f"after {best.steps} steps, and {second.loss:.8f} with {second.candidate.options()}. The options of "
                 f"the choice in the place of --peft {AUTO} repeat this run without trials")
    return best.candidate


def halves(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Those that go on, half of them or one more, where three or more are left, else one; and the others."""
    by_loss = sorted(trials, key=lambda trial: trial.loss)  # of the same loss, the first in the table
    best = by_loss[:(len(trials) + 1) // 2]
    return [trial for trial in trials if trial in best], [trial for trial in trials if trial not in best]


def share_losses(trials: Sequence[Trial]) -> None:
    """All processes go on with the losses of the first: by rounding, they could come to other choices."""
    losses = [[trial.loss for trial in trials]]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(losses)
    for trial, loss in zip(trials, losses[0], strict=True):
        trial.loss = loss if math.isfinite(loss) else math.inf


def listing(trials: Sequence[Trial]) -> str:
    table = PrettyTable(["method", "learning rate", "steps", "validation loss", "trial"], align="r")
    table.align["method"] = table.align["trial"] = "l"
    for trial in trials:
        table.add_row([trial.candidate.config.method, f"{trial.candidate.lr:g}", trial.steps, f"{trial.loss:.8f}",
                       trial.end])
    return table.get_string()


def training(original: types.SimpleNamespace, args: argparse.Namespace, model: nn.Module, groups: dict, loss: nn.Module,
             output_args: dict[str, bool], train_loader: DataLoader, valid_set: Sequence) -> Callable[[int], float]:
    """What trains the model for so many more steps, and returns its validation loss.

    original: has MACE's ``take_step`` and ``evaluate``. groups: those of the optimizer, on the run's device. The loader
    of the run stays as it is, and several processes do the same.
    """
    optimizer, order = get_optimizer(args, groups), torch.Generator()
    order.set_state(train_loader.generator.get_state())
    loader = DataLoader(train_loader.dataset, batch_size=train_loader.batch_size, shuffle=True,
                        drop_last=train_loader.drop_last, generator=order)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass, each in an order of its own
    valid_loader = DataLoader(valid_set, batch_size=args.valid_batch_size, shuffle=False)
    learnt = list(trainable_parameters(model).values())
    shared = {"model": model, "loss_fn": loss, "output_args": output_args, "device": torch.device(args.device)}
    schedule_free = hasattr(optimizer, "eval")

    def train(steps: int) -> float:
        if schedule_free:
            optimizer.train()
        with replaced(torch.Tensor, "backward", backward_to(lambda: learnt)):
            for batch in itertools.islice(batches, steps):
                original.take_step(batch=batch, optimizer=optimizer, ema=None, max_grad_norm=args.clip_grad, **shared)
        if schedule_free:
            optimizer.eval()
        with trainability_kept(model):
            return original.evaluate(data_loader=valid_loader, **shared)[0]

    return train
