"""MACE's symmetric contraction on a CPU, with a fraction of the memory traffic.

For the features x (16 components for l up to 3) of one atom and channel it is a polynomial without constant term,

    out_o = sum_i x_i (K1_oi + sum_j K2_oij x_j + sum_jk K3_oijk x_j x_k),

whose coefficients K are MACE's: its constants U times the weights of the atom's element. MACE computes coefficients for
each atom, then multiplies them by x once, twice, and three times. Its tensors of (atoms, channels, o, i, j) do not fit
into a CPU's cache, and take most of a training step. Here coefficients are computed for each element, and the largest
tensor of atoms is that of x_j x_k. Values and gradients are the same.
"""

from contextlib import AbstractContextManager

import torch
from mace.modules.symmetric_contraction import Contraction
from torch import Tensor

from mace_peft.patching import replaced

OF_MACE = Contraction.forward
FEW = 4  # atoms of an element: with fewer, MACE's way is as fast, and keeps less for the backward pass


def contract_as_mace() -> AbstractContextManager[None]:
    """Contractions are MACE's own for a while: TorchScript compiles nothing else."""
    return replaced(Contraction, "forward", OF_MACE)


def by_element(self: Contraction, x: Tensor, y: Tensor) -> Tensor:
    """x: (atoms, channels, components), y: one-hot elements (atoms, elements); to (atoms, channels * components of o).
    """
    if x.device.type != "cpu" or self.correlation > 3:
        return OF_MACE(self, x, y)
    element_of_atom = y.argmax(1)
    elements = element_of_atom.unique().tolist()
    if len(x) < FEW * len(elements):
        return OF_MACE(self, x, y)
    atoms = [(element_of_atom == element).nonzero()[:, 0] for element in elements]
    parts = [polynomial(self, element, x[which].permute(1, 2, 0).contiguous())
             for element, which in zip(elements, atoms, strict=True)]
    return torch.cat(parts, -1)[..., torch.cat(atoms).argsort()].permute(2, 0, 1).flatten(1)


def polynomial(self: Contraction, element: int, x: Tensor) -> Tensor:
    """x: (channels, components, atoms), all of one element; to (channels, components of o, atoms)."""
    channels, components, atoms = x.shape
    K = [coefficients(self, order, element, components) for order in range(1, self.correlation + 1)]
    inner = K[0].expand(-1, -1, atoms)
    if self.correlation > 1:
        inner = torch.baddbmm(inner, K[1], x)
    if self.correlation > 2:
        inner = torch.baddbmm(inner, K[2], (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1, 2))
    return (inner.view(channels, -1, components, atoms) * x.unsqueeze(1)).sum(2)


def coefficients(self: Contraction, order: int, element: int, components: int) -> Tensor:
    """K of that order: (channels, o times i, 1 or j or j times k)."""
    weight = (self.weights_max, *self.weights)[self.correlation - order][element]  # (paths, channels)
    K = weight.T @ self.U_tensors(order).flatten(0, -2).T
    return K.view(len(K), -1, components ** (order - 1))
