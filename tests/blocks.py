"""Single blocks with an adapter inside, as ``inject`` makes them in a model."""

import torch

from mace_peft import PeftConfig
from mace_peft.blocks.adapted import put_in
from mace_peft.blocks.mace import OPERATIONS
from mace_peft.blocks.operation import operation_of
from mace_peft.methods import METHODS
from mace_peft.model.targets import Target


def target(block: torch.nn.Module, method: str) -> Target:
    """What the method makes of the block."""
    operation = operation_of(block, OPERATIONS)
    return Target(operation, METHODS[method].adapters[operation.role])


def adapt(block: torch.nn.Module, method: str, **settings) -> torch.nn.Module:
    """Give the block a new adapter of the method, in the dtype of the block, in place. Returns the block."""
    found = target(block, method)
    adapter = found.make(block, PeftConfig(method, **settings))
    put_in(block, found.mixin, adapter.to(next(block.parameters()).dtype))
    return block
