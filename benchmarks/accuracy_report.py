"""The tables and figures of docs/results.md, from what accuracy.py measured. Energies in meV, forces in meV/A."""

from __future__ import annotations

from statistics import mean

import matplotlib
from cells import ABLATED, COMPARED, DATA, EXPERIMENTS, LADDER, MOLECULES, TRAINED, Cell, learning_rates, sweep
from cells import validation_error as validation

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from pages import DOCS, fill, table, versions

STYLES = {"foundation": ("0.6", ":"), "scratch": ("0.6", "-"), "full": ("black", "-"), "readouts": ("0.6", "--"),
          "MACE LoRA": ("black", "--"), "elora products": ("tab:blue", "-"), "elora linears": ("tab:blue", "--"),
          "elora published": ("tab:blue", ":"), "mmea products": ("tab:orange", "-"),
          "mmea linears": ("tab:orange", "--"), "mmea published": ("tab:orange", ":"),
          "mmea all": ("tab:orange", "-."), "static all": ("tab:green", "-"), "small": ("tab:green", "--")}


class Results:
    """What was measured, by the settings that a table asks for."""

    def __init__(self, results: dict[str, dict]):
        self.results = results
        self.rates = learning_rates(results)

    def cells(self, experiment: str, **chosen) -> list[Cell]:
        """Measured cells of an experiment with these settings."""
        cells = EXPERIMENTS[experiment](self.results, self.rates)
        return [cell for cell in cells if cell.key in self.results
                and all(getattr(cell, name) == value for name, value in chosen.items())]

    def values(self, cells: list[Cell], test: str, error: str) -> list[float]:
        return [1e3 * self.results[cell.key]["errors"][test][error] for cell in cells]

    def shown(self, cells: list[Cell], test: str, error: str) -> str:
        """Mean over the seeds, and half of what lies between the lowest and the highest."""
        values = self.values(cells, test, error)
        if not values:
            return ""
        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"

    def share(self, method: str) -> str:
        """Parameters that the method trains, of those of the model, by the molecules' models."""
        cells = [cell for cell in self.main(method) if cell.data == "ethanol"]
        full = [cell for cell in self.main("full") if cell.data == "ethanol"]
        if not cells or not full:
            return ""
        count, base = (self.results[found[0].key]["parameters"] for found in (cells, full))
        return f"{count:,} ({100 * count / base:.1f} %)"

    def main(self, method: str, **chosen) -> list[Cell]:
        return self.cells("foundation" if method == "foundation" else "main", method=method, **chosen)


def molecules(found: Results) -> str:
    header = ["trained", *(f"{name} {error}" for name in MOLECULES for error in ("E", "F"))]
    return table(["rMD17, MAE", *header], [
        [method, found.share(method), *(found.shown(found.main(method, data=name), "test", error)
                                        for name in MOLECULES for error in ("mae_e", "mae_f"))] for method in COMPARED])


def acac(found: Results) -> str:
    tests = ("test_300K", "test_600K")
    return table(["AcAc, RMSE", *(f"{test[5:-1]} K {error}" for test in tests for error in ("E", "F")),
                  "600 K / 300 K, F"], [
        [method, *(found.shown(cells, test, error) for test in tests for error in ("rmse_e", "rmse_f")),
         f"{mean(found.values(cells, tests[1], 'rmse_f')) / mean(found.values(cells, tests[0], 'rmse_f')):.2f}"
         if cells else ""] for method in COMPARED for cells in [found.main(method, data="acac")]])


def forgetting(found: Results) -> str:
    return table(["pretraining data, MAE F", *DATA], [
        [method, *(found.shown([cell for cell in found.main(method, data=name)
                                if "pretraining" in found.results[cell.key]["errors"]], "pretraining", "mae_f")
                   for name in DATA)] for method in COMPARED if method != "scratch"])


