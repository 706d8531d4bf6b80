"""The adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import e3nn
import mace
import torch
from safetensors.torch import save
from torch import nn

import mace_peft
from mace_peft.injection import trainable_parameters

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
