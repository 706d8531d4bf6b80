"""``mace_peft evaluate``: errors as those of the calculators, structure by structure."""

import copy
import re

import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress
from mace.calculators import MACECalculator
from tiny import configurations, randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, calculator, eject, inject, load_adapter, save_adapter
from mace_peft.backbones.foundation import rebuild
from mace_peft.inspect.compare import compare
from mace_peft.inspect.evaluate import draw, evaluate
from mace_peft.inspect.strengths import at_strengths, compare_strengths
from mace_peft.inspect.strengths import draw as draw_over_strength
from mace_peft.model import isolated
from mace_peft.model.adapted import fingerprint, origin
from mace_peft.model.inject import fold

FOUNDATION = "foundation.model"
E0S = [-1.5, -2.5, -2.0]  # eV, of the runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A foundation of four elements; adapters of three of them, two with the same E0s; structures with labels."""
    folder = tmp_path_factory.mktemp("evaluate")
    foundation = tiny_mace(elements=(1, 6, 7, 8))
    torch.save(foundation, folder / FOUNDATION)
    origin = {"name": FOUNDATION, "head": None, "fingerprint": fingerprint(foundation)}
    for seed, (name, config, E0s) in enumerate([("elora", PeftConfig("elora", rank=2), E0S),
                                                ("mmea", PeftConfig("mmea", rank=2, targets="products"), E0S),
                                                ("other", PeftConfig("scales"), [-1.0, -2.0, -2.6])]):
        start = rebuild(copy.deepcopy(foundation), [1, 6, 8], ["Default"], [E0s])
        save_adapter(randomise(inject(start, config, origin), seed, 0.1), folder / name)
    two = rebuild(copy.deepcopy(foundation), [1, 6, 8], ["a", "b"], [E0S, [0.0, 0.0, 0.0]])
    save_adapter(randomise(inject(two, PeftConfig("elora", rank=2), origin)), folder / "two_heads")

    random, structures = np.random.default_rng(0), [*configurations(3, periodic=True), *configurations(4, "H2O")]
    for atoms in structures[:3]:
        atoms.info["REF_stress"] = random.normal(scale=0.01, size=6)
    del structures[0].info["REF_energy"], structures[5].arrays["REF_forces"]
    structures[6].info["config_forces_weight"] = 0.0  # as if it had none
    ase.io.write(folder / "labelled.xyz", structures)
    for atoms in structures:
        atoms.calc = SinglePointCalculator(atoms, **{name.removeprefix("REF_"): value for name, value in
                                                     [*atoms.info.items(), *atoms.arrays.items()] if "REF" in name})
        atoms.info = {name: value for name, value in atoms.info.items() if "REF" not in name}
        atoms.arrays.pop("REF_forces", None)
    ase.io.write(folder / "of_ase.xyz", structures)
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def foundation_with(E0s=None):
    """The calculator of the foundation, with E0s of H, C and O in the place of its own."""
    model = torch.load(FOUNDATION, weights_only=False)
    if E0s is not None:
        model.atomic_energies_fn.atomic_energies[..., [0, 1, 3]] = torch.tensor(E0s, dtype=torch.float64)
    return MACECalculator(models=[model], device="cpu", default_dtype="float64")


def plain_errors(calc, path="labelled.xyz"):
    """MAE and RMSE of energies per atom, forces and stresses."""
    errors = {"energy": [], "forces": [], "stress": []}
    for atoms in ase.io.read(path, ":"):
        atoms.calc = calc
        if "REF_energy" in atoms.info:
            errors["energy"].append((atoms.get_potential_energy() - atoms.info["REF_energy"]) / len(atoms))
        if "REF_forces" in atoms.arrays and atoms.info.get("config_forces_weight") != 0:
            errors["forces"].extend((atoms.get_forces() - atoms.arrays["REF_forces"]).flatten())
        if "REF_stress" in atoms.info:
            label = voigt_6_to_full_3x3_stress(atoms.info["REF_stress"])
            errors["stress"].extend((atoms.get_stress(voigt=False) - label).flatten())
    values = map(np.array, errors.values())
    return [error for value in values for error in (np.abs(value).mean(), np.sqrt((value**2).mean()))]


