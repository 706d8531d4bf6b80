"""The figures of ``mace_peft plot``, drawn from what ``gains`` and ``spectra`` give, or from a file of it."""

import itertools
import math
import os
import textwrap
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mace_peft.adapter.load import load_adapter
from mace_peft.backbones.foundation import load_foundation
from mace_peft.blocks.adapted import Updated, adapted_blocks
from mace_peft.errors import PeftError, printable
from mace_peft.files import REMEDY, complete
from mace_peft.inspect.gain_ranges import gates_with_gains
from mace_peft.inspect.gains import constant_gains, gain_statistics
from mace_peft.inspect.spectra import update_spectra
from mace_peft.labels import read
from mace_peft.methods import METHODS

RANGE = "#cfe3f5"
STYLE = {"font.size": 8, "axes.titlesize": "medium", "legend.fontsize": 7}


def shown(text: str) -> str:
    """The text as a figure has to be given it, which would else take what is between two $ for mathematics."""
    return printable(text).replace("$", r"\$")


def plot(adapter: str | os.PathLike, foundation: str, structures: str | None = None) -> list[Path]:
    """Draw what an adapter has learnt to PNG files beside its directory; returns their paths.

    ``DIR_gains.png``: the gains of gates at the atoms of the structures, a file that ASE reads; or constant gains.
    ``DIR_updates.png``: the singular values of the low-rank updates (ELoRA, and MMEA at ``published``).

    Raises PeftError if there is nothing to draw, if something does not fit, or if a file cannot be written.
    """
    model = load_adapter(load_foundation(foundation), adapter, strength=1)
    gains = gates_with_gains(model)
    updated = [block for block in adapted_blocks(model).values() if isinstance(block, Updated)]
    if gains and structures is None:
        raise PeftError(f"{adapter} has gates, whose gains depend on the atoms: add --structures with a file of some")
    if structures is not None and not gains:
        raise PeftError(f"--structures {structures} has no effect on {adapter}, whose gains depend on no atoms: leave "
                        "it out")
    figures = {}
    if gains:
        figures["gains"] = draw_gains(gain_statistics(model, read(structures)))
    if any(block.adapter.gains() is not None for block in updated):
        figures["gains"] = draw_constant_gains(constant_gains(model))
    updates = (block.adapter.low_rank_updates(block.own_weights()) for block in updated)
    if any(updates) or not figures:
        figures["updates"] = draw_updates(update_spectra(model))
    directory = Path(adapter).resolve()
    paths = [directory.with_name(f"{directory.name}_{name}.png") for name in figures]
    for path in paths:
        for given in (foundation, structures):
            if given is not None and path.exists() and Path(given).exists() and path.samefile(given):
                raise PeftError(f"the figure {path} would take the place of {given}, which was given: rename that")
    for path, figure in zip(paths, figures.values(), strict=True):
        complete(Figure.savefig, remedy=REMEDY)(figure, path)
    return paths


