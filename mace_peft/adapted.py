"""MACE's and e3nn's blocks with an adapter inside.

A block is adapted in place: it gets a submodule ``adapter`` and its class becomes the subclass below. So it stays an
instance of its own class, keeps its attributes and the state-dict keys of its base, and ejecting it is the way back.
Each class says in ``make_adapter`` which mathematics (``mace_peft.methods``) its block takes.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Optional

import mace  # noqa: F401  before e3nn, see mace_peft.methods
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from e3nn.util.jit import compile_mode
from mace.modules import radial
from mace.modules.blocks import EquivariantProductBasisBlock
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction
from torch import Tensor, nn

from mace_peft.config import PeftConfig
from mace_peft.methods import MMEA, ContractionUpdate, LinearUpdate, MatrixUpdate, TensorProductUpdate

RadialLayer = type(e3nn_nn.FullyConnectedNet([1, 1])[0])
# modules that are one thing to a user, though their parts are adapted one by one
COMPOSITES = (e3nn_nn.FullyConnectedNet, SymmetricContraction)
# mace-torch 0.3.14 and later
if hasattr(radial, "RadialMLP"):
    COMPOSITES += (radial.RadialMLP,)


class Adapted(nn.Module):
    """Marks a block that has an ``adapter``; the block's own class is the last base of its subclass."""


def renamed(function: Callable, name: str) -> Callable:
    """A copy of the function under another name: TorchScript, which knows no ``super()``, compiles a method by name."""
    copy = types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    return copy


# --- MMEA: the output of the block is modulated -----------------------------------------------------------------------


class GatedProduct(Adapted, EquivariantProductBasisBlock):
    """Product block whose output, skip connection included, drives and takes the gate."""

    plain_forward = renamed(EquivariantProductBasisBlock.forward, "plain_forward")

    @staticmethod
    def make_adapter(block: EquivariantProductBasisBlock, config: PeftConfig) -> MMEA:
        irreps = block.linear.irreps_out
        return MMEA(irreps, irreps, config.rank, config.gate, config.init_std)

    @staticmethod
    def largest_rank(block: EquivariantProductBasisBlock) -> int:
        return widest(block.linear.irreps_out)

    # Optional[...] as TorchScript compiles these signatures
    def forward(self, node_feats: Tensor, sc: Optional[Tensor], node_attrs: Tensor) -> Tensor:  # noqa: UP045
        features = self.plain_forward(node_feats, sc, node_attrs)
        return self.adapter(features, features)


class GatedLinear(Adapted, o3.Linear):
    """Linear layer whose input scalars drive, and whose output takes, the gate."""

    plain_forward = renamed(o3.Linear.forward, "plain_forward")

    @staticmethod
    def make_adapter(block: o3.Linear, config: PeftConfig) -> MMEA:
        return MMEA(block.irreps_in, block.irreps_out, config.rank, config.gate, config.init_std)

    @staticmethod
    def largest_rank(block: o3.Linear) -> int:
        return max(widest(block.irreps_in), widest(block.irreps_out))

    def forward(self, features, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None):  # noqa: UP045
        return self.adapter(features, self.plain_forward(features, weight, bias))


class GatedTensorProduct(Adapted, o3.FullyConnectedTensorProduct):
    """Tensor product with elements, whose first input's scalars drive, and whose output takes, the gate."""

    plain_forward = renamed(o3.TensorProduct.forward, "plain_forward")

    @staticmethod
    def make_adapter(block: o3.FullyConnectedTensorProduct, config: PeftConfig) -> MMEA:
        return MMEA(block.irreps_in1, block.irreps_out, config.rank, config.gate, config.init_std)

    @staticmethod
    def largest_rank(block: o3.FullyConnectedTensorProduct) -> int:
        return max(widest(block.irreps_in1), widest(block.irreps_out))

    def forward(self, x, y, weight: Optional[Tensor] = None):  # noqa: UP045
        return self.adapter(x, self.plain_forward(x, y, weight))


class GatedMessages(Adapted, o3.Linear):
    """Linear layer that takes the sum of the messages to an atom, with a gate of its own for them.

    A gain for each path and channel that depends on the atom that receives is the same for all messages to it: so their
    sum takes it, and its scalars, which are shifted as in any gate, drive it.
    """

    plain_forward = renamed(o3.Linear.forward, "plain_forward")

    @staticmethod
    def make_adapter(block: o3.Linear, config: PeftConfig) -> nn.ModuleDict:
        messages = MMEA(block.irreps_in, block.irreps_in, config.rank, config.gate, config.init_std)
        return nn.ModuleDict({"messages": messages, "output": GatedLinear.make_adapter(block, config)})

    @staticmethod
    def largest_rank(block: o3.Linear) -> int:
        return GatedLinear.largest_rank(block)

    def forward(self, messages, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None):  # noqa: UP045
        messages = self.adapter["messages"](messages, messages)
        return self.adapter["output"](messages, self.plain_forward(messages, weight, bias))


def gates(block: Adapted) -> dict[str, MMEA]:
    """The block's gates, by what they gate: ``messages``, or its ``output``."""
    if isinstance(block.adapter, MMEA):
        return {"output": block.adapter}
    return dict(block.adapter.items()) if isinstance(block.adapter, nn.ModuleDict) else {}


