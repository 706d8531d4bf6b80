"""The ``--peft*`` options of ``mace_run_train``, and the checks made before any data is read."""

import argparse
import importlib.util
import math
import os
import sys
from typing import NoReturn

from mace_peft.config import PeftConfig, check_effect
from mace_peft.errors import PeftError, check_choice
from mace_peft.methods import METHODS
from mace_peft.train.auto_candidates import AUTO
from mace_peft.train.learning_rates import mark_defaults
from mace_peft.train.run_files import check_places

# Text, not int or float, and no argparse choices: PeftConfig checks the values and says so in one line. No defaults
# (argparse.SUPPRESS): args of a run without --peft are then what they are without mace-peft.
OPTIONS = {
    "peft": f"train adapters instead of the whole model, or all of it by full; the method: {', '.join(METHODS)}; or "
            "auto: short trials choose it, and --lr unless given",
    "peft_rank": "rank of the adapters, or auto: chosen for each module from the training set (default: the method's)",
    "peft_budget": "what auto may train: a share of the base's parameters, or a number of them (default: the method's)",
    "peft_alpha": "low-rank updates are scaled by alpha / rank (default: the rank)",
    "peft_targets": "where adapters go: products, linears, published, all, or comma-separated glob patterns over "
                    "module names (default: the method's)",
    "peft_start": "first factor of low-rank updates at the start: published, N(0, 1); fan-in, N(0, 1 / rows); or "
                  "gradient, along the first gradients of the training set (default: the method's)",
    "peft_gate": "gain of a gate: bounded, or exp as published (default: bounded)",
    "peft_init_std": "std of a gate's scalar shift at the start; 0 starts as the foundation (default: 0)",
    "peft_train_also": "comma-separated glob patterns of base parameters that train along, such as 'readouts.*'",
    "peft_adapter": "start from the adapter of this directory; its settings are the defaults of the options above",
    "peft_keep": "keep what the foundation predicts for other structures, some of which each step takes: an extended "
                 "XYZ file, whose labels are not read, or auto: molecules and crystals of the run's elements",
    "peft_keep_weight": "weight of their loss, beside 1 for the training set (default: 0.01)",
    "peft_fast": "False: the arithmetic of MACE itself, which gives the same numbers in more time (default: True)",
}
# options of MACE that cannot go with --peft, and why
CONFLICTS = {
    "lora": "it is MACE's own adapter: leave out --lora or --peft",
    "freeze": "--peft freezes all but the adapters already: leave it out",
    "les_arguments": "LES keeps the settings of the foundation: leave it out",
    "enable_oeq": "adapters have not been tried on OpenEquivariance's layers: leave it out, or use --enable_cueq True",
}
KEEP_WEIGHT = 0.01  # costs 0 to 3 % at home in benchmarks/kinds.py; 0.05 keeps more and costs 3 % and more
OF_TRAINING = ("peft_keep", "peft_keep_weight")  # they shape no adapters, and the training takes them from args
# --model values that take the foundation's blocks over: class of the model that MACE makes then
MODELS = {"MACE": "ScaleShiftMACE", "ScaleShiftMACE": "ScaleShiftMACE", "MACELES": "MACELES", "PolarMACE": "PolarMACE"}


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--peft*`` options to MACE's parser, once."""
    if not any(action.dest == "peft" for action in parser._actions):
        group = parser.add_argument_group("parameter-efficient fine-tuning (mace-peft)")
        for name, text in OPTIONS.items():
            group.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS)
        mark_defaults(parser)
    return parser


def read_settings(args: argparse.Namespace) -> dict | None:
    """The settings that are given, by their names in PeftConfig, ``adapter`` and ``fast``; None without ``--peft``.

    ``--peft_adapter`` alone stands for ``--peft`` with the method of that adapter, too. Raises PeftError for values
    that cannot be used.
    """
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name, None) is not None}
    if not given:
        return None
    if "peft" not in given and "peft_adapter" in given:
        from mace_peft.adapter.directory import read_sizes  # as late as this, for a run without --peft

        given["peft"] = read_sizes(given["peft_adapter"])[0]["peft"]["method"]
    if "peft" not in given:
        name, value = next(iter(given.items()))
        raise PeftError(f"--{name} {value} has no effect without --peft: add --peft with one of "
                        f"{', '.join((*METHODS, AUTO))}")
    check_choice("<method>", given["peft"], (*METHODS, AUTO))
    settings = {"method": given.pop("peft"), **{name.removeprefix("peft_"): value for name, value in given.items()
                                                if name not in OF_TRAINING}}
    if settings["method"] != AUTO:
        check_effect(settings)
    for name, number in {"rank": int, "alpha": float, "init_std": float}.items():
        if name in settings and settings[name] != "auto":
            try:
                settings[name] = number(str(settings[name]))  # int(2.5) is 2, int('2.5') is an error
            except ValueError:
                kind = "a whole number or auto" if number is int else "a number"
                raise PeftError(f"<{name}> {settings[name]!r} is not {kind}: use one, such as <{name}> 16") from None
    check_choice("<fast>", str(settings.setdefault("fast", True)), ("True", "False"))
    settings["fast"] = str(settings["fast"]) == "True"
    own = {name: value for name, value in settings.items() if name not in ("adapter", "fast")}
    if settings["method"] == AUTO:
        check_auto(args, settings)
    else:  # those of an adapter to start from are not known yet: a budget is one of rank auto
        PeftConfig(**({"rank": "auto"} if "adapter" in settings and "budget" in settings else {}) | own)
    return settings


