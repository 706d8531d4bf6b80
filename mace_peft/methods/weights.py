"""An operation's weights as data: which stretch of which weight is a matrix of which irrep, element and channel."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mace_peft.restore import restore


class Part(NamedTuple):
    """A stretch of one raw weight, before e3nn's path normalisation: a matrix of rows x columns.

    The rows are inputs (before x elements x after), the columns output channels.

    weight: name of the weight.
    start: where the stretch begins in the flattened weight.
    shape: (before, elements, after, columns); elements is 1 where the operation has none.
    factors: name of the matrix that the part belongs to, which takes one low-rank update; None: it takes none.
    row, column: where the part lies in that matrix.
    element, channel: where its elements and columns lie among those of the operation.
    channels: how many output channels the operation has, where no path may lead to some.
    transposed: whether the weight is stored as (columns, rows).
    full: whether it takes a full update where other parts take a low-rank one.
    divisor: a low-rank update A B starts with A ~ N(0, 1) / divisor, as published.
    """

    weight: str
    start: int
    shape: tuple[int, int, int, int]
    factors: str | None = None
    row: int = 0
    column: int = 0
    element: int = 0
    channel: int = 0
    channels: int = 0
    transposed: bool = False
    full: bool = False
    divisor: int = 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:3])

    @property
    def columns(self) -> int:
        return self.shape[3]

    def of(self, weights: dict[str, Tensor]) -> Tensor:
        """The part of these weights, as (rows, columns)."""
        flat = weights[self.weight].flatten()[self.start : self.start + self.rows * self.columns]
        return flat.view(self.columns, self.rows).T if self.transposed else flat.view(self.rows, self.columns)

    def __reduce__(self):
        return restore, ("part", *self)


def join(parts: Sequence[Part], matrices: Sequence[Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, in the shapes of those given, from the matrices (rows, columns) of their parts, which lie in order."""
    pieces: dict[str, list[Tensor]] = {}
    for part, matrix in zip(parts, matrices, strict=True):
        pieces.setdefault(part.weight, []).append((matrix.T if part.transposed else matrix).flatten())
    return {name: torch.cat(found).view(weights[name].shape) for name, found in pieces.items()}


def matrix_shapes(parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each matrix that takes a low-rank update."""
    shapes: dict[str, tuple[int, int]] = {}
    for part in parts:
        if part.factors is not None:
            rows, columns = shapes.get(part.factors, (0, 0))
            shapes[part.factors] = max(rows, part.row + part.rows), max(columns, part.column + part.columns)
    return shapes


def assemble(parts: Sequence[Part], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The matrices that take low-rank updates from the values (rows, columns) of their parts; zero where none lies."""
    shapes = matrix_shapes(parts)
    found: dict[str, Tensor] = {}
    for part, value in zip(parts, values, strict=True):
        matrix = found.setdefault(part.factors, value.new_zeros(shapes[part.factors]))
        matrix[part.row : part.row + part.rows, part.column : part.column + part.columns] = value
    return found


def matrices(parts: Sequence[Part], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices that take low-rank updates, (rows, columns) by name, from the weights of the operation."""
    updated = [part for part in parts if part.factors is not None]
    return assemble(updated, [part.of(weights) for part in updated])
