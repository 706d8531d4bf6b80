"""mace-peft inside ``mace_run_train``: the options, and what a run does with and without ``--peft``.

``install`` wraps two names for good: the parser, and ``run``. What ``run`` needs for ``--peft`` is imported only then,
and only for a mace-torch that is supported: every other run is MACE's own, whatever its version.
"""

import argparse
import functools
import types

from mace_peft.errors import PeftError
from mace_peft.patching import replaced
from mace_peft.quiet import without_harmless_warnings
from mace_peft.train.learning_rates import unmark
from mace_peft.train.options import add_options, check_options, read_settings, settle_cueq, stop
from mace_peft.train.run_files import checkpoints_begin
from mace_peft.train.sole_run import sole_run

SUPPORTED = ("0.3.13", "0.3.14", "0.3.15", "0.3.16")  # versions of mace-torch


def install(run_train: types.ModuleType) -> None:
    """Make the module ``mace.cli.run_train`` know ``--peft*``. A second call changes nothing."""
    if hasattr(run_train.run, "without_peft"):
        return
    original_parser, original_run = run_train.tools.build_default_arg_parser, run_train.run

    @functools.wraps(original_parser)
    def build_default_arg_parser():
        return add_options(original_parser())

    @functools.wraps(original_run)
    def run(args):
        try:
            settings = read_settings(args)
            if settings is None:
                unmark(args)
                configure = functools.partial(refuse_adapted, run_train.configure_model)
                with sole_run(args, with_peft=False), replaced(run_train, "configure_model", configure):
                    refuse_checkpoints(args)
                    return original_run(args)
            return run_with_peft(run_train, args, settings)
        except PeftError as error:
            stop(error)

    run.without_peft = original_run
    run_train.tools.build_default_arg_parser = build_default_arg_parser
    run_train.run = run


@without_harmless_warnings()
def run_with_peft(run_train: types.ModuleType, args: argparse.Namespace, settings: dict) -> object:
    """MACE's ``run`` as a fine-tune with these settings. Raises PeftError for what cannot be done."""
    check_version()
    check_options(args)
    settle_cueq(args)
    from mace_peft.train.data.heads import replays
    from mace_peft.train.finetune import FineTune
    from mace_peft.train.first_mistakes import check_first_mistakes, one_line_before_training
    from mace_peft.train.seams import replaced_names
    from mace_peft.train.start import find_start

    check_first_mistakes(args)
    fast = settings.pop("fast")
    fine_tune = FineTune(run_train, args, find_start(args, settings), fast)
    args.multiheads_finetuning = replays(args)  # as MACE does, but it warns of replay that nobody has asked for
    with sole_run(args), replaced_names(run_train, fine_tune, fast), one_line_before_training(fine_tune.begun):
        return fine_tune.results.run(run_train.run.without_peft)


def check_version() -> None:
    """Raise PeftError if the mace-torch that runs is none that ``--peft`` has been tested with."""
    from mace import __version__ as version  # of the code, which need not be what is installed

    if version not in SUPPORTED:
        raise PeftError(f"mace-torch {version} is not supported by this mace-peft, which knows {', '.join(SUPPORTED)}: "
                        f"install one of them (pip install mace-torch=={SUPPORTED[-1]}), or a newer mace-peft")


def refuse_adapted(configure_model, args, train_loader, atomic_energies, foundation=None, *more, **options):
    """MACE's ``configure_model`` for a run without ``--peft``, which would drop its foundation's adapters: it stops."""
    config = getattr(foundation, "peft_config", None)
    if config is not None:
        stop(PeftError(f"--foundation_model {args.foundation_model} has {config.method} adapters, which a run without "
                       f"--peft would lose: add --peft {config.method} to train them on, or give the foundation"))
    return configure_model(args, train_loader, atomic_energies, foundation, *more, **options)


def refuse_checkpoints(args: argparse.Namespace) -> None:
    """Raise PeftError if MACE would take the checkpoint of a run with ``--peft`` for one of this run without.

    It loads the latest of that name in the end, and ``--restart_latest`` at the start, whatever is in it.
    """
    import torch

    beginning = checkpoints_begin(args)
    for path in sorted(beginning.parent.glob("*.pt")):
        if not path.name.startswith(f"{beginning.name}_epoch-") or not path.is_file():
            continue
        try:
            with_peft = "peft" in torch.load(path, map_location="meta", weights_only=False)
        except Exception:  # a damaged file fails in many ways, and MACE tells of it if it needs the file
            continue
        if with_peft:
            raise PeftError(f"the checkpoint {path} was made with --peft, and this run of the same name is without: "
                            "add the --peft options it was made with, or give this run another --name")
