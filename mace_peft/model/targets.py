"""Which modules of a model get an adapter and which one, and which base parameters train along."""

import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from mace_peft.backbones import Backbone, backbone_of
from mace_peft.blocks.adapted import Adapted, Updated, weights_of
from mace_peft.blocks.operation import Operation, operation_of
from mace_peft.config import PeftConfig, split_patterns
from mace_peft.errors import PeftError, did_you_mean
from mace_peft.methods import Adapter, Full


class Target(NamedTuple):
    """What a module is to get: the adapter of a method, for the operation that the module is."""

    operation: Operation
    adapter: type[Adapter]

    @property
    def mixin(self) -> type[Adapted]:
        """The class that makes the module an adapted one."""
        return self.operation.gated if self.adapter.on_features else Updated

    def make(self, block: nn.Module, config: PeftConfig) -> nn.Module:
        """A new adapter for the module, in torch's default dtype: of several gates, a ModuleDict.

        Raises PeftError if the parts of the module's weights are not all of them.
        """
        settings = {name: getattr(config, name) for name in self.adapter.settings}
        if self.adapter.on_features:
            gates = {name: self.adapter(*irreps, **settings) for name, irreps in self.operation.gates(block).items()}
            return gates["output"] if len(gates) == 1 else nn.ModuleDict(gates)
        parts, sizes = self.operation.parts(block), Counter()
        for part in parts:
            sizes[part.weight] += part.rows * part.columns
        weights = weights_of(block, sizes)
        for name, weight in weights.items():
            if weight.numel() != sizes[name]:
                raise PeftError(f"the {name} of a {type(block).__name__} has {weight.numel()} numbers, and its paths "
                                f"{sizes[name]}, so that it takes no adapter: choose <targets> without it")
        made = self.adapter(parts, {name: weight.detach() for name, weight in weights.items()}, **settings)
        made.names = tuple(weights)
        return made

    def largest_rank(self, block: nn.Module) -> int:
        """The largest rank that is of use to the module; 0 where its adapter has none."""
        if self.adapter.on_features:
            return max(self.adapter.largest_rank(*irreps) for irreps in self.operation.gates(block).values())
        return self.adapter.largest_rank(self.operation.parts(block))


def find_targets(model: nn.Module, config: PeftConfig) -> dict[str, Target]:
    """``{module name: target}`` for every module that gets an adapter, in the model's own order.

    Warns where scales have no E0s beside them that could take a shift. Raises PeftError if the placement or a pattern
    finds nothing to adapt in this model.
    """
    backbone = backbone_of(model)
    operations = {name: operation_of(module, backbone.operations) for name, module in model.named_modules() if name}
    adaptable = {name: Target(operation, config.row.adapters[operation.role]) for name, operation in operations.items()
                 if operation and operation.role in config.row.adapters}

    @functools.cache  # many patterns may match a name
    def inside(name: str) -> set[str]:
        return set(outermost(name, model.get_submodule(name), adaptable))

    if config.targets in backbone.placements:
        roles = backbone.placements[config.targets]
        wanted = [name for name, operation in operations.items() if operation and operation.role in roles]
        found = set().union(*map(inside, wanted))
        found_roles = {adaptable[name].operation.role for name in found}
        if not found_roles - {"energies"}:
            needed = sorted({cls.__name__ for cls, operation in backbone.operations.items()
                             if operation.role in roles - {"energies"}})
            raise PeftError(f"<targets> {config.targets!r} needs {', '.join(needed)}, and {type(model).__name__} has "
                            f"none that {config.method} adapts: use another placement or glob patterns")
        if "energies" in config.row.adapters and "energies" not in found_roles:
            warnings.warn(f"{config.method} change the total energy, and {type(model).__name__} has no atomic energies "
                          "that could take a shift back", stacklevel=2)
    else:
        found = set()
        for pattern in split_patterns(config.targets):
            matched = set().union(*(inside(name) for name in operations if fnmatchcase(name, pattern)))
            if not matched:
                raise PeftError(no_match(model, pattern, config, backbone, list(adaptable)))
            found |= matched
    targets = gate_where_received(model, {name: adaptable[name] for name in found}, backbone)
    targets |= {name: Target(operations[name], Full) for name in trained_E0s(model, config) if name not in targets}
    targets = {name: targets[name] for name in operations if name in targets}
    return targets if config.rank_pattern is None else with_chosen_ranks(targets, config)


def trained_E0s(model: nn.Module, config: PeftConfig) -> set[str]:
    """The blocks of E0s whose E0s ``train_also`` names: they take a shift."""
    return {block for name, block in blocks_of_E0s(model).items()
            if any(fnmatchcase(name, pattern) for pattern in split_patterns(config.train_also))}


