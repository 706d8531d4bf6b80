"""Elements as texts."""

from collections.abc import Iterable

from ase.data import chemical_symbols


def symbol(element: int) -> str:
    """The chemical symbol of the element (atomic number); of a number that no element has, that number."""
    return chemical_symbols[element] if element in range(len(chemical_symbols)) else str(element)


def symbols(elements: Iterable[int]) -> str:
    """The elements (atomic numbers), sorted, as a text of chemical symbols."""
    return " ".join(map(symbol, sorted(elements)))
