"""The table of gates in docs/gains.md, from results/gates.json."""

from __future__ import annotations

import numpy as np
from pages import DOCS, fill, table, versions

SETS = {"ethanol": "ethanol", "malonaldehyde": "malonaldehyde", "acac": "acetylacetone"}


def write_report(results: dict[str, dict]) -> None:
    where = versions([cell["environment"] for cell in results.values()])
    fill(DOCS / "gains.md", {"gates": gates(results), "versions": where})


def gates(results: dict[str, dict]) -> str:
    """A row for each gain, placement and rate: means over seeds at home, and the extremes of all that is away."""
    rows: dict[tuple, list[dict]] = {}
    for cell in results.values():
        rows.setdefault((cell["targets"], cell["lr"], cell["form"]), []).append(cell)
    header = ["`--peft_targets`, lr, gain", "seeds", *(f"{name}, E / F" for name in SETS.values()), "gains away",
              "forces above", "worst force (foundation)", "E(isolated) - E0, eV"]
    return table(header, [row(key, cells) for key, cells in sorted(rows.items(), key=lambda item: item[0])])


def row(key: tuple, cells: list[dict]) -> list[str]:
    targets, lr, form = key
    low, high = min(cell["gains_away"][0] for cell in cells), max(cell["gains_away"][1] for cell in cells)
    worst = max(cells, key=excess)
    return [f"{targets}, {lr:g}, {form}", str(len({cell["seed"] for cell in cells})),
            *(errors([cell for cell in cells if cell["data"] == name]) for name in SETS), f"{low:.2g} to {high:.2g}",
            f"{sum(cell['above'] for cell in cells)} of {sum(cell['away'] for cell in cells):,}",
            f"{worst['worst_force']:,.4g} ({worst['worst_base']:,.2g})", f"{max(cell['lone'] for cell in cells):.2g}"]


def errors(cells: list[dict]) -> str:
    """Means over seeds, in meV and meV/A."""
    means = [f"{1000 * np.mean([cell[name] for cell in cells]):.3g}" for name in ("mae_e", "mae_f") if cells]
    return " / ".join(means)


def excess(cell: dict) -> float:
    """How many times the foundation's the worst force is; one that is no number is the worst."""
    ratio = cell["worst_force"] / max(cell["worst_base"], 0.1)
    return float("inf") if np.isnan(ratio) else ratio
