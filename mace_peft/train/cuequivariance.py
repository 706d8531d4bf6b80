"""Training on cuEquivariance's layers, and the way back. Import this module only where cuEquivariance is installed."""

from collections.abc import Callable

import torch
from torch import nn

from mace_peft.blocks.adapted import adapted_blocks
from mace_peft.blocks.cuequivariance import carry_over
from mace_peft.errors import PeftError, one_line
from mace_peft.model.adapted import adapted_model_class, of_isolated_atoms, trainable_parameters


def accelerate(model: nn.Module, base: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The adapted model on cuEquivariance's layers, with copies of its adapters.

    base: the model without its adapters, which ``convert`` (MACE's) converts. Raises PeftError if MACE cannot convert
    it, or if something trains that the converted model does not have.
    """
    try:
        accelerated = convert(base)
    except Exception as error:  # a model of an unexpected shape fails in many ways
        raise PeftError(f"MACE cannot convert this model to cuEquivariance ({one_line(error)}): leave out "
                        "--enable_cueq") from error
    held = dict(accelerated.named_parameters())
    lost = [name for name in model.peft_originals if name not in held and model.get_parameter(name).numel()]
    if lost:
        remedy = "" if model.peft_config.row.trains_base else "leave it out of <train_also>, or "
        raise PeftError(f"{lost[0]} trains along, and cuEquivariance's layers hold it in another form: {remedy}leave "
                        "out --enable_cueq")
    carry_over(adapted_blocks(model), base, accelerated)
    accelerated.peft_originals = dict.fromkeys(model.peft_originals)
    accelerated.__class__ = adapted_model_class(type(accelerated), model.peft_config)
    accelerated.peft_foundation = accelerated.peft_base = accelerated.peft_gains = None
    accelerated.peft_full = {}
    accelerated.peft_isolated = of_isolated_atoms(model)
    return copy_trained(model, accelerated)


@torch.no_grad()
def copy_trained(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give one form of an adapted model what the other has learnt. Returns the target."""
    learnt = trainable_parameters(source)
    for name, parameter in trainable_parameters(target).items():
        if name in learnt:  # cuEquivariance's layers leave out biases of no elements
            parameter.copy_(learnt[name].reshape(parameter.shape))
    return target
