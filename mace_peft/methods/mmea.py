"""MMEA, the Magnitude-Modulated Equivariant Adapter (arXiv 2511.06696)."""

from __future__ import annotations

import torch
from e3nn import o3
from torch import Tensor, nn
from torch.nn.functional import silu

SCALAR = o3.Irrep("0e")


class MMEA(nn.Module):
    """Scales each channel of the features by a gain that scalars drive; directions and channels are never mixed.

        z    = SiLU(s W1 + b1)        s: the 0e channels of irreps_in; z: (..., rank)
        h'   = phi(z W2 + b2) * h     one gain per channel of every irrep that is not 0e, shared by its 2l+1 components
        h'_0 = h_0 + z W0 + b0        0e channels are shifted

    phi is exp (``gate="exp"``) or 1 + x (``gate="residual"``). A 0o channel is multiplied: a shift would break parity.
    All weights start at zero, but W1 (uniform, as in nn.Linear) and W0 (N(0, init_std)): with init_std = 0, h' = h.

    forward(x, h): x (..., irreps_in.dim) and h (..., irreps_out.dim), both in mul_ir layout, to (..., irreps_out.dim).
    ``set_layout("ir_mul")`` makes it take and give the features that cuEquivariance's layers hold.
    """

    def __init__(self, irreps_in, irreps_out, rank: int, gate: str = "exp", init_std: float = 0.0):
        super().__init__()
        irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        scalars, shifts = irreps_in.count("0e"), irreps_out.count("0e")
        gains = irreps_out.num_irreps - shifts
        self.irreps_out = str(irreps_out)
        self.exponential = gate == "exp"
        self.W1 = nn.Parameter(torch.empty(scalars, rank).uniform_(-1, 1) / max(scalars, 1) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(rank))
        self.W2 = nn.Parameter(torch.zeros(rank, gains))
        self.b2 = nn.Parameter(torch.zeros(gains))
        self.W0 = nn.Parameter(init_std * torch.randn(rank, shifts))
        self.b0 = nn.Parameter(torch.zeros(shifts))
        self.register_buffer("scalars", scalar_columns(irreps_in), persistent=False)
        self.set_layout("mul_ir")
        self.description = f"MMEA({irreps_in.simplify()} -> {irreps_out.simplify()}, rank {rank}, gate {gate})"

    def set_layout(self, layout: str) -> None:
        """``mul_ir``: the components of a channel lie together; ``ir_mul``: the channels of a component do."""
        gain_of, shift_of = columns(o3.Irreps(self.irreps_out), self.W2.shape[1], self.W0.shape[1], layout)
        self.register_buffer("gain_of", gain_of.to(self.W2.device), persistent=False)
        self.register_buffer("shift_of", shift_of.to(self.W2.device), persistent=False)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gains phi (..., channels that are not 0e) and shifts (..., 0e channels), in the order of irreps_out."""
        z = silu(x.index_select(-1, self.scalars) @ self.W1 + self.b1)
        g = z @ self.W2 + self.b2
        return torch.exp(g) if self.exponential else 1 + g, z @ self.W0 + self.b0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gain, shift = self.coefficients(x)
        # the last column is the gain of what is shifted (1), and the shift of what is scaled (0)
        gain = torch.cat([gain, torch.ones_like(h[..., :1])], -1).index_select(-1, self.gain_of)
        shift = torch.cat([shift, torch.zeros_like(h[..., :1])], -1).index_select(-1, self.shift_of)
        return gain * h + shift

    def __repr__(self):
        return f"{self.description[:-1]}, {sum(p.numel() for p in self.parameters())} weights)"


def scalar_columns(irreps: o3.Irreps) -> Tensor:
    """Columns of the 0e channels, over all blocks of the irreps."""
    blocks = [torch.arange(s.start, s.stop) for s, (_, ir) in zip(irreps.slices(), irreps, strict=True) if ir == SCALAR]
    return torch.cat([torch.arange(0), *blocks])


def columns(irreps: o3.Irreps, gains: int, shifts: int, layout: str) -> tuple[Tensor, Tensor]:
    """For each column of the features: which gain and which shift it takes; ``gains`` and ``shifts`` stand for none."""
    gain_of, shift_of = [torch.arange(0)], [torch.arange(0)]
    gain = shift = 0
    for mul, ir in irreps:
        if ir == SCALAR:
            gain_of.append(torch.full((mul,), gains))
            shift_of.append(torch.arange(shift, shift + mul))
            shift += mul
        else:
            channels = torch.arange(gain, gain + mul)
            gain_of.append(channels.repeat(ir.dim) if layout == "ir_mul" else channels.repeat_interleave(ir.dim))
            shift_of.append(torch.full((mul * ir.dim,), shifts))
            gain += mul
    return torch.cat(gain_of), torch.cat(shift_of)
