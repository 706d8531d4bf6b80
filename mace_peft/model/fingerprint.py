"""The digest by which an adapter knows its foundation: of all that a prediction depends on, and of nothing else."""

import dataclasses
import enum
import functools
import hashlib
from argparse import Namespace
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Complex, Integral
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mace_peft.blocks.adapted import Adapted
from mace_peft.errors import PeftError, one_line

# what a prediction does not depend on, though a model has it: what this package adds, apart
WITHOUT_EFFECT = {*vars(nn.Module()), "lammps_mliap", "_prof_str", "_profiling_str"} | {
    # of SevenNet: in which form data come, what is put out, and what the reader of old checkpoints drops
    "is_batch_data", "_is_batch_data", "eval_type_map", "eval_modal_map", "use_atomic_virial",
    "_instructions_before_sort"}
COMPILED = (torch.jit.ScriptModule, torch.fx.GraphModule)  # the code of a module, whose attributes say what it is
IGNORED = (type(None), torch.dtype, torch.device)
NUMBERS = {"b": bool, "i": np.int64, "u": np.int64, "f": np.float64, "c": np.complex128}  # by the kind of an array


def digest(model: nn.Module, originals: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the parameters, buffers, classes and attributes of all modules, by name, without any adapter.

    ``originals`` take the places of tensors of the model. Attributes are numbers, texts, arrays, functions and classes
    (by their names), and containers, dataclasses and namespaces of these; no other object counts. The order of modules
    in a module does, for a Sequential calls them in it.

    It is the same on every device, in every process, and for a model's float64 and float32 file: floating point numbers
    are rounded to float32. What is None or empty does not count: releases of torch and MACE add such attributes.

    Raises PeftError for a tensor or attribute whose values cannot be read.
    """
    found = hashlib.sha256()
    modules = without_adapters(model)
    known = {id(module) for module in modules.values()}
    tensors = (*model.named_parameters(), *model.named_buffers())
    before = {id(tensor): originals[name] for name, tensor in tensors if name in originals}

    for name, module in sorted(modules.items()):
        held = {**module._parameters, **module._buffers}
        if isinstance(module, COMPILED):  # torch.fx keeps constants of the code as buffers in copies alone
            held = {key: value for key, value in held.items() if not key.startswith("_tensor_constant")}
        else:
            held |= attributes(module)
            inside = [key for key, child in module._modules.items()
                      if id(child) in known and not isinstance(child, COMPILED)]
            found.update(f"\n{name}: {class_name(module)} {' '.join(inside)}".encode())
        for key, value in sorted(held.items()):
            try:
                for piece in pieces(before.get(id(value), value), known):
                    found.update(f"\n{name}.{key}=".encode() + piece)
            except Exception as error:  # such as numbers that are on no device
                place = f"{name}.{key}".lstrip(".")
                raise PeftError(f"{place} of the {type(model).__name__} cannot be read for its fingerprint "
                                f"({one_line(error)}): make it a plain tensor, number, text or list") from None
    return found.hexdigest()


def without_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, by each of them where a module has several places."""
    adapters = {id(inner) for module in model.modules() if isinstance(module, Adapted) for inner in
                module.adapter.modules()}
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if id(module) not in adapters}


def class_name(module: nn.Module) -> str:
    """That of its own class, where this package has put another one in its place."""
    return next(cls.__name__ for cls in type(module).__mro__ if not cls.__module__.startswith("mace_peft."))


def attributes(module: nn.Module) -> dict[str, object]:
    """Those that are no parameters, buffers or modules, and have an effect."""
    found = {name: value for name, value in vars(module).items() if name not in WITHOUT_EFFECT
             and not name.startswith(("__", "peft_"))}
    if found.get("heads") == ["Default"]:
        del found["heads"]  # models that were saved before MACE had heads say nothing
    return found


def pieces(value: object, known: Collection[int], inside: tuple[int, ...] = ()) -> Iterator[bytes]:
    """The value as bytes; nothing for what does not count, and for modules that are known."""
    if isinstance(value, IGNORED) or id(value) in known or id(value) in inside:
        return
    inside = (*inside, id(value))
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        value = torch.as_tensor(np.array(value, NUMBERS[value.dtype.kind], order="C"))
    elif isinstance(value, (np.ndarray, np.generic)):  # of texts and other objects, with or without a dimension
        value = value.tolist()
    if isinstance(value, torch.Tensor):
        yield rounded(value)
    elif isinstance(value, bool):
        yield str(value).encode()
    elif isinstance(value, (str, bytes)):
        yield repr(value).encode()
    elif isinstance(value, Integral):
        yield str(int(value)).encode()
    elif isinstance(value, Complex):
        yield rounded(torch.tensor(complex(value)))
    elif isinstance(value, functools.partial):
        yield from contained(enumerate((value.func, value.args, value.keywords)), known, inside)
    elif isinstance(value, (list, tuple, deque)):
        yield from contained(enumerate(value), known, inside)
    elif isinstance(value, (slice, range)):
        yield from contained(enumerate((value.start, value.stop, value.step)), known, inside)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(b"".join(pieces(entry, known, inside)) for entry in value)
    elif isinstance(value, Mapping):
        yield from contained(sorted(value.items(), key=lambda item: str(item[0])), known, inside)
    elif isinstance(value, nn.Module):
        inner = {**attributes(value), **value._parameters, **value._buffers}
        yield from contained([*sorted(inner.items()), *value._modules.items()], known, inside)
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
    """The numbers of the tensor in float32; whole ones as they are."""
    numbers = tensor.detach().cpu()
    numbers = numbers if numbers.layout is torch.strided else numbers.to_dense()
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers.resolve_conj())
    numbers = numbers.float() if numbers.is_floating_point() else numbers.long()
    return numbers.resolve_neg().contiguous().numpy().tobytes()
