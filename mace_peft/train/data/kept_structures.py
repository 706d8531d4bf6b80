"""The structures of self-replay (``--peft_keep``), whose labels the foundation gives: those of a file, or made ones."""

from collections.abc import Collection

from ase import Atoms

from mace_peft.elements import symbols
from mace_peft.errors import PeftError
from mace_peft.labels import DEFAULT_KEYS, STATES, from_atoms, label_keys, read
from mace_peft.train.data.made_structures import made_of

AUTO = "auto"


def kept_structures(source: str, elements: Collection[int]) -> list[Atoms]:
    """The structures of an extended XYZ file, without their labels, or ``made_of`` the elements where it is ``auto``.

    elements: atomic numbers that the model knows. Of the file, charge, spin and temperature under MACE's own keys
    count, too. Raises PeftError for a file that cannot be read, for structures that MACE does not take, for fewer than
    two or of other elements, and if nothing can be made.
    """
    if source == AUTO:
        return made_of(elements)
    structures = [bare(atoms) for atoms in read(source)]
    from_atoms(structures, label_keys(), source)
    if len(structures) < 2:
        raise PeftError(f"{source} has one structure, and some of those that are kept are held out: give more")
    unknown = {int(number) for atoms in structures for number in atoms.numbers} - set(elements)
    if unknown:
        raise PeftError(f"{source} has structures of {symbols(unknown)}, and the model of this run knows "
                        f"{symbols(elements)}: leave these structures out, or add the elements to --atomic_numbers, "
                        "with E0s for them")
    return structures


def bare(atoms: Atoms) -> Atoms:
    """A copy without labels."""
    states = {key: atoms.info[key] for key in map(DEFAULT_KEYS.get, STATES) if key in atoms.info}
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=states)
