"""README.md of an adapter directory: what the adapter is, for who finds it. Nothing reads it again."""

from typing import NamedTuple

from mace_peft.adapter.facts import error_rows, facts, header
from mace_peft.errors import printable
from mace_peft.methods import METHODS

# How each card begins, by which a save knows one that it may replace.
BEGINNING = "---\nlibrary_name: mace-peft\n"


class Kind(NamedTuple):
    """A kind of model: what it is called, how it is used in ASE, and its paper."""

    name: str
    use: str
    paper: str | None = None


OTHERS = Kind("e3nn", "from mace_peft import load_adapter\n\nload_adapter(model, {directory})  # model: the foundation")
# by the name of a backbone
KINDS = {
    "mace": Kind("MACE", "from mace_peft import calculator\n\natoms.calc = calculator({foundation}, {directory})",
                 "[MACE, NeurIPS 2022](https://arxiv.org/abs/2206.07697)"),
    "sevennet": Kind("SevenNet", "from mace_peft import load_adapter\nfrom sevenn.calculator import SevenNetCalculator"
                     "\n\nmodel = load_adapter({foundation}, {directory})\n"
                     'atoms.calc = SevenNetCalculator(model, file_type="model_instance")',
                     "[SevenNet, JCTC 2024](https://arxiv.org/abs/2402.03789)"),
}


def card(description: dict, sizes: dict[str, int]) -> str:
    """The text, in Markdown. sizes: how many numbers each tensor of the adapter has."""
    said = facts(description, sizes)
    method, name = description["peft"]["method"], description["foundation"]["name"]
    training, kind = description.get("training"), KINDS.get(description["backbone"], OTHERS)
    title = METHODS[method].title + ("" if METHODS[method].trains_base else " adapter")
    lines = [
        f"{BEGINNING}tags: [{kind.name.lower()}, interatomic-potential, fine-tuning]\n---\n",
        f"# A fine-tuned {kind.name} model: {title} of {code(name or 'a foundation model')}\n",
        "These files and the foundation model are an interatomic potential. The foundation model is not among them: "
        "it is the one with the fingerprint below.\n",
        *markdown(["", ""], [[name, code(value)] for name, value in said.items()]),
    ]
    if training is not None and training["errors"]:
        lines += ["\n## Errors\n", *markdown(header(training), [[code(name), *cells] for name, *cells in
                                                              error_rows(training)])]
    lines += [
        f"\n## Use it{' in ASE' if kind is not OTHERS else ''}\n",
        "```python\n" + kind.use.format(foundation=quoted(name), directory='"the directory of this file"') + "\n```\n",
        "## Cite\n",
        ", ".join(filter(None, [METHODS[method].paper, kind.paper, "the paper of the foundation model."])),
    ]
    return "\n".join(lines) + "\n"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def code(text: str) -> str:
    """The text, which may be a stranger's, as it is: neither Markdown nor HTML in it takes effect."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"


def quoted(name: str | None) -> str:
    """The name as a piece of Python in a block of code."""
    return repr(printable(name or "foundation.model")).replace("`", "'")
