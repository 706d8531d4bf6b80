"""Foundation file + adapter directory = the trained model."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator

import torch
from torch import nn

from mace_peft.config import PeftError, one_line
from mace_peft.foundation import first_E0s, rebuild, single_head, with_heads
from mace_peft.injection import eject, inject
from mace_peft.models import check_model, check_switched_on, fingerprint, is_adapted, origin, trainable_parameters
from mace_peft.storage import ENERGIES, energy_buffers, read_adapter


def load_adapter(foundation: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """The trained model: the foundation with the adapter of the directory, all but its adapters frozen.

    The foundation may have another dtype or device than in training. It is adapted in place where the adapter was
    trained for its elements and heads; else the model is a new one, narrowed as ``mace_run_train`` narrowed it. A
    foundation that has an adapter already swaps it for this one. No code from the directory runs.

    Raises PeftError if the directory holds no complete adapter, or one that was trained from other weights, and if the
    foundation is no model.
    """
    check_model(foundation)
    check_switched_on(foundation)
    config, description, tensors = read_adapter(directory)
    source = description["foundation"]
    held = origin(foundation)["fingerprint"] if is_adapted(foundation) else fingerprint(foundation)
    if held != source["fingerprint"]:
        raise PeftError(f"{directory} was trained from a foundation ({source['name']!r}) whose weights differ from the "
                        f"one given (fingerprints {source['fingerprint'][:12]!r} and {held[:12]!r}): give that one")
    try:
        with left_alone_on_error(foundation):
            model = base_of(with_heads(foundation), description)
            inject(model, config, source)
            fill(model, tensors, complete=True)
            set_energies(model, description)
    except PeftError as error:
        raise PeftError(f"the adapter in {directory} does not fit: {error}") from None
    except Exception as error:  # elements, heads and numbers that do not go together fail in MACE in many ways
        raise PeftError(f"the adapter in {directory} does not fit its foundation ({one_line(error)}): save or copy it "
                        "again") from error
    return model


@contextlib.contextmanager
def left_alone_on_error(model: nn.Module) -> Iterator[None]:
    """Give the model its adapter back, or none if it had none, if the block fails."""
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapter = None
    if is_adapted(model):
        tensors = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
        energies = {name: buffer.clone() for name, buffer in energy_buffers(model).items()}
        adapter = model.peft_config, origin(model), tensors, energies
    try:
        yield
    except BaseException:
        if is_adapted(model):
            eject(model)
        if adapter is not None:
            config, source, tensors, energies = adapter
            fill(inject(model, config, source), tensors)
            set_energies(model, energies)
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
        raise


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], complete: bool = False) -> None:
    """Give the adapted model these trained tensors by name.

    Raises PeftError, and changes nothing, for a tensor that finds no place or one of another shape, and with
    ``complete`` for a place that finds no tensor.
    """
    trainable = trainable_parameters(model)
    odd = [name for name, tensor in tensors.items() if name not in trainable or trainable[name].shape != tensor.shape]
    odd += [name for name in trainable if complete and name not in tensors]
    if odd:
        more = f" and {len(odd) - 3} more" if odd[3:] else ""
        raise PeftError(f"{', '.join(map(repr, odd[:3]))}{more} are missing, unknown or of another shape: use the "
                        "adapter with the settings, elements and heads it was trained for")
    with torch.no_grad():
        for name, tensor in tensors.items():
            trainable[name].copy_(tensor)


def base_of(foundation: nn.Module, description: dict) -> nn.Module:
    """The foundation with the elements and heads of the description: itself where these are its own.

    Raises PeftError where an adapted foundation cannot become that.
    """
    elements, heads, source = description["elements"], description["heads"], description["foundation"]
    own = foundation.atomic_numbers.tolist() == elements and list(foundation.heads) == heads
    if is_adapted(foundation):
        kept = origin(foundation).get("head") == source.get("head")
        if not kept or (not own and len(foundation.heads) > 1):
            raise PeftError("the adapter was trained for other heads than the one that it would replace: load it onto "
                            "the foundation")
        if own:
            return eject(foundation)
        foundation = eject(copy.deepcopy(foundation))
    elif "head" in source and len(foundation.heads) > 1:
        own = False  # a run gives the head that it takes to each of its own heads, also to one of the same name
    if own:
        return foundation
    foundation = single_head(foundation, source.get("head"))
    E0s = first_E0s(foundation)
    return rebuild(foundation, elements, heads, [[E0s.get(element) for element in elements]] * len(heads))


def set_energies(model: nn.Module, values: dict) -> None:
    """Give the adapted model these E0s, scale and shift, while it has its adapters; all or, on an error, none."""
    buffers = energy_buffers(model)
    tensors = {name: torch.as_tensor(values[name], dtype=torch.float64).reshape(buffer.shape)
               for name, buffer in buffers.items()}
    for name, buffer in buffers.items():
        model.peft_originals[ENERGIES[name]] = buffer.clone()
        buffer.copy_(tensors[name])
