"""The table of docs/results/real.md, from results/real.json."""

from __future__ import annotations

from kinds_report import mean
from pages import DOCS, fill, table, versions

TARGETS = {"ethanol": "ethanol", "malonaldehyde": "malonaldehyde", "tungsten": "W slabs"}


def write_report(results: dict[str, dict]) -> None:
    cells = list(results.values())
    fill(DOCS / "results" / "real.md", {"real": errors(cells), "versions": versions(
        [cell["environment"] for cell in cells])})


def errors(cells: list[dict]) -> str:
    """A row for each method, rate and target: means over seeds, in meV and meV/A."""
    rows: dict[tuple, list[dict]] = {}
    for cell in cells:
        rows.setdefault((list(TARGETS).index(cell["data"]), cell["row"], cell["lr"]), []).append(cell)
    header = ["target", "method", "lr", "trains", "seeds", "E", "F (before)", "F of MPtrj (before)", "moved by"]
    return table(header, [[TARGETS[found[0]["data"]], name, f"{lr:g}", f"{found[0]['trained']:,}", str(len(found)),
                           mean(found, "mae_e"), f"{mean(found, 'mae_f')} ({mean(found, 'before')})",
                           f"{mean(found, 'abroad')} ({mean(found, 'abroad_base')})", mean(found, "moved")]
                          for (_, name, lr), found in sorted(rows.items())])
