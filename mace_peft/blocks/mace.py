"""MACE's own blocks as operations, beside e3nn's layers."""

from typing import Optional

import torch
from mace.modules import radial
from mace.modules.blocks import AtomicEnergiesBlock, EquivariantProductBasisBlock
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction
from torch import Tensor

from mace_peft.blocks import e3nn
from mace_peft.blocks.adapted import Adapted
from mace_peft.blocks.operation import Operation, Operations
from mace_peft.methods import Part


class GatedProduct(Adapted):
    """Product block whose output, skip connection included, drives and takes the gate."""

    # Optional[...] as TorchScript compiles these signatures
    def forward(self, node_feats: Tensor, sc: Optional[Tensor], node_attrs: Tensor) -> Tensor:  # noqa: UP045
        features = self.plain_forward(node_feats, sc, node_attrs)
        return self.adapter(features, features)


def contraction_parts(block: Contraction) -> list[Part]:
    """The highest order is one matrix of elements x paths to channels; the lower orders are small."""
    elements, paths, channels = block.weights_max.shape
    highest = Part("weights_max", 0, (1, elements, paths, channels), "weights_max", divisor=paths)
    return [highest, *(Part(f"weights.{i}", 0, (1, *weight.shape[:2], channels), full=True)
                       for i, weight in enumerate(block.weights)
                       if not getattr(block, f"weights_{i}_zeroed", False))]  # MACE's, for paths that do not exist


def energy_parts(block: AtomicEnergiesBlock) -> list[Part]:
    """E0s by head and element. Models that mace_run_train has not saved may have no dimension for the heads."""
    heads, elements = torch.atleast_2d(block.atomic_energies).shape
    return [Part("atomic_energies", 0, (heads, 1, 1, elements), full=True)]


OPERATIONS: Operations = e3nn.OPERATIONS | {
    EquivariantProductBasisBlock: Operation("product", None, lambda block: {
        "output": (block.linear.irreps_out, block.linear.irreps_out)}, GatedProduct),
    SymmetricContraction: Operation("contractions"),
    Contraction: Operation("contraction", contraction_parts),
    AtomicEnergiesBlock: Operation("energies", energy_parts),
}
if hasattr(radial, "RadialMLP"):  # mace-torch 0.3.14 and later
    OPERATIONS[radial.RadialMLP] = Operation("radial MLP")
