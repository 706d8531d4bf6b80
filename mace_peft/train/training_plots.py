"""MACE's figures of a training, where they would fail in the debug log alone."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from mace.cli.visualise_train import TrainingPlotter
from matplotlib.axes import Axes

from mace_peft.errors import one_line
from mace_peft.patching import replaced

# the same tables of errors for data without stresses and virials, of which there are no errors to draw
WITHOUT_STRESS = {"PerAtomRMSEstressvirials": "PerAtomRMSE", "PerAtomMAEstressvirials": "PerAtomMAE"}


def mended(plotter: TrainingPlotter) -> TrainingPlotter:
    """The plotter, which draws what was measured, and says in the log what it cannot draw: nothing stops a run."""
    draw = plotter.plot

    def plot(*args, **kwargs) -> None:
        measured = Path(plotter.results_dir).read_text() if Path(plotter.results_dir).exists() else ""
        if '_stress"' not in measured:
            plotter.table_type = WITHOUT_STRESS.get(plotter.table_type, plotter.table_type)
        try:
            with replaced(Axes, "plot", labelled_by_text(Axes.plot)):
                draw(*args, **kwargs)
        except Exception as error:  # figures fail in many ways
            if '"opt"' not in measured:
                logging.info("No figure is drawn, for no epoch was trained")
                return
            logging.warning(f"No figure is drawn ({type(error).__name__}: {one_line(error)})")

    plotter.plot = plot
    return plotter


def labelled_by_text(plot: Callable) -> Callable:
    """``Axes.plot`` for MACE, which labels the line of an error by a tuple: matplotlib 3.11 refuses that."""

    @functools.wraps(plot)
    def plot_labelled(axes, *args, **kwargs):
        if isinstance(kwargs.get("label"), tuple):
            kwargs["label"] = kwargs["label"][-1]  # the error and its unit, after MACE's name of it
        return plot(axes, *args, **kwargs)

    return plot_labelled
