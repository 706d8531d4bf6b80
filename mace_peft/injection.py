"""Put adapters into a MACE model, take them out, fold them into the weights. All in place, as MACE's own code does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from mace_peft.adapted import Adapted, GatedMessages, LowRank, Mergeable
from mace_peft.config import PeftConfig, PeftError
from mace_peft.models import (
    adapt,
    adapted_blocks,
    check_adapted,
    check_backend,
    check_model,
    check_switched_on,
    fingerprint,
    is_adapted,
    is_switched_off,
    known_originals,
    plain_class,
    settle,
    trainable_parameters,
)
from mace_peft.scaled import ScaledLowRank
from mace_peft.targets import find_parameters, find_targets


def inject(model: nn.Module, config: PeftConfig, foundation: dict | None = None) -> nn.Module:
    """Adapt the model and freeze everything but its adapters and ``config.train_also``. Returns the model.

    The adapters have the dtype and device of the blocks they adapt. ``foundation`` says what the model started from
    (``{"name", "head", "fingerprint"}``), by default the model itself. Raises PeftError where ``check`` does, and then
    leaves the model as it was.
    """
    targets = check(model, config)
    if config.rank == "auto" and config.rank_pattern is None:
        raise PeftError("--peft_rank auto has to be chosen from data first: see mace_peft.ranks.choose_ranks")
    adapt(model, targets, config, foundation or {"name": None, "fingerprint": fingerprint(model)})
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """Freeze all but what the fine-tune trains. Returns the model."""
    model.requires_grad_(False)
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """What is frozen stays so after this: gradient clipping would see the gradients of the base."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, learns in trains.items():
            parameter.requires_grad_(learns)


def check(model: nn.Module, config: PeftConfig) -> dict[str, type]:
    """The targets of the settings in this model (``find_targets``); changes nothing.

    Raises PeftError if the model has adapters already, if a placement or pattern finds nothing, or if the rank is
    above the largest that is of use to any target, or one of several to its own, or if no target is scaled by alpha.
    """
    check_model(model)
    if not isinstance(config, PeftConfig):
        raise PeftError(f"{config!r:.80} are no settings: give a PeftConfig, such as PeftConfig('mmea')")
    check_switched_on(model)
    if is_adapted(model):
        raise PeftError(f"the model has {model.peft_config.method} adapters already: eject them first")
    check_backend(model)
    targets = find_targets(model, config)
    find_parameters(model, config.train_also)
    check_rank(model, targets, config)
    updates = any(issubclass(kind, (LowRank, ScaledLowRank)) for kind in targets.values())
    if config.alpha not in (None, config.rank) and not updates:
        raise PeftError(f"--peft_alpha {config.alpha:g} has no effect on gates, and nothing else is in --peft_targets "
                        f"{config.targets}: leave it out, or use published")
    return targets


def check_rank(model: nn.Module, targets: dict[str, type], config: PeftConfig) -> None:
    if not config.has_rank:
        return
    ranked = targets if config.rank != "auto" else dict(config.rank_pattern or ())
    largest = {name: targets[name].largest_rank(model.get_submodule(name)) for name in ranked}
    if config.rank == "auto":
        for name, rank in ranked.items():
            if rank > largest[name]:
                raise PeftError(f"rank_pattern {name} {rank} is more than that module can use: the largest useful rank "
                                f"there is {largest[name]}")
        return
    widest = max(largest, key=largest.get)
    if config.rank > largest[widest]:
        if not largest[widest]:
            raise PeftError(f"--peft_rank {config.rank} has no effect on {widest}, which takes a shift and no update "
                            "of low rank: use --peft mmea --peft_gate static")
        raise PeftError(f"--peft_rank {config.rank} is more than the widest target ({widest}) can use: "
                        f"the largest useful rank here is {largest[widest]}")


def eject(model: nn.Module) -> nn.Module:
    """Take the adapters out: the base as it was, every parameter trainable. Returns the model.

    What trained along, and what ``load_adapter`` set, is as it was before. Updates that ``fold`` has put into the
    weights stay there. Raises PeftError if there is no adapter.
    """
    check_adapted(model)
    exchange(model)
    for _, block in adapted_blocks(model):
        remove_adapter(block)
    return forget(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base's predictions for a while: ``with disable_adapter(model): ...``. In there it counts as a plain model.

    Raises PeftError if there is no adapter.
    """
    if is_switched_off(model):  # by an outer one
        yield model
        return
    check_adapted(model)
    modules = [(module, type(module)) for module in (model, *dict(adapted_blocks(model)).values())]
    exchange(model)
    try:
        for module, adapted in modules:
            module.__class__ = adapted.__bases__[-1]
        yield model
    finally:
        for module, adapted in modules:
            module.__class__ = adapted
        exchange(model)


@torch.no_grad()
def exchange(model: nn.Module) -> None:
    """Swap what trained along, and E0s, scale and shift of a loaded adapter, with what they were before."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, original in dict(known_originals(model)).items():
        # no copy into the tensor, of which a backward pass that is still to come may need the version that it was
        model.peft_originals[name] = tensors[name].data
        tensors[name].data = original.to(tensors[name])


def merge(model: nn.Module) -> nn.Module:
    """Fold ELoRA's updates or static gains into the weights: a plain MACE model of the same predictions. Returns it.

    Raises PeftError if there is no adapter, or if one is a gate that atoms drive.
    """
    check_adapted(model)
    gates = [name for name, block in adapted_blocks(model) if not isinstance(block, Mergeable)]
    if gates:
        raise PeftError(f"the MMEA gate at {gates[0]} cannot be merged, for its gain depends on each atom's "
                        "environment: keep the adapted model, or use its TorchScript file where mace-peft is missing")
    return fold(model)


def fold(model: nn.Module) -> nn.Module:
    """Fold what can be folded, low-rank updates and static gains, and leave the gates. Returns the model.

    Gates that stay have a new base then, and the model's settings name them.
    """
    updates = [block for _, block in adapted_blocks(model) if isinstance(block, Mergeable)]
    for block in updates:
        block.fold()
        remove_adapter(block)
    gates = dict(adapted_blocks(model))
    if not gates:
        return forget(model)
    if updates:
        # the layer that takes messages has the gates of a convolution if that is the target
        targets = [f"{name.rpartition('.')[0]}.conv_tp" if isinstance(block, GatedMessages) else name
                   for name, block in gates.items()]
        config = dataclasses.replace(model.peft_config, targets=",".join(targets), alpha=None)  # that of the updates
        if config.rank_pattern is not None:
            ranks = {name: rank for name, rank in config.rank_pattern if name in gates}
            config = dataclasses.replace(config, rank_pattern=ranks)
        settle(model, config, None)
    return model


def remove_adapter(block: Adapted) -> None:
    del block.adapter
    block.__class__ = type(block).__bases__[-1]


def forget(model: nn.Module) -> nn.Module:
    """Drop what ``inject`` left on a model that has no adapters any more, so that it is plain MACE again."""
    del model.peft_originals, model.peft_foundation, model.peft_base
    model.__class__ = plain_class(model)
    return model.requires_grad_(True)
