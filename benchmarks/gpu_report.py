"""The part of docs/performance.md that says what gpu.py has found."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from gpu_part import read
from pages import DOCS, fill, table, versions
from speed_report import peak, ratios, spread, title

RESULT = Path(__file__).resolve().parent / "results" / "gpu.json"


def section(entries: dict[str, dict]) -> str:
    """All that was found, or that nothing was."""
    if not entries:
        return "No GPU has been measured."
    parts = [versions(list(entries.values())), *(wrong(name, entry) for name, entry in entries.items())]
    if "right" in entries:
        parts.append(right(entries["right"]))
    cells = list(entries["fast"]["cases"].values()) if "fast" in entries else []
    for on_cueq in (False, True):
        stepped, predicted = ([cell for cell in cells if kind in cell and cell["cuEquivariance"] == on_cueq]
                              for kind in ("step", "predict"))
        if stepped:
            parts += [times(stepped, "step", "training step / full"), memory(stepped)]
        if predicted:
            parts.append(times(predicted, "predict", "prediction / base"))
    if "command" in entries:
        parts.append(commands(entries["command"]))
    return "\n\n".join(part for part in parts if part)


def wrong(name: str, entry: dict) -> str:
    """A sentence for what is missing or wrong in a part."""
    said = [f"{one['case']}: {one['what'].splitlines()[0]}" for one in entry["wrong"]]
    said += [f"{case}: left out, for the time was over" for case in entry["left out"]]
    return f"In the part {name}: {'; '.join(said)}." if said else ""


def right(entry: dict) -> str:
    """The largest differences from the CPU, by what was done with the model."""
    largest: dict[tuple[str, str], list[float]] = {}
    for name, case in entry["cases"].items():
        dtype, _, what = name.split(", ", 2)
        largest.setdefault((dtype, what), []).extend(case["errors"].values())
    kinds = list(dict.fromkeys(what for _, what in largest))
    dtypes = list(dict.fromkeys(dtype for dtype, _ in largest))
    return table(["largest difference from the CPU, relative", *dtypes],
                 [[what, *(f"{max(largest[dtype, what]):.1e}" if (dtype, what) in largest else "" for dtype in dtypes)]
                  for what in kinds])


def times(cells: list[dict], kind: str, heading: str) -> str:
    """Of each variant over the first one."""
    of, *names = dict.fromkeys(name for cell in cells for name in cell[kind])
    return table([heading, f"{of}, ms", *names],
                 [[title(cell), f"{1e3 * median(cell[kind][of]):.0f}",
                   *(spread(ratios(cell[kind], name, of)) if name in cell[kind] else "" for name in names)]
                  for cell in cells])


def memory(cells: list[dict]) -> str:
    names = list(dict.fromkeys(name for cell in cells for name in cell["peak"] if name != "full"))
    return table(["memory of a step / full", "full, MB", *names],
                 [[title(cell), f"{(cell['peak']['full'] + sum(cell['resident']['full'].values())) / 1e6:.0f}",
                   *(f"{peak(cell, name):.2f}" if name in cell["peak"] else "" for name in names)] for cell in cells])


def commands(entry: dict) -> str:
    return table(["`mace_run_train`", "s", "validation losses differ by"],
                 [[name, f"{case['seconds']:.0f}", f"{case['errors']['validation losses']:.1e}" if "errors" in case
                   else ""] for name, case in entry["cases"].items()])


def write_report() -> None:
    fill(DOCS / "performance.md", {"gpu": section(read(RESULT))})
