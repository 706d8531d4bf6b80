"""What a run with ``--peft`` starts from: a foundation model, or one with an adapter that was trained before."""

import argparse
import copy
import dataclasses
import functools
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from mace_peft.adapter.description import describe
from mace_peft.adapter.directory import TENSOR_FILE, read_sizes
from mace_peft.adapter.load import fill, load_adapter
from mace_peft.backbones.foundation import load_foundation
from mace_peft.config import PeftConfig, split_patterns
from mace_peft.elements import symbols
from mace_peft.errors import PeftError
from mace_peft.model.adapted import fingerprint, is_adapted, origin, trainable_parameters
from mace_peft.model.inject import check, eject, inject
from mace_peft.model.isolated import E0S
from mace_peft.train.auto_candidates import AUTO, methods_that_take
from mace_peft.train.foundation_head import choose_foundation_head, first_head
from mace_peft.train.options import MODELS

FITTED = {"average", "estimated"}  # E0s that are fits
OF_HEADS = ("readouts.", "embedding_readout.", "les_readouts.", "atomic_energies_fn.")  # parts with something for each


@dataclasses.dataclass
class Start:
    """The settings of a run; the name, head and fingerprint of its foundation; and the adapted model to go on from.

    elements: the atomic numbers that the model to start from knows. ``adapted`` is None where the adapters are new.
    tried: the settings among which trials will choose, one for each method, if the method is ``auto``, where the
    settings are None until then; refused: why other methods are not tried.
    """

    config: PeftConfig | None
    foundation: dict[str, str | None]
    elements: list[int]
    adapted: nn.Module | None = None
    tried: list[PeftConfig] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def check_known(self, elements: list[int]) -> None:
        """Raise PeftError if the run has elements (atomic numbers) that the model to start from has never seen."""
        new = set(elements) - set(self.elements)
        if new and self.adapted is not None:
            raise PeftError(f"the run has {symbols(new)}, which the adapter that it starts from has never seen (it "
                            f"knows {symbols(self.elements)}): start from the foundation")
        if new:
            raise PeftError(f"the run has {symbols(new)}, which the foundation does not know: leave out what has these "
                            "elements, or give another foundation model")


def find_start(args: argparse.Namespace, settings: dict) -> Start:
    """Load what ``--foundation_model`` and ``--peft_adapter`` name, and check that the settings fit it.

    Raises PeftError if they do not, before any data is read.
    """
    settings = dict(settings)
    directory = settings.pop("adapter", None)
    try:
        model = load_foundation(args.foundation_model, args.default_dtype)
    except PeftError:
        if not Path(args.foundation_model, TENSOR_FILE).exists():
            raise
        trained_from = read_sizes(args.foundation_model)[0]["foundation"]["name"]
        raise PeftError(f"--foundation_model {args.foundation_model} is the directory of an adapter: give it by "
                        f"--peft_adapter, and by --foundation_model the model that it was trained from "
                        f"({trained_from!r})") from None
    check_class(args, model)
    choose_foundation_head(args, model, directory is not None or is_adapted(model))
    name = Path(args.foundation_model).name
    if is_adapted(model):
        if directory is not None:
            raise PeftError(f"--foundation_model {args.foundation_model} has an adapter already, and --peft_adapter "
                            f"{directory} is another: leave one out, or give the foundation")
        source = dict(origin(model))
        source["name"] = source["name"] or name
        if len(model.heads) > 1:
            source.setdefault("head", args.foundation_head)
    else:
        source = {"name": name, "head": args.foundation_head, "fingerprint": fingerprint(model)}
        if directory is not None:
            several, heads = len(model.heads) > 1, model.heads
            model = load_adapter(model.to(getattr(torch, args.default_dtype)), directory)
            trained = origin(model).get("head") or first_head(heads)
            if several and trained != args.foundation_head:
                raise PeftError(f"--foundation_head {args.foundation_head} differs from the head {trained} that the "
                                f"adapter {directory} was trained from: add --foundation_head {trained}")
    if settings["method"] == AUTO and not is_adapted(model):
        del settings["method"]
        tried, refused = methods_that_take(settings, functools.partial(check_trial, args, model))
        return Start(None, source, model.atomic_numbers.tolist(), tried=tried, refused=refused)
    if not is_adapted(model):
        config = PeftConfig(**settings)
        check(model, config)
        return Start(config, source, model.atomic_numbers.tolist())
    given = directory or f"foundation model {args.foundation_model}"
    if model.peft_strength != 1:
        raise PeftError(f"the adapter in {given} has the strength {model.peft_strength:g}, and only one of strength 1 "
                        "trains further: give what its run left, or save it again after set_strength(model, 1)")
    if model.peft_folded and args.peft_keep is not None:
        raise PeftError(f"--peft_keep {args.peft_keep} cannot go with {given}, whose weights hold a part of what its "
                        "run has learnt, so that no foundation is left to keep: give the foundation, and the adapter "
                        "by --peft_adapter")
    config = settings_from(model.peft_config, settings, given)
    go_on(eject(copy.deepcopy(model)), config, source, model)
    return Start(config, source, model.atomic_numbers.tolist(), model)