def blocks_of_E0s(model: nn.Module) -> dict[str, str]:
    """The block that has them by the name of the tensor of E0s: a buffer of MACE, a parameter of SevenNet."""
    operations = backbone_of(model).operations
    blocks = [(name, module, operation_of(module, operations)) for name, module in model.named_modules() if name]
    return {f"{name}.{part.weight}": name for name, module, operation in blocks
            if operation and operation.role == "energies" for part in operation.parts(module)}


def with_chosen_ranks(targets: dict[str, Target], config: PeftConfig) -> dict[str, Target]:
    """The targets that have a rank, and of the others what needs none."""
    ranks = dict(config.rank_pattern)
    unknown = sorted(ranks.keys() - targets.keys())
    if unknown:
        raise PeftError(f"a rank was chosen for {unknown[0]}, which is no target in this model: choose the ranks anew")
    chosen = {}
    for name, target in targets.items():
        ranked = name in ranks or "rank" not in target.adapter.settings
        adapter = target.adapter if ranked else target.adapter.without_rank
        if adapter is not None:
            chosen[name] = target._replace(adapter=adapter)
    return chosen


def gate_where_received(model: nn.Module, targets: dict[str, Target], backbone: Backbone) -> dict[str, Target]:
    """Where a convolution is to be gated, its gate goes to the linear layer that takes the messages."""
    receivers = backbone.receivers(model)
    for name in [name for name, target in targets.items() if target.operation.role == "convolution"]:
        if name not in receivers:
            raise PeftError(f"gates go to the linear layer that takes the messages of a convolution, and of {name} in "
                            f"this {type(model).__name__} it is not known: choose <targets> without it")
        targets[receivers[name]] = targets.pop(name)
    return targets


def outermost(name: str, module: nn.Module, adaptable: dict[str, Target]) -> Iterator[str]:
    """The module's name, if it is adaptable and has weights, or those of the outermost such modules inside it."""
    target = adaptable.get(name)
    weights_elsewhere = target is not None and (  # those of messages come from the radial MLP; E0s are a buffer
        target.operation.role == "energies" or getattr(module, "weight_numel", 0) > 0)
    if not any(parameter.numel() for parameter in module.parameters()) and not weights_elsewhere:
        return  # such as a linear layer between irreps that have none in common: it gives zeros
    if target is not None:
        yield name
    else:
        for child, submodule in module.named_children():
            yield from outermost(f"{name}.{child}", submodule, adaptable)


def no_match(model: nn.Module, pattern: str, config: PeftConfig, backbone: Backbone, adaptable: list[str]) -> str:
    if pattern in backbone.placements:
        return f"<targets> {config.targets!r:.200} mixes the placement {pattern} with patterns: give it alone"
    names = list(dict.fromkeys(unit(model, name) for name in adaptable))
    hint = did_you_mean(pattern, [*backbone.placements, *names])
    return (f"<targets> {pattern!r:.200} matches no module that {config.method} can adapt{hint}: use "
            f"{', '.join(backbone.placements)}, or glob patterns over module names such as {backbone.pattern!r}; "
            f"this model has {', '.join(names)}")


def unit(model: nn.Module, name: str) -> str:
    """The name under which a user knows a module: a layer belongs to its radial MLP, a contraction to its set."""
    operations, parts = backbone_of(model).operations, name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        operation = operation_of(model.get_submodule(prefix), operations)
        if operation is not None and operation.parts is None and operation.gates is None:
            return prefix
    return name


def find_parameters(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the base parameters that train: those that ``train_also`` names, or of ``full`` all.

    They are without E0s, see ``trained_E0s``. Raises PeftError for a pattern that matches none, or names what trains
    without it.
    """
    wanted, E0s = split_patterns(config.train_also), blocks_of_E0s(model)
    others = {*E0s, *backbone_of(model).untrained}
    # those that hold something: in some models mace-torch 0.3.15 makes parameters of biases of no elements
    names = [name for name, parameter in model.named_parameters() if parameter.numel() and name not in others]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in (*names, *E0s)):
            raise PeftError(f"<train_also> {pattern!r:.200} matches no parameter of the model"
                            f"{did_you_mean(pattern, [*names, *E0s])}: use glob patterns such as 'readouts.*'")
        if config.row.trains_base and not any(fnmatchcase(name, pattern) for name in E0s):
            raise PeftError(f"<train_also> {pattern!r:.200} has no effect on {config.method}, which trains every "
                            "parameter: leave it out")
    if config.row.trains_base:
        return names
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
