"""Put adapters into a MACE model, take them out, fold them into the weights. All in place, as MACE's own code does."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from mace_peft.adapted import Adapted, LowRank
from mace_peft.config import PeftConfig, PeftError
from mace_peft.targets import find_parameters, find_targets


def inject(model: nn.Module, config: PeftConfig, foundation: dict | None = None) -> nn.Module:
    """Adapt the model and freeze everything but its adapters and ``config.train_also``. Returns the model.

    The adapters have the dtype and device of the blocks they adapt. With the model stay ``peft_config``, the settings;
    ``peft_foundation``, what it started from (``{"name", "fingerprint"}``, by default of the model itself); and
    ``peft_originals``, the parameters of ``train_also`` as they were. Raises PeftError, and leaves the model as it was,
    where ``check`` does.
    """
    targets = check(model, config)
    model.peft_foundation = foundation or {"name": None, "fingerprint": fingerprint(model)}
    model.peft_originals = {name: model.get_parameter(name).detach().clone() for name in
                            find_parameters(model, config.train_also)}
    for name, adapted in targets.items():
        block = model.get_submodule(name)
        weight = next(block.parameters())
        block.adapter = adapted.make_adapter(block, config).to(weight.device, weight.dtype)
        block.__class__ = adapted
    model.peft_config = config
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """Freeze all but what the fine-tune trains. Returns the model."""
    model.requires_grad_(False)
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's parameters by name, rounded to float32: the same for its float64 and float32 file."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check(model: nn.Module, config: PeftConfig) -> dict[str, type]:
    """The targets of the settings in this model (``find_targets``); changes nothing.

    Raises PeftError if the model has adapters already, if a placement or pattern finds nothing, or if the rank is
    above the largest that is of use to any target.
    """
    if is_adapted(model):
        raise PeftError(f"the model has {model.peft_config.method} adapters already: eject them first")
    if getattr(getattr(model, "cueq_config", None), "enabled", False):
        raise PeftError("the model is built for cuEquivariance, whose layers are not adapted yet: convert it with "
                        "mace_cueq_to_e3nn first")
    targets = find_targets(model, config)
    find_parameters(model, config.train_also)
    check_rank(model, targets, config)
    return targets


def check_rank(model: nn.Module, targets: dict[str, type], config: PeftConfig) -> None:
    largest = {name: adapted.largest_rank(model.get_submodule(name)) for name, adapted in targets.items()}
    widest = max(largest, key=largest.get)
    if config.rank > largest[widest]:
        raise PeftError(f"--peft_rank {config.rank} is more than the widest target ({widest}) can use: "
                        f"the largest useful rank here is {largest[widest]}")


def eject(model: nn.Module) -> nn.Module:
    """Take the adapters out: the base as it was, ``train_also`` included, every parameter trainable. Returns the model.

    Updates that ``fold`` has put into the weights stay there. Raises PeftError if there is no adapter.
    """
    check_adapted(model)
    exchange(model)
    for _, block in adapted_blocks(model):
        remove_adapter(block)
    return forget(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base's predictions for a while: ``with disable_adapter(model): ...``.

    Raises PeftError if there is no adapter.
    """
    check_adapted(model)
    blocks = [(block, type(block)) for _, block in adapted_blocks(model)]
    try:
        exchange(model)
        for block, adapted in blocks:
            block.__class__ = adapted.__bases__[-1]
        yield model
    finally:
        for block, adapted in blocks:
            block.__class__ = adapted
        exchange(model)


@torch.no_grad()
def exchange(model: nn.Module) -> None:
    """Swap the parameters that trained along with what they were before."""
    for name, original in model.peft_originals.items():
        parameter = model.get_parameter(name)
        trained = parameter.clone()
        parameter.copy_(original)
        original.copy_(trained)


def merge(model: nn.Module) -> nn.Module:
    """Fold ELoRA's updates into the weights: a plain MACE model with the same predictions. Returns the model.

    Raises PeftError if there is no adapter, or if one is an MMEA gate.
    """
    check_adapted(model)
    gates = [name for name, block in adapted_blocks(model) if not isinstance(block, LowRank)]
    if gates:
        raise PeftError(f"the MMEA gate at {gates[0]} cannot be merged, for its gain depends on each atom's "
                        "environment: keep the adapted model, or use its TorchScript file where mace-peft is missing")
    return fold(model)


def fold(model: nn.Module) -> nn.Module:
    """Fold what can be folded, which is every low-rank update, and leave the gates. Returns the model."""
    for _, block in adapted_blocks(model):
        if isinstance(block, LowRank):
            block.fold()
            remove_adapter(block)
    return model if any(adapted_blocks(model)) else forget(model)


def remove_adapter(block: Adapted) -> None:
    del block.adapter
    block.__class__ = type(block).__bases__[-1]


def forget(model: nn.Module) -> nn.Module:
    """Drop what ``inject`` left on a model that has no adapters any more, so that it is plain MACE again."""
    for name in ("peft_config", "peft_foundation", "peft_originals"):
        vars(model).pop(name, None)
    return model.requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def check_adapted(model: nn.Module) -> None:
    if not is_adapted(model):
        raise PeftError(f"this {type(model).__name__} has no adapters: inject(model, config) puts them in")


def adapted_blocks(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The adapted blocks by name; safe to change while looping."""
    yield from [(name, module) for name, module in model.named_modules() if isinstance(module, Adapted)]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a fine-tune trains, by name: all parameters of the adapters and those of ``train_also``.

    Derived from the model's structure, not from ``requires_grad``, which MACE switches while it evaluates. Freezing,
    counting, the optimizer, the EMA and saving all come from here. Raises PeftError if the model has no adapters.
    """
    check_adapted(model)
    names = {f"{name}.adapter.{key}" for name, block in adapted_blocks(model) for key, _ in
             block.adapter.named_parameters()}
    names.update(model.peft_originals)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}
