"""Gates of messages that see the atom that sends: what the gates of mace-peft, which see the other, are compared with.

In a module of its own, as models that are saved with it name it.
"""

from torch import Tensor

from mace_peft.blocks.adapted import Adapted
from mace_peft.blocks.operation import Gated, Operation
from mace_peft.e3nn import o3


class GatedBySenders(Adapted):
    """Convolution whose weights, one for each path and channel of a message, take the gate as channels of 0o would."""

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return self.plain_forward(x, y, self.adapter(x, weight))


def weight_gates(block: o3.TensorProduct) -> Gated:
    return {"output": (block.irreps_in1, o3.Irreps(f"{block.weight_numel}x0o"))}


# no convolution by its role: the gates of one go to the layer that takes its messages
BY_SENDERS = Operation("tensor product", gates=weight_gates, gated=GatedBySenders)
