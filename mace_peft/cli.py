"""The ``mace_peft`` command: look at adapters, export, plot and evaluate them."""

import argparse
import importlib
import os
import sys

from mace_peft import __version__
from mace_peft.errors import PeftError, needs_mace, one_line, printable
from mace_peft.quiet import without_harmless_warnings

FORMATS = ("model", "torchscript", "lammps", "lammps-mliap")


def main() -> None:
    """Run the command. What cannot be done ends it with one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # what it cannot show, such as a name in another script, is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    args = vars(build_parser().parse_args())
    module, name = args.pop("runs")
    try:
        with without_harmless_warnings(), needs_mace(f"mace_peft {name}"):
            # imported now: --help and errors in the options come at once
            result = getattr(importlib.import_module(module), name)(**args)
    except (PeftError, OSError) as error:
        error = error if isinstance(error, PeftError) else PeftError(one_line(error))
        print(f"mace_peft: error: {error.on_command_line()}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        print(result if isinstance(result, str) else "\n".join(f"Wrote {printable(str(path))}" for path in result))
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(1) from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mace_peft", description="Adapters of MACE models (mace_run_train --peft)")
    parser.add_argument("--version", action="version", version=f"mace-peft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what an adapter directory or a model holds")
    info.add_argument("path", metavar="DIR|MODEL", help="an adapter directory; with --trust, a model")
    info.add_argument("--trust", action="store_true",
                      help="load the model file, which can run any code: only if you know who made it")
    info.set_defaults(runs=("mace_peft.inspect.info", "info"))

    export = commands.add_parser("export", help="write the fine-tuned model to one file")
    export.add_argument("foundation", metavar="FOUNDATION", help="the model that the adapter was trained from")
    export.add_argument("adapter", metavar="DIR", help="the adapter directory")
    export.add_argument("out", metavar="OUT", help="the file to write")
    export.add_argument("--format", choices=FORMATS, default="model", help="default: model")
    export.add_argument("--head", help="the head for LAMMPS, where the model has several")
    export.add_argument("--strength", type=float, metavar="S", help="from 0, the foundation, to 1, the adapter; "
                        "default: as it was saved, which is 1 after a run")
    export.set_defaults(runs=("mace_peft.deploy", "export"))

    plot = commands.add_parser("plot", help="draw the gains of MMEA, or the singular values of ELoRA's updates")
    plot.add_argument("adapter", metavar="DIR", help="the adapter directory")
    plot.add_argument("--foundation", required=True, help="the model that the adapter was trained from")
    plot.add_argument("--structures", metavar="FILE", help="structures for MMEA's gains, in a format ASE reads")
    plot.set_defaults(runs=("mace_peft.inspect.figures", "plot"))

    evaluate = commands.add_parser("evaluate", help="errors of a foundation and of adapters on labelled structures")
    evaluate.add_argument("foundation", metavar="FOUNDATION", help="the model that the adapters were trained from; its "
                          "energies are taken with the E0s of each")
    evaluate.add_argument("adapters", metavar="DIR", nargs="*", help="adapter directories")
    evaluate.add_argument("--structures", metavar="FILE", required=True, help="structures with labels, in a format ASE "
                          "reads")
    evaluate.add_argument("--plot", metavar="FILE", help="also draw predictions over labels, to a file such as a.png")
    evaluate.add_argument("--strengths", metavar="AWAY", nargs="?", const="", help="errors at strengths of one adapter "
                          "from 0 to 1 instead; also on this file, of the foundation's own data, if one is given")
    for name in ("energy", "forces", "stress"):
        evaluate.add_argument(f"--{name}_key", metavar="KEY", help=f"default: REF_{name}")
    evaluate.add_argument("--device", default="cpu", help="default: cpu")
    evaluate.add_argument("--default_dtype", choices=("float32", "float64"), help="default: that of the training")
    evaluate.add_argument("--batch_size", type=int, default=10, metavar="N", help="structures at once; default: 10")
    evaluate.add_argument("--head", help="the head that predicts, where the model has several")
    evaluate.set_defaults(runs=("mace_peft.inspect.evaluate", "evaluate"))
    return parser