def read_table(text):
    """The errors by model, in eV and A."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {name: [float(cell.replace(",", "")) / 1000 for cell in cells] for name, *cells in rows[1:]}


def test_errors_are_those_of_the_calculators():
    text = evaluate(FOUNDATION, ["elora", "mmea", "other"], "labelled.xyz", batch_size=2)
    found = read_table(text)
    assert text.startswith("Errors on labelled.xyz (6 energies, 24 forces on atoms, 3 stresses)\n")
    assert re.search(r"model +\| E MAE \(meV/atom\) \| E RMSE \(meV/atom\) \| F MAE \(meV/A\) \| F RMSE \(meV/A\) \| "
                     r"stress MAE \(meV/A\^3\) \| stress RMSE \(meV/A\^3\) \|", text)
    assert list(found) == [f"{FOUNDATION}, E0s of elora", "elora", "mmea", f"{FOUNDATION}, E0s of other", "other"]
    for name in ("elora", "mmea", "other"):
        assert found[name] == pytest.approx(plain_errors(calculator(FOUNDATION, name)), abs=6e-6)
    for name, E0s in (("elora", E0S), ("other", [-1.0, -2.0, -2.6])):
        assert found[f"{FOUNDATION}, E0s of {name}"] == pytest.approx(plain_errors(foundation_with(E0s)), abs=6e-6)


def test_without_an_adapter_the_foundation_is_as_it_is():
    found = read_table(evaluate(FOUNDATION, [], "labelled.xyz"))
    assert found == {FOUNDATION: pytest.approx(plain_errors(foundation_with()), abs=6e-6)}


def test_labels_that_ase_takes_over_count():
    keys = {"energy_key": "energy", "forces_key": "forces", "stress_key": "stress"}
    assert read_table(evaluate(FOUNDATION, ["elora"], "of_ase.xyz", **keys)) == read_table(
        evaluate(FOUNDATION, ["elora"], "labelled.xyz"))


def test_the_dtype_is_that_of_the_training_or_the_one_that_is_given():
    labels, double = compare(FOUNDATION, ["elora"], "labelled.xyz")
    _, single = compare(FOUNDATION, ["elora"], "labelled.xyz", default_dtype="float32")
    for (_, one), (_, other) in zip(double, single, strict=True):
        for label in labels:
            assert one[label] == pytest.approx(other[label], abs=1e-4)
            assert not np.array_equal(one[label], other[label])


def test_the_head_is_the_one_that_is_given():
    labels, predictions = compare(FOUNDATION, ["two_heads"], "labelled.xyz", head="b")
    structures = [atoms for atoms in ase.io.read("labelled.xyz", ":") if "REF_energy" in atoms.info]
    of_b = calculator(FOUNDATION, "two_heads", head="b")
    expected = [of_b.get_potential_energy(atoms) / len(atoms) for atoms in structures]
    assert predictions[1][1]["energy"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("arguments, options, words", [
    (("elora", [FOUNDATION], "labelled.xyz"), {}, "elora is a directory, and the foundation's file comes first"),
    ((FOUNDATION, [FOUNDATION], "labelled.xyz"), {}, f"{FOUNDATION} is a file, and adapters are directories"),
    (("nowhere.model", ["elora"], "labelled.xyz"), {}, "nowhere.model is neither a file nor a name"),
    ((FOUNDATION, ["nowhere"], "labelled.xyz"), {}, "nowhere is no adapter directory"),
    ((FOUNDATION, ["elora"], "nowhere.xyz"), {}, "nowhere.xyz does not exist"),
    ((FOUNDATION, ["elora"], "weightless.xyz"), {}, "no label of weightless.xyz has a weight"),
    ((FOUNDATION, ["elora"], "labelled.xyz@:2"), {}, "labelled.xyz@:2 does not exist: give the path of a file"),
    ((FOUNDATION, ["elora"], "of_ase.xyz"), {}, "no structure of of_ase.xyz has a label: its keys are "),
    ((FOUNDATION, ["elora"], "labelled.xyz"), {"energy_key": "enrgy"},
     "--energy_key enrgy: no structure of labelled.xyz has a label under it; the keys are REF_energy, REF_forces"),
    ((FOUNDATION, ["elora"], "ammonia.xyz"), {}, "have N, which the adapter elora does not know (it knows H C O)"),
    ((FOUNDATION, [], "sulphur.xyz"), {}, f"have S, which {FOUNDATION} does not know (it knows H C N O)"),
    ((FOUNDATION, ["two_heads"], "labelled.xyz"), {}, "two_heads has the heads a, b: choose one by head"),
    ((FOUNDATION, ["elora"], "labelled.xyz"), {"head": "Defalt"}, "head 'Defalt' is none of "),
    ((FOUNDATION, [], "labelled.xyz"), {"device": "gpu"}, "device gpu cannot be used"),
    ((FOUNDATION, [], "labelled.xyz"), {"batch_size": 0}, "--batch_size 0 is not allowed"),
    ((FOUNDATION, [], "labelled.xyz"), {"default_dtype": "float16"}, "--default_dtype 'float16' is unknown"),
    ((FOUNDATION, ["elora"], "labelled.xyz"), {"plot": "nowhere/a.png"}, "nowhere is no directory: make it"),
    ((FOUNDATION, ["elora"], "labelled.xyz"), {"plot": "a.xyz"}, "--plot a.xyz ends on no format of figures"),
    ((FOUNDATION, ["elora"], "labelled.xyz"), {"plot": "elora/a.png"}, "would change elora, which was given"),
    ((FOUNDATION, ["elora"], "structures.png"), {"plot": "structures.png"}, "would change structures.png"),
], ids=lambda value: "" if isinstance(value, str) else str(value))
def test_what_cannot_be_evaluated_is_one_line(arguments, options, words, folder, monkeypatch):
    ase.io.write("ammonia.xyz", configurations(1, "NH3"))
    ase.io.write("sulphur.xyz", configurations(1, "SH2"))
    ase.io.write("structures.png", configurations(1), format="extxyz")
    weightless = configurations(1)
    weightless[0].info["config_weight"] = 0
    ase.io.write("weightless.xyz", weightless)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr("mace_peft.inspect.compare.predict", None)  # nothing is computed
    with pytest.raises(PeftError) as error:
        evaluate(*arguments, **options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_prediction_that_is_no_number_names_the_model_and_the_structure(tmp_path):
    model = inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products", gate="exp"))
    with torch.no_grad():
        model.products[0].adapter.b2.fill_(1e4)
    save_adapter(model, tmp_path / "exploding")
    torch.save(tiny_mace(), tmp_path / "tiny.model")
    with pytest.raises(PeftError, match="exploding gives energy of NaN or infinity for structure 0"):
        evaluate(str(tmp_path / "tiny.model"), [tmp_path / "exploding"], "labelled.xyz")


@pytest.mark.parametrize("name", ["parity.png", "parity.PDF"])
def test_the_figure_is_written(name, folder):
    assert evaluate(FOUNDATION, ["elora"], "labelled.xyz", plot=name).endswith(f"\nWrote {name}")
    assert (folder / name).read_bytes().startswith({"parity.png": b"\x89PNG", "parity.PDF": b"%PDF"}[name])


def test_the_figure_has_each_prediction_over_its_label_and_all_texts_inside():
    labels, predictions = compare(FOUNDATION, ["elora", "mmea"], "labelled.xyz")
    predictions[0] = ("folder/" * 40 + "no_{mathematics$_" + predictions[0][0] + "$", predictions[0][1])
    figure = draw(labels, predictions)
    for axes, (name, label) in zip(figure.axes, labels.items(), strict=True):
        middle = label.mean() if name == "energy" else 0.0
        *drawn, _ = axes.lines
        assert len({line.get_color() for line in drawn}) == len(predictions)
        for line, (_, predicted) in zip(drawn, predictions, strict=True):
            assert line.get_xdata() == pytest.approx(label.flatten() - middle)
            assert line.get_ydata() == pytest.approx(predicted[name].flatten() - middle)
    colours = [line.get_color() for line in figure.axes[0].lines[:-1]]
    assert [handle.get_color() for handle in figure.legends[0].legend_handles] == colours
    figure.draw_without_rendering()
    for text in [*figure.legends, *(label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label))]:
        extent = text.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= extent.y0 < extent.y1 <= figure.bbox.y1, text


# --- over the strength ------------------------------------------------------------------------------------------------


@pytest.fixture
def away(folder):
    """A second file, of which some structures are those of the first."""
    ase.io.write(folder / "away.xyz", ase.io.read(folder / "labelled.xyz", "2:"))
    return "away.xyz"


def test_errors_at_strengths_are_those_of_the_calculators(away):
    """Energies with the E0s of the run, and those of the second file with those of the foundation."""
    text = evaluate(FOUNDATION, ["mmea"], "labelled.xyz", strengths=away)
    first, second = text.split("Errors on ")[1:]
    assert first.startswith("labelled.xyz, with the E0s of mmea (6 energies")
    assert second.startswith(f"away.xyz, with the E0s of {FOUNDATION} (5 energies") and "| strength |" in second
    own = foundation_with().models[0].atomic_energies_fn.atomic_energies.flatten()[[0, 1, 3]]
    for path, said, E0s in (("labelled.xyz", first, torch.tensor(E0S)), (away, second, own)):
        found = read_table(said)
        assert list(found) == ["0", "0.25", "0.5", "0.75", "1"]
        for strength in (0, 0.25, 1):
            calc = calculator(FOUNDATION, "mmea", strength=strength)
            calc.models[0].atomic_energies_fn.atomic_energies[:] = E0s
            assert found[f"{strength:g}"] == pytest.approx(plain_errors(calc, path), abs=6e-6)
    assert read_table(first)["0"] == read_table(evaluate(FOUNDATION, ["mmea"], "labelled.xyz"))[
        f"{FOUNDATION}, E0s of mmea"]
    assert evaluate(FOUNDATION, ["mmea"], "labelled.xyz", strengths="") == text[:text.index("\nErrors on away.xyz")]


@pytest.mark.parametrize("E0s_at", [1.0, 0.0])
def test_E0s_that_the_adapter_has_learnt_to_shift_are_the_same_at_each_strength(E0s_at):
    expected = isolated.E0s(load_adapter(FOUNDATION, "other", E0s_at))
    loaded = torch.load(FOUNDATION, weights_only=False)
    assert not torch.equal(expected, isolated.E0s(load_adapter(FOUNDATION, "other", 1 - E0s_at)))
    for _, model in at_strengths(FOUNDATION, loaded, {"other": "float64"}, {1, 6, 8}, E0s_at):
        torch.testing.assert_close(isolated.E0s(model), expected, rtol=0, atol=1e-12)


def test_what_holds_a_part_of_what_its_run_has_learnt_is_no_foundation():
    first = fold(randomise(inject(torch.load(FOUNDATION, weights_only=False), PeftConfig("mmea", rank=2))))
    save_adapter(randomise(inject(eject(copy.deepcopy(first)), first.peft_config, origin(first))), "further")
    torch.save(first, "first.model")
    with pytest.raises(PeftError, match="first.model hold a part of what its run has learnt, .* further replaces"):
        evaluate("first.model", ["further"], "labelled.xyz")


def test_the_figure_has_the_errors_over_the_strength(away, folder):
    curves = compare_strengths(FOUNDATION, ["elora"], "labelled.xyz", away)
    curves[0] = ("no_{mathematics$_" + curves[0][0] + "$", *curves[0][1:])
    figure = draw_over_strength(curves)
    figure.draw_without_rendering()
    for axes, name in zip(figure.axes, ("energy", "forces", "stress"), strict=True):
        for line, (_, labels, predictions) in zip(axes.lines, curves, strict=True):
            errors = [1000 * np.sqrt(((found[name] - labels[name])**2).mean()) for _, found in predictions]
            assert line.get_xdata() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
            assert line.get_ydata() == pytest.approx(errors)
    assert evaluate(FOUNDATION, ["elora"], "labelled.xyz", plot="curve.png", strengths="").endswith("\nWrote curve.png")
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("adapters, options, words", [
    ([], {"strengths": ""}, "--strengths is of one adapter, and 0 are given"),
    (["elora", "mmea"], {"strengths": ""}, "--strengths is of one adapter, and 2 are given"),
    (["elora"], {"strengths": "nowhere.xyz"}, "nowhere.xyz does not exist"),
    (["elora"], {"strengths": "away.png", "plot": "away.png"}, "would change away.png, which was given"),
])
def test_strengths_that_cannot_be_evaluated_are_one_line(adapters, options, words, monkeypatch):
    ase.io.write("away.png", configurations(1), format="extxyz")
    monkeypatch.setattr("mace_peft.inspect.compare.predict", None)  # nothing is computed
    with pytest.raises(PeftError) as error:
        evaluate(FOUNDATION, adapters, "labelled.xyz", **options)
    assert words in str(error.value) and "\n" not in str(error.value)
