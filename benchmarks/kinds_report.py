"""docs/results/kinds.md and real.md, and their figure, from results/kinds.json and real.json."""

from __future__ import annotations

import json

import numpy as np
from pages import DOCS, fill, table, versions
from studies import CLIP, RESULTS

TARGETS = {"ethanol": "ethanol", "malonaldehyde": "malonaldehyde", "acac": "acetylacetone", "tungsten": "W slabs"}
KINDS = {"near": "near", "far": "far", "real": "SevenNet-0"}
SHORT = {"--peft best": "best", "--peft best --peft_keep auto": "best, keep 0.01", "--lora": "MACE's --lora"}
PAGES = {"kinds": "kinds.md", "real": "real.md"}  # which no other report writes
SUM_UP = ("full", "MACE's --lora", "best", "best, keep 0.01", "best, keep 0.02", "best, keep 0.05", "best at 5 %",
          "small", "elora", "scales")


def write_report(results: dict[str, dict]) -> None:
    """The page of these cells, and what sums up all that there are."""
    cells = [cell for cell in results.values() if "epochs" not in cell]
    parts = {kind: errors([cell for cell in cells if cell["kind"] == kind]) for kind in dict.fromkeys(
        cell["kind"] for cell in cells)}
    page = PAGES["real" if "real" in parts else "kinds"]
    longer = [cell for cell in results.values() if "epochs" in cell]
    if longer:
        parts["long"] = long_runs(longer)
    fill(DOCS / "results" / page, {**parts, "versions": versions([cell["environment"] for cell in results.values()])})
    every = [cell for name in ("kinds.json", "real.json") if (RESULTS / name).exists()
             for cell in json.loads((RESULTS / name).read_text()).values() if "epochs" not in cell]
    fill(DOCS / "results" / PAGES["kinds"], {"summary": summary(every)})
    fill(DOCS.parent / "README.md", {"kinds": in_short(every)})
    draw(every)


def grouped(cells: list[dict], *names: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in names), []).append(cell)
    return groups


def mean(cells: list[dict], key: str) -> float:
    """In meV or meV/A."""
    return 1000 * float(np.mean([cell[key] for cell in cells]))


def rise(cells: list[dict]) -> float:
    """Of the force error abroad."""
    return mean(cells, "abroad") - mean(cells, "abroad_base")


def errors(cells: list[dict]) -> str:
    """A row for each target, method and rate: means over seeds, in meV and meV/A."""
    header = ["target", "method", "lr", "clipped at", "trains", "seeds", "E", "F", "F abroad moved by"]
    own_level = cells[0]["kind"] != "far"  # of the labels abroad
    groups = grouped(cells, "data", "clip", "row", "lr")
    rows = sorted(groups.items(), key=lambda item: (list(TARGETS).index(item[0][0]), *item[0][1:]))
    return table([*header, *(["F abroad (before)"] if own_level else [])], [
        [TARGETS[data], name, f"{lr:g}", str(clip), f"{found[0]['trained']:,}", str(len(found)),
         *(f"{mean(found, key):.3g}" for key in ("mae_e", "mae_f", "moved")),
         *([f"{mean(found, 'abroad'):.3g} ({mean(found, 'abroad_base'):.3g})"] if own_level else [])]
        for (data, clip, name, lr), found in rows])


def long_runs(cells: list[dict]) -> str:
    """A row for each target, number of epochs, method and rate: means over seeds, in meV and meV/A."""
    groups = grouped(cells, "kind", "data", "epochs", "row", "lr")
    rows = sorted(groups.items(), key=lambda item: (list(KINDS).index(item[0][0]), list(TARGETS).index(item[0][1]),
                                                    *item[0][2:]))
    return table(["target", "of", "epochs", "method", "lr", "seeds", "E", "F", "F abroad moved by"], [
        [KINDS[kind], TARGETS[data], str(epochs), name, f"{lr:g}", str(len(found)),
         *(f"{mean(found, key):.3g}" for key in ("mae_e", "mae_f", "moved"))]
        for (kind, data, epochs, name, lr), found in rows])


