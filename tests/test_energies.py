"""The E0s of a run are those asked for, or it stops: for every way to give them and every set of elements."""

import ast
import contextlib
import functools
import itertools
import json
import unittest.mock

import ase.io
import numpy as np
import pytest
from ase import Atoms
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mace.cli import run_train
from releases import since
from runs import train_here, write_inputs
from tiny import ELEMENTS, predict, tiny_mace

from mace_peft import PeftError
from mace_peft.labels import energies_alone
from mace_peft.train.data.e0s import asked_E0s

pytestmark = pytest.mark.usefixtures("double_precision")

FOUNDATION = dict(zip(ELEMENTS, (-1.0, -2.0, -3.0), strict=True))
UNKNOWN = 7  # to the foundation
SHIFT = {1: 0.25, 6: -0.5, 7: 1.0, 8: 0.125}  # of the labels against the foundation
ALONE = {1: -0.5, 6: -1.5, 7: -1.75, 8: -2.5}
GIVEN = {1: -0.7, 6: -1.9, 7: -2.0, 8: -2.6, 16: -9.0}
WAYS = ("none", "IsolatedAtom", "foundation", "average", "numbers", "file", "by head", "statistics", "statistics and "
        "numbers", *(("estimated", "statistics and estimated") if since("0.3.15") else ()))
