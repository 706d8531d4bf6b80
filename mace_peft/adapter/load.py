"""Foundation file + adapter directory = the trained model."""

import contextlib
import copy
import os
from collections.abc import Iterator

import torch
from torch import nn

from mace_peft.adapter.directory import read_adapter
from mace_peft.backbones import backbone_of, load_foundation
from mace_peft.errors import PeftError, one_line
from mace_peft.model.adapted import check_switched_on, fingerprint, is_adapted, origin, settle, trainable_parameters
from mace_peft.model.inject import inject, take_adapters_out
from mace_peft.model.retired import retire
from mace_peft.model.strength import check_strength, set_strength

HOOKS = {name for name in vars(nn.Module()) if "hook" in name}


def load_adapter(foundation: nn.Module | str | os.PathLike, directory: str | os.PathLike, strength: float | None = None
                 ) -> nn.Module:
    """Make the foundation the trained model, in place: all but its adapters is frozen then. Returns it.

    strength: see ``set_strength``; by default that with which the adapter was saved, which is 1 after a run.

    Of a MACE model or a SevenNet, its file or a name that MACE or sevenn knows will do, which is loaded on the CPU in
    its own dtype.
    The foundation may have another dtype or device than in training. It takes the elements and heads that the adapter
    was trained for, as ``mace_run_train`` narrowed them: load another adapter, of other elements, onto the foundation's
    file. What has an adapter already swaps it for this one. An optimizer or a moving average that holds the parameters
    of the one before goes on with this one if all shapes are the same; else it raises PeftError when it uses them next.
    No code from the directory runs.

    Raises PeftError, and leaves the model as it was, if the directory holds no complete adapter, or one that was
    trained from another foundation, if the foundation is no model or cannot be loaded, and for a strength that is none.
    """
    if strength is not None:
        check_strength(strength)
    named = isinstance(foundation, (str, os.PathLike))
    if not named:
        backbone_of(foundation)  # raises for what is no model
        check_switched_on(foundation)
    config, description, tensors = read_adapter(directory)
    if named:
        foundation = load_foundation(os.fspath(foundation), description["backbone"])
    backbone = backbone_of(foundation)
    source = description["foundation"]
    held = origin(foundation)["fingerprint"] if is_adapted(foundation) else fingerprint(foundation)
    if held != source["fingerprint"]:
        name = f" ({source['name']!r})" if source["name"] else ""  # in Python, a foundation may have none
        raise PeftError(f"{directory} was trained from a foundation{name} whose weights differ from the one given, or "
                        "what else its predictions depend on, such as E0s, cutoff or elements "
                        f"(fingerprints {source['fingerprint'][:12]!r} and {held[:12]!r}): give that one")
    known = {"backbone": backbone.name, "model_class": backbone.describe(foundation)["model_class"]}
    for field, value in known.items():
        if description[field] != value:
            raise PeftError(f"{directory} was trained with the {field} {description[field]!r:.200}, and the foundation "
                            f"has {value!r}: give that of the training, or save the adapter again")
    learnt = trainable_parameters(foundation) if is_adapted(foundation) else {}
    folded = is_adapted(foundation) and foundation.peft_folded  # so that its base is no model without the gates
    try:
        with left_alone_on_error(foundation):
            model = base_for(foundation, description)
            inject(model, config, source)
            if folded:
                settle(model, config, source, folded)
            fill(model, tensors, complete=True)
            set_energies(model, description)
            model.peft_gains = description["gains"]
            set_strength(model, description.get("strength", 1.0) if strength is None else strength)
            become(foundation, model)
            keep_parameters(foundation, learnt)
    except PeftError as error:
        raise PeftError(f"the adapter in {directory} does not fit: {error.args[0]}") from None
    except Exception as error:  # elements, heads and numbers that do not go together fail in many ways
        raise PeftError(f"the adapter in {directory} does not fit its foundation ({one_line(error)}): save or copy it "
                        "again") from None  # whose texts may be the directory's
    retire(learnt.values(), foundation)
    return foundation


def become(model: nn.Module, other: nn.Module) -> None:
    """Make the model the other one, which nobody else has. What users have given it stays: hooks, and attributes."""
    if other is not model:
        other.train(model.training)
        model.__class__ = type(other)
        vars(model).update({name: value for name, value in vars(other).items() if name not in HOOKS})