def chosen(cells: list[dict]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """The cells of each kind and method at the rate that is best for forces on ethanol, by target."""
    found = {}
    for (kind, name), own in grouped([cell for cell in cells if cell["clip"] == CLIP], "kind", "row").items():
        rates = grouped([cell for cell in own if cell["data"] == "ethanol"], "lr")
        if rates:
            lr = min(rates, key=lambda rate: mean(rates[rate], "mae_f"))[0]
            found[kind, name] = {data: group for (data,), group in grouped(
                [cell for cell in own if cell["lr"] == lr], "data").items()}
    return found


def ratios(by_data: dict[str, list[dict]], full: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Of errors and movements to those of full fine-tuning, on each target that both have."""
    pairs = [(found, full[data]) for data, found in by_data.items() if data in full]
    found = {key: [mean(one, key) / mean(other, key) for one, other in pairs] for key in ("mae_f", "mae_e", "moved")}
    # far from the foundation, labels abroad are of another level
    return found | {"rise": [rise(one) / rise(other) for one, other in pairs if one[0]["kind"] != "far"]}


def averages(values: dict[str, list[float]], *keys: str) -> list[str]:
    return [f"{np.mean(values[key]):.2f}" if values[key] else "" for key in keys]


def summary(cells: list[dict]) -> str:
    """Errors in terms of those of full fine-tuning on the same target, means over the targets that both have."""
    best, rows = chosen(cells), []
    for kind, name in [(kind, name) for kind in KINDS for name in SUM_UP if (kind, name) in best]:
        found = ratios(best[kind, name], best[kind, "full"])
        rows.append([KINDS[kind], name, f"{best[kind, name]['ethanol'][0]['lr']:g}",
                     ", ".join(f"{TARGETS[data]} ({len(several)})" for data, several in best[kind, name].items()
                               if data in best[kind, "full"]),
                     *averages(found, "mae_f"), f"{min(found['mae_f']):.2f} to {max(found['mae_f']):.2f}",
                     *averages(found, "mae_e", "moved", "rise")])
    return table(["target", "method", "lr", "of (seeds)", "F, full = 1", "of one target", "E, full = 1",
                  "F abroad moved, full = 1", "rise of the error abroad, full = 1"], rows)


def in_short(cells: list[dict]) -> str:
    """The same of ``--peft best`` and MACE's own LoRA, for README.md."""
    best = chosen(cells)

    def shown(kind: str, name: str) -> str:
        if (kind, name) not in best:
            return ""
        force, energy, risen = averages(ratios(best[kind, name], best[kind, "full"]), "mae_f", "mae_e", "rise")
        return f"{force} / {energy}" + (f", {risen}" if risen else "")

    return table(["forces / energies, rise of the error on other structures; full fine-tuning = 1",
                  "data at the foundation's level of theory", "at another", "from SevenNet-0"],
                 [[f"`{command}`", *(shown(kind, name) for kind in KINDS)] for command, name in SHORT.items()])


def draw(cells: list[dict]) -> None:
    """Error at home over what has moved abroad, a point for each method and rate on ethanol."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [cell for cell in cells if cell["data"] == "ethanol" and cell["clip"] == CLIP]
    kinds = [kind for kind in KINDS if any(cell["kind"] == kind for cell in shown)]
    figure, (panels,) = plt.subplots(1, len(kinds), figsize=(3.4 * len(kinds) + 1.8, 3.4), layout="constrained",
                                     squeeze=False)
    names = list(dict.fromkeys(cell["row"] for cell in shown))
    for panel, kind in zip(panels, kinds, strict=True):
        for name in names:
            points = grouped([cell for cell in shown if (cell["kind"], cell["row"]) == (kind, name)], "lr").values()
            panel.plot([mean(found, "moved") for found in points], [mean(found, "mae_f") for found in points], "o",
                       color=f"C{names.index(name)}", label=name)
        panel.set(title=KINDS[kind], xlabel="forces abroad moved by, meV/A")
    panels[0].set_ylabel("force error on ethanol, meV/A")
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(),
                                                                          strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(DOCS / "figures" / "kinds.png", dpi=110)
    plt.close(figure)
