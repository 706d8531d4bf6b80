"""The tables of docs/results/kinds.md, from results/kinds.json."""

from __future__ import annotations

import numpy as np
from gates_report import SETS
from pages import DOCS, fill, table, versions

KINDS = ("near", "far")


def write_report(results: dict[str, dict]) -> None:
    cells = list(results.values())
    parts = {kind: errors([cell for cell in cells if cell["kind"] == kind]) for kind in KINDS}
    fill(DOCS / "results" / "kinds.md", {**parts, "versions": versions([cell["environment"] for cell in cells])})


def errors(cells: list[dict]) -> str:
    """A row for each method and rate: means over seeds, in meV and meV/A."""
    rows: dict[tuple, list[dict]] = {}
    for cell in cells:
        rows.setdefault((cell["clip"], cell["row"], cell["lr"]), []).append(cell)
    header = ["method", "lr", "clipped at", "trains", "seeds", *(f"{name}, E / F" for name in SETS.values()),
              "F abroad moved by"]
    if cells and cells[0]["kind"] == "near":
        header.append("F abroad (before)")
    return table(header, [row(found) for _, found in sorted(rows.items())])


def row(cells: list[dict]) -> list[str]:
    first = cells[0]
    written = [first["row"], f"{first['lr']:g}", str(first["clip"]), f"{first['trained']:,}",
               str(len({cell["seed"] for cell in cells}))]
    for data in SETS:
        found = [cell for cell in cells if cell["data"] == data]
        written.append(" / ".join(mean(found, key) for key in ("mae_e", "mae_f") if found))
    written.append(mean(cells, "moved"))
    if cells[0]["kind"] == "near":
        written.append(f"{mean(cells, 'abroad')} ({mean(cells, 'abroad_base')})")
    return written


def mean(cells: list[dict], key: str) -> str:
    return f"{1000 * np.mean([cell[key] for cell in cells]):.3g}"
