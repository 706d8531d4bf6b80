"""Which modules of a model get an adapter, and which base parameters train along."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import mace  # noqa: F401  before e3nn, see mace_peft.methods
from e3nn import o3
from mace.modules.blocks import AtomicEnergiesBlock, EquivariantProductBasisBlock, InteractionBlock
from torch import nn

from mace_peft.adapted import COMPOSITES, GATED, GATED_PRODUCTS, LOW_RANK, GatedMessages
from mace_peft.config import PLACEMENTS, PeftConfig, PeftError, describe_targets, did_you_mean, split_patterns
from mace_peft.scaled import SCALED, SCALED_LOW_RANK

# The classes that a placement means. A module that has no adapter of its own in the method passes the placement on
# to what it is made of: ELoRA at a product block updates the block's linear layer and contractions.
PLACEMENT_CLASSES = {
    "products": (EquivariantProductBasisBlock,),
    "linears": (o3.Linear,),
    "published": (o3.Linear, o3.FullyConnectedTensorProduct, *COMPOSITES),
    "all": (o3.Linear, o3.TensorProduct, *COMPOSITES),
}


def adaptable(config: PeftConfig) -> dict[type, type]:
    """What the method makes of a block. MMEA updates by low rank what it does not gate: in the published runs that is
    everything but linear layers; ``all`` has gates alone.
    """
    if config.gate == "static":
        return SCALED if config.method == "mmea" else SCALED_LOW_RANK
    if config.method == "elora":
        return LOW_RANK
    if config.targets == "all":
        return {o3.Linear: GATED[o3.Linear], **GATED_PRODUCTS}
    return {**LOW_RANK, **GATED} if config.targets in PLACEMENTS else {**LOW_RANK, **GATED, **GATED_PRODUCTS}


def find_targets(model: nn.Module, config: PeftConfig) -> dict[str, type]:
    """``{module name: adapted class}`` for every module that gets an adapter, in the model's own order.

    Raises PeftError if the placement or a pattern finds nothing to adapt in this model.
    """
    adapted = adaptable(config)
    modules = {name: module for name, module in model.named_modules() if name}
    if config.targets in PLACEMENTS:
        classes = PLACEMENT_CLASSES[config.targets]
        wanted = [name for name, module in modules.items() if isinstance(module, classes)]
        found = adaptable_inside(model, adapted, wanted)
        if not found:
            names = ", ".join(sorted({cls.__name__ for cls in classes}))
            raise PeftError(f"--peft_targets {config.targets!r} needs {names}, and {type(model).__name__} has none: "
                            "use another placement or glob patterns over the names of its modules")
        if config.gate == "static":  # gains move the total energy, and only the E0s can move it back
            found |= {name for name, module in modules.items() if type(module) is AtomicEnergiesBlock}
    else:
        found = set()
        for pattern in split_patterns(config.targets):
            wanted = [name for name in modules if fnmatchcase(name, pattern)]
            matched = adaptable_inside(model, adapted, wanted)
            if not matched:
                raise PeftError(no_match(model, pattern, config))
            found |= matched
    found = gate_where_received(model, {name: adapted[type(modules[name])] for name in modules if name in found})
    if config.rank_pattern is None:
        return found
    ranks = dict(config.rank_pattern)
    unknown = sorted(ranks.keys() - found)
    if unknown:
        raise PeftError(f"a rank was chosen for {unknown[0]}, which is no target in this model: choose the ranks anew")
    # what has no rank has static gains, or nothing
    unranked = SCALED if config.gate == "static" else {}
    kinds = {name: kind if name in ranks else unranked.get(type(modules[name])) for name, kind in found.items()}
    return {name: kind for name, kind in kinds.items() if kind}


def gate_where_received(model: nn.Module, found: dict[str, type]) -> dict[str, type]:
    """Where a convolution is to be gated, its gate goes to the linear layer that takes the messages."""
    takers = {f"{name}.conv_tp": f"{name}.linear" if hasattr(block, "linear") else f"{name}.linear_1"
              for name, block in model.named_modules() if isinstance(block, InteractionBlock)}
    gated = {takers.get(name) for name, kind in found.items() if kind is GatedMessages}
    if None in gated:
        raise PeftError("--peft mmea can gate the convolution of an interaction alone, and "
                        f"{type(model).__name__} has another one: choose --peft_targets without it")
    found = {name: kind for name, kind in found.items() if kind is not GatedMessages}
    found |= dict.fromkeys(gated, GatedMessages)
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def adaptable_inside(model: nn.Module, adapted: dict[type, type], wanted: list[str]) -> set[str]:
    """Names of the adaptable modules with weights that are wanted, or outermost inside a wanted module."""
    return {found for name in wanted for found in outermost(name, model.get_submodule(name), adapted)}


def outermost(name: str, module: nn.Module, adapted: dict[type, type]) -> Iterator[str]:
    if not any(parameter.numel() for parameter in module.parameters()) and not has_other_weights(module):
        return  # such as a linear layer between irreps that have none in common: it gives zeros
    if type(module) in adapted:
        yield name
    else:
        for child, submodule in module.named_children():
            yield from outermost(f"{name}.{child}", submodule, adapted)


def has_other_weights(module: nn.Module) -> bool:
    """Whether it has weights that are no parameters: those of messages come from the radial MLP; E0s are a buffer."""
    return isinstance(module, AtomicEnergiesBlock) or (isinstance(module, o3.TensorProduct) and module.weight_numel > 0)


def no_match(model: nn.Module, pattern: str, config: PeftConfig) -> str:
    adapted = adaptable(config)
    if pattern in PLACEMENTS:
        return f"--peft_targets {config.targets!r} mixes the placement {pattern} with patterns: give it alone"
    found = [name for name, module in model.named_modules() if type(module) in adapted]
    names = list(dict.fromkeys(unit(model, name) for name in found))
    cause = f"--peft_targets {pattern!r} matches no module that {config.method} can adapt"
    hint = did_you_mean(pattern, [*PLACEMENTS, *names])
    return f"{cause}{hint}: {describe_targets()}; this model has {', '.join(names)}"


def unit(model: nn.Module, name: str) -> str:
    """The name under which a user knows a module: a layer belongs to its radial MLP, a contraction to its set."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if isinstance(model.get_submodule(prefix), COMPOSITES):
            return prefix
    return name


def find_parameters(model: nn.Module, patterns: str | None) -> list[str]:
    """Names of the base parameters that ``--peft_train_also`` names.

    Raises PeftError for a pattern that matches none.
    """
    # those that hold something: in some models mace-torch 0.3.15 makes parameters of biases of no elements
    names = [name for name, parameter in model.named_parameters() if parameter.numel()]
    found: set[str] = set()
    for pattern in split_patterns(patterns):
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise PeftError(f"--peft_train_also {pattern!r} matches no parameter of the model"
                            f"{did_you_mean(pattern, names)}: use glob patterns such as 'readouts.*'")
        found |= matched
    return [name for name in names if name in found]