model = functools.cache(tiny_mace)
elements = st.sets(st.sampled_from(ELEMENTS), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def labelled(present: set[int]) -> list[Atoms]:
    """Chains of these elements, each with another composition, and energies that the foundation has but for a shift."""
    structures = []
    for count, number in itertools.product((1, 2, 3), sorted(present)):
        numbers = [*sorted(present), *[number] * count]
        atoms = Atoms(numbers, positions=[(1.2 * i, 0.3 * (i % 2), 0) for i in range(len(numbers))])
        known = Atoms([min(z, 8) if z != UNKNOWN else 8 for z in numbers], positions=atoms.positions)
        atoms.info["REF_energy"] = predict(model(), [known])[0].item() + sum(SHIFT[z] for z in numbers)
        atoms.arrays["REF_forces"] = np.zeros((len(atoms), 3))
        structures.append(atoms)
    return structures


def reached(folder, **options) -> dict[int, float] | None:
    """The E0s that the run has made up when it goes on to its model; None if it has stopped with exit code 2."""
    seen = {}

    def configure_model(args, loader, atomic_energies, foundation, heads, z_table, head_configs):
        seen.update(zip(z_table.zs, np.ravel(atomic_energies).tolist(), strict=True))
        raise KeyboardInterrupt

    with unittest.mock.patch.object(run_train, "configure_model", configure_model), \
            contextlib.suppress(KeyboardInterrupt):
        try:
            train_here(folder, peft="elora", peft_rank=1, test_file=None, batch_size=1, **options)
        except SystemExit as stopped:
            assert stopped.code == 2
            return None
    return seen


def expected(way: str, structures: list[Atoms], present: set[int], given: set[int], alone: set[int]):
    """By hand: the E0s, or None where they cannot be had."""
    if UNKNOWN in present:
        return None
    if way in ("none", "IsolatedAtom"):
        return {z: ALONE[z] for z in present} if present <= alone else None
    if way == "foundation":
        return {z: FOUNDATION[z] for z in present}
    if "estimated" in way:
        return {z: FOUNDATION[z] + SHIFT[z] for z in present}
    if way == "average":
        counts = np.array([[np.count_nonzero(atoms.numbers == z) for z in sorted(present)] for atoms in structures])
        energies = np.array([atoms.info["REF_energy"] for atoms in structures])
        return dict(zip(sorted(present), np.linalg.lstsq(counts, energies, rcond=None)[0], strict=True))
    return {z: GIVEN[z] for z in present} if present <= given else None


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(way=st.sampled_from(WAYS), present=elements, unknown=st.integers(0, 7), given=st.sets(
    st.sampled_from(sorted(GIVEN)), min_size=1), alone=st.sets(st.sampled_from(sorted(ALONE))))
def test_E0s_are_those_asked_for(folder, capsys, way, present, unknown, given, alone):
    present = present | ({UNKNOWN} if unknown == 0 else set())
    structures = labelled(present)
    atoms = [Atoms([z], info={"config_type": "IsolatedAtom", "REF_energy": ALONE[z]}) for z in alone]
    ase.io.write(folder / "E0_train.xyz", [*structures, *atoms])
    ase.io.write(folder / "E0_valid.xyz", structures[:2])
    numbers = str({z: GIVEN[z] for z in given})
    (folder / "E0s.json").write_text(json.dumps(ast.literal_eval(numbers)))
    other = numbers if way == "statistics" else str(dict.fromkeys(present, -77.0))
    (folder / "statistics.json").write_text(json.dumps({
        "atomic_energies": other, "atomic_numbers": str(sorted(present)), "avg_num_neighbors": 3.0, "mean": 0.0,
        "std": 1.0}))
    E0s = {"none": None, "statistics": None, "numbers": numbers, "statistics and numbers": numbers,
           "file": folder / "E0s.json", "by head": str({"Default": ast.literal_eval(numbers)}),
           "statistics and estimated": "estimated"}.get(way, way)
    statistics = folder / "statistics.json" if "statistics" in way else None
    capsys.readouterr()
    held = reached(folder, E0s=E0s, train_file=folder / "E0_train.xyz", valid_file=folder / "E0_valid.xyz",
                   statistics_file=statistics)
    right = expected(way, structures, present, given, alone)
    assert (held is None) == (right is None)
    if held is None:
        said = capsys.readouterr().err
        assert said.startswith("mace_run_train: error: ") and said.count("\n") == 1 and "MACE failed" not in said
    else:
        assert held == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("option, words", [
    ("foundatoin", "did you mean foundation"), ("{1: }", "neither a word"), ("-13.6", "is no dictionary"),
    ("{'H': -13.6}", "entry 'H'"), ("{1: None}", "entry 1"), ("{200: 1.0}", "entry 200"), ("{}", "is no dictionary"),
    ("{1: nan}", "neither a word"), ("nowhere.json", "does not exist"),
    ("{'other': {1: 0.0}}", "no entry for the head"),
])
def test_E0s_that_are_none_are_refused(option, words):
    with pytest.raises(PeftError, match=words):
        asked_E0s(option, "mine")


def test_E0s_may_be_mappings():
    assert asked_E0s({1: -13, "8": -2041.5}, "mine") == {1: -13, 8: -2041.5}
    assert asked_E0s({"mine": "Average", "other": {1: 0.0}}, "mine") == "average"


def test_energies_of_isolated_atoms_under_a_key_of_ase(folder):
    """ASE moves them to a calculator, and MACE takes 0."""
    structures = [*labelled({1, 6, 8}), *(Atoms([z], info={"config_type": "IsolatedAtom", "REF_energy": ALONE[z]})
                                           for z in ELEMENTS)]
    text = []
    for atoms in structures:
        rows = [f"{symbol} {' '.join(map(str, position))} 0 0 0" for symbol, position in
                zip(atoms.symbols, atoms.positions, strict=True)]
        kind = f" config_type={atoms.info['config_type']}" if "config_type" in atoms.info else ""
        text += [str(len(atoms)), f'Properties=species:S:1:pos:R:3:forces:R:3 energy={atoms.info["REF_energy"]}{kind} '
                 'pbc="F F F"', *rows]
    (folder / "ase.xyz").write_text("\n".join(text) + "\n")
    held = reached(folder, E0s="IsolatedAtom", train_file=folder / "ase.xyz", valid_fraction=0.2, valid_file=None,
                   energy_key="energy", forces_key="forces")
    assert held == {z: ALONE[z] for z in ELEMENTS}


@pytest.mark.parametrize("energy", ["much", np.nan, [1.0, 2.0]], ids=str)
def test_an_energy_of_an_isolated_atom_that_is_none_is_named(energy):
    atom = Atoms("H", info={"REF_energy": energy, "config_type": "IsolatedAtom"})
    with pytest.raises(PeftError, match="REF_energy of .* isolated atom .*: give "):
        energies_alone([atom], "REF_energy", "data.xyz")


@pytest.mark.parametrize("E0s", ["average", pytest.param("estimated", marks=pytest.mark.since("0.3.15"))])
def test_averages_take_the_energies_that_are_there(folder, capsys, E0s):
    structures = labelled({1, 6, 8})
    whole = reached(folder, E0s=E0s, **written(folder, structures))
    structures += [atoms.copy() for atoms in structures]
    for atoms in structures[9:]:
        del atoms.info["REF_energy"]
    assert reached(folder, E0s=E0s, **written(folder, structures)) == pytest.approx(whole, abs=1e-8)
    for atoms in structures[:9]:
        del atoms.info["REF_energy"]
    assert reached(folder, E0s=E0s, **written(folder, structures)) is None
    assert f"--E0s {E0s} takes E0s from energies, and no structure of" in capsys.readouterr().err


def written(folder, structures: list[Atoms]) -> dict:
    ase.io.write(folder / "E0_train.xyz", structures)
    return {"train_file": folder / "E0_train.xyz", "valid_file": folder / "E0_train.xyz"}


def test_an_element_that_is_listed_twice_is_one(folder):
    structures = written(folder, labelled({1, 6, 8}))
    held = [reached(folder, E0s="average", atomic_numbers=elements, **structures)
            for elements in ("[1, 6, 8]", "[1, 1, 6, 8]")]
    assert held[0] == held[1]
