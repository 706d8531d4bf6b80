"""What ``--peft_keep auto`` makes: structures of the run's elements that a foundation can label."""

import numpy as np
import pytest
from ase.build import molecule as of_ase
from ase.data import covalent_radii
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mace_peft import PeftError
from mace_peft.train.data.made_structures import bonds_to_hydrogen, joined, made_of, molecules


@pytest.mark.parametrize("elements", [{1, 6, 8}, {29}, {8, 26}, {14}, set(range(1, 84))], ids=str)
def test_what_is_made_has_these_elements_and_is_the_same_each_time(elements):
    structures, again = made_of(elements), made_of(elements)
    assert len(structures) == 200
    assert {int(z) for atoms in structures for z in atoms.numbers} <= elements
    for atoms, other in zip(structures, again, strict=True):
        assert atoms == other
        assert len(atoms) >= (8 if atoms.pbc.any() else 2)
        distances = atoms.get_all_distances(mic=True) + 9 * np.eye(len(atoms))
        assert distances.min() > 0.4
    assert len({atoms.positions.tobytes() for atoms in structures}) == 200
    assert any(atoms.pbc.all() for atoms in structures)


def test_molecules_and_crystals_are_both_made():
    assert {bool(atoms.pbc.all()) for atoms in made_of({1, 6, 8})} == {True, False}
    assert {len(set(atoms.numbers)) for atoms in made_of({11, 17}) if atoms.pbc.all()} == {1, 2}


def test_what_ASE_has_nothing_of_stops():
    with pytest.raises(PeftError, match="no molecule and no crystal to keep can be made of He: give a file"):
        made_of({2})


def test_elements_that_nothing_made_has_are_named(caplog):
    made_of({1, 6, 8, 35})
    assert "None of the structures that are made to be kept has Br: give a file" in caplog.text
    caplog.clear()
    made_of({1, 6, 8})
    assert not caplog.text


# --- molecules that are joined ----------------------------------------------------------------------------------------


def bonds(molecule) -> list[tuple[int, int]]:
    """Pairs of atoms whose distance is below 1.25 times the sum of their covalent radii."""
    radii = covalent_radii[molecule.numbers]
    near = molecule.get_all_distances() < 1.25 * (radii[:, None] + radii)
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(near, 1))]


@pytest.mark.parametrize("names", [("CH4", "H2O"), ("CH4", "CH4"), ("HCOOH", "NH3"), ("C6H6", "CH3OH", "HCOOH")],
                         ids=" + ".join)
def test_parts_are_joined_by_single_bonds_and_keep_their_own(names):
    random, parts, seen = np.random.default_rng(1), [of_ase(name) for name in names], set()
    for whole in filter(None, (joined(parts, random) for _ in range(30))):
        links = len(names) - 1
        assert len(whole) == sum(map(len, parts)) - 2 * links
        assert (whole.numbers == 1).sum() == sum((part.numbers == 1).sum() for part in parts) - 2 * links
        # each link takes a bond from either side, and adds one
        found = bonds(whole)
        assert len(found) == sum(len(bonds(part)) for part in parts) - links
        row, column = np.array(found).T
        assert connected_components(coo_array((np.ones(len(row)), (row, column)), (len(whole),) * 2))[0] == 1
        seen.add(whole.positions.tobytes())
    assert len(seen) > 10


def test_two_molecules_of_methane_are_joined_to_ethane():
    whole = joined([of_ase("CH4"), of_ase("CH4")], np.random.default_rng(0))
    carbons = np.flatnonzero(whole.numbers == 6)
    assert whole.get_distance(*carbons) == pytest.approx(2 * covalent_radii[6])
    for hydrogen in np.flatnonzero(whole.numbers == 1):
        angles = [whole.get_angle(hydrogen, near, far) for near, far in (carbons, carbons[::-1])]
        assert max(angles) == pytest.approx(109.47, abs=0.1)


def test_a_molecule_of_hydrogen_cannot_be_joined():
    assert bonds_to_hydrogen(of_ase("H2")) == [] and joined([of_ase("H2"), of_ase("CH4")], np.random) is None


def test_about_half_of_the_molecules_are_none_of_the_set():
    known = {tuple(sorted(molecule.numbers)) for molecule in molecules({"H", "C", "N", "O"})}
    made = [atoms for atoms in made_of({1, 6, 7, 8}) if not atoms.pbc.any()]
    new = [atoms for atoms in made if tuple(sorted(atoms.numbers)) not in known]
    assert 0.3 * len(made) < len(new) < 0.7 * len(made) and max(map(len, new)) > 20
