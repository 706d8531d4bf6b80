"""The E0s: a fine-tune's model holds those that its log prints.

mace-torch 0.3.16 overwrites them by the foundation's if the elements are all of the foundation's. That files are saved
with these E0s is for ``test_train.py``.
"""

import ast
import json

import ase.io
import pytest
import torch
from ase import Atoms
from mace import data
from releases import since
from runs import E0S, FEWER_ELEMENTS, MOLECULE, Run, reach_training, write_inputs
from tiny import tiny_mace

pytestmark = pytest.mark.usefixtures("uncompiled")

FOUNDATION_E0S = {1: -1.0, 6: -2.0, 8: -3.0}
PUT_RIGHT = "E0s put right"
ESTIMATED = pytest.mark.since("0.3.15")
EVERY = pytest.mark.parametrize("E0s", [pytest.param("estimated", marks=ESTIMATED), "average", "given"])


@pytest.fixture(params=[MOLECULE, FEWER_ELEMENTS], ids=["all_elements", "fewer_elements"])
def molecule(request):
    return request.param


def fine_tune(folder, **options) -> tuple[dict[int, float], Run]:
    """E0s in eV, by element, with which the model goes into training; and the run, for its log."""
    given = reach_training(folder, peft="mmea", peft_rank=2, peft_targets="products", **options)
    return E0s_of(given["model"]), Run(folder / "reached")


def E0s_of(model) -> dict[int, float]:
    energies = model.atomic_energies_fn.atomic_energies.flatten().tolist()
    return dict(zip(model.atomic_numbers.tolist(), energies, strict=True))


@EVERY
def test_the_model_holds_the_E0s_that_the_log_prints(tmp_path, molecule, E0s):
    """And says so where MACE by itself, without ``--peft``, trains with others."""
    write_inputs(tmp_path, molecule)
    options = {"E0s": E0S[molecule] if E0s == "given" else E0s}
    held, run = fine_tune(tmp_path, **options)
    assert held == run.printed_E0s()
    assert all(energy != FOUNDATION_E0S[z] for z, energy in held.items())
    assert E0s != "given" or held == ast.literal_eval(E0S[molecule])
    of_mace = E0s_of(reach_training(tmp_path, work_dir=tmp_path / "plain", **options)["model"])
    assert run.log.count(PUT_RIGHT) == (of_mace != held)


@EVERY
def test_elements_that_the_data_lack_keep_the_E0s_of_the_foundation(tmp_path, E0s):
    """With ``--foundation_model_elements``; the log prints those of the data alone."""
    write_inputs(tmp_path, FEWER_ELEMENTS)
    held, run = fine_tune(tmp_path, E0s=E0S[FEWER_ELEMENTS] if E0s == "given" else E0s, foundation_model_elements=True)
    assert held == {6: FOUNDATION_E0S[6]} | run.printed_E0s()
    assert all(energy != FOUNDATION_E0S[z] for z, energy in run.printed_E0s().items())
    assert run.log.count(PUT_RIGHT) == 1


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("carbon", [-1.9, 0.0])
def test_given_E0s_of_elements_that_the_data_lack_are_kept(tmp_path, carbon, file):
    write_inputs(tmp_path, FEWER_ELEMENTS)
    E0s = {1: -0.7, 6: carbon, 8: -2.6}
    (tmp_path / "E0s.json").write_text(json.dumps(E0s))
    held, _ = fine_tune(tmp_path, E0s=tmp_path / "E0s.json" if file else E0s, foundation_model_elements=True)
    assert held == E0s


def test_E0s_that_this_mace_cannot_estimate_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(data, "estimate_e0s_from_foundation", raising=False)
    with pytest.raises(SystemExit):
        reach_training(write_inputs(tmp_path), peft="mmea", peft_rank=2, E0s="estimated")
    assert "--E0s estimated needs mace-torch 0.3.15 or later" in capsys.readouterr().err


def test_the_model_holds_the_energies_of_isolated_atoms(tmp_path):
    write_inputs(tmp_path)
    energies = {1: -0.5, 6: -1.5, 8: -2.5}
    atoms = [Atoms([z], info={"config_type": "IsolatedAtom", "REF_energy": energy}) for z, energy in energies.items()]
    ase.io.write(tmp_path / "train.xyz", atoms, append=True)
    held, run = fine_tune(tmp_path, E0s=None)
    assert held == run.printed_E0s() == energies


def test_the_E0s_of_the_foundation_need_no_putting_right(tmp_path):
    held, run = fine_tune(write_inputs(tmp_path), E0s="foundation")
    assert held == run.printed_E0s() == FOUNDATION_E0S
    assert PUT_RIGHT not in run.log


def test_the_E0s_of_one_head_of_the_foundation(tmp_path, capsys):
    """Before 0.3.15, MACE takes those of the first head, whichever is chosen: that is refused."""
    foundation = tiny_mace(heads=("a", "b"))
    foundation.atomic_energies_fn.atomic_energies[1] -= 0.25
    write_inputs(tmp_path, foundation=foundation)
    assert fine_tune(tmp_path, E0s="foundation", foundation_head="a")[0] == FOUNDATION_E0S
    if since("0.3.15"):
        of_b = {z: energy - 0.25 for z, energy in FOUNDATION_E0S.items()}
        assert fine_tune(tmp_path, E0s="foundation", foundation_head="b")[0] == of_b
        return
    with pytest.raises(SystemExit):
        fine_tune(tmp_path, E0s="foundation", foundation_head="b")
    assert "this run starts from the head b: give the E0s as numbers" in capsys.readouterr().err


@ESTIMATED
def test_a_foundation_of_another_dtype_estimates_the_same_E0s(tmp_path, molecule):
    """The same as in double precision, up to the precision of float32; the model holds them in its own dtype."""
    model = tiny_mace(dtype=torch.float32)
    _, in_double = fine_tune(write_inputs(tmp_path / "double", molecule, model.double()), E0s="estimated")
    for foundation, dtype in [("float64", "float32"), ("float32", "float64")]:
        write_inputs(tmp_path / dtype, molecule, model.to(getattr(torch, foundation)))
        held, run = fine_tune(tmp_path / dtype, E0s="estimated", default_dtype=dtype)
        printed = run.printed_E0s()
        assert list(held.values()) == torch.tensor(list(printed.values()), dtype=getattr(torch, dtype)).tolist()
        assert printed == pytest.approx(in_double.printed_E0s(), abs=1e-5)
