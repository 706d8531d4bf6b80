"""The figures of docs/results/. Forces in meV/A."""

from __future__ import annotations

from statistics import mean

import matplotlib
from accuracy_results import Results
from cells import COMPARED, TRAINED

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = {"foundation": ("0.6", ":"), "scratch": ("0.6", "-"), "full": ("black", "-"), "readouts": ("0.6", "--"),
          "MACE LoRA": ("black", "--"), "elora products": ("tab:blue", "-"), "elora linears": ("tab:blue", "--"),
          "elora published": ("tab:blue", ":"), "mmea products": ("tab:orange", "-"),
          "mmea linears": ("tab:orange", "--"), "mmea published": ("tab:orange", ":"),
          "gates": ("tab:orange", "-."), "scales": ("tab:green", "-"), "small": ("tab:green", "--"),
          "best": ("tab:red", "-"), "mmea": ("tab:red", "--")}


def data_panels(found: Results) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """A panel for each data set."""
    names = found.data()
    figure, (panels,) = plt.subplots(1, len(names), figsize=(3.2 * len(names) + 1.6, 3.6), layout="constrained",
                                     squeeze=False)
    return figure, dict(zip(names, panels, strict=True))


def labelled(figure: plt.Figure) -> plt.Figure:
    """With all methods of the panels, in a column beside them."""
    known = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(),
                                                                             strict=True)}
    names = [name for name in COMPARED if name in known]
    figure.legend([known[name] for name in names], names, loc="outside right center", fontsize=8, frameon=False)
    return figure


def logarithmic(panel: plt.Axes, *ticks: int) -> None:
    """The errors' axis, no longer than the errors ask, with those of the ticks that it has room for."""
    panel.set_yscale("log")
    limits = panel.get_ylim()
    panel.set_yticks(ticks, map(str, ticks))
    panel.set_ylim(limits)
    panel.minorticks_off()


def draw_curves(found: Results) -> plt.Figure:
    """Validation force MAE after each epoch, first seed."""
    figure, panels = data_panels(found)
    for name, panel in panels.items():
        for method in TRAINED:
            for cell in found.main(method, data=name, seed=1):
                values = [1e3 * value for value in found.results[cell.key]["curve"]["mae_f"]]
                panel.plot(values, label=method, color=STYLES[method][0], linestyle=STYLES[method][1], linewidth=1)
        panel.set(title=name, xlabel="epoch", ylabel="force MAE, validation (meV/A)")
        logarithmic(panel, 5, 10, 20, 50, 100, 200, 500)
    return labelled(figure)


def draw_forgetting(found: Results) -> plt.Figure:
    """What a fine-tune gains on its own data, and what it loses on the foundation's; a line where that was.

    Means over the seeds, as in the tables.
    """
    figure, panels = data_panels(found)
    for name, panel in panels.items():
        for method in COMPARED:
            cells = found.forgetting(method, name)
            if not cells or method == "scratch":
                continue
            test, pretraining = (mean(found.values(cells, on, "mae_f")) for on in (cells[0].tests[0], "pretraining"))
            color, line = STYLES[method]
            if method == "foundation":
                panel.axhline(pretraining, color=color, linestyle=line, label=method)
            else:
                panel.plot(test, pretraining, marker={"-": "o", "--": "s", ":": "^", "-.": "D"}[line], color=color,
                           linestyle="none", label=method)
        panel.set(title=name, xlabel="force MAE, test (meV/A)", ylabel="force MAE, pretraining data (meV/A)")
        # gates may fail on structures unlike all in training, by orders of magnitude
        logarithmic(panel, 50, 100, 200, 500, 1000, 2000)
    return labelled(figure)


def draw_sizes(found: Results) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for panel, test in zip(panels, ("test_300K", "test_600K"), strict=True):
        cells = found.cells("sizes")
        for method in dict.fromkeys(cell.method for cell in cells):
            mine = [cell for cell in cells if cell.method == method]
            panel.loglog([cell.train for cell in mine], found.values(mine, test, "mae_f"), marker="o", label=method,
                         color=STYLES[method][0], linestyle=STYLES[method][1])
        panel.set(title=f"AcAc, {test[5:-1]} K", xlabel="training configurations")
        sizes = sorted({cell.train for cell in cells})
        panel.set_xticks(sizes, map(str, sizes))
        panel.set_yticks((20, 50, 100, 200, 400), map(str, (20, 50, 100, 200, 400)))
        panel.minorticks_off()
    panels[0].set_ylabel("force MAE (meV/A)")
    panels[0].legend(fontsize=8)
    return figure
