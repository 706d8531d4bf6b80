"""Structures of given elements that are made from what ASE knows, for ``--peft_keep auto``: molecules of the G2 set,
larger ones that are joined from them, and crystals of common prototypes, all displaced and strained at random."""

import itertools
import logging
from collections.abc import Collection, Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.collections import g2
from ase.data import atomic_numbers, chemical_symbols, covalent_radii, reference_states
from scipy.spatial.distance import cdist

from mace_peft.elements import symbols
from mace_peft.errors import PeftError

COUNT, SEED = 200, 0  # of the structures that are made
MOST_OF_A_KIND = 100  # small molecules, joined ones or crystals: more of a kind do not make it more frequent
DISPLACED = 0.02, 0.1  # A, root mean square over the atoms: least and most; stiff bonds take no more
STRAIN = 0.02  # standard deviation of each component
BONDED, APART = 1.25, 1.3  # distances in sums of covalent radii: at most, and at least
ATOMS = 8  # of a crystal, at least
NOBLE = set("He Ne Ar Kr Xe Rn Og".split())
NONMETALS = set("H C N O F P S Cl Se Br I At".split())
# nearest neighbours of these prototypes have this distance, in units of the lattice constant
DISTANCES = {"rocksalt": 1 / 2, "zincblende": 3**0.5 / 4, "cesiumchloride": 3**0.5 / 2, "fluorite": 3**0.5 / 4}
ATOMS_OF_CELL = {"fcc": 4, "bcc": 2, "sc": 1}


def made_of(elements: Collection[int], count: int = COUNT) -> list[Atoms]:
    """So many molecules and crystals of these elements (atomic numbers), always the same ones.

    The log names elements that none of them has. Raises PeftError if ASE has no molecule and no crystal of them.
    """
    random, known = np.random.default_rng(SEED), {chemical_symbols[number] for number in elements}
    small, prototypes = molecules(known), crystals(known)
    open_ended = [molecule for molecule in small if bonds_to_hydrogen(molecule)]
    makers = (lambda: one_of(small, random).copy(),
              lambda: joined([one_of(open_ended, random) for _ in range(random.integers(2, 4))], random),
              lambda: build(one_of(prototypes, random)))
    shares = np.array([min(len(kind), MOST_OF_A_KIND) for kind in (small, open_ended, prototypes)])
    if not shares.any():
        raise PeftError(f"no molecule and no crystal to keep can be made of {symbols(elements)}: give a file of "
                        "structures in the place of auto")
    made = []
    while len(made) < count:
        atoms = makers[random.choice(len(makers), p=shares / shares.sum())]()
        if atoms is not None:
            made.append(changed(atoms, random))
    missing = set(elements).difference(*(atoms.numbers.tolist() for atoms in made))
    if missing:
        logging.warning(f"None of the structures that are made to be kept has {symbols(missing)}: give a file of "
                        "structures that have, in the place of auto")
    return made


def one_of(choices: Sequence, random: np.random.Generator):
    return choices[random.integers(len(choices))]


def molecules(known: set[str]) -> list[Atoms]:
    """Those of the G2 set that are made of these symbols; no single atoms."""
    found = [g2[name] for name in g2.names]
    return [Atoms(molecule.numbers, molecule.positions) for molecule in found
            if len(molecule) > 1 and set(molecule.get_chemical_symbols()) <= known]


def bonds_to_hydrogen(molecule: Atoms) -> list[tuple[int, int]]:
    """Each hydrogen atom that has one neighbour, of another element, and that neighbour."""
    radii = covalent_radii[molecule.numbers]
    bonded = molecule.get_all_distances() < BONDED * np.add.outer(radii, radii)
    np.fill_diagonal(bonded, False)
    alone = [(hydrogen, *np.flatnonzero(bonded[hydrogen])) for hydrogen in np.flatnonzero(molecule.numbers == 1)]
    return [pair for pair in alone if len(pair) == 2 and molecule.numbers[pair[1]] != 1]


def joined(parts: Sequence[Atoms], random: np.random.Generator) -> Atoms | None:
    """One molecule, made by joining these one after the other: a single bond takes the place of one hydrogen atom on
    each side. Atoms and angle are chosen at random. None where two parts come too near, or no hydrogen is left."""
    whole, *others = parts
    for part in others:
        if not (bonds_to_hydrogen(whole) and bonds_to_hydrogen(part)):
            return None
        below, above = opened(whole, "z", random), opened(part, "-z", random)
        above.rotate(random.uniform(0, 360), "z")
        above.positions[:, 2] += covalent_radii[[below.numbers[0], above.numbers[0]]].sum()
        distances = cdist(below.positions, above.positions)
        distances[0, 0] = np.inf  # of the new bond
        if (distances < APART * np.add.outer(covalent_radii[below.numbers], covalent_radii[above.numbers])).any():
            return None
        whole = below + above
    return whole


def opened(molecule: Atoms, direction: str, random: np.random.Generator) -> Atoms:
    """The molecule without a hydrogen atom, which was in that direction of what is now its first atom, at the origin.
    """
    hydrogen, neighbour = one_of(bonds_to_hydrogen(molecule), random)
    moved = molecule.copy()
    moved.positions -= molecule.positions[neighbour]
    moved.rotate(moved.positions[hydrogen], direction)
    return moved[[neighbour, *(i for i in range(len(moved)) if i not in (hydrogen, neighbour))]]


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
    """A crystal of at least so many atoms that they can be displaced."""
    crystal = bulk(*prototype)
    crystal = crystal.repeat(int(np.ceil((ATOMS / len(crystal)) ** (1 / 3) - 1e-9)))
    return Atoms(crystal.numbers, crystal.positions, cell=crystal.cell, pbc=True)


def changed(atoms: Atoms, random: np.random.Generator) -> Atoms:
    """The structure, strained and with displaced atoms, in place. Returns it."""
    strain = random.normal(scale=STRAIN, size=(3, 3))
    stretch = np.eye(3) + (strain + strain.T) / 2
    atoms.set_cell(atoms.cell @ stretch)
    scale = random.uniform(*DISPLACED) / 3**0.5
    atoms.positions = atoms.positions @ stretch + random.normal(scale=scale, size=atoms.positions.shape)
    return atoms
