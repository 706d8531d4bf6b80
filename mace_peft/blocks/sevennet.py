"""SevenNet's own blocks as operations, beside e3nn's layers."""

import torch
from sevenn.nn.scale import ModalWiseRescale, Rescale, SpeciesWiseRescale
from torch import nn

from mace_peft.blocks import e3nn
from mace_peft.blocks.operation import Operation, Operations
from mace_peft.methods import Part


def energy_parts(block: nn.Module) -> list[Part]:
    """Reference energies by modality and element, which SevenNet calls the shift; one number may stand for all."""
    modalities, elements = torch.atleast_2d(block.shift).shape
    return [Part("shift", 0, (modalities, 1, 1, elements), full=True)]


OPERATIONS: Operations = e3nn.OPERATIONS | dict.fromkeys(
    (Rescale, SpeciesWiseRescale, ModalWiseRescale), Operation("energies", energy_parts))
