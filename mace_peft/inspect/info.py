"""What ``mace_peft info`` says of an adapter directory or a model."""

from pathlib import Path

from prettytable import PrettyTable

from mace_peft.adapter.description import describe
from mace_peft.adapter.directory import CONFIG_FILE, TENSOR_FILE, read_sizes
from mace_peft.adapter.facts import error_table, facts
from mace_peft.backbones import load_foundation
from mace_peft.elements import symbols
from mace_peft.errors import PeftError, printable
from mace_peft.model.adapted import fingerprint, is_adapted, trainable_parameters
from mace_peft.model.summary import count


def info(path: str, trust: bool = False) -> str:
    """Method, rank, placement, parameters by module, elements, size and fingerprint of what is at the path.

    That is an adapter directory, of which no code runs; with ``trust``, it may be a MACE model, whose file can run any
    code. Raises PeftError if it is neither.
    """
    if not trust or Path(path).is_dir():
        if Path(path).is_file():
            raise PeftError(f"{path} is no adapter directory: if it is a model, whose file can run any code when it is "
                            "loaded, and you know who made it, add --trust")
        description, sizes = read_sizes(path)
        size = sum((Path(path) / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))
        return adapter_info(f"adapter {path} ({size:,} bytes)", description, sizes)
    model = load_foundation(path, "mace")
    if Path(path).exists():
        path += f" ({Path(path).stat().st_size:,} bytes)"
    if is_adapted(model):
        sizes = {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}
        return adapter_info(f"adapted model {path}", describe(model), sizes)
    return table({
        "what": f"model {path}",
        "adapters": "none: a plain MACE model, such as a foundation or a merged fine-tune",
        "class": type(model).__name__,
        "parameters": f"{count(model.parameters()):,}",
        "elements": symbols(model.atomic_numbers.tolist()),
        "heads": ", ".join(model.heads),
        "fingerprint": fingerprint(model),
    })


def adapter_info(what: str, description: dict, sizes: dict[str, int]) -> str:
    """Its facts, a table of its modules, and one of the errors that a run has measured."""
    found: dict[str, int] = {}
    for name, size in sizes.items():
        module = name.partition(".adapter.")[0]
        found[module] = found.get(module, 0) + size
    modules = PrettyTable(["module", "parameters"], align="r")
    modules.align["module"] = "l"
    modules.add_rows([[printable(module), f"{size:,}"] for module, size in sorted(found.items())])
    chosen, ranges = description["peft"]["rank_pattern"], description["gains"]
    if chosen is not None:
        modules.add_column("rank", [chosen.get(module, "none") for module in sorted(found)])
    if ranges:
        modules.add_column("gains on the training set", [range_of_gains(ranges, module) for module in sorted(found)])
    parts = [table({"what": what, **facts(description, sizes)}), modules.get_string()]
    if description.get("training", {}).get("errors"):
        parts.append(error_table(description["training"]))
    return "\n".join(parts)


def range_of_gains(ranges: dict[str, dict[str, float]], module: str) -> str:
    """Those of all gates of the module: beside the one of its output, it may have one of the messages that it takes."""
    ends = [ends for name, ends in ranges.items() if name.partition(",")[0] == module]
    return f"{min(e['low'] for e in ends):.3g} to {max(e['high'] for e in ends):.3g}" if ends else ""


def table(rows: dict[str, str]) -> str:
    return "\n".join(f"{name:<13}{printable(value)}" for name, value in rows.items())
