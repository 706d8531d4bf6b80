"""The figures of docs/results.md. Forces in meV/A."""

from __future__ import annotations

import matplotlib
from accuracy_results import Results
from cells import COMPARED, TRAINED

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = {"foundation": ("0.6", ":"), "scratch": ("0.6", "-"), "full": ("black", "-"), "readouts": ("0.6", "--"),
          "MACE LoRA": ("black", "--"), "elora products": ("tab:blue", "-"), "elora linears": ("tab:blue", "--"),
          "elora published": ("tab:blue", ":"), "mmea products": ("tab:orange", "-"),
          "mmea linears": ("tab:orange", "--"), "mmea published": ("tab:orange", ":"),
          "mmea all": ("tab:orange", "-."), "static all": ("tab:green", "-"), "small": ("tab:green", "--")}


def data_panels(found: Results) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """A panel for each data set."""
    names = found.data()
    figure, (panels,) = plt.subplots(1, len(names), figsize=(3.2 * len(names) + 1.6, 3.6), layout="constrained",
                                     squeeze=False)
    return figure, dict(zip(names, panels, strict=True))


def labelled(figure: plt.Figure, panel: plt.Axes) -> plt.Figure:
    """With the methods of the panel, in a column beside it."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def draw_curves(found: Results) -> plt.Figure:
    """Validation force MAE after each epoch, first seed."""
    figure, panels = data_panels(found)
    for name, panel in panels.items():
        for method in TRAINED:
            for cell in found.main(method, data=name, seed=1):
                values = [1e3 * value for value in found.results[cell.key]["curve"]["mae_f"]]
                panel.semilogy(values, label=method, color=STYLES[method][0], linestyle=STYLES[method][1], linewidth=1)
        panel.set(title=name, xlabel="epoch", ylabel="force MAE, validation (meV/A)")
    return labelled(figure, panel)


def draw_forgetting(found: Results) -> plt.Figure:
    """What a fine-tune gains on its own data, and what it loses on the foundation's."""
    figure, panels = data_panels(found)
    for name, panel in panels.items():
        for method in COMPARED:
            for cell in found.main(method, data=name, seed=1):
                errors = found.results[cell.key]["errors"]
                if "pretraining" in errors and method != "scratch":
                    panel.loglog(1e3 * errors[cell.tests[0]]["mae_f"], 1e3 * errors["pretraining"]["mae_f"],
                                 marker="o" if "-" == STYLES[method][1] else "s" if "--" == STYLES[method][1] else "^",
                                 color=STYLES[method][0], linestyle="none", label=method)
        panel.set(title=name, xlabel="force MAE, test (meV/A)", ylabel="force MAE, pretraining data (meV/A)")
    return labelled(figure, panel)


def draw_sizes(found: Results) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for panel, test in zip(panels, ("test_300K", "test_600K"), strict=True):
        cells = found.cells("sizes")
        for method in dict.fromkeys(cell.method for cell in cells):
            mine = [cell for cell in cells if cell.method == method]
            panel.loglog([cell.train for cell in mine], found.values(mine, test, "mae_f"), marker="o", label=method,
                         color=STYLES[method][0], linestyle=STYLES[method][1])
        panel.set(title=f"AcAc, {test[5:-1]} K", xlabel="training configurations")
    panels[0].set_ylabel("force MAE (meV/A)")
    panels[0].legend(fontsize=8)
    return figure
