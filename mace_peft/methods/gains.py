"""Static gains: MMEA's modulation by learnt constants, which merge into the weights, of low rank updates too.

    W[..., c]  <-  exp(g[c]) W[..., c]        g = 0 at the start

for every output channel c of an operation, so that all 2l+1 components of the channel are scaled alike. Each module's
``forward(weights)`` gives the updates (exp(g) - 1) W of one operation's raw weights, as ``{weight name: update}``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from e3nn import o3
from torch import Tensor, nn

from mace_peft.methods.elora import Update


class Gains(nn.Module):
    """What the gains share: g, of the shape given, and the names of the weights that they scale."""

    def __init__(self, shape: Sequence[int], names: Sequence[str]):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(*shape))
        self.names = list(names)

    def exponents(self) -> dict[str, Tensor]:
        """g, for each weight in a shape that broadcasts to the weight's."""
        raise NotImplementedError

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        exponents = self.exponents()
        return {name: torch.expm1(exponents[name]) * weight for name, weight in weights.items()}

    def __repr__(self):
        return f"{type(self).__name__}({self.g.numel()} weights)"


class MatrixGains(Gains):
    """Of one (rows, columns) matrix: a gain per column. Layers of a radial MLP, before their activation.

    ``transposed`` serves ``nn.Linear``, which stores its weight as (columns, rows), and may have a bias (columns).
    """

    def __init__(self, columns: int, transposed: bool = False, bias: bool = False):
        super().__init__([columns], ["weight", *(["bias"] if bias else [])])
        self.transposed = transposed

    def exponents(self) -> dict[str, Tensor]:
        return {"weight": self.g.unsqueeze(-1) if self.transposed else self.g, "bias": self.g}


class LinearGains(Gains):
    """Of ``o3.Linear``: a gain per channel of irreps_out, for all paths to it and its bias.

    paths: (mul_in, i_out) of each weighted instruction, in the order of the weights; biases: i_out of each bias.
    """

    def __init__(self, irreps_out, paths: Sequence[tuple[int, int]], biases: Sequence[int] = ()):
        irreps_out = o3.Irreps(irreps_out)
        super().__init__([irreps_out.num_irreps], ["weight", *(["bias"] if biases else [])])
        self.channels = [mul for mul, _ in irreps_out]
        self.paths, self.biases = list(paths), list(biases)

    def exponents(self) -> dict[str, Tensor]:
        g = self.g.split(self.channels)
        weight = [g[i_out].expand(mul_in, -1).flatten() for mul_in, i_out in self.paths]
        return {"weight": torch.cat(weight), "bias": torch.cat([self.g[:0], *(g[i_out] for i_out in self.biases)])}


class TensorProductGains(Gains):
    """Of ``o3.FullyConnectedTensorProduct`` with one-hot elements: a gain per element and channel of irreps_out.

    g: (channels of irreps_in2, channels of irreps_out). paths: (mul_in1, i_in2, i_out) of each weighted instruction.
    """

    def __init__(self, irreps_in2, irreps_out, paths: Sequence[tuple[int, int, int]]):
        irreps_in2, irreps_out = o3.Irreps(irreps_in2), o3.Irreps(irreps_out)
        super().__init__([irreps_in2.num_irreps, irreps_out.num_irreps], ["weight"])
        self.elements, self.channels = [mul for mul, _ in irreps_in2], [mul for mul, _ in irreps_out]
        self.paths = list(paths)

    def exponents(self) -> dict[str, Tensor]:
        g = [rows.split(self.channels, 1) for rows in self.g.split(self.elements)]
        return {"weight": torch.cat([g[i_in2][i_out].expand(mul_in1, -1, -1).flatten()
                                     for mul_in1, i_in2, i_out in self.paths])}


class ContractionGains(Gains):
    """Of MACE's symmetric contraction to one irrep: a gain per element and channel, for all correlation orders.

    g: (elements, channels); each weight: (elements, paths, channels).
    """

    def __init__(self, elements: int, channels: int, names: Sequence[str]):
        super().__init__([elements, channels], names)

    def exponents(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, self.g.unsqueeze(1))


class EnergyShift(nn.Module):
    """Of the atomic energies: a shift s in eV per head and element, 0 at the start. Gains move the total energy, and no
    other weight could move it back.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(*shape))

    def forward(self) -> dict[str, Tensor]:
        return {"atomic_energies": self.s}


class ScaledUpdate(nn.Module):
    """A low-rank update of ELoRA under gains: W <- exp(g) (W + (alpha / rank) A B)."""

    def __init__(self, gains: Gains, update: Update):
        super().__init__()
        self.gains, self.update = gains, update
        self.names = gains.names

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        updates = self.update()
        updated = {name: weight + updates[name] if name in updates else weight for name, weight in weights.items()}
        return {name: updated[name] - weights[name] + update for name, update in self.gains(updated).items()}
