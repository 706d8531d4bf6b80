"""MMEA, the Magnitude-Modulated Equivariant Adapter (arXiv 2511.06696)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mace_peft.e3nn import o3
from mace_peft.errors import check_choice
from mace_peft.methods.adapter import Adapter

SCALAR = o3.Irrep("0e")
GATES = ("bounded", "exp")
BOUND = 0.5  # of the logarithm of a bounded gain


class MMEA(Adapter):
    """A gate on features: scales each channel by a gain that scalars drive; directions and channels are never mixed.

        h'   = phi(z W2 + b2) * h     one gain per channel of every irrep that is not 0e, shared by its 2l+1 components
        h'_0 = h_0 + z W0 + u b0      0e channels are shifted

    s are the 0e channels of irreps_in, z is (..., rank). As published (``gate="exp"``):

        z = SiLU(s W1 + b1)                     phi(g) = exp(g)                 u = 1

    That has no bound away from the training data, and shifts the energy of an atom without neighbours, whose scalars
    vanish. Both are mended where the gate is ``bounded``, with c = BOUND:

        z = tanh(s W1 + b1) - tanh(b1)          phi(g) = exp(c tanh(g / c))     u = |s|^2 / (1 + |s|^2)

    At a strength s the gain is phi(g)^s and the shift is scaled by s: 0 gives h, to the last bit, and 1 the equations.

    A 0o channel is multiplied: a shift would break parity. All weights start at zero, but W1 (uniform, as in nn.Linear)
    and W0 (N(0, init_std)): with init_std = 0, h' = h.

    forward(x, h): x (..., irreps_in.dim) and h (..., irreps_out.dim), both in mul_ir layout, to (..., irreps_out.dim).
    ``set_layout("ir_mul")`` makes it take and give the features that cuEquivariance's layers hold. Raises PeftError for
    an unknown gate.
    """

    kind = "gate"
    settings = ("rank", "gate", "init_std")
    on_features = True

    def __init__(self, irreps_in, irreps_out, rank: int, gate: str = "bounded", init_std: float = 0.0):
        super().__init__()
        check_choice("<gate>", gate, GATES)
        irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        scalars, shifts = irreps_in.count("0e"), irreps_out.count("0e")
        gains = irreps_out.num_irreps - shifts
        self.irreps_out = str(irreps_out)
        self.bound = BOUND  # where TorchScript finds it
        self.gate = gate
        self.W1 = nn.Parameter(torch.empty(scalars, rank).uniform_(-1, 1) / max(scalars, 1) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(rank))
        self.W2 = nn.Parameter(torch.zeros(rank, gains))
        self.b2 = nn.Parameter(torch.zeros(gains))
        self.W0 = nn.Parameter(init_std * torch.randn(rank, shifts))
        self.b0 = nn.Parameter(torch.zeros(shifts))
        # for each block of the irreps, its columns in x or h, and how many scalars, gains or shifts it has
        self.sizes_in = [mul * ir.dim for mul, ir in irreps_in]
        self.scalars = [mul if ir == SCALAR else 0 for mul, ir in irreps_in]
        self.sizes_out = [mul * ir.dim for mul, ir in irreps_out]
        self.gain_counts = [mul if ir != SCALAR else 0 for mul, ir in irreps_out]
        self.shifts = [mul if ir == SCALAR else 0 for mul, ir in irreps_out]
        self.set_layout("mul_ir")
        self.description = f"MMEA({irreps_in.simplify()} -> {irreps_out.simplify()}, rank {rank}, gate {gate})"

    def set_layout(self, layout: str) -> None:
        """``mul_ir``: the components of a channel lie together; ``ir_mul``: the channels of a component do."""
        self.mul_ir = layout == "mul_ir"

    def scalars_of(self, x: Tensor) -> Tensor:
        """The 0e channels of x."""
        blocks: list[Tensor] = []
        for x_l, scalars in zip(x.split(self.sizes_in, -1), self.scalars):  # noqa: B905  TorchScript
            if scalars > 0:
                blocks.append(x_l)
        if len(blocks) == 1:  # as nearly always: a copy less
            return blocks[0]
        return torch.cat(blocks, -1) if len(blocks) > 0 else x[..., :0]

    def coefficients(self, x: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Gains phi (..., channels that are not 0e) and shifts (..., 0e channels), in the order of irreps_out."""
        s = self.scalars_of(x)
        y = s @ self.W1 + self.b1
        if self.gate == "exp":
            z = silu(y)
            log_gain, shift = z @ self.W2 + self.b2, z @ self.W0 + self.b0
        else:
            z = torch.tanh(y) - torch.tanh(self.b1)
            surrounded = (s * s).sum(-1, keepdim=True)
            log_gain = self.bound * torch.tanh((z @ self.W2 + self.b2) / self.bound)
            shift = z @ self.W0 + surrounded / (1 + surrounded) * self.b0
        if strength != 1.0:  # which costs a step of training nothing
            log_gain, shift = strength * log_gain, strength * shift
        return torch.exp(log_gain), shift

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.strength == 0.0:
            return h
        gain, shift = self.coefficients(x, self.strength)
        gains, shifts = gain.split(self.gain_counts, -1), shift.split(self.shifts, -1)
        modulated: list[Tensor] = []
        for none in (gain, shift):
            if none.shape[-1] == 0:  # joined all the same, so that weights of no columns get a gradient too
                modulated.append(none)
        for h_l, gain_l, shift_l in zip(h.split(self.sizes_out, -1), gains, shifts):  # noqa: B905
            channels = gain_l.shape[-1]
            if channels == 0:
                modulated.append(h_l + shift_l)
            else:
                components = h_l.shape[-1] // channels
                h_l = h_l.unflatten(-1, [channels, components] if self.mul_ir else [components, channels])
                modulated.append((gain_l.unsqueeze(-1 if self.mul_ir else -2) * h_l).flatten(-2))
        return torch.cat(modulated, -1)

    @classmethod
    def largest_rank(cls, irreps_in, irreps_out) -> int:
        """Channels of the irrep that has most."""
        return max((irreps.count(ir) for irreps in (o3.Irreps(irreps_in), o3.Irreps(irreps_out)) for _, ir in irreps),
                   default=0)

    def gradients_by_rank(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Of the last layer, in a gate that is wide: no weight but its own has a gradient."""
        return [torch.cat([gradients["W2"], gradients["W0"]], -1)]

    def __repr__(self):
        return f"{self.description[:-1]}, {sum(p.numel() for p in self.parameters())} weights)"
