"""The digest by which an adapter knows its foundation: of all that a prediction depends on, and of nothing else."""

import dataclasses
import enum
import functools
import hashlib
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Complex, Integral
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mace_peft.blocks.adapted import Adapted

# what a prediction does not depend on, though a model has it: hooks apart, and what this package adds
WITHOUT_EFFECT = {*vars(nn.Module()), "lammps_mliap", "_prof_str", "_profiling_str"}
COMPILED = (torch.jit.ScriptModule, torch.fx.GraphModule)  # the code of a module, whose attributes say what it is
IGNORED = (type(None), torch.dtype, torch.device)


def digest(model: nn.Module, originals: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the parameters, buffers, classes and attributes of all modules, by name, without any adapter.

    ``originals`` take the places of tensors of the model. Attributes are numbers, texts, arrays, functions and classes
    (by their names), and containers, dataclasses and namespaces of these; no other object counts.

    It is the same on every device, in every process, and for a model's float64 and float32 file: numbers are rounded to
    float32. What is None or empty does not count: releases of torch and MACE add such attributes.
    """
    found = hashlib.sha256()
    modules = without_adapters(model)
    known = {id(module) for module in modules.values()}
    for name, module in sorted(modules.items()):
        if not isinstance(module, COMPILED):
            found.update(f"\n{name}: {class_name(module)}".encode())
            for key, value in sorted(attributes(module).items()):
                for piece in pieces(value, known):
                    found.update(f"\n{key}=".encode() + piece)
        for key, tensor in sorted({**module._parameters, **module._buffers}.items()):
            if tensor is not None:
                full_name = f"{name}.{key}" if name else key
                found.update(f"\n{full_name}#".encode() + rounded(originals.get(full_name, tensor)))
    return found.hexdigest()


def without_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, each once."""
    adapters = {id(inner) for module in model.modules() if isinstance(module, Adapted) for inner in
                module.adapter.modules()}
    return {name: module for name, module in model.named_modules() if id(module) not in adapters}


def class_name(module: nn.Module) -> str:
    """That of its own class, where this package has put another one in its place."""
    return next(cls.__name__ for cls in type(module).__mro__ if not cls.__module__.startswith("mace_peft."))


def attributes(module: nn.Module) -> dict[str, object]:
    """Those that are no parameters, buffers or modules, and have an effect."""
    found = {name: value for name, value in vars(module).items() if name not in WITHOUT_EFFECT
             and "hook" not in name and not name.startswith(("__", "peft_"))}
    if found.get("heads") == ["Default"]:
        del found["heads"]  # models that were saved before MACE had heads say nothing
    return found


def pieces(value: object, known: Collection[int], inside: tuple[int, ...] = ()) -> Iterator[bytes]:
    """The value as bytes; nothing for what does not count, and for modules that are known."""
    if isinstance(value, IGNORED) or id(value) in known or id(value) in inside:
        return
    inside = (*inside, id(value))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.as_tensor(value)
    if isinstance(value, torch.Tensor):
        yield rounded(value)
    elif isinstance(value, (bool, np.bool_)):
        yield str(bool(value)).encode()
    elif isinstance(value, (str, bytes)):
        yield repr(value).encode()
    elif isinstance(value, Integral):
        yield str(int(value)).encode()
    elif isinstance(value, Complex):
        yield rounded(torch.tensor(complex(value)))
    elif isinstance(value, functools.partial):
        yield from contained(enumerate((value.func, value.args, value.keywords)), known, inside)
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield from contained(enumerate(value), known, inside)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(b"".join(pieces(entry, known, inside)) for entry in value)
    elif isinstance(value, Mapping):
        yield from contained(sorted(value.items(), key=lambda item: str(item[0])), known, inside)
    elif isinstance(value, nn.Module):
        inner = {**attributes(value), **value._parameters, **value._buffers, **value._modules}
        yield from contained(sorted(inner.items()), known, inside)
    elif isinstance(value, (Namespace, SimpleNamespace)):
        yield from contained(sorted(vars(value).items()), known, inside)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from contained(((field.name, getattr(value, field.name)) for field in dataclasses.fields(value)), known,
                             inside)
    elif callable(value) or isinstance(value, enum.Enum):  # TorchScript's functions have no __name__
        yield str(getattr(value, "__name__", None) or getattr(value, "name", None) or type(value).__name__).encode()


def contained(items: Iterable[tuple[object, object]], known: Collection[int], inside: tuple[int, ...]
              ) -> Iterator[bytes]:
    for key, value in items:
        for piece in pieces(value, known, inside):
            yield f"{key}:".encode() + piece


def rounded(tensor: torch.Tensor) -> bytes:
    numbers = tensor.detach().cpu()
    numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers
    return numbers.float().contiguous().numpy().tobytes()
