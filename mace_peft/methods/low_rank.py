"""ELoRA: low-rank updates per path, which never mix irreps (ICML 2025, openreview hcoxm3Vwgy)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mace_peft.methods.adapter import Adapter, Full
from mace_peft.methods.weights import Part, assemble, join, matrices, matrix_shapes

STARTS = ("published", "fan-in", "gradient")


class LowRank(Adapter):
    """Adds a low-rank update to each matrix of an operation's raw weights.

        W  <-  W + (alpha / rank) A B        A (rows, rank) ~ N(0, 1), B (rank, columns) = 0

    That is the start as published. With ``fan-in`` A ~ N(0, 1 / rows), so that its columns have the length 1, and A
    learns as much as B does. With ``gradient`` A starts in the same way, and ``start_along`` turns it afterwards.

    The operation says what the matrices are (``Part``): in ``o3.Linear`` one for each irrep, over all its blocks; in a
    tensor product one for each path; in MACE's symmetric contraction the highest order, whose A is divided by the
    number of paths. Parts that are marked ``full``, the lower orders of a contraction, get a full update.
    """

    kind = "low-rank update"
    settings = ("rank", "alpha", "start")

    def __init__(self, parts: Sequence[Part], weights: dict[str, Tensor], rank: int, alpha: float,
                 start: str = "published"):
        super().__init__()
        self.parts = [part for part in parts if part.factors is not None]
        self.rank, self.scale = rank, alpha / rank
        shapes, divisors = matrix_shapes(parts), {part.factors: part.divisor for part in self.parts}
        self.A = nn.ParameterDict({key: torch.randn(rows, rank) / divisors[key] for key, (rows, _) in shapes.items()})
        if start != "published":
            for A in self.A.values():
                A.data /= math.sqrt(len(A))
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

    @torch.no_grad()
    def start_along(self, gradients: dict[str, Tensor]) -> None:
        """Let each A begin with the leading left singular vectors of the gradient G of its matrix.

            A  <-  U[:, :rank] / divisor        G = U S V^T

        Along them a first step of B, which is zero, lowers the loss most. Where G has no further direction, columns
        stay random.
        """
        divisors = {part.factors: part.divisor for part in self.parts}
        for key, G in matrices(self.parts, gradients).items():
            U, S, _ = torch.linalg.svd(G.cpu().double(), full_matrices=False)  # mps has no doubles
            found = int((S > max(G.shape) * torch.finfo(G.dtype).eps * S.max()).sum())
            A = self.A[key][:, :found]
            A.copy_(U[:, : A.shape[1]] / divisors[key])

    def low_rank_updates(self, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        updates, matrix = assemble(self.parts, self.products()), matrices(self.parts, weights)
        return {key: (self.scale * update, matrix[key]) for key, update in updates.items()}
