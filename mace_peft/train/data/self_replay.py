"""The structures of self-replay (``--peft_keep``), whose labels the foundation gives: those of a file, or made here.

Made are molecules of the G2 set and crystals of common prototypes, as ASE has them, of the given elements alone,
displaced and strained at random under a fixed seed: the same elements give the same structures.
"""

import itertools
from collections.abc import Collection

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.collections import g2
from ase.data import atomic_numbers, chemical_symbols, covalent_radii, reference_states

from mace_peft.elements import symbols
from mace_peft.errors import PeftError
from mace_peft.labels import DEFAULT_KEYS, STATES, from_atoms, label_keys, read

AUTO = "auto"
COUNT, SEED = 200, 0  # of the structures that are made
MOST_OF_A_KIND = 100  # molecules, and crystals, that these start from
DISPLACED = 0.02, 0.1  # A, root mean square over the atoms: least and most; stiff bonds take no more
STRAIN = 0.02  # standard deviation of each component
ATOMS = 8  # of a crystal, at least
NOBLE = set("He Ne Ar Kr Xe Rn Og".split())
NONMETALS = set("H C N O F P S Cl Se Br I At".split())
# nearest neighbours of these prototypes have this distance, in units of the lattice constant
DISTANCES = {"rocksalt": 1 / 2, "zincblende": 3**0.5 / 4, "cesiumchloride": 3**0.5 / 2, "fluorite": 3**0.5 / 4}
ATOMS_OF_CELL = {"fcc": 4, "bcc": 2, "sc": 1}


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


def made_of(elements: Collection[int], count: int = COUNT, seed: int = SEED) -> list[Atoms]:
    """So many molecules and crystals of these elements (atomic numbers), displaced and strained.

    Raises PeftError if ASE has no molecule and no crystal of them.
    """
    random, known = np.random.default_rng(seed), {chemical_symbols[number] for number in elements}
    kinds = [molecules(known), crystals(known)]
    prototypes = [kind[i] for kind in kinds for i in random.permutation(len(kind))[:MOST_OF_A_KIND]]
    if not prototypes:
        raise PeftError(f"no molecule and no crystal to keep can be made of {symbols(elements)}: give a file of "
                        "structures in the place of auto")
    shuffled = [prototypes[i] for i in random.permutation(len(prototypes))]
    return [changed(build(prototype), random) for prototype in itertools.islice(itertools.cycle(shuffled), count)]


def molecules(known: set[str]) -> list[tuple]:
    """The names of those in the G2 set that are made of these symbols, as arguments of ``build``; no single atoms."""
    return [(name,) for name in g2.names if len(g2[name]) > 1 and set(g2[name].get_chemical_symbols()) <= known]


def crystals(known: set[str]) -> list[tuple]:
    """Formula, prototype and lattice constant (A) of crystals of these symbols, as arguments of ``ase.build.bulk``.

    Elements come as ASE knows them, and metals in other lattices of the same density, too. Metals (and metalloids)
    make compounds with nonmetals and with one another, in which neighbours touch by their covalent radii.
    """
    found = []
    metals = sorted(known - NONMETALS - NOBLE)
    for symbol in sorted(known):
        try:
            crystal = bulk(symbol)
        except (ValueError, RuntimeError):  # ASE knows none, or not the places of its atoms
            continue
        own, volume = reference_states[atomic_numbers[symbol]]["symmetry"], crystal.get_volume() / len(crystal)
        found.append((symbol, None, None))
        found += [(symbol, lattice, (number * volume) ** (1 / 3)) for lattice, number in ATOMS_OF_CELL.items()
                  if symbol in metals and lattice != own]
    pairs = [(metal, other, tuple(DISTANCES)) for metal in metals for other in sorted(known & NONMETALS)]
    pairs += [(*both, ("cesiumchloride",)) for both in itertools.combinations(metals, 2)]
    for metal, other, prototypes in pairs:
        distance = sum(covalent_radii[atomic_numbers[symbol]] for symbol in (metal, other))
        found += [(f"{metal}{other}{'2' if prototype == 'fluorite' else ''}", prototype,
                   distance / DISTANCES[prototype]) for prototype in prototypes]
    return found


def build(prototype: tuple) -> Atoms:
    """A molecule of that name, or a crystal of at least so many atoms that they can be displaced."""
    if len(prototype) == 1:
        return bare(g2[prototype[0]])
    crystal = bulk(*prototype)
    return bare(crystal.repeat(int(np.ceil((ATOMS / len(crystal)) ** (1 / 3) - 1e-9))))


def changed(atoms: Atoms, random: np.random.Generator) -> Atoms:
    """The structure, strained and with displaced atoms, in place. Returns it."""
    strain = random.normal(scale=STRAIN, size=(3, 3))
    stretch = np.eye(3) + (strain + strain.T) / 2
    atoms.set_cell(atoms.cell @ stretch)
    scale = random.uniform(*DISPLACED) / 3**0.5
    atoms.positions = atoms.positions @ stretch + random.normal(scale=scale, size=atoms.positions.shape)
    return atoms
