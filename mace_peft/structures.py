"""Structures for which no model has a prediction are refused, and a stress that means nothing is left out."""

import logging

import numpy as np
from ase.geometry import complete_cell
from mace.data import Configuration
from scipy.spatial import KDTree

from mace_peft.errors import PeftError

ONE_PLACE = 1e-6  # A, or parts of a cell: as near as the decimals of a file bring atoms that are meant to be at one


def check_structure(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, where: str) -> None:
    """Raise PeftError for a structure without atoms, with NaN or infinity (A), or that is periodic without a cell."""
    if not len(positions):
        raise PeftError(f"{where} has no atoms: leave it out")
    if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        raise PeftError(f"the positions or the cell of {where} hold NaN or infinity: correct them")
    periodic = np.asarray(cell, dtype=float)[np.asarray(pbc, dtype=bool)]
    if len(periodic) and np.linalg.matrix_rank(periodic) < len(periodic):  # numpy 1 has no rank of nothing
        raise PeftError(f"{where} is periodic, and has no cell to be so: give its cell, or pbc=\"F F F\"")


def check_apart(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, where: str) -> None:
    """Raise PeftError where two atoms are upon one another, or upon images of one another: forces are NaN there."""
    pbc = np.asarray(pbc, dtype=bool)
    scaled = positions @ np.linalg.inv(complete_cell(np.asarray(cell, dtype=float) * pbc[:, None]))
    scaled[:, pbc] = scaled[:, pbc] % 1 % 1  # a remainder just below 0 is 1 after the first
    for first, second in sorted(KDTree(scaled, boxsize=pbc.astype(float)).query_pairs(ONE_PLACE)):
        raise PeftError(f"the atoms {first} and {second} of {where} are at one place: correct the structure, or leave "
                        "it out")


def has_stress_in_vain(configuration: Configuration) -> bool:
    """Whether it has the stress of a structure that is not periodic in all directions.

    MACE makes such a structure a cell of its own, and divides by the volume of that: its stress means nothing.
    """
    return configuration.properties.get("stress") is not None and not all(configuration.pbc)


def log_stresses_left_out(number: int, where: str) -> None:
    """Log that so many stresses are left out, see ``has_stress_in_vain``; nothing where there are none."""
    if number:
        logging.warning(f"The stress of {number} structures of {where} is left out, for they are not periodic in all "
                        "directions, where MACE would compute it for a cell of its own")
