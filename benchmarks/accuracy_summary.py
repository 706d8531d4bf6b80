"""What accuracy.py and speed.py measured in a few lines: the tops of README.md and docs/results.md.

Errors are in terms of those of full fine-tuning, over the data sets that all rows have.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median

from accuracy_figures import STYLES, plt
from accuracy_results import Results
from cells import METHODS, TRAINED
from pages import table
from speed_report import peak, ratios

from mace_peft.methods import METHODS as TABLE

SPEED = Path(__file__).parent / "results" / "speed.json"
# what to answer to "Which method should I use?", and the options of each answer
WHICH = {"the lowest error from an adapter": "elora linears",
         "gates by each atom's surroundings, low-rank updates elsewhere": "mmea published",
         "5 % of the parameters": "small", "under 2 %": "scales"}
WHY = {"`--peft elora`": "elora linears", "`--peft mmea`": "mmea published", "MACE's `--lora`": "MACE LoRA",
       "full fine-tuning": "full"}
SUMMARY = {"full fine-tuning": "full", "MACE's `--lora`": "MACE LoRA", "`--peft elora`": "elora linears",
           "`--peft mmea`": "mmea published", "`--peft small`": "small", "`--peft scales`": "scales"}


def at(name: str) -> str:
    """The data set, with the hottest of its tests."""
    return "acac at 600 K" if name == "acac" else name


def common(found: Results, methods) -> list[str]:
    """The data sets that all of these methods have."""
    return [name for name in found.data() if all(found.ratio(method, "full", name) for method in methods)]


def average(values: list[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def ranged(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else ""


def forgotten(found: Results, method: str, names: list[str]) -> list[float]:
    """Force errors on the foundation's own data: after the fine-tune, in terms of before."""
    found_both = [[found.values(found.forgetting(each, name), "pretraining", "mae_f")
                   for each in (method, "foundation")] for name in names]
    return [mean(after) / mean(before) for after, before in found_both if after and before]


def options(found: Results, method: str) -> str:
    """What the method adds to the command of recipes/own_data.yaml."""
    measured = [cell.options() for cell in found.main(method)]
    settings = {name: f"{measured[0][name]:g}" for name in ("lr", "swa_lr") if measured} | METHODS[method]
    if "peft_targets" in settings and settings["peft_targets"] == TABLE[settings["peft"]].targets:  # its default
        del settings["peft_targets"]
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def which(found: Results) -> str:
    """Which method to use."""
    names = common(found, WHICH.values())
    return table(["you want", "add", "trains", "force error; full fine-tuning = 1"], [
        [wish, f"`{options(found, method)}`", found.share(method),
         average([found.ratio(method, "full", name) for name in names])] for wish, method in WHICH.items()])


def why(found: Results, speed: dict | None = None) -> str:
    """Why adapters, and where full fine-tuning is better."""
    names, methods = common(found, WHY.values()), list(WHY.values())
    cell = (json.loads(SPEED.read_text()) if speed is None else speed)["cells"][0]

    def errors(error: str) -> list[str]:
        return [average([found.ratio(method, "full", name, error) for name in names]) for method in methods]

    steps = [median(ratios(cell["step"], method, "full")) for method in methods]
    kept = [cell["parameters"][method] / cell["parameters"]["full"] if method not in ("MACE LoRA", "full") else 1
            for method in methods]
    checked = "foundation, elements, damage, NaN"
    right = "[E0s, missing labels, stage two, restarts](docs/from-lora.md#what-is-put-right)"
    rows = [["force error, full = 1", *errors("mae_f")], ["energy error, full = 1", *errors("mae_e")],
            ["time of a step, full = 1", *(f"{value:.2f}" for value in steps)],
            ["memory of a step, full = 1", *(f"{peak(cell, method):.2f}" for method in methods)],
            ["result, of the model's size", *(f"{100 * value:.0f} %" for value in kept)],
            ["forgotten: force error on the foundation's data, times", *(
                ranged(forgotten(found, method, names), 0) for method in methods)],
            ["checked when it is loaded", checked, checked, "nothing", "nothing"],
            ["put right in the run", right, right, "nothing", "nothing"]]
    forces = {name: min(methods, key=lambda method: found.ratio(method, "full", name)) for name in names}
    best = [at(name) for name in names if forces[name] == "full"]
    said = f"Of these, full fine-tuning has the lowest force error on {', '.join(best) or 'no data set'}."
    return table(["", *WHY], rows) + "\n\n" + said


def summary(found: Results) -> str:
    names = common(found, SUMMARY.values())
    rows = []
    for title, method in SUMMARY.items():
        forces, energies = ([found.ratio(method, "full", name, error) for name in names]
                            for error in ("mae_f", "mae_e"))
        rows.append([title, found.share(method), average(forces), ranged(forces, 2), average(energies),
                     ranged(forgotten(found, method, names), 1)])
    return table(["", "trains", "force error, full = 1", "of one data set", "energy error, full = 1",
                  "force error on the foundation's data, foundation = 1"], rows)


def draw_summary(found: Results) -> plt.Figure:
    """What a share of the parameters is worth: the mean over the data sets, and the lowest and the highest."""
    figure, panel = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for method in TRAINED:
        ratios = [ratio for name in found.data() if (ratio := found.ratio(method, "full", name)) is not None]
        if not ratios or method == "scratch":
            continue
        (share,), middle, (color, line) = found.percent(method), mean(ratios), STYLES[method]
        panel.errorbar(share, middle, yerr=[[middle - min(ratios)], [max(ratios) - middle]], color=color, label=method,
                       marker={"-": "o", "--": "s", ":": "^", "-.": "D"}[line], linestyle="none", linewidth=0.8)
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set(xscale="log", xlabel="trained, % of the parameters", ylabel="force error, full fine-tuning = 1")
    panel.set_xticks((0.5, 1, 2, 5, 10, 20, 50, 100), ("0.5", "1", "2", "5", "10", "20", "50", "100"))
    panel.minorticks_off()
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure
