"""The tables and the figure of docs/performance.md, from what speed.py measured."""

from __future__ import annotations

from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from pages import DOCS, fill, table, versions
from variants import PLACEMENTS, STAGES

METHODS = [*(f"{method} {placement}" for placement in PLACEMENTS[:3] for method in ("mmea", "elora")), "scales all"]


def ratios(times: dict[str, list[float]], of: str, to: str) -> list[float]:
    """Round by round, for the machine's speed drifts."""
    return [first / second for first, second in zip(times[of], times[to], strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and the middle half; of fewer than four, all."""
    low, high = (sorted(values)[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return f"{median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def title(cell: dict) -> str:
    device = "" if cell["device"] == "cpu" else f", {cell['device']}"
    return f"{cell['model']}, {cell['batch']}, {cell['dtype']}{device}"


def summary(cell: dict) -> str:
    """The defaults in one cell, in terms of full fine-tuning, and of the base for a prediction."""
    rows = []
    for title_of, name in (("full fine-tuning", "full"), ("MACE's `--lora`", "MACE LoRA"),
                           ("`--peft elora`", "elora linears"), ("`--peft mmea`", "mmea published")):
        predicts = cell["predict"].get(name)
        rows.append([title_of, spread(ratios(cell["step"], name, "full")), f"{peak(cell, name):.2f}",
                     f"{100 * cell['checkpoint'][name] / cell['checkpoint']['full']:.0f} %",
                     spread(ratios(cell["predict"], name, "base")) if predicts else ""])
    return table([title(cell), "time of a step", "its memory", "checkpoint", "time of a prediction / base"], rows)


def peak(cell: dict, name: str) -> float:
    """Of the memory in a step, with what is held between steps; full fine-tuning is 1."""
    held, full = (cell["peak"][each] + sum(cell["resident"][each].values()) for each in (name, "full"))
    return held / full


def steps(cells: list[dict]) -> str:
    names = ["full, cheaper", "MACE LoRA", *METHODS]
    return table(["training step / full", "rounds", "full, s", *names],
                 [[title(cell), str(len(cell["step"]["full"])), f"{median(cell['step']['full']):.2f}",
                   *(spread(ratios(cell["step"], name, "full")) if name in cell["step"] else "" for name in names)]
                  for cell in cells])


def levers(cells: list[dict]) -> str:
    rows = []
    for cell in cells:
        if "full, cheaper" not in cell["step"]:
            continue
        same = spread(ratios(cell["step"], "full, cheaper", "full"))
        rows.append([title(cell), "none: full", "1.00", "", same, "", ""])
        for name in METHODS:
            stages = [*(f"{name}, {stage}" for stage in STAGES), name, f"floor {name.split()[1]}"]
            if stages[0] in cell["step"]:
                rows.append([title(cell), name, *(spread(ratios(cell["step"], stage, "full")) for stage in stages),
                             spread(ratios(cell["step"], name, stages[-1]))])
    return table(["cell", "adapters", "as MACE trains", "backward to what trains", "and cheaper messages, contractions",
                  "floor", "step / floor"], rows)


def predictions(cells: list[dict], kind: str) -> str:
    cells = [cell for cell in cells if kind in cell]
    names = [name for name in cells[0][kind] if name != "base"]
    return table([f"{kind} / base", "base, ms", *names],
                 [[title(cell), f"{1e3 * median(cell[kind]['base']):.0f}",
                   *(spread(ratios(cell[kind], name, "base"), 3) for name in names)] for cell in cells])


def memory(cells: list[dict]) -> str:
    rows = []
    for name in ["full", "MACE LoRA", *METHODS]:
        row = [name]
        for cell in cells:
            held, full = cell["resident"][name], cell["resident"]["full"]
            state = (held["optimizer"] + held["EMA"]) / (full["optimizer"] + full["EMA"])
            share = cell["parameters"][name] / cell["parameters"]["full"]
            row += [f"{peak(cell, name):.2f}", f"{100 * state:.1f} %", f"{100 * share:.1f} %",
                    f"{100 * cell['checkpoint'][name] / cell['checkpoint']['full']:.1f} %"]
        rows.append(row)
    columns = ["peak of a step", "optimizer + EMA", "trained parameters", "checkpoint"]
    return table(["/ full", *(f"{title(cell)}: {column}" for cell in cells for column in columns)], rows)


def profile(result: dict) -> str:
    found = result["profile"]
    total = sum(seconds for _, _, seconds in found["operations"])
    return f"{found['variant']}, {title(found['cell'])}:\n\n" + table(
        ["operation", "calls", "s", "of these"],
        [[f"`{name}`", str(calls), f"{seconds:.3f}", f"{100 * seconds / total:.0f} %"]
         for name, calls, seconds in found["operations"]])


def draw(cells: list[dict]) -> plt.Figure:
    """Steps against full fine-tuning, with the floors as lines; shades of grey say the placement."""
    figure, panels = plt.subplots(1, len(cells), figsize=(4.2 * len(cells), 3.6), sharey=True, squeeze=False,
                                  layout="constrained")
    names = ["MACE LoRA", *METHODS]
    for panel, cell in zip(panels[0], cells, strict=True):
        values = [ratios(cell["step"], name, "full") for name in names]
        middles = [median(value) for value in values]
        errors = [[middle - min(value) for middle, value in zip(middles, values, strict=True)],
                  [max(value) - middle for middle, value in zip(middles, values, strict=True)]]
        panel.bar(names, middles, yerr=errors, color=["0.3", *["0.75", "0.55"] * 3, "0.75"], ecolor="0.2", capsize=2)
        for index, name in enumerate(METHODS, start=1):
            floor = median(ratios(cell["step"], f"floor {name.split()[1]}", "full"))
            panel.hlines(floor, index - 0.4, index + 0.4, color="tab:red", label="floor" if index == 1 else None)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_title(title(cell), fontsize=9)
        panel.tick_params(axis="x", rotation=60, labelsize=8)
    panels[0][0].set_ylabel("training step / full fine-tuning")
    panels[0][0].legend(fontsize=8)
    return figure


def write_report(result: dict) -> None:
    """Put the tables between their marks in docs/performance.md, and draw the figure."""
    cells = result["cells"]
    medium = [cell for cell in cells if cell["model"] == "medium" and cell["dtype"] == "float64"] or cells
    parts = {"summary": summary(medium[0]), "versions": versions(cells), "steps": steps(cells),
             "levers": levers(medium),
             "predictions": predictions(cells, "predict"), "TorchScript": predictions(cells, "predict, TorchScript"),
             "memory": memory(medium[:1]), "profile": profile(result)}
    fill(DOCS / "performance.md", parts)
    draw(medium).savefig(DOCS / "figures" / "speed.png", dpi=120)