def check_trial(args: argparse.Namespace, model: nn.Module, config: PeftConfig) -> None:
    """Raise PeftError if the model, or the form in which it trains, does not take what the settings ask for."""
    check(model, config)
    if args.enable_cueq and config.row.trains_base:
        raise PeftError("cuEquivariance's layers hold some parameters in another form")


def check_class(args: argparse.Namespace, foundation: nn.Module) -> None:
    """Raise PeftError if ``--model`` makes a model that lacks parts of the foundation, or has parts that it lacks."""
    made, held = MODELS[args.model], type(foundation).__name__
    if made != held:
        raise PeftError(f"--model {args.model} makes a {made} of foundation model {args.foundation_model}, which is a "
                        f"{held}: parts of it would be lost, or be random and frozen; use --model {held}")


def settings_from(adapter: PeftConfig, given: dict, source: str) -> PeftConfig:
    """The adapter's settings, with those given that may differ: where adapters go, and what trains along.

    Raises PeftError for another value of one that shapes the adapters.
    """
    for name in ("method", "rank", "budget", "alpha", "start", "gate", "init_std"):
        held = getattr(adapter, name)
        if name not in given or given[name] == held:
            continue
        if name == "budget" and adapter.rank != "auto":
            raise PeftError(f"<budget> {given[name]} has no effect on the adapter in {source}, which has the rank "
                            f"{adapter.rank}: leave it out")
        remedy = "leave it out" if held is None else f"give {held}"
        raise PeftError(f"<{name}> {given[name]} differs from the {held} of the adapter in {source}: {remedy}, or "
                        "start from the foundation")
    if adapter.rank_pattern is not None and given.get("targets", adapter.targets) != adapter.targets:
        raise PeftError(f"<targets> {given['targets']} differs from the {adapter.targets} that the ranks of the "
                        f"adapter in {source} were chosen for: leave it out, or start from the foundation")
    if E0S in split_patterns(adapter.train_also) and "train_also" in given:  # which its run has added by itself
        given = {**given, "train_also": ",".join(dict.fromkeys((*split_patterns(given["train_also"]), E0S)))}
    return dataclasses.replace(adapter, **given)


def go_on(model: nn.Module, config: PeftConfig, source: dict, adapted: nn.Module | None) -> list[str]:
    """Inject, and fill the adapters from those of the other model, if any; returns the names of what starts anew.

    Raises PeftError if something of the other model finds no place, or if the result could not be saved.
    """
    inject(model, config, source)
    describe(model)
    tensors = {} if adapted is None else trainable_parameters(adapted)
    try:
        fill(model, tensors)
    except PeftError as error:
        elements, known = model.atomic_numbers.tolist(), adapted.atomic_numbers.tolist()
        if elements == known:
            raise
        raise PeftError(f"the run has {symbols(elements)}, and adapters that it starts from hold something for each of "
                        f"{symbols(known)}: add --atomic_numbers=\"{known}\", and E0s for them") from error
    return [name for name in trainable_parameters(model) if name not in tensors]


def let_fitted_E0s_train(config: PeftConfig, args: argparse.Namespace, asked: Iterable[object]) -> PeftConfig:
    """The settings with E0s that train along, where these were fitted to the data at the start.

    No other weight moves energies and leaves forces, so that energies are right as early as forces are. E0s that were
    given stay, and with ``exp`` all is as published. asked: what each head asks for, see ``asked_E0s``.
    """
    if config.gate == "exp" or args.enable_cueq or not set(map(str, asked)) <= FITTED:
        return config
    logging.info("The E0s, which were fitted to the data, train along: those of --E0s with numbers would stay")
    patterns = dict.fromkeys((*split_patterns(config.train_also), E0S))
    return dataclasses.replace(config, train_also=",".join(patterns))


def check_heads(heads: list[str], adapted: nn.Module) -> None:
    """Raise PeftError if what was trained for each head would go to other heads."""
    trained = [name for name in trainable_parameters(adapted) if name.startswith(OF_HEADS)]
    if trained and len(adapted.heads) > 1 and heads != list(adapted.heads):
        raise PeftError(f"the run has the heads {', '.join(heads)}, and the adapter that it starts from trained "
                        f"{trained[0]} for {', '.join(adapted.heads)}: name the heads so, in this order")
