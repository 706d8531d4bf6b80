"""``restore`` makes the empty objects that ``pickle`` and ``copy`` fill.

It is the only name of this package in a model file, so that files outlive every other module path.
"""

import pkgutil
import sys
import traceback

PLACES = {
    "model": "mace_peft.model.adapted:empty_model",
    "block": "mace_peft.blocks.adapted:empty_block",
    "adapter": "mace_peft.methods:empty_adapter",
    "part": "mace_peft.methods.weights:Part",
}


def restore(what: str, *arguments):
    """An empty object of that kind. A training command of MACE that would lose the adapters of a model ends here."""
    if what == "model":
        refuse_plain_training()
    return pkgutil.resolve_name(PLACES[what])(*arguments)


def refuse_plain_training() -> None:
    """End ``mace_run_train`` where it loads an adapted model and the start-up hook is off, as with ``python -S``."""
    for frame, _ in traceback.walk_stack(sys._getframe()):
        names = frame.f_globals
        in_training = frame.f_code.co_name == "run" and hasattr(names.get("tools"), "build_default_arg_parser")
        if in_training and not hasattr(names.get("run"), "without_peft"):
            print("mace_run_train: error: the foundation model has adapters, which this run would lose, for the "
                  "start-up hook of mace-peft is off: run python -m mace_peft.run_train with --peft, or give the "
                  "foundation", file=sys.stderr)
            raise SystemExit(2)
