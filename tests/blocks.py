"""Single blocks with an adapter inside, as ``inject`` makes them in a model."""

import torch

from mace_peft import PeftConfig
from mace_peft.backbones.mace import Mace
from mace_peft.blocks.adapted import put_in
from mace_peft.model.targets import Target, target_of


def target(block: torch.nn.Module, method: str) -> Target:
    """What the method makes of the block."""
    return target_of(block, PeftConfig(method), Mace())


def adapt(block: torch.nn.Module, method: str, **settings) -> torch.nn.Module:
    """Give the block a new adapter of the method, in the dtype of the block, in place. Returns the block."""
    found = target(block, method)
    adapter = found.make(block, PeftConfig(method, **settings))
    put_in(block, found.mixin, adapter.to(next(block.parameters()).dtype))
    return block
