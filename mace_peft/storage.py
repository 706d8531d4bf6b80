"""The adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import e3nn
import mace
import torch
from mace.tools.scripts_utils import remove_pt_head
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

import mace_peft
from mace_peft.config import PeftConfig, PeftError
from mace_peft.foundation import rebuild
from mace_peft.injection import eject, fingerprint, inject, is_adapted, trainable_parameters

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the adapted model's trained tensors and settings to the directory; returns its path.

    The files hold what it takes to get from the foundation file to this model: the trained parameters, the elements,
    E0s (eV, one list per head, in the order of the elements), heads, scale and shift (eV), the settings, the name and
    fingerprint of the foundation, and the versions of the packages. Each file is complete before it takes the place of
    an older one; other files in the directory stay. Raises PeftError if the model has no adapters, OSError if the
    directory cannot be written.
    """
    directory = Path(directory)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable_parameters(model).items()}
    contents = {
        TENSOR_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(describe(model), indent=2) + "\n").encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in contents.items():
            unfinished(directory, name).write_bytes(content)
        for name in contents:
            unfinished(directory, name).replace(directory / name)
    finally:
        for name in contents:
            unfinished(directory, name).unlink(missing_ok=True)
    return directory


def unfinished(directory: Path, name: str) -> Path:
    return directory / f".{name}.unfinished"


def describe(model: nn.Module) -> dict:
    """What adapter_config.json says of an adapted model."""
    scale_shift = getattr(model, "scale_shift", None)
    atomic_energies = getattr(model, "atomic_energies_fn", None)
    return {
        "peft": model.peft_config.to_dict(),
        "foundation": model.peft_foundation,
        "model_class": type(model).__name__,
        "elements": model.atomic_numbers.tolist(),
        "heads": list(getattr(model, "heads", ["Default"])),
        "E0s": None if atomic_energies is None else torch.atleast_2d(atomic_energies.atomic_energies).tolist(),
        "scale": None if scale_shift is None else torch.atleast_1d(scale_shift.scale).tolist(),
        "shift": None if scale_shift is None else torch.atleast_1d(scale_shift.shift).tolist(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {package.__name__: package.__version__ for package in (mace_peft, mace, e3nn, torch)},
    }


def load_adapter(foundation: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """The trained model: the foundation with the adapter of the directory, all but its adapters frozen.

    The foundation may have another dtype or device than in training. It is adapted in place where the adapter was
    trained for its elements and heads; else the model is a new one, narrowed as ``mace_run_train`` narrowed it. A
    foundation that has an adapter already swaps it for this one. No code from the directory runs.

    Raises PeftError if the directory holds no complete adapter, or one that was trained from other weights.
    """
    directory = Path(directory)
    description, tensors = read(directory)
    origin = description["foundation"]
    try:
        config = PeftConfig(**description["peft"])
    except TypeError as error:
        raise PeftError(f"{directory / CONFIG_FILE} has settings that this mace-peft does not know ({error}): use the "
                        "version that saved it, or a newer one") from None
    held = foundation.peft_foundation["fingerprint"] if is_adapted(foundation) else fingerprint(foundation)
    if held != origin["fingerprint"]:
        raise PeftError(f"{directory} was trained from a foundation ({origin['name']}) whose weights differ from the "
                        f"one given (fingerprints {origin['fingerprint'][:12]} and {held[:12]}): give that foundation")
    model = base_of(foundation, description)
    inject(model, config, origin)
    trainable = trainable_parameters(model)
    shapes, wanted = ({name: tuple(t.shape) for name, t in given.items()} for given in (tensors, trainable))
    if shapes != wanted:
        eject(model)
        odd = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise PeftError(f"{directory / TENSOR_FILE} does not fit its settings (missing, unknown or of another shape: "
                        f"{', '.join(odd)}): save or copy the adapter again")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])
    return model


def base_of(foundation: nn.Module, description: dict) -> nn.Module:
    """The foundation with the elements, heads, E0s, scale and shift of the description: itself where these are its own.

    Raises PeftError where an adapted foundation would have to become another model.
    """
    elements, heads = description["elements"], description["heads"]
    own = foundation.atomic_numbers.tolist() == elements and list(foundation.heads) == heads
    if is_adapted(foundation):
        if not own:
            raise PeftError("the adapter was trained for other elements or heads than the one that it would replace: "
                            "load it onto the foundation")
        model = eject(foundation)
    elif own:
        model = foundation
    else:
        if len(foundation.heads) > 1:
            foundation = remove_pt_head(foundation, description["foundation"].get("head"))
        model = rebuild(foundation, elements, heads, description["E0s"])
    numbers = {"E0s": model.atomic_energies_fn.atomic_energies, "scale": model.scale_shift.scale,
               "shift": model.scale_shift.shift}
    for name, buffer in numbers.items():
        buffer.copy_(torch.tensor(description[name], dtype=torch.float64).reshape(buffer.shape))
    return model


def read(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The settings and the tensors of an adapter directory.

    Raises PeftError if a file is missing or broken.
    """
    try:
        description = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load((directory / TENSOR_FILE).read_bytes())
    except FileNotFoundError as error:
        raise PeftError(f"{directory} is no adapter directory, for {Path(error.filename).name} is missing: give the "
                        "NAME_adapter directory that a run left") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise PeftError(f"the adapter in {directory} cannot be read ({error}): save or copy it again") from None
    absent = {"peft", "foundation", "elements", "heads", "E0s", "scale", "shift"} - set(description)
    if absent:
        raise PeftError(f"{directory / CONFIG_FILE} lacks {', '.join(sorted(absent))}: save the adapter again")
    return description, tensors
