"""Blocks whose weights take static gains (``mace_peft.methods.gains``): ``--peft_gate static``.

With ``--peft mmea`` gains are all, with ``--peft elora`` they scale weights that are updated by low rank as well.
"""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_peft.methods
import torch
from e3nn import o3
from mace.modules.blocks import AtomicEnergiesBlock
from mace.modules.symmetric_contraction import Contraction
from torch import Tensor, nn

from mace_peft.adapted import LOW_RANK, Mergeable, RadialLayer, lower_weights
from mace_peft.config import PeftConfig
from mace_peft.methods import ContractionGains, EnergyShift, LinearGains, MatrixGains, ScaledUpdate, TensorProductGains


class Scaled(Mergeable):
    """A block whose adapter gives gains of its weights."""

    def updates(self) -> dict[str, Tensor]:
        return self.adapter({name: self.get_parameter(name) for name in self.adapter.names})


class ScaledLinear(Scaled, o3.Linear):
    @staticmethod
    def make_adapter(block: o3.Linear, config: PeftConfig) -> LinearGains:
        paths = [(i.path_shape[0], i.i_out) for i in block.instructions if i.i_in != -1]  # -1 marks a bias
        biases = [i.i_out for i in block.instructions if i.i_in == -1]
        return LinearGains(block.irreps_out, paths, biases)


class ScaledTensorProduct(Scaled, o3.FullyConnectedTensorProduct):
    @staticmethod
    def make_adapter(block: o3.FullyConnectedTensorProduct, config: PeftConfig) -> TensorProductGains:
        paths = [(i.path_shape[0], i.i_in2, i.i_out) for i in block.instructions if i.has_weight]
        return TensorProductGains(block.irreps_in2, block.irreps_out, paths)


class ScaledLayer(Scaled, RadialLayer):
    """Layer of e3nn's radial MLP."""

    @staticmethod
    def make_adapter(block: RadialLayer, config: PeftConfig) -> MatrixGains:
        return MatrixGains(block.weight.shape[1])


class ScaledDense(Scaled, nn.Linear):
    """Layer of MACE's newer radial MLP."""

    @staticmethod
    def make_adapter(block: nn.Linear, config: PeftConfig) -> MatrixGains:
        return MatrixGains(block.out_features, transposed=True, bias=block.bias is not None)


class ScaledContraction(Scaled, Contraction):
    @staticmethod
    def make_adapter(block: Contraction, config: PeftConfig) -> ContractionGains:
        elements, _, channels = block.weights_max.shape
        return ContractionGains(elements, channels, ["weights_max", *lower_weights(block)])


class ShiftedEnergies(Mergeable, AtomicEnergiesBlock):
    """The E0s, which gains alone could not follow: a shift in the place of a gain."""

    @staticmethod
    def make_adapter(block: AtomicEnergiesBlock, config: PeftConfig) -> EnergyShift:
        # a row for each head, as in what mace_run_train saves: models made otherwise may have no rows
        return EnergyShift(torch.atleast_2d(block.atomic_energies).shape)

    @staticmethod
    def largest_rank(block: AtomicEnergiesBlock) -> int:
        return 0

    def updates(self) -> dict[str, Tensor]:
        return {name: shift.reshape(self.atomic_energies.shape) for name, shift in self.adapter().items()}


SCALED = {
    AtomicEnergiesBlock: ShiftedEnergies,
    o3.Linear: ScaledLinear,
    o3.FullyConnectedTensorProduct: ScaledTensorProduct,
    RadialLayer: ScaledLayer,
    nn.Linear: ScaledDense,
    Contraction: ScaledContraction,
}


class ScaledLowRank(Scaled):
    """A block whose weights are updated by low rank, and then scaled."""

    @classmethod
    def make_adapter(cls, block: nn.Module, config: PeftConfig) -> ScaledUpdate:
        kind = cls.__bases__[-1]
        return ScaledUpdate(SCALED[kind].make_adapter(block, config), LOW_RANK[kind].make_adapter(block, config))

    @classmethod
    def largest_rank(cls, block: nn.Module) -> int:
        return LOW_RANK[cls.__bases__[-1]].largest_rank(block)


class ScaledLowRankLinear(ScaledLowRank, o3.Linear):
    pass


class ScaledLowRankTensorProduct(ScaledLowRank, o3.FullyConnectedTensorProduct):
    pass


class ScaledLowRankLayer(ScaledLowRank, RadialLayer):
    pass


class ScaledLowRankDense(ScaledLowRank, nn.Linear):
    pass


class ScaledLowRankContraction(ScaledLowRank, Contraction):
    pass


SCALED_LOW_RANK = {
    AtomicEnergiesBlock: ShiftedEnergies,
    o3.Linear: ScaledLowRankLinear,
    o3.FullyConnectedTensorProduct: ScaledLowRankTensorProduct,
    RadialLayer: ScaledLowRankLayer,
    nn.Linear: ScaledLowRankDense,
    Contraction: ScaledLowRankContraction,
}