def rates(found: Results) -> str:
    """Force MAE on ethanol's validation set for each learning rate, the best in bold."""
    swept = {(cell.method, cell.lr): 1e3 * validation(found.results[cell.key]) for cell in sweep(found.results, {})
             if cell.key in found.results}
    rows = []
    for method in TRAINED:
        values = [swept.get((method, lr)) for lr in LADDER]
        rows.append([method, *("" if value is None else f"**{value:.1f}**" if found.rates.get(method) == lr
                               else f"{value:.1f}" for lr, value in zip(LADDER, values, strict=True))])
    return table(["lr", *(f"{lr:g}" for lr in LADDER)], rows)


def by(found: Results, experiment: str, setting: str, test: str, label: str) -> str:
    """Energy and force MAE of each method of the experiment against a setting."""
    cells = found.cells(experiment)
    values = list(dict.fromkeys(getattr(cell, setting) for cell in cells))
    return table([label, *(f"{value} {error}" for value in values for error in ("E", "F"))], [
        [method, *(found.shown([cell for cell in cells if cell.method == method and getattr(cell, setting) == value],
                               test, error) for value in values for error in ("mae_e", "mae_f"))]
        for method in dict.fromkeys(cell.method for cell in cells)])


def ablated(found: Results) -> str:
    rows = [[method, f"{found.results[cells[0].key]['parameters']:,}",
             *(found.shown(cells, "test", error) for error in ("mae_e", "mae_f"))]
            for method in ("mmea products", *ABLATED) for cells in [found.cells("ablations", method=method)] if cells]
    return table(["ethanol, MAE", "trained", "E", "F"], rows)


def small_budget(found: Results) -> str:
    """Each with the better of its learning rates."""
    best: dict[str, Cell] = {}
    for cell in found.cells("small"):
        if cell.method not in best or validation(found.results[cell.key]) < validation(
                found.results[best[cell.method].key]):
            best[cell.method] = cell
    rows = []
    for cell in best.values():
        result = found.results[cell.key]
        rows.append([cell.method, f"{result['parameters']:,}", f"{cell.lr:g}",
                     *(f"{1e3 * min(result['curve'][error]):.1f}" for error in ("mae_e", "mae_f"))])
    return table(["ethanol, validation, MAE", "trained", "lr", "E", "F"], rows)


def messages(found: Results) -> str:
    """Force MAE on ethanol's validation set for each learning rate."""
    cells = found.cells("messages")
    rates = list(dict.fromkeys(cell.lr for cell in cells))
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [found.results[cell.key] for cell in cells if cell.method == method]
        rows.append([method, f"{mine[0]['parameters']:,}", *(f"{1e3 * validation(result):.1f}" for result in mine)])
    return table(["ethanol, validation, MAE F", "trained", *(f"lr {rate:g}" for rate in rates)], rows)


def chosen(found: Results) -> str:
    """ELoRA with one rank everywhere, and with chosen ranks for as many parameters."""
    rows = []
    cells = found.cells("chosen")
    for cell in [cell for cell in cells if cell.budget is None]:
        count = found.results[cell.key]["parameters"]
        other = [one for one in cells if one.data == cell.data and one.budget == str(count)]
        pairs = [(found.values([one], one.tests[-1], "mae_e")[0], found.values([one], one.tests[-1], "mae_f")[0])
                 for one in (cell, *other)]
        rows.append([cell.data, str(cell.rank), f"{count:,}", *(f"{value:.1f}" for pair in pairs for value in pair),
                     *([f"{pairs[1][1] / pairs[0][1]:.3f}"] if other else ["", "", ""])])
    return table(["MAE", "rank", "parameters", "E", "F", "chosen ranks: E", "F", "F, chosen / one rank"], rows)


def comparison(found: Results, better: str, worse: str, error: str, data=MOLECULES, test: str = "test") -> str:
    """By how much the first is below the second: percent, averaged over the data sets that have both."""
    gains = []
    for name in data:
        first, second = (found.values(found.main(method, data=name), test, error) for method in (better, worse))
        if first and second:
            gains.append(100 * (1 - mean(first) / mean(second)))
    return f"{mean(gains):.1f} %" if gains else ""