def keep_parameters(model: nn.Module, learnt: dict[str, nn.Parameter]) -> None:
    """Let those of the adapter before be those of this one, for who holds them, if all shapes are the same."""
    new = trainable_parameters(model)
    if {name: parameter.shape for name, parameter in learnt.items()} != {name: p.shape for name, p in new.items()}:
        return
    for name, parameter in learnt.items():
        owner, _, key = name.rpartition(".")
        parameter.data, parameter.grad = new[name].data, None
        model.get_submodule(owner)._parameters[key] = parameter.requires_grad_(True)


@contextlib.contextmanager
def left_alone_on_error(model: nn.Module) -> Iterator[None]:
    """Give the model its modules, classes, tensors and gradients back if the block fails."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    held = [(module, type(module), {**vars(module), "_modules": dict(module._modules)}) for module in modules]
    tensors = [(tensor, tensor.data, tensor.detach().clone(), tensor.grad, tensor.requires_grad)
               for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        for module, cls, attributes in held:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for tensor, data, value, gradient, learns in tensors:
            if not torch.equal(data, value):
                data.copy_(value)
            tensor.data = data  # other processes may share its memory
            tensor.requires_grad_(learns)
            tensor.grad = gradient
        raise


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], complete: bool = False) -> None:
    """Give the adapted model these trained tensors by name.

    Raises PeftError, and changes nothing, for a tensor that finds no place or one of another shape, for numbers that
    are not finite in the dtype of the model, and with ``complete`` for a place that finds no tensor.
    """
    trainable = trainable_parameters(model)
    odd = [name for name, tensor in tensors.items() if name not in trainable or trainable[name].shape != tensor.shape]
    odd += [name for name in trainable if complete and name not in tensors]
    if odd:
        more = f" and {len(odd) - 3} more" if odd[3:] else ""
        named = ", ".join(f"{name!r:.200}" for name in odd[:3])
        raise PeftError(f"{named}{more} are missing, unknown or of another shape: use the adapter with the settings, "
                        "elements and heads it was trained for")
    values = {name: tensor.to(trainable[name]) for name, tensor in tensors.items()}
    check_finite(values)
    with torch.no_grad():
        for name, value in values.items():
            trainable[name].copy_(value)


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise PeftError for a tensor of NaN or infinity, which numbers become that are too large for a dtype."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PeftError(f"{name!r:.200} holds what is no number in {str(tensor.dtype).removeprefix('torch.')}: "
                            "train again with a lower --lr, or use the dtype of the training")


def base_for(foundation: nn.Module, description: dict) -> nn.Module:
    """The foundation with the elements and heads of the description: itself where these are its own.

    Raises PeftError where an adapted foundation cannot become that.
    """
    backbone = backbone_of(foundation)
    if not is_adapted(foundation):
        narrowed = backbone.is_narrowed(foundation, description)
        return foundation if narrowed else backbone.narrow(foundation, description)
    head = description["foundation"].get("head")
    narrowed = backbone.is_narrowed(foundation, {**description, "foundation": {}})
    several = len(getattr(foundation, "heads", ())) > 1
    if origin(foundation).get("head") != head or (not narrowed and several):
        raise PeftError("the adapter was trained for other heads than the one that it would replace: load it onto "
                        "the foundation")
    if narrowed:
        return take_adapters_out(foundation)
    if set(description["elements"]) - set(backbone.describe(foundation)["elements"]):
        raise PeftError("it was trained for elements that the model has no longer, for it took those of another "
                        "adapter: load it onto the foundation's file")
    return backbone.narrow(take_adapters_out(copy.deepcopy(foundation)), description)


def set_energies(model: nn.Module, values: dict) -> None:
    """Give the adapted model these E0s, scale and shift, while it has its adapters; all or, on an error, none.

    Raises PeftError for numbers that are not finite in the dtype of the model.
    """
    constants = backbone_of(model).constants(model)
    tensors = {field: torch.as_tensor(values[field], dtype=torch.float64).reshape(buffer.shape).to(buffer)
               for field, (_, buffer) in constants.items()}
    check_finite(tensors)
    for field, (name, buffer) in constants.items():
        model.peft_originals[name] = buffer.clone()
        buffer.copy_(tensors[field])