def check_auto(args: argparse.Namespace, settings: dict) -> None:
    """Raise PeftError for what leaves ``--peft auto`` nothing to choose."""
    if "adapter" in settings:
        raise PeftError(f"<method> {AUTO} cannot go with <adapter> {settings['adapter']}, which has a method: leave "
                        f"out <method> {AUTO}")
    if getattr(args, "lbfgs", False):
        raise PeftError(f"--lbfgs True cannot go with <method> {AUTO}, whose trials take steps at a learning rate: "
                        "leave it out, or give a method")


def check_options(args: argparse.Namespace) -> None:
    """Raise PeftError if options of MACE do not go with ``--peft``, or if the run could not write its files."""
    for name, reason in CONFLICTS.items():
        if getattr(args, name, None):
            raise PeftError(f"--{name} {getattr(args, name)} cannot go with --peft: {reason}")
    if args.device == "xpu":
        raise PeftError("--device xpu cannot go with --peft: MACE goes on with another model there (ipex.optimize), "
                        "which would lose the adapters: use cuda or cpu")
    from mace import data  # as late as this, for a run without --peft

    if args.foundation_model is None:
        option = next(name for name in ("peft", "peft_adapter") if getattr(args, name, None))
        raise PeftError(f"--{option} {getattr(args, option)} has nothing to adapt: add --foundation_model with a "
                        "file or a name that MACE knows, such as medium_off")
    if str(args.E0s).lower() == "estimated" and not hasattr(data, "estimate_e0s_from_foundation"):
        raise PeftError(f"--E0s {args.E0s} needs mace-torch 0.3.15 or later: upgrade it, or use average")
    if args.model not in MODELS:
        raise PeftError(f"--model {args.model} builds a new model instead of the foundation's: leave it out, or use "
                        f"one of {', '.join(MODELS)}")
    if "dipole" in args.loss and not (args.model == "PolarMACE" and args.loss == "energy_forces_dipole"):
        raise PeftError(f"--loss {args.loss} is one of dipoles, and --model {args.model} predicts no dipoles with it: "
                        "leave it out, or use one of energies and forces, such as weighted")
    if not args.foundation_filter_elements:
        raise PeftError("--foundation_filter_elements False leaves the readouts at random values, which --peft would "
                        "freeze: leave it out")
    if os.sep in args.name:
        raise PeftError(f"--name {args.name} has a {os.sep}, and MACE would not find its checkpoints again: give the "
                        "folder by --work_dir")
    check_places(args)
    check_keep(args)


def check_keep(args: argparse.Namespace) -> None:
    """Put plain values of ``OF_TRAINING``, and the default, into the arguments. Raises PeftError for others."""
    source, weight = (getattr(args, name, None) for name in OF_TRAINING)
    args.peft_keep, args.peft_keep_weight = None if source is None else str(source), None
    if source is None:
        if weight is not None:
            raise PeftError(f"--peft_keep_weight {weight} has no effect without --peft_keep: add it, with a file of "
                            "structures or auto, or leave the weight out")
        return
    try:
        args.peft_keep_weight = float(str(KEEP_WEIGHT if weight is None else weight))
    except ValueError:
        args.peft_keep_weight = math.nan
    if not 0 < args.peft_keep_weight < math.inf:
        raise PeftError(f"--peft_keep_weight {weight} is not a number above 0: give one, such as {KEEP_WEIGHT}")
    if args.peft_keep != "auto" and not os.path.exists(args.peft_keep):
        raise PeftError(f"--peft_keep {args.peft_keep} does not exist: check the path, or use auto")
    if args.lbfgs:
        raise PeftError(f"--peft_keep {args.peft_keep} cannot go with --lbfgs, whose steps need one and the same loss, "
                        "not one of other structures each time: leave out one of them")


def settle_cueq(args: argparse.Namespace) -> None:
    """Make ``--only_cueq``, on which MACE does not act with a foundation model, another name of ``--enable_cueq``.

    Raises PeftError if cuEquivariance is asked for and not installed.
    """
    for name in ("enable_cueq", "only_cueq"):
        if getattr(args, name, None):
            if importlib.util.find_spec("cuequivariance_torch") is None:
                raise PeftError(f"--{name} True needs cuequivariance-torch, which is not installed: "
                                "pip install cuequivariance-torch, or leave it out")
            args.enable_cueq, args.only_cueq = True, False


def stop(error: PeftError) -> NoReturn:
    """End ``mace_run_train`` with the error in one line, whatever it quotes, and exit code 2."""
    print(f"mace_run_train: error: {error.on_command_line()}", file=sys.stderr)
    raise SystemExit(2)