def widest(irreps: o3.Irreps) -> int:
    """Channels of the irrep that has most."""
    return max((irreps.count(ir) for _, ir in irreps), default=0)


# --- The weights of the operation are updated: ELoRA here, static gains in scaled.py --------------------------------


@compile_mode("unsupported")
class Updated(nn.Module):
    """Runs the block with ``weight + update`` in the place of each weight. TorchScript: fold the update in first."""

    def updates(self) -> dict[str, Tensor]:
        """The updates by the names of the block's weights, in their shapes."""
        raise NotImplementedError

    def forward(self, *args, **kwargs):
        with self.updated_weights():
            return super().forward(*args, **kwargs)

    @contextlib.contextmanager
    def updated_weights(self):
        updates = self.updates()
        places = {name: locate(self, name) for name in updates}
        base = {name: tensors[key] for name, (tensors, key) in places.items()}
        try:
            for name, (tensors, key) in places.items():
                tensors[key] = base[name] + updates[name]
            yield
        finally:
            for name, (tensors, key) in places.items():
                tensors[key] = base[name]


class Mergeable(Updated, Adapted):
    """A block whose updates can be added to its weights for good."""

    @torch.no_grad()
    def fold(self) -> None:
        """Add the updates to the weights for good."""
        for name, update in self.updates().items():
            tensors, key = locate(self, name)
            tensors[key].add_(update)


class LowRank(Mergeable):
    """A block whose adapter gives the updates."""

    def updates(self) -> dict[str, Tensor]:
        return self.adapter()


def locate(module: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """The dictionary that holds the parameter or buffer of that dotted name, and its key there."""
    owner, _, key = name.rpartition(".")
    owner = module.get_submodule(owner)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


class LowRankLinear(LowRank, o3.Linear):
    @staticmethod
    def make_adapter(block: o3.Linear, config: PeftConfig) -> LinearUpdate:
        paths = [(i.i_in, i.i_out) for i in block.instructions if i.i_in != -1]  # -1 marks a bias
        return LinearUpdate(block.irreps_in, block.irreps_out, paths, config.rank, config.alpha)

    @staticmethod
    def largest_rank(block: o3.Linear) -> int:
        shared = {ir for _, ir in block.irreps_in} & {ir for _, ir in block.irreps_out}
        return max((min(block.irreps_in.count(ir), block.irreps_out.count(ir)) for ir in shared), default=0)


class LowRankTensorProduct(LowRank, o3.FullyConnectedTensorProduct):
    @staticmethod
    def make_adapter(block: o3.FullyConnectedTensorProduct, config: PeftConfig) -> TensorProductUpdate:
        return TensorProductUpdate(LowRankTensorProduct.paths(block), config.rank, config.alpha)

    @staticmethod
    def largest_rank(block: o3.FullyConnectedTensorProduct) -> int:
        return max((min(m1 * m2, m_out) for m1, m2, m_out in LowRankTensorProduct.paths(block)), default=0)

    @staticmethod
    def paths(block: o3.FullyConnectedTensorProduct) -> list[tuple[int, int, int]]:
        return [i.path_shape for i in block.instructions if i.has_weight]


class LowRankLayer(LowRank, RadialLayer):
    """Layer of e3nn's radial MLP."""

    @staticmethod
    def make_adapter(block: RadialLayer, config: PeftConfig) -> MatrixUpdate:
        return MatrixUpdate(*block.weight.shape, config.rank, config.alpha)

    @staticmethod
    def largest_rank(block: RadialLayer) -> int:
        return min(block.weight.shape)


class LowRankDense(LowRank, nn.Linear):
    """Layer of MACE's newer radial MLP."""

    @staticmethod
    def make_adapter(block: nn.Linear, config: PeftConfig) -> MatrixUpdate:
        return MatrixUpdate(block.in_features, block.out_features, config.rank, config.alpha, transposed=True)

    @staticmethod
    def largest_rank(block: nn.Linear) -> int:
        return min(block.weight.shape)


class LowRankContraction(LowRank, Contraction):
    @staticmethod
    def make_adapter(block: Contraction, config: PeftConfig) -> ContractionUpdate:
        lower = {name: block.get_parameter(name).shape for name in lower_weights(block)}
        return ContractionUpdate(block.weights_max.shape, lower, config.rank, config.alpha)

    @staticmethod
    def largest_rank(block: Contraction) -> int:
        elements, paths, channels = block.weights_max.shape
        return min(elements * paths, channels)


def lower_weights(block: Contraction) -> list[str]:
    """Names of the weights of the lower orders, but those that MACE has set to zero, for paths that do not exist."""
    return [f"weights.{i}" for i in range(len(block.weights)) if not getattr(block, f"weights_{i}_zeroed", False)]


LOW_RANK = {
    o3.Linear: LowRankLinear,
    o3.FullyConnectedTensorProduct: LowRankTensorProduct,
    RadialLayer: LowRankLayer,
    nn.Linear: LowRankDense,
    Contraction: LowRankContraction,
}
GATED = {EquivariantProductBasisBlock: GatedProduct, o3.Linear: GatedLinear}
# of a convolution the gate moves to the layer that takes its messages: find_targets
GATED_PRODUCTS = {o3.FullyConnectedTensorProduct: GatedTensorProduct, o3.TensorProduct: GatedMessages}
