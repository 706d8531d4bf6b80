"""How strongly an adapter acts: in full, not at all, or in between."""

import contextlib
from collections.abc import Iterator
from numbers import Real

import torch
from torch import nn

from mace_peft.blocks.adapted import plain, strengthen
from mace_peft.config import check_number
from mace_peft.errors import PeftError
from mace_peft.model.adapted import (
    COMPILE_MODE,
    SWITCHED_OFF,
    UNKNOWN,
    adapted_model_class,
    check_adapted,
    is_switched_off,
    known_originals,
)
from mace_peft.model.inject import freeze


@torch.no_grad()
def set_strength(model: nn.Module, strength: float) -> nn.Module:
    """Scale what the adapter does by a strength s of 0 to 1, in place. Returns the model.

    Weights become W + s (W' - W), where the adapter makes W' of W; a gain phi of a gate becomes phi^s, and its shift
    of 0e channels is scaled by s (``mace_peft.methods``). What trained along, and the E0s (eV), scale and shift that
    ``load_adapter`` sets, lie between those of before and of the adapter in the same way. At 0 the model predicts as
    the foundation, as in ``disable_adapter``, and at 1 as the adapter, to the last bit.

    It goes with the model into copies, files, adapter directories and what ``merge`` makes of it. Nothing trains while
    it is not 1. Raises PeftError, and changes nothing, for another number, if there is no adapter, if what trained
    along has no value of before (in a model that MACE rebuilt), and where low-rank updates are folded beside gates.
    """
    check_strength(strength)
    check_adapted(model)
    strength = float(strength)
    if strength == model.peft_strength:
        return model
    if model.peft_folded:
        raise PeftError(f"the low-rank updates of this model are folded into its weights at strength "
                        f"{model.peft_strength:g}, so that it takes no other: use load_adapter(foundation, directory, "
                        "strength), which folds nothing")
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    originals = known_originals(model)
    full = {name: held[name].clone() for name in originals} | model.peft_full
    for name, value in full.items():
        value = value.to(held[name])
        # no copy into the tensor, of which a backward pass that is still to come may need the version that it was
        held[name].data = torch.lerp(originals.get(name, value).to(value), value, strength)
    model.peft_full = {} if strength == 1 else full
    model.__class__ = adapted_model_class(plain(model), model.peft_config, strength=strength)
    strengthen(model, strength)
    model.peft_isolated = UNKNOWN
    vars(model).pop(COMPILE_MODE, None)
    if strength == 1:
        return freeze(model)
    for parameter in model.parameters():
        parameter.grad = None
    return model.requires_grad_(False)


def check_strength(strength: object) -> None:
    """Raise PeftError unless it is a number from 0 to 1."""
    check_number("<strength>", strength, Real, lambda s: 0 <= s <= 1,
                 "a number from 0, the foundation, to 1, the adapter")


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base's predictions for a while: ``with disable_adapter(model): ...``.

    It holds for calls of the model in this context: not for other threads, and not for copies and files that are made
    meanwhile, which have their adapters. What trained along, and what ``load_adapter`` set, counts as before. Raises
    PeftError if there is no adapter, and for a model of which only the gates are left: the updates that are folded into
    its weights cannot be switched off.
    """
    if not is_switched_off(model):  # by an outer one
        check_adapted(model)
    if model.peft_folded:
        raise PeftError("the low-rank updates of this model are folded into its weights, so that it is not the "
                        "foundation without its gates: use the foundation itself, or load_adapter(foundation, "
                        "directory), which folds nothing")
    known_originals(model)
    before = SWITCHED_OFF.set((*SWITCHED_OFF.get(), model))
    try:
        yield model
    finally:
        SWITCHED_OFF.reset(before)
