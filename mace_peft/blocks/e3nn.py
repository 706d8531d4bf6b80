"""e3nn's own layers as operations."""

import math
from typing import Optional

from torch import Tensor, nn

from mace_peft.blocks.adapted import Adapted
from mace_peft.blocks.operation import Operation, Operations, starts
from mace_peft.e3nn import RadialLayer, o3
from mace_peft.e3nn import nn as e3nn_nn
from mace_peft.methods import Part


def linear_parts(block: o3.Linear) -> list[Part]:
    """A matrix for each irrep, over all its blocks: a list with repeats such as 8x0e+8x0e is one irrep, 16 channels."""
    rows, columns = channels_within_irrep(block.irreps_in), channels_within_irrep(block.irreps_out)
    channels = starts(mul for mul, _ in block.irreps_out)
    parts, weights, biases = [], 0, 0
    for i in block.instructions:
        size = math.prod(i.path_shape)
        if i.i_in == -1:  # marks a bias
            parts.append(Part("bias", biases, (1, 1, 1, size), channel=channels[i.i_out]))
            biases += size
        else:
            before, after = i.path_shape
            parts.append(Part("weight", weights, (before, 1, 1, after), str(block.irreps_in[i.i_in].ir), rows[i.i_in],
                              columns[i.i_out], channel=channels[i.i_out], channels=block.irreps_out.num_irreps))
            weights += size
    return parts


def channels_within_irrep(irreps: o3.Irreps) -> list[int]:
    """Where each block's channels begin among all channels of its irrep."""
    return [irreps[:i].count(ir) for i, (_, ir) in enumerate(irreps)]


def tensor_product_parts(block: o3.FullyConnectedTensorProduct) -> list[Part]:
    """A matrix for each path, of channels x elements to channels."""
    elements = starts(mul for mul, _ in block.irreps_in2)
    channels = starts(mul for mul, _ in block.irreps_out)
    paths = [i for i in block.instructions if i.has_weight]
    names = [f"{block.irreps_in1[i.i_in1].ir}*{block.irreps_in2[i.i_in2].ir}" for i in paths]
    names = [f"{name}_{names[:k].count(name) + 1}" if names.count(name) > 1 else name for k, name in enumerate(names)]
    parts, start = [], 0
    for i, name in zip(paths, names, strict=True):
        m1, m2, m_out = i.path_shape
        parts.append(Part("weight", start, (m1, m2, 1, m_out), name, element=elements[i.i_in2],
                          channel=channels[i.i_out], channels=block.irreps_out.num_irreps))
        start += m1 * m2 * m_out
    return parts


def layer_parts(block: RadialLayer) -> list[Part]:
    """Of a radial MLP, before the activation."""
    rows, columns = block.weight.shape
    return [Part("weight", 0, (rows, 1, 1, columns), "weight")]


def dense_parts(block: nn.Linear) -> list[Part]:
    """Of torch's linear layer, which stores its weight as (columns, rows)."""
    bias = [] if block.bias is None else [Part("bias", 0, (1, 1, 1, block.out_features))]
    return [Part("weight", 0, (block.in_features, 1, 1, block.out_features), "weight", transposed=True), *bias]


class GatedLinear(Adapted):
    """Linear layer whose input scalars drive, and whose output takes, the gate."""

    # Optional[...], here and below, as TorchScript compiles these signatures
    def forward(self, features, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None):  # noqa: UP045
        return self.adapter(features, self.plain_forward(features, weight, bias))


class GatedTensorProduct(Adapted):
    """Tensor product with elements, whose first input's scalars drive, and whose output takes, the gate."""

    def forward(self, x, y, weight: Optional[Tensor] = None):  # noqa: UP045
        return self.adapter(x, self.plain_forward(x, y, weight))


class GatedMessages(Adapted):
    """Linear layer that takes the sum of the messages to an atom, with a gate of its own for them.

    A gain for each path and channel that depends on the atom that receives is the same for all messages to it: so their
    sum takes it, and its scalars, which are shifted as in any gate, drive it.
    """

    def forward(self, messages, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None):  # noqa: UP045
        messages = self.adapter["messages"](messages, messages)
        return self.adapter["output"](messages, self.plain_forward(messages, weight, bias))


OPERATIONS: Operations = {
    o3.Linear: Operation(
        "linear", linear_parts, lambda block: {"output": (block.irreps_in, block.irreps_out)}, GatedLinear),
    o3.FullyConnectedTensorProduct: Operation(
        "tensor product", tensor_product_parts, lambda block: {"output": (block.irreps_in1, block.irreps_out)},
        GatedTensorProduct),
    # a convolution's gates are those of the layer that takes its messages, see ``Backbone.receivers``
    o3.TensorProduct: Operation("convolution", None, lambda block: {
        "messages": (block.irreps_in, block.irreps_in), "output": (block.irreps_in, block.irreps_out)}, GatedMessages),
    e3nn_nn.FullyConnectedNet: Operation("radial MLP"),
    RadialLayer: Operation("layer", layer_parts),
    nn.Linear: Operation("layer", dense_parts),
}
