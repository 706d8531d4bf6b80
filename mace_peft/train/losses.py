"""The losses of MACE that leave out weights, with all of them: of structures, and of single labels.

``weighted``, ``ef``, ``forces_only``, ``stress`` and ``virials`` multiply each error by both. MACE's ``huber`` knows
neither, ``l1l2energyforces`` neither for forces, ``energy_forces_dipole`` neither for dipoles, and ``universal`` not
that of structures. With weights of 1, each is the same number as in MACE. ``ptr.diff()`` is the number of atoms of each
structure of a batch.
"""

import torch
from mace import modules
from mace.modules.loss import (
    mean_squared_error_forces,
    reduce_loss,
    weighted_mean_absolute_error_energy,
    weighted_mean_squared_error_energy,
)
from torch.nn.functional import huber_loss

# of the norm of a force label in eV/A: from there on, Huber's delta is multiplied by this (``UniversalLoss``)
SOFTER = ((100.0, 0.7), (200.0, 0.4), (300.0, 0.1))


def spread(ref, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Weights of structures in a shape that multiplies the label of that name: of each atom, or of each structure."""
    if name == "forces":
        weight = torch.repeat_interleave(weight, ref.ptr.diff())
    return weight.view(-1, *[1] * (ref[name].dim() - 1))


class WeightedHuberEnergyForcesStressLoss(modules.WeightedHuberEnergyForcesStressLoss):
    def forward(self, ref, pred, ddp: bool | None = None) -> torch.Tensor:
        def term(name: str, divisor: torch.Tensor | float = 1.0) -> torch.Tensor:
            raw = huber_loss(ref[name] / divisor, pred[name] / divisor, reduction="none", delta=self.huber_delta)
            return reduce_loss(spread(ref, name, ref.weight * ref[f"{name}_weight"]) * raw, ddp)

        return (self.energy_weight * term("energy", ref.ptr.diff()) + self.forces_weight * term("forces")
                + self.stress_weight * term("stress"))


class UniversalLoss(modules.UniversalLoss):
    """As in MACE, the weights of labels are inside of Huber's function, and scale label and prediction."""

    def forward(self, ref, pred, ddp: bool | None = None) -> torch.Tensor:
        def term(name: str, divisor: torch.Tensor | float = 1.0) -> torch.Tensor:
            inside = spread(ref, name, ref[f"{name}_weight"])
            error = (inside * ref[name] / divisor - inside * pred[name] / divisor).abs()
            delta = self.softened(inside * ref[name]) if name == "forces" else self.huber_delta
            raw = torch.where(error < delta, 0.5 * error**2, delta * (error - 0.5 * delta))
            return reduce_loss(spread(ref, name, ref.weight) * raw, ddp)

        return (self.energy_weight * term("energy", ref.ptr.diff()) + self.forces_weight * term("forces")
                + self.stress_weight * term("stress"))

    def softened(self, forces: torch.Tensor) -> torch.Tensor:
        """Huber's delta for each atom: smaller for large forces."""
        norm = forces.norm(dim=-1, keepdim=True)
        delta = torch.full_like(norm, self.huber_delta)
        for start, factor in SOFTER:
            delta = torch.where(norm < start, delta, self.huber_delta * factor)
        return delta


class WeightedEnergyForcesL1L2Loss(modules.WeightedEnergyForcesL1L2Loss):
    def forward(self, ref, pred, ddp: bool | None = None) -> torch.Tensor:
        norms = torch.linalg.vector_norm(ref["forces"] - pred["forces"], ord=2, dim=-1)
        weight = torch.repeat_interleave(ref.weight * ref.forces_weight, ref.ptr.diff())
        return (self.energy_weight * weighted_mean_absolute_error_energy(ref, pred, ddp)
                + self.forces_weight * reduce_loss(weight * norms, ddp))


class WeightedEnergyForcesDipoleLoss(modules.WeightedEnergyForcesDipoleLoss):
    def forward(self, ref, pred, ddp: bool | None = None) -> torch.Tensor:
        squares = torch.square((ref["dipole"] - pred["dipole"]) / ref.ptr.diff().unsqueeze(-1))
        weight = ref.weight.unsqueeze(-1) * ref.dipole_weight
        return (self.energy_weight * weighted_mean_squared_error_energy(ref, pred, ddp)
                + self.forces_weight * mean_squared_error_forces(ref, pred, ddp)
                + self.dipole_weight * 100.0 * reduce_loss(weight * squares, ddp))
