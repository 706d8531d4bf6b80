"""Structures for which no model has a prediction are refused, before anything is computed."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from mace_peft import PeftError
from mace_peft.labels import from_atoms, label_keys

SKEW = [[4.0, 0.0, 0.0], [1.5, 3.5, 0.0], [0.5, 1.0, 3.0]]
TOGETHER = {
    "molecule": Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, 0, 1]]),
    "across a face": Atoms("Cu2", scaled_positions=[[0, 0.2, 0.3], [1 - 1e-17, 0.2, 0.3]], cell=SKEW, pbc=True),
    "images far away": Atoms("Cu2", [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3] + [3, -2, 5] @ np.array(SKEW)], cell=SKEW,
                             pbc=True),
    "slab": Atoms("Cu2", [[0, 0, 50.0], [8.0, 0, 50.0]], cell=SKEW, pbc=(True, False, False)),
}
APART = {
    "atom": Atoms("H"), "near": Atoms("H2", [[0, 0, 0], [0, 0, 0.1]]), "crystal": bulk("Cu"),
    "slab": Atoms("Cu2", [[0, 0, 0], SKEW[2]], cell=SKEW, pbc=(True, True, False)),
    "cell that does not count": Atoms("H2", [[0, 0, 0], [1, 0, 0]], cell=np.eye(3)),
}


@pytest.mark.parametrize("atoms", TOGETHER.values(), ids=TOGETHER)
def test_atoms_at_one_place_are_named(atoms):
    with pytest.raises(PeftError, match=r"the atoms \d and \d of structure 0 of it are at one place"):
        from_atoms([atoms], label_keys(), "it")


@pytest.mark.parametrize("atoms", APART.values(), ids=APART)
def test_others_are_taken(atoms):
    from_atoms([atoms], label_keys(), "it")


def test_a_stress_with_no_cell_of_its_own_is_left_out(caplog):
    structures = [bulk("Cu", a=4 + number / 10) for number in range(3)]
    for atoms, pbc in zip(structures, (True, (True, True, False), False), strict=True):
        atoms.pbc = pbc
        atoms.info["REF_stress"] = np.eye(3)
    configurations = from_atoms(structures, label_keys(), "it")
    assert [found.properties["stress"] is None for found in configurations] == [False, True, True]
    assert [found.property_weights["stress"] for found in configurations][1:] == [0, 0]
    assert caplog.messages == ["The stress of 2 structures of it is left out, for they are not periodic in all "
                               "directions, where MACE would compute it for a cell of its own"]
    assert all((atoms.info["REF_stress"] == np.eye(3)).all() for atoms in structures)
