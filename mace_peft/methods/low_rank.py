"""ELoRA: low-rank updates per path, which never mix irreps (ICML 2025, openreview hcoxm3Vwgy)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mace_peft.methods.adapter import Adapter, Full
from mace_peft.methods.weights import Part, assemble, join, matrices, matrix_shapes


class LowRank(Adapter):
    """Adds a low-rank update to each matrix of an operation's raw weights.

        W  <-  W + (alpha / rank) A B        A (rows, rank) ~ N(0, 1), B (rank, columns) = 0

    The operation says what the matrices are (``Part``): in ``o3.Linear`` one for each irrep, over all its blocks; in a
    tensor product one for each path; in MACE's symmetric contraction the highest order, whose A is divided by the
    number of paths. Parts that are marked ``full``, the lower orders of a contraction, get a full update.
    """

    kind = "low-rank update"
    settings = ("rank", "alpha")

    def __init__(self, parts: Sequence[Part], weights: dict[str, Tensor], rank: int, alpha: float):
        super().__init__()
        self.parts = [part for part in parts if part.factors is not None]
        self.rank, self.scale = rank, alpha / rank
        shapes, divisors = matrix_shapes(parts), {part.factors: part.divisor for part in self.parts}
        self.A = nn.ParameterDict({key: torch.randn(rows, rank) / divisors[key] for key, (rows, _) in shapes.items()})
        self.B = nn.ParameterDict({key: torch.zeros(rank, columns) for key, (_, columns) in shapes.items()})
        self.full = Full([part for part in parts if part.full], weights)

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        updates = join(self.parts, self.products(), weights)
        return {name: weights[name] + self.scale * update for name, update in updates.items()} | self.full(weights)

    def products(self) -> list[Tensor]:
        """A B of each part."""
        return [self.A[part.factors][part.row : part.row + part.rows] @
                self.B[part.factors][:, part.column : part.column + part.columns] for part in self.parts]

    @classmethod
    def largest_rank(cls, parts: Sequence[Part]) -> int:
        return max(map(min, matrix_shapes(parts).values()), default=0)

    def low_rank_updates(self, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        updates, matrix = assemble(self.parts, self.products()), matrices(self.parts, weights)
        return {key: (self.scale * update, matrix[key]) for key, update in updates.items()}
