"""Parameters of adapters that were taken out: an optimizer or a moving average that still holds them says so.

torch would train on without a word, what no model uses any more.
"""

from collections.abc import Iterable

from torch import nn

from mace_peft.errors import PeftError


class Retired(nn.Parameter):
    """Raises PeftError for whatever torch is to do with it, such as a step of an optimizer."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise PeftError("a parameter is in use whose adapter was taken out of its model, by eject, merge or another "
                        "load_adapter: make a new optimizer and a new moving average of trainable_parameters(model)")

    def __repr__(self):
        return "Retired()"


def retire(parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Make those retired that are not in the model any more."""
    alive = {id(parameter) for parameter in model.parameters()}
    for parameter in parameters:
        if id(parameter) not in alive:
            parameter.__class__ = Retired
