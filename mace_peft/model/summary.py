"""What trains, as text: the table of adapted modules that a run logs, and one line."""

from collections.abc import Iterable

from prettytable import PrettyTable
from torch import nn

from mace_peft.blocks.adapted import adapted_blocks, adapters_of
from mace_peft.model.adapted import trainable_parameters
from mace_peft.model.targets import unit


def summary(model: nn.Module) -> str:
    """Adapted modules with what trains in each, how many parameters that is, and its share of the base's.

    A radial MLP and a set of symmetric contractions have one row each; what trains along has one for each parameter, or
    for each module where all of the base trains. Raises PeftError if there is no adapter.
    """
    trainable = trainable_parameters(model)
    blocks = adapted_blocks(model)
    rows: dict[tuple[str, str], int] = {}
    for name, block in blocks.items():
        adapters = list(adapters_of(block).values())
        row = (unit(model, name), adapters[0].kind + "s" * (len(adapters) > 1))
        rows[row] = rows.get(row, 0) + count(block.adapter.parameters())
    whole = model.peft_config.row.trains_base
    for name, parameter in trainable.items():
        if name in model.peft_originals:
            row = (unit(model, name.rpartition(".")[0]) if whole else name, "itself")
            rows[row] = rows.get(row, 0) + parameter.numel()
    base = size_of_base(model)
    table = PrettyTable(["module", "what trains", "parameters", "% of base"], align="r")
    table.align["module"] = table.align["what trains"] = "l"
    for (name, kind), number in rows.items():
        table.add_row([name, kind, f"{number:,}", f"{100 * number / base:.2f}"])
    total = count(trainable.values())
    return f"{table}\nTrainable: {total:,} parameters, {100 * total / base:.1f} % of the base's {base:,}"


def size_of_base(model: nn.Module) -> int:
    """How many parameters the model has without its adapters."""
    return count(model.parameters()) - sum(count(block.adapter.parameters())
                                           for block in adapted_blocks(model).values())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, how many the model has, adapters included, and the share in percent.

    Raises PeftError if there is no adapter.
    """
    trainable, total = count(trainable_parameters(model).values()), count(model.parameters())
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
