"""Scales: MMEA's modulation by learnt constants, which merge into the weights; alone, or around low-rank updates."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mace_peft.methods.adapter import Adapter
from mace_peft.methods.low_rank import LowRank
from mace_peft.methods.weights import Part, join


class Scales(Adapter):
    """Scales each output channel of an operation by a learnt constant, for each element where it has elements.

        W[..., z, :, c]  <-  exp(g[z, c]) W[..., z, :, c]        g (elements, channels) = 0 at the start

    All 2l+1 components of a channel are scaled alike, so that the operation stays equivariant. A bias scales along.
    """

    kind = "gains"

    def __init__(self, parts: Sequence[Part], weights: dict[str, Tensor]):
        super().__init__()
        self.parts = list(parts)
        elements = max(part.element + part.shape[1] for part in parts)
        channels = max(max(part.channels, part.channel + part.columns) for part in parts)
        self.g = nn.Parameter(torch.zeros(elements, channels))

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        updates = []
        for part in self.parts:
            before, elements, after, columns = part.shape
            g = self.g[part.element : part.element + elements, part.channel : part.channel + columns]
            gain = torch.expm1(g).view(1, elements, 1, columns)
            updates.append((gain * part.of(weights).reshape(part.shape)).view(part.rows, columns))
        return {name: weights[name] + update for name, update in join(self.parts, updates, weights).items()}

    def gains(self) -> Tensor:
        return self.g.detach().exp().flatten()


class ScaledLowRank(Adapter):
    """Scales around low-rank updates: W <- exp(g) (W + (alpha / rank) A B)."""

    kind = "gains and low-rank update"
    settings = LowRank.settings
    largest_rank = LowRank.largest_rank
    without_rank = Scales

    def __init__(self, parts: Sequence[Part], weights: dict[str, Tensor], **settings):
        super().__init__()
        self.scales, self.low_rank = Scales(parts, weights), LowRank(parts, weights, **settings)

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.scales(weights | self.low_rank(weights))

    def low_rank_updates(self, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return self.low_rank.low_rank_updates(weights)

    def start_along(self, gradients: dict[str, Tensor]) -> None:
        self.low_rank.start_along(gradients)

    def gains(self) -> Tensor:
        return self.scales.gains()
