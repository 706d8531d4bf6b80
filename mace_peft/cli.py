"""The ``mace_peft`` command: look at adapters, export and plot them."""

from __future__ import annotations

import argparse
import sys

from mace_peft.config import PeftError, one_line

FORMATS = ("model", "torchscript", "lammps", "lammps-mliap")


def main() -> None:
    """Run the command. What cannot be done ends it with one line on stderr and exit code 2."""
    args = build_parser().parse_args()
    try:
        print(args.run(args))
    except PeftError as error:
        fail(error)
    except OSError as error:
        fail(PeftError(one_line(error)))


def fail(error: PeftError) -> None:
    print(f"mace_peft: error: {error}", file=sys.stderr)
    raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mace_peft", description="Adapters of MACE models (mace_run_train --peft)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what an adapter directory or a model holds")
    info.add_argument("path", metavar="DIR|MODEL")
    info.set_defaults(run=run_info)

    export = commands.add_parser("export", help="write the fine-tuned model to one file")
    export.add_argument("foundation", metavar="FOUNDATION", help="the model that the adapter was trained from")
    export.add_argument("adapter", metavar="DIR", help="the adapter directory")
    export.add_argument("out", metavar="OUT", help="the file to write")
    export.add_argument("--format", choices=FORMATS, default="model", help="default: model")
    export.add_argument("--head", help="the head for LAMMPS, where the model has several")
    export.set_defaults(run=run_export)

    plot = commands.add_parser("plot", help="draw the gains of MMEA, or the singular values of ELoRA's updates")
    plot.add_argument("adapter", metavar="DIR", help="the adapter directory")
    plot.add_argument("--foundation", required=True, help="the model that the adapter was trained from")
    plot.add_argument("--structures", metavar="FILE", help="structures for MMEA's gains, in a format ASE reads")
    plot.set_defaults(run=run_plot)
    return parser


# Each imports what it needs: --help and errors in the options come at once.


def run_info(args: argparse.Namespace) -> str:
    from mace_peft.info import info

    return info(args.path)


def run_export(args: argparse.Namespace) -> str:
    from mace_peft.deploy import export

    return export(args.foundation, args.adapter, args.out, args.format, args.head)


def run_plot(args: argparse.Namespace) -> str:
    from mace_peft.plot import plot

    return "\n".join(f"Wrote {path}" for path in plot(args.adapter, args.foundation, args.structures))
