"""``mace_peft evaluate``: the errors of a foundation and of adapters as a table, and as a figure."""

import functools
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mace.tools import compute_mae, compute_rmse
from matplotlib import rc_context
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from prettytable import PrettyTable

from mace_peft.errors import PeftError, printable
from mace_peft.files import REMEDY, check_regular, complete
from mace_peft.inspect import strengths as over_strength
from mace_peft.inspect.compare import QUANTITIES, Values, compare
from mace_peft.inspect.figures import STYLE, shown


def evaluate(foundation: str, adapters: Sequence[str], structures: str, plot: str | None = None,
             strengths: str | None = None, **options) -> str:
    """The errors of the predictions of ``compare`` as text: a row per model, with MAE and RMSE of the energies per atom
    (meV/atom), the forces (meV/A), and of stresses (meV/A^3) where the file has them.

    plot: a figure to write, of predictions over labels. strengths: not None asks for a row per strength of the adapter
    in the place of that, and a figure of errors over the strength; it may name a second file, see
    ``compare_strengths``. options: those of ``compare``.

    Raises PeftError where ``compare`` does, and before that for a figure that cannot be written.
    """
    if plot is not None:
        check_figure(plot, [foundation, structures, *filter(None, [strengths]), *adapters])
    if strengths is None:
        labels, predictions = compare(foundation, adapters, structures, **options)
        said = errors("model", structures, labels, predictions)
        figure = functools.partial(draw, labels, predictions)
    else:
        curves = over_strength.compare_strengths(foundation, adapters, structures, strengths, **options)
        said = "\n".join(errors("strength", *curve) for curve in curves)
        figure = functools.partial(over_strength.draw, curves)
    if plot is None:
        return said
    complete(Figure.savefig, remedy=REMEDY)(figure(), plot, format=file_format(plot))
    return f"{said}\nWrote {printable(plot)}"


def errors(row: str, what: str, labels: Values, predictions: list[tuple[str, Values]]) -> str:
    """A line and the table of the errors on what is named so, with that title of its rows."""
    counts = ", ".join(f"{len(values):,} {QUANTITIES[name].counted}" for name, values in labels.items())
    return f"Errors on {printable(what)} ({counts})\n{table(row, labels, predictions)}"


def table(row: str, labels: Values, predictions: list[tuple[str, Values]]) -> PrettyTable:
    quantities = [QUANTITIES[name] for name in labels]
    rows = PrettyTable([row, *(f"{quantity.short} {error} (m{quantity.unit})" for quantity in quantities
                                   for error in ("MAE", "RMSE"))], align="r")
    rows.align[row] = "l"
    for model, predicted in predictions:
        found = [compute(predicted[name] - label) for name, label in labels.items()
                 for compute in (compute_mae, compute_rmse)]
        rows.add_row([printable(model), *(f"{1000 * error:,.2f}" for error in found)])
    return rows


@rc_context(STYLE)
def draw(labels: Values, predictions: list[tuple[str, Values]]) -> Figure:
    """Predictions over labels: a panel per kind of label, a colour per model. Energies are relative to the labels'
    mean."""
    width = max(4.8, 3.2 * len(labels))
    names = ["\n".join(textwrap.wrap(shown(model), int(14 * width))) for model, _ in predictions]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(width, 3.6 + 0.17 * lines), dpi=150, layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels.items(), strict=True):
        quantity, middle = QUANTITIES[name], label.mean() if name == "energy" else 0.0
        for number, (_, predicted) in enumerate(predictions):
            axes.plot(label.flatten() - middle, predicted[name].flatten() - middle, ".", color=f"C{number}",
                      markersize=4, alpha=0.6, markeredgewidth=0, rasterized=True)
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=0)
        axes.set_aspect("equal", adjustable="datalim")
        mean = " - mean of the labels" if name == "energy" else ""
        axes.set_xlabel(f"label: {name}{mean} ({quantity.unit})")
        axes.set_ylabel(f"prediction ({quantity.unit})")
    # those of the last panel stand for all
    figure.legend(axes.lines[:-1], names, loc="outside lower center", frameon=False, markerscale=2)
    return figure


def check_figure(path: str, given: Sequence[str | os.PathLike]) -> None:
    """Raise PeftError if no figure can be written there, or if it would take the place of what is given."""
    folder, formats = Path(path).absolute().parent, sorted(FigureCanvasBase.filetypes)
    if file_format(path) not in formats:
        raise PeftError(f"--plot {path} ends on no format of figures: use a name that ends on one of .png, .pdf and "
                        f"{', '.join(f'.{one}' for one in formats if one not in ('png', 'pdf'))}")
    if not folder.is_dir():
        raise PeftError(f"--plot {path} cannot be written, for {folder} is no directory: make it, or give another path")
    check_regular(path)
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise PeftError(f"--plot {path} cannot be written, for it is not allowed to you: give another path")
    for one in given:
        inside = Path(one).is_dir() and folder.resolve() == Path(one).resolve()
        if inside or (Path(path).exists() and Path(one).exists() and Path(path).samefile(one)):
            raise PeftError(f"--plot {path} would change {one}, which was given: give another name")


def file_format(path: str) -> str:
    return Path(path).suffix[1:].lower()
