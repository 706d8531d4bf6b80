"""Put adapters into a model, take them out, fold them into the weights. All in place, as MACE's own code does."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from mace_peft.backbones import backbone_of
from mace_peft.blocks.adapted import Updated, adapted_blocks, adapters_of, plain, take_out
from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError
from mace_peft.model import isolated
from mace_peft.model.adapted import (
    COMPILE_MODE,
    add_adapters,
    base_of,
    check_adapted,
    check_switched_on,
    fingerprint,
    is_adapted,
    known_originals,
    of_isolated_atoms,
    settle,
    trainable_parameters,
)
from mace_peft.model.retired import retire
from mace_peft.model.targets import Target, find_parameters, find_targets


def inject(model: nn.Module, config: PeftConfig, foundation: dict | None = None) -> nn.Module:
    """Adapt the model and freeze everything but its adapters and ``config.train_also``. Returns the model.

    With ``full`` there are no adapters, and every parameter trains: the model keeps what they were before.

    The adapters have the dtype and device of the blocks they adapt. ``foundation`` says what the model started from
    (``{"name", "head", "fingerprint"}``), by default the model itself. Raises PeftError where ``check`` does, and then
    leaves the model as it was.
    """
    targets = check(model, config)
    if config.rank == "auto" and config.rank_pattern is None:
        raise PeftError("<rank> auto has to be chosen from data first: call choose_ranks(model, config, structures) "
                        "with labelled ase.Atoms, and inject the settings that it returns")
    foundation = foundation or {"name": None, "fingerprint": fingerprint(model)}
    originals = {name: model.get_parameter(name).detach().clone() for name in
                 find_parameters(model, config)}
    add_adapters(model, targets, config)
    model.peft_originals, model.peft_gains, model.peft_full = originals, None, {}
    settle(model, config, foundation)
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """Freeze all but what the fine-tune trains. Returns the model.

    An optimizer that was made before has no gradients left to move the base by.
    """
    learns = {id(parameter) for parameter in trainable_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learns)
        if id(parameter) not in learns:
            parameter.grad = None
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


def check(model: nn.Module, config: PeftConfig) -> dict[str, Target]:
    """The targets of the settings in this model (``find_targets``); changes nothing.

    Raises PeftError if no backbone knows the model, if it or a part of it has adapters already, if a placement or
    pattern finds nothing, if a rank is above the largest that is of use, or if no target is scaled by alpha.
    """
    backbone = backbone_of(model)
    if not isinstance(config, PeftConfig):
        raise PeftError(f"{config!r:.80} are no settings: give a PeftConfig, such as PeftConfig('mmea')")
    check_switched_on(model)
    if is_adapted(model):
        raise PeftError(f"the model has {model.peft_config.method} adapters already: eject them first")
    for name in adapted_blocks(model):
        raise PeftError(f"{name} has an adapter already, of an adapted model inside of this one: eject that first")
    backbone.check_new(model)
    targets = find_targets(model, config)
    find_parameters(model, config)
    if config.has_rank:
        check_rank(model, targets, config)
    if config.alpha not in (None, config.rank) and not any("alpha" in t.adapter.settings for t in targets.values()):
        raise PeftError(f"<alpha> {config.alpha:g} has no effect on gates, and nothing else is in <targets> "
                        f"{config.targets}: leave it out, or use published")
    return targets


def check_rank(model: nn.Module, targets: dict[str, Target], config: PeftConfig) -> None:
    largest = {name: target.largest_rank(model.get_submodule(name)) for name, target in targets.items()}
    if config.rank == "auto":
        for name, rank in config.rank_pattern or ():
            if rank > largest[name]:
                raise PeftError(f"rank_pattern {name} {rank} is more than that module can use: the largest useful rank "
                                f"there is {largest[name]}")
        return
    widest = max(largest, key=largest.get)
    if config.rank > largest[widest]:
        if not largest[widest]:
            raise PeftError(f"<rank> {config.rank} has no effect on {widest}, which takes a shift and no update of low "
                            "rank: use <method> scales")
        raise PeftError(f"<rank> {config.rank} is more than the widest target ({widest}) can use: the largest useful "
                        f"rank here is {largest[widest]}")


def eject(model: nn.Module) -> nn.Module:
    """Take the adapters out: the base as it was, every parameter trainable. Returns the model.

    What trained along, and what ``load_adapter`` set, is as it was before. Updates that ``fold`` has put into the
    weights stay there. An optimizer or a moving average that holds parameters of the adapters raises PeftError when it
    uses them next. Raises PeftError if there is no adapter.
    """
    check_adapted(model)
    learnt = trainable_parameters(model)
    take_adapters_out(model)
    retire(learnt.values(), model)
    return model


@torch.no_grad()
def take_adapters_out(model: nn.Module) -> nn.Module:
    """``eject``, but an optimizer may go on with the parameters. Returns the model."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, original in known_originals(model).items():
        # no copy into the tensor, of which a backward pass that is still to come may need the version that it was
        tensors[name].data = original.to(tensors[name], copy=True)
    for block in adapted_blocks(model).values():
        take_out(block)
    return forget(model)


