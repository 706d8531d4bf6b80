"""What an operation is to the methods: its role, its weights as data, and what a gate may act on."""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

from mace_peft.blocks.adapted import Adapted
from mace_peft.e3nn import o3
from mace_peft.methods import Part

Gated = dict[str, tuple[o3.Irreps, o3.Irreps]]


class Operation(NamedTuple):
    """One kind of module.

    role: by which the table of methods knows it, and placements find it.
    parts: its weights as data, from the module.
    gates: for each gate that it takes, irreps of the features whose scalars drive it, and of those that it acts on.
    gated: what makes the module a gated one.

    Without parts and gates it is one thing to a user, whose parts are adapted one by one, such as a radial MLP.
    """

    role: str
    parts: Callable[[nn.Module], list[Part]] | None = None
    gates: Callable[[nn.Module], Gated] | None = None
    gated: type[Adapted] | None = None


Operations = dict[type[nn.Module], Operation]


def operation_of(module: nn.Module, operations: Operations) -> Operation | None:
    """The operation that the module is: that of its own class, or of the nearest class that it is derived from."""
    return next((operations[cls] for cls in type(module).__mro__ if cls in operations), None)


def starts(sizes: Iterable[int]) -> list[int]:
    """Where each of the stretches begins that lie one after the other."""
    return list(itertools.accumulate(sizes, initial=0))[:-1]
