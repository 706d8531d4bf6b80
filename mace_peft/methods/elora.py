"""ELoRA: low-rank updates per path, which never mix irreps (ICML 2025, openreview hcoxm3Vwgy).

    W  <-  W + (alpha / rank) A B        A ~ N(0, 1), B = 0

Each module's ``forward()`` gives the updates of one operation's raw weights (before e3nn's path normalisation) as
``{weight name: update}``, in the weights' own shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from e3nn import o3
from torch import Tensor, nn


class Update(nn.Module):
    """What the updates share: the scale alpha / rank, and a one-line repr."""

    def __init__(self, rank: int, alpha: float):
        super().__init__()
        self.rank = rank
        self.scale = alpha / rank

    def __repr__(self):
        return f"{type(self).__name__}(rank {self.rank}, {sum(p.numel() for p in self.parameters())} weights)"


class MatrixUpdate(Update):
    """Update of one (rows, columns) matrix: A (rows, rank), B (rank, columns). Layers of a radial MLP.

    ``transposed`` serves ``nn.Linear``, which stores its weight as (columns, rows).
    """

    def __init__(self, rows: int, columns: int, rank: int, alpha: float, transposed: bool = False):
        super().__init__(rank, alpha)
        self.transposed = transposed
        self.A = nn.Parameter(torch.randn(rows, rank))
        self.B = nn.Parameter(torch.zeros(rank, columns))

    def forward(self) -> dict[str, Tensor]:
        update = self.scale * (self.A @ self.B)
        return {"weight": update.T if self.transposed else update}


class LinearUpdate(Update):
    """Update of ``o3.Linear``: for each irrep A (mul_in, rank) and B (rank, mul_out).

    mul_in and mul_out count all blocks of the irrep: a list with repeats such as 8x0e+8x0e is one irrep with 16
    channels, whose update spans them all. instructions: the (i_in, i_out) pairs of blocks, in the order of the weights.
    """

    def __init__(self, irreps_in, irreps_out, instructions: Sequence[tuple[int, int]], rank: int, alpha: float):
        super().__init__(rank, alpha)
        irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        rows, columns = channel_slices(irreps_in), channel_slices(irreps_out)
        self.paths = [(str(irreps_in[i].ir), rows[i], columns[o]) for i, o in instructions]
        irreps = dict.fromkeys(ir for ir, _, _ in self.paths)
        self.A = nn.ParameterDict({ir: torch.randn(irreps_in.count(ir), rank) for ir in irreps})
        self.B = nn.ParameterDict({ir: torch.zeros(rank, irreps_out.count(ir)) for ir in irreps})

    def forward(self) -> dict[str, Tensor]:
        updates = [(self.A[ir][rows] @ self.B[ir][:, columns]).flatten() for ir, rows, columns in self.paths]
        return {"weight": self.scale * torch.cat(updates) if updates else torch.zeros(0)}


class TensorProductUpdate(Update):
    """Update of ``o3.FullyConnectedTensorProduct``: per path (m1, m2, m_out), A (m1*m2, rank) and B (rank, m_out)."""

    def __init__(self, paths: Sequence[tuple[int, int, int]], rank: int, alpha: float):
        super().__init__(rank, alpha)
        self.A = nn.ParameterList([torch.randn(m1 * m2, rank) for m1, m2, _ in paths])
        self.B = nn.ParameterList([torch.zeros(rank, m_out) for _, _, m_out in paths])

    def forward(self) -> dict[str, Tensor]:
        updates = [(A @ B).flatten() for A, B in zip(self.A, self.B, strict=True)]
        return {"weight": self.scale * torch.cat(updates) if updates else torch.zeros(0)}


class ContractionUpdate(Update):
    """Update of MACE's symmetric contraction to one irrep.

    Highest order, ``weights_max`` (elements, paths, channels): A (elements, paths, rank) ~ N(0, 1) / paths, and
    B (rank, channels). The weights of the lower orders are small: they get a full update, which starts at zero.
    lower: the shapes of those weights by name.
    """

    def __init__(self, shape: tuple[int, int, int], lower: dict[str, torch.Size], rank: int, alpha: float):
        super().__init__(rank, alpha)
        elements, paths, channels = shape
        self.A = nn.Parameter(torch.randn(elements, paths, rank) / paths)
        self.B = nn.Parameter(torch.zeros(rank, channels))
        self.names = list(lower)
        self.lower = nn.ParameterList([torch.zeros(size) for size in lower.values()])

    def forward(self) -> dict[str, Tensor]:
        return {"weights_max": self.scale * (self.A @ self.B), **dict(zip(self.names, self.lower, strict=True))}


def channel_slices(irreps: o3.Irreps) -> list[slice]:
    """Where each block's channels lie among all channels of its irrep."""
    seen: dict[o3.Irrep, int] = {}
    slices = []
    for mul, ir in irreps:
        start = seen.get(ir, 0)
        slices.append(slice(start, start + mul))
        seen[ir] = start + mul
    return slices