def merge(model: nn.Module) -> nn.Module:
    """Fold low-rank updates and scales into the weights: a plain model of the same predictions. Returns it.

    An optimizer or a moving average that holds parameters of the adapters raises PeftError when it uses them next.
    Raises PeftError if there is no adapter, if one is a gate that atoms drive, and for weights of NaN or infinity.
    """
    check_adapted(model)
    gates = [name for name, block in adapted_blocks(model).items() if not isinstance(block, Updated)]
    if gates:
        raise PeftError(f"the MMEA gate at {gates[0]} cannot be merged, for its gain depends on each atom's "
                        "environment: keep the adapted model, or use its TorchScript file where mace-peft is missing")
    return fold(model)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold what can be folded, low-rank updates and scales, and leave the gates. Returns the model.

    Gates that stay have a new base then, and the model's settings name them. Raises PeftError, and changes nothing, for
    weights that are not finite.
    """
    learnt = trainable_parameters(model)
    updated = {name: block for name, block in adapted_blocks(model).items() if isinstance(block, Updated)}
    for name, block in updated.items():
        if not all(torch.isfinite(weight).all() for weight in block.adapted_weights().values()):
            raise PeftError(f"the adapter of {name} makes weights of NaN or infinity, so that it is not folded into "
                            "them: train again with a lower --lr")
    of_base = of_isolated_atoms(model)
    for block in updated.values():
        block.fold()
        take_out(block)
    retire(learnt.values(), model)
    gates = adapted_blocks(model)
    if of_base is not None and (updated or not gates):  # by gates that stay, isolated atoms are put right anew
        model.get_buffer(isolated.E0S).sub_(isolated.drift(base_of(model) if gates else model, of_base))
    if not gates:
        return forget(model)
    if updated:
        convolutions = {receiver: name for name, receiver in backbone_of(model).receivers(model).items()}
        # the layer that takes messages has the gates of a convolution if that is the target
        targets = [convolutions[name] if "messages" in adapters_of(block) else name for name, block in gates.items()]
        along = ",".join(name for name, _ in model.named_parameters() if name in model.peft_originals)  # without E0s
        config = dataclasses.replace(model.peft_config, targets=",".join(targets), alpha=None,  # that of the updates
                                     train_also=along or None)
        if config.rank_pattern is not None:
            ranks = {name: rank for name, rank in config.rank_pattern if name in gates}
            config = dataclasses.replace(config, rank_pattern=ranks)
        settle(model, config, None, folded=True)
        if of_base is None:  # of which updates change nothing
            model.peft_isolated = None
        of_isolated_atoms(model)  # for e3nn's compile
    return model


@torch.no_grad()
def settle_isolated_atoms(model: nn.Module) -> nn.Module:
    """Put the energies of isolated atoms right by the E0s, for a model that does not train any more. Returns it."""
    if is_adapted(model) and of_isolated_atoms(model) is not None:
        E0s = model.get_buffer(isolated.E0S)
        model.peft_full.setdefault(isolated.E0S, E0s.clone())
        E0s.sub_(isolated.drift(model, of_isolated_atoms(model)))
        model.peft_isolated = None
        vars(model).pop(COMPILE_MODE, None)
    return model


def forget(model: nn.Module) -> nn.Module:
    """Drop what ``inject`` left on a model that has no adapters any more, so that it is a plain one again."""
    del model.peft_originals, model.peft_foundation, model.peft_base, model.peft_isolated, model.peft_gains
    del model.peft_full
    vars(model).pop(COMPILE_MODE, None)
    model.__class__ = plain(model)
    return model.requires_grad_(True)