def claims(found: Results) -> str:
    pairs = [("MMEA below ELoRA", "mmea published", "elora published", "6.6 %", "8.7 %"),
             ("ELoRA below full fine-tuning", "elora published", "full", "25.5 %", "23.7 %")]
    rows = [[f"{what}, rMD17, {name}", said, comparison(found, better, worse, error)]
            for what, better, worse, *both in pairs
            for name, error, said in zip(("energy", "force"), ("mae_e", "mae_f"), both, strict=True)]
    rows += [[f"{method}: trained parameters", said, found.share(method)] for method, said in (
        ("mmea published", "20.1 %"), ("elora published", "23.4 %"))]
    rows += [[f"{better} below {worse}, AcAc at 600 K, force RMSE", "better",
              comparison(found, better, worse, "rmse_f", ("acac",), "test_600K")]
             for better, worse in (("mmea published", "elora published"), ("elora published", "full"))]
    return table(["claim", "published", "here"], rows)


def draw_curves(found: Results) -> plt.Figure:
    """Validation force MAE after each epoch, first seed."""
    figure, panels = plt.subplots(1, len(DATA), figsize=(3.2 * len(DATA), 3.6), layout="constrained")
    for panel, name in zip(panels, DATA, strict=True):
        for method in TRAINED:
            for cell in found.main(method, data=name, seed=1):
                values = [1e3 * value for value in found.results[cell.key]["curve"]["mae_f"]]
                panel.semilogy(values, label=method, color=STYLES[method][0], linestyle=STYLES[method][1], linewidth=1)
        panel.set(title=name, xlabel="epoch")
    panels[0].set_ylabel("force MAE, validation (meV/A)")
    panels[-1].legend(fontsize=7)
    return figure


def draw_forgetting(found: Results) -> plt.Figure:
    """What a fine-tune gains on its own data, and what it loses on the foundation's."""
    figure, panels = plt.subplots(1, len(DATA), figsize=(3.2 * len(DATA), 3.6), layout="constrained")
    for panel, name in zip(panels, DATA, strict=True):
        for method in COMPARED:
            for cell in found.main(method, data=name, seed=1):
                errors = found.results[cell.key]["errors"]
                if "pretraining" in errors and method != "scratch":
                    panel.loglog(1e3 * errors[cell.tests[0]]["mae_f"], 1e3 * errors["pretraining"]["mae_f"],
                                 marker="o" if "-" == STYLES[method][1] else "s" if "--" == STYLES[method][1] else "^",
                                 color=STYLES[method][0], linestyle="none", label=method)
        panel.set(title=name, xlabel="force MAE, test (meV/A)")
    panels[0].set_ylabel("force MAE, pretraining data (meV/A)")
    panels[-1].legend(fontsize=7)
    return figure


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


def write_report(results: dict[str, dict]) -> None:
    """Put the tables between their marks in docs/results.md, and draw the figures, of those that the page has."""
    found, page = Results(results), (DOCS / "results.md").read_text()
    parts = {
        "versions": versions([result["environment"] for result in results.values()]),
        "molecules": molecules(found), "acac": acac(found),
        "claims": claims(found), "forgetting": forgetting(found), "rates": rates(found), "ablations": ablated(found),
        "ranks": by(found, "ranks", "rank", "test", "ethanol, MAE, by rank"),
        "small": small_budget(found), "chosen": chosen(found),
        "messages": messages(found),
        "sizes": by(found, "sizes", "train", "test_600K", "AcAc at 600 K, MAE, by training configurations"),
        "E0s": by(found, "E0s", "E0s", "test", "ethanol, MAE, by E0s")}
    fill(DOCS / "results.md", {name: part for name, part in parts.items() if f"<!-- {name} -->" in page})
    drawn = {"curves": draw_curves, "forgetting": draw_forgetting, "sizes": draw_sizes}
    for name, draw in drawn.items():
        if f"accuracy_{name}.png" not in page:
            continue
        figure = draw(found)
        figure.savefig(DOCS / "figures" / f"accuracy_{name}.png", dpi=110)
        plt.close(figure)
