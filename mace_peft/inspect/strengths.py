"""Errors over the strength of an adapter, on structures of its own and on others: as tables, and as a figure."""

import copy
import functools
import os
from collections.abc import Collection, Iterator, Sequence

import torch
from mace.tools import compute_rmse
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

from mace_peft.adapter.load import load_adapter
from mace_peft.errors import PeftError
from mace_peft.inspect.compare import QUANTITIES, Values, prepare
from mace_peft.inspect.figures import STYLE, shown
from mace_peft.model import isolated
from mace_peft.model.strength import set_strength

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
Curve = tuple[str, Values, list[tuple[str, Values]]]  # what it is of, labels, and predictions by the strength


def compare_strengths(foundation: str, adapters: Sequence[str | os.PathLike], structures: str, away: str = "",
                      **options) -> list[Curve]:
    """Labels and predictions (``compare``) at the strengths of ``STRENGTHS``, on one file or on two.

    adapters: one. structures: a file of what the adapter was trained for; energies are taken with the E0s of its run at
    every strength. away: a file of the foundation's own data, whose energies are taken with the foundation's E0s;
    nothing without. Forces and stresses do not depend on them.

    Raises PeftError where ``compare`` does, and for another number of adapters.
    """
    if len(adapters) != 1:
        raise PeftError(f"--strengths is of one adapter, and {len(adapters)} are given: give the foundation and one "
                        "adapter directory")
    files = [(structures, adapters[0], 1.0), (away, foundation, 0.0)][:2 if away else 1]
    prepared = [prepare(foundation, adapters, file, models=functools.partial(at_strengths, E0s_at=E0s_at), **options)
                for file, _, E0s_at in files]
    return [(f"{file}, with the E0s of {source}", *compute())
            for (file, source, _), compute in zip(files, prepared, strict=True)]


def at_strengths(foundation: str, loaded: nn.Module, dtypes: dict[str, str], numbers: Collection[int], E0s_at: float
                 ) -> Iterator[tuple[str, nn.Module]]:
    """The model of the adapter at each strength, by that, with the E0s that it has at the strength ``E0s_at``."""
    ((adapter, dtype),) = dtypes.items()
    model = load_adapter(loaded.to(getattr(torch, dtype)), adapter, E0s_at)
    E0s = isolated.E0s(model).detach().clone()  # with the shift that the adapter has learnt
    for strength in STRENGTHS:
        of_strength = set_strength(copy.deepcopy(model), strength)
        of_strength.get_buffer(isolated.E0S).add_(E0s - isolated.E0s(of_strength).detach())
        yield f"{strength:g}", of_strength


@rc_context(STYLE)
def draw(curves: Sequence[Curve]) -> Figure:
    """RMSE over the strength: a panel per kind of label, a colour per file."""
    names = list(dict.fromkeys(name for _, labels, _ in curves for name in labels))
    figure = Figure(figsize=(max(4.8, 3.2 * len(names)), 3.2 + 0.17 * len(curves)), dpi=150, layout="constrained")
    lines = {}
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        quantity = QUANTITIES[name]
        for number, (what, labels, predictions) in enumerate(curves):
            if name in labels:
                errors = [1000 * compute_rmse(predicted[name] - labels[name]) for _, predicted in predictions]
                (lines[what],) = axes.plot([float(strength) for strength, _ in predictions], errors, ".-",
                                           color=f"C{number}")
        axes.set_yscale("log")
        axes.set_xlabel("strength: 0 foundation, 1 adapter")
        axes.set_ylabel(f"RMSE of {name} (m{quantity.unit})")
    figure.legend(lines.values(), map(shown, lines), loc="outside lower center", frameon=False)
    return figure
