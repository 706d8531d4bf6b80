"""Structures unlike all that a molecule's fine-tune has seen: small molecules, as they are and bent out of shape."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.collections import g2

SCALED = (0.85, 1.15)  # positions, of those of the G2 set
DISPLACED = (0.1, 0.3)  # A, standard deviation


def molecules(elements: set[int]) -> dict[str, Atoms]:
    """Those of ASE's G2 set of these elements, with more than one atom: as they are, scaled, and displaced."""
    random = np.random.default_rng(0)
    found = {}
    for name in g2.names:
        atoms = g2[name]
        if len(atoms) < 2 or not elements >= set(atoms.numbers):
            continue
        found[name] = Atoms(atoms.numbers, atoms.positions)
        for factor in SCALED:
            found[f"{name} x {factor}"] = Atoms(atoms.numbers, factor * atoms.positions)
        found |= displaced(name, atoms, random)
    return found


def displaced(name: str, atoms: Atoms, random: np.random.Generator) -> dict[str, Atoms]:
    moves = {size: random.normal(scale=size, size=(len(atoms), 3)) for size in DISPLACED}
    return {f"{name} + {size} A": Atoms(atoms.numbers, atoms.positions + move) for size, move in moves.items()}


def largest_forces(forces: np.ndarray, structures: list[Atoms]) -> np.ndarray:
    """The largest force (eV/A) of each structure, from those of all their atoms."""
    sizes = np.linalg.norm(forces, axis=1)
    ends = np.cumsum([len(atoms) for atoms in structures])
    return np.array([part.max() for part in np.split(sizes, ends[:-1])])
