"""Gates of messages that see the atom that sends: what the gates of mace-peft, which see the other, are compared with.

In a module of its own, as models that are saved with it name it.
"""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_peft.methods
import torch
from e3nn import o3

from mace_peft import PeftConfig
from mace_peft.blocks.e3nn import Adapted, renamed
from mace_peft.methods import MMEA


class GatedBySenders(Adapted, o3.TensorProduct):
    """Convolution whose weights, one for each path and channel of a message, take the gate as channels of 0o would."""

    plain_forward = renamed(o3.TensorProduct.forward, "plain_forward")

    @staticmethod
    def make_adapter(block: o3.TensorProduct, config: PeftConfig) -> MMEA:
        return MMEA(block.irreps_in1, f"{block.weight_numel}x0o", config.rank, config.gate)

    @staticmethod
    def largest_rank(block: o3.TensorProduct) -> int:
        return block.irreps_in1.count("0e")

    def forward(self, x, y, weight: torch.Tensor):
        return self.plain_forward(x, y, self.adapter(x, weight))
