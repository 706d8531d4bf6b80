"""MACE's symmetric contraction on a CPU, with a fraction of the arithmetic and of the memory traffic.

For the features x (16 components for l up to 3) of one atom and channel it is a polynomial without constant term,

    out_o = sum_i x_i (K1_oi + sum_j K2_oij x_j + sum_jk K3_oijk x_j x_k),

whose coefficients K are MACE's: its constants U times the weights of the atom's element. MACE computes coefficients for
each atom, then multiplies them by x once, twice, and three times. Its tensors of (atoms, channels, o, i, j) do not fit
into a CPU's cache, and take most of a training step. Here coefficients are computed for each element, and made
symmetric in i, j, k, which changes no value. Then one sum over j <= k gives the output and its derivatives,

    d out_o / d x_i = K1_oi + 2 sum_j K2_oij x_j + 3 sum_jk K3_oijk x_j x_k.
"""

import itertools

import torch
from mace.modules.symmetric_contraction import Contraction
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mace_peft.fast.polynomial import pairs_of, polynomial

CONTRACTION_OF_MACE = Contraction.forward
FEW = 4  # atoms of an element: with fewer, MACE's way is as fast, and keeps less for the backward pass
SYMMETRIC: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of constants U, what ``symmetric`` made of them


def by_element(self: Contraction, x: Tensor, y: Tensor) -> Tensor:
    """x: (atoms, channels, components), y: one-hot elements (atoms, elements); to (atoms, channels * components of o).
    """
    if x.device.type != "cpu" or self.correlation > 3:
        return CONTRACTION_OF_MACE(self, x, y)
    element_of_atom = y.argmax(1)
    elements = element_of_atom.unique().tolist()
    if len(x) < FEW * len(elements):
        return CONTRACTION_OF_MACE(self, x, y)
    atoms = [(element_of_atom == element).nonzero()[:, 0] for element in elements]
    parts = [polynomial(x[which].permute(1, 2, 0).contiguous(), *coefficients(self, element))
             for element, which in zip(elements, atoms, strict=True)]
    return torch.cat(parts, -1)[..., torch.cat(atoms).argsort()].permute(2, 0, 1).flatten(1)


def coefficients(self: Contraction, element: int) -> list[Tensor]:
    """K1, K2, ... of the element: (channels, components of o times i, 1 or j or pairs of j and k)."""
    weights = reversed((self.weights_max, *self.weights))  # (elements, paths, channels) of each order
    constants = [symmetric(self.U_tensors(order), order) for order in range(1, self.correlation + 1)]
    return [(weight[element].T @ U.flatten(0, 1).T).view(-1, *U.shape[:2])
            for weight, U in zip(weights, constants, strict=True)]


def symmetric(U: Tensor, order: int) -> Tensor:
    """MACE's constants (components of o, i, j, ..., paths) as (components of o times i, 1 or j or pairs, paths)."""
    version, known = SYMMETRIC.get(U, (None, None))
    if version == U._version:
        return known
    components, paths = U.shape[-2:]
    tensor = U.view(-1, *[components] * order, paths)
    orders = list(itertools.permutations(range(1, order + 1)))
    tensor = sum(tensor.permute(0, *indices, order + 1) for indices in orders) / len(orders)
    if order == 3:
        first, second = pairs_of(components)
        twice = 1 + (first != second).to(U)  # a pair stands for x_j x_k and x_k x_j
        tensor = tensor[:, :, first, second] * twice.unsqueeze(1)
    tensor = tensor.reshape(len(tensor) * components, -1, paths)
    SYMMETRIC[U] = U._version, tensor
    return tensor