@rc_context(STYLE)
def draw_gains(statistics: dict) -> Figure:
    """The gains of ``gain_statistics``: a panel per module, in it a box per irrep and element."""
    peft, blocks, elements = statistics["peft"], statistics["blocks"], list(statistics["atoms"])
    slots = max(len(irreps) for irreps in blocks.values()) * (len(elements) + 1)
    figure, panels = grid(list(blocks), min(3, max(1, 48 // slots)), width=max(8, 0.2 * slots))
    figure.suptitle(f"{METHODS[peft['method']].title}, rank {peft['rank']}, gate {peft['gate']}: gains at "
                    f"{sum(statistics['atoms'].values()):,} atoms of {statistics['structures']:,} structures")
    figure.supylabel("gain (dimensionless)")
    shades = {element: str(0.95 - 0.4 * i / len(elements)) for i, element in enumerate(elements)}
    keys = [Patch(facecolor=shade, edgecolor="black", label=element) for element, shade in shades.items()]
    keys.append(Line2D([], [], color="black", linestyle=":", linewidth=1, label="gain 1: features unchanged"))
    ranges = statistics.get("ranges", {})
    if ranges:
        keys.append(Patch(color=RANGE, label="all gains on the training set"))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 8), frameon=False, title=(
        "boxes: median and quartiles over atoms and channels; whiskers: 1st and 99th percentile"))
    boxes = [[found[element] for found in irreps.values() for element in elements] for irreps in blocks.values()]
    low, high = min(1, *(box["whislo"] for box in sum(boxes, []))), max(1, *(box["whishi"] for box in sum(boxes, [])))
    for axes, (name, irreps), drawn in zip(panels, blocks.items(), boxes, strict=True):
        if name in ranges:
            axes.axhspan(ranges[name]["low"], ranges[name]["high"], color=RANGE, zorder=0)
        axes.axhline(1, color="black", linestyle=":", linewidth=1)
        starts = [i * (len(elements) + 1) for i in range(len(irreps))]
        places = [start + j for start in starts for j in range(len(elements))]
        artists = axes.bxp(drawn, places, widths=0.8, patch_artist=True, showfliers=False,
                           medianprops={"color": "black", "linewidth": 2})
        for patch, element in zip(artists["boxes"], elements * len(irreps), strict=True):
            patch.set_facecolor(shades[element])
        axes.set_xticks(places, elements * len(irreps), minor=True)
        axes.set_xticks([start + (len(elements) - 1) / 2 for start in starts], [f"\n{irrep}" for irrep in irreps])
        axes.xaxis.remove_overlapping_locs = False  # the label of an element may stand right above that of the irrep
        axes.tick_params(axis="x", which="both", length=0)
        axes.set_xlabel("element and irrep")
        if 0 < 10 * low < high:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
    return figure


@rc_context(STYLE)
def draw_constant_gains(gains: dict) -> Figure:
    """The gains of ``constant_gains``: a box per module."""
    units = gains["units"]
    figure = Figure(figsize=(6.5, 1.4 + 0.25 * len(units)), dpi=150, layout="constrained")
    axes = figure.subplots()
    figure.suptitle(f"{METHODS[gains['peft']['method']].title}: constant gains")
    axes.axvline(1, color="black", linestyle=":", linewidth=1)
    axes.boxplot(list(units.values()), orientation="horizontal", whis=(1, 99), showfliers=False,
                 medianprops={"color": "black"})
    axes.set_yticks(range(1, len(units) + 1), [f"{name} ({len(values)})" for name, values in units.items()])
    axes.invert_yaxis()
    figure.supxlabel("gain (dimensionless)\nboxes: median and quartiles over channels (their number); "
                     "whiskers: 1st and 99th percentile")
    return figure


@rc_context(STYLE)
def draw_updates(spectra: dict) -> Figure:
    """The values of ``update_spectra``: a panel per module, in it a line per weight over the index of the value."""
    peft, units = spectra["peft"], spectra["units"]
    figure, panels = grid(list(units), 3 if len(units) < 10 else 4, below=0.15 * max(map(len, units.values())))
    figure.suptitle(f"{METHODS[peft['method']].title}, rank {peft['rank']}: low-rank updates of the weights")
    figure.supylabel("singular value / norm of the weight\n(dimensionless)")
    figure.supxlabel("index of the singular value\n%: norm of the update / norm of the weight (Frobenius norms)")
    drawn, widest = [], max(len(update["singular_values"]) for updates in units.values() for update in updates)
    for axes, updates in zip(panels, units.values(), strict=True):
        styles = zip(*map(itertools.cycle, ("os^Dvx*", ["-", "--", ":", "-."], ["0", "0.35", "0.6"])), strict=False)
        for update, (marker, line, shade) in zip(updates, styles, strict=False):
            ratios = [value / (update["weight_norm"] or math.nan) for value in update["singular_values"]]
            drawn += [ratio for ratio in ratios if ratio > 0]
            axes.plot(range(1, len(ratios) + 1), ratios, color=shade, linestyle=line, marker=marker, markersize=3,
                      linewidth=1, label=f"{update['weight']} ({100 * math.hypot(*ratios):.2g} %)".strip())
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)  # below the panel
        axes.set_xlim(0.5, widest + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_yscale("log")
        axes.grid(axis="y", color="0.85", linewidth=0.5)
    high = max(drawn, default=1)
    axes.set_ylim(max(min(drawn, default=1), high * 1e-4) / 1.5, high * 1.5)
    return figure


def grid(titles: list[str], columns: int, width: float = 8, below: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per title, in at most so many columns, all with the same y axis.

    width: of the figure; below: room for what stands below each panel; both in inches.
    """
    rows = math.ceil(len(titles) / columns)
    columns = math.ceil(len(titles) / rows)
    figure = Figure(figsize=(width, 1.2 + (1.9 + below) * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten().tolist()
    for axes in panels[len(titles) :]:
        axes.remove()
    for axes, title in zip(panels, titles, strict=False):
        lines = textwrap.wrap(title.replace(".", ". "), int(12 * width / columns))  # breaks after a dot
        axes.set_title("\n".join(lines).replace(". ", "."))
        axes.tick_params(which="both", labelsize=8)
    return figure, panels[: len(titles)]
