"""The parameter groups of the optimizer: MACE's, of what trains alone."""

from torch import nn

from mace_peft.model.adapted import trainable_parameters


def trained_groups(groups: list[dict], model: nn.Module) -> list[dict]:
    """MACE's groups (changed in place) without what is frozen, and a group for what trains and has none there."""
    left = {id(parameter): parameter for parameter in trainable_parameters(model).values()}
    for group in groups:
        group["params"] = [left.pop(id(parameter)) for parameter in group["params"] if id(parameter) in left]
    groups = [group for group in groups if group["params"]]
    if left:
        groups.append({"name": "other", "params": list(left.values()), "weight_decay": 0.0})
    return groups
