"""``--peft_keep``: labels, loss and order of the structures that are kept, and runs with them."""

import argparse
import re

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from combined import write_small
from mace.cli import run_train
from mace.modules import WeightedEnergyForcesLoss
from runs import Run, relabel, train_here
from tiny import configurations, predict, randomise, tiny_mace

import mace_peft
from mace_peft import PeftConfig, PeftError, inject, trainable_parameters
from mace_peft.inspect.info import info
from mace_peft.methods import METHODS
from mace_peft.model.inject import fold
from mace_peft.model.isolated import E0S
from mace_peft.train.data import made_structures
from mace_peft.train.data.kept_structures import kept_structures
from mace_peft.train.data.made_structures import made_of
from mace_peft.train.self_replay import SelfReplay

PEFT = {"peft": "elora", "peft_rank": 2, "max_num_epochs": 8}
W, WE, WF = 3.0, 7.0, 11.0
SKIPPED = "RealAgnosticResidualInteractionBlock"  # a first layer with a skip connection: isolated atoms are corrected
MODELS = {"one head": {}, "two heads": {"heads": ("a", "b")}, "isolated atoms": {"first": SKIPPED}}


def others(count: int = 12) -> list[Atoms]:
    """Molecules unlike those of the training set, and a crystal; without labels."""
    bare = [Atoms(atoms.numbers, atoms.positions) for name in ("H2O", "CO2", "C2H4")
            for atoms in configurations(count // 4, name, seed=5)]
    crystals = configurations(count - len(bare), "CH4", seed=6, periodic=True)
    return bare + [Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True) for atoms in crystals]


def interaction(model, structures: list[Atoms]) -> tuple[list[float], list[np.ndarray]]:
    """Energies (eV) less the E0s of the model's buffer, and forces (eV/A), of each structure; heads in turn."""
    E0s = np.atleast_2d(model.atomic_energies_fn._buffers["atomic_energies"].numpy())
    column = {number: i for i, number in enumerate(model.atomic_numbers.tolist())}
    energies, forces = [], []
    for number, atoms in enumerate(structures):
        head = (number + number // 10) % len(model.heads)  # of both those that are kept and those that are held out
        labelled = atoms.copy()
        labelled.info["head"] = model.heads[head]
        energy, force = predict(model, [labelled])
        energies.append(energy.item() - sum(E0s[head, column[z]] for z in atoms.numbers))
        forces.append(force.numpy())
    return energies, forces


def replay(model, structures=None, batch_size=4) -> SelfReplay:
    args = argparse.Namespace(peft_keep="others.xyz", peft_keep_weight=W, seed=1)
    return SelfReplay(structures or others(), model, model, WeightedEnergyForcesLoss(WE, WF), args, batch_size)


@pytest.fixture(params=MODELS)
def models(request, double_precision) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A foundation, and it with adapters that act."""
    adapted = inject(tiny_mace(**MODELS[request.param]), PeftConfig("mmea", rank=2, targets="published"))
    return tiny_mace(**MODELS[request.param]), randomise(adapted, scale=0.2)


# --- labels, loss and order -------------------------------------------------------------------------------------------


def test_labels_are_the_predictions_of_the_foundation(models):
    foundation, model = models
    kept = replay(model)
    energies, forces = interaction(foundation, others())
    numbers = [number for number in range(12) if number % 10]
    for number, graph in zip([0, 10, *numbers], [*kept.held_out, *kept.structures], strict=True):
        assert graph.energy.item() == pytest.approx(energies[number], rel=1e-10, abs=1e-10)
        np.testing.assert_allclose(graph.forces.numpy(), forces[number], rtol=1e-10, atol=1e-10)


def test_the_loss_is_that_of_its_equation(models):
    foundation, model = models
    kept = replay(model)
    batch = [1 + place + place // 9 for place in map(kept.at, range(4))]  # 0 and 10 are held out
    base, now = interaction(foundation, others()), interaction(model, others())
    structures = others()
    energy = np.mean([((now[0][i] - base[0][i]) / len(structures[i])) ** 2 for i in batch])
    force = np.mean(np.concatenate([(now[1][i] - base[1][i]) ** 2 for i in batch]))
    assert kept.next_loss().item() == pytest.approx(W * (WE * energy + WF * force), rel=1e-9)
    held = np.concatenate([np.linalg.norm(now[1][i] - base[1][i], axis=1) for i in (0, 10)])
    assert kept.moved() == pytest.approx(held.mean(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_like_the_foundation_has_no_loss_and_what_is_learnt_has_one(double_precision, method):
    config = PeftConfig(method, rank=2 if "rank" in METHODS[method].settings else None)
    model = inject(tiny_mace(interactions=1), config)
    kept = replay(model)
    assert kept.next_loss().item() < 1e-20
    kept = replay(randomise(model, scale=0.1))
    loss = kept.next_loss()
    loss.backward()
    gradients = [parameter.grad for parameter in trainable_parameters(model).values() if parameter.grad is not None]
    assert loss > 1e-6 and any(gradient.any() for gradient in gradients)


def test_E0s_that_train_along_do_not_enter(double_precision):
    model = randomise(inject(tiny_mace(), PeftConfig("elora", rank=2, train_also=E0S)), scale=0.2)
    kept, trained = replay(model), trainable_parameters(model)
    (shift,) = [parameter for name, parameter in trained.items() if name.startswith("atomic_energies_fn")]
    loss = kept.next_loss()
    loss.backward()
    assert shift.grad is None or not shift.grad.any()
    with torch.no_grad():
        shift += 100.0
        model.get_buffer(E0S).add_(1e6)
    kept.taken = 0
    assert kept.next_loss().item() == pytest.approx(loss.item(), rel=1e-10)


def test_the_order_is_one_of_its_own_and_draws_no_random_numbers_of_the_run(double_precision):
    model = inject(tiny_mace(interactions=1), PeftConfig("scales"))
    numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    kept = replay(model, made_of({1, 6, 8}, count=12))
    kept.next_loss()
    assert torch.equal(torch.get_rng_state(), numbers[0]) and (np.random.get_state()[1] == numbers[1]).all()
    first, second = ([kept.at(10 * turn + place) for place in range(10)] for turn in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second, "each pass takes each once"


def test_processes_share_a_batch(double_precision, monkeypatch):
    kept = replay(inject(tiny_mace(interactions=1), PeftConfig("scales")), batch_size=4)
    whole, asked = [kept.at(place) for place in range(4)], []
    kept.batch_size, kept.processes = 2, 2
    monkeypatch.setattr(kept, "at", lambda place: asked.append(place) or 0)
    for kept.rank in (0, 1):
        kept.taken = 0
        kept.next_loss()
    assert sorted(asked) == [0, 1, 2, 3] and len(whole) == kept.taken == 4


def test_predictions_that_are_not_finite_stop(double_precision):
    model = inject(tiny_mace(interactions=1), PeftConfig("scales"))
    hydrogen = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]])
    with torch.no_grad():
        model.node_embedding.linear.weight[:len(model.node_embedding.linear.weight) // 3] = torch.nan  # of H, the first
    with pytest.raises(PeftError, match="predicts NaN or infinity for structure 0 of others.xyz"):
        replay(model, [hydrogen, *others()[:2]])


# --- structures of a file ---------------------------------------------------------------------------------------------


@pytest.mark.since("0.3.14")  # which has charges
def test_labels_of_a_file_are_not_read_and_its_charges_are(tmp_path):
    structures = configurations(3)
    structures[1].info |= {"total_charge": 2, "REF_energy": np.nan}
    ase.io.write(tmp_path / "kept.xyz", structures)
    kept = kept_structures(str(tmp_path / "kept.xyz"), [1, 6, 8])
    assert [atoms.info for atoms in kept] == [{}, {"total_charge": 2}, {}]
    assert all(set(atoms.arrays) == {"numbers", "positions"} and atoms.calc is None for atoms in kept)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = relabel(write_small(tmp_path_factory.mktemp("inputs")))
    ase.io.write(folder / "kept.xyz", others(20))
    ase.io.write(folder / "one.xyz", others()[:1])
    ase.io.write(folder / "nitrogen.xyz", configurations(3, "NH3"))
    without_cell = others()[:2]
    without_cell[1].pbc, without_cell[1].cell = True, None
    ase.io.write(folder / "nocell.xyz", without_cell)
    (folder / "empty.xyz").write_text("")
    trained = randomise(inject(torch.load(folder / "foundation.model", weights_only=False), PeftConfig("mmea", rank=2)))
    torch.save(fold(trained), folder / "gates.model")
    return folder


def moved(run: Run) -> list[float]:
    """What the log says, epoch by epoch, in meV/A."""
    return [float(number) for number in re.findall(r"moved from the foundation's by ([\d.]+) meV/A", run.log)]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics if line["mode"] == "eval"]


@pytest.fixture(scope="module")
def runs(inputs, uncompiled) -> dict[float | None, Run]:
    """Runs by the weight of what is kept."""
    found = {}
    for weight in (None, 1e-12, 1e6):
        keep = {} if weight is None else {"peft_keep": inputs / "kept.xyz", "peft_keep_weight": weight}
        found[weight] = Run(inputs / f"weight {weight}")
        train_here(inputs, "--ema", "--swa", **PEFT, **keep, work_dir=found[weight].folder, ema_decay=0.5, start_swa=6)
    return found


def test_a_tiny_weight_leaves_the_run_as_it_is(runs):
    """The order of its data, too."""
    assert losses(runs[1e-12]) == pytest.approx(losses(runs[None]), rel=1e-8)
    assert moved(runs[None]) == []


def test_a_huge_weight_holds_the_forces_of_others(runs):
    free, held = moved(runs[1e-12]), moved(runs[1e6])
    assert len(free) == len(held) == 8
    assert held[-1] < 0.3 * free[-1]


def test_the_run_and_its_adapter_say_what_was_kept(runs):
    run = runs[1e6]
    assert "Self-replay: the foundation's predictions are kept for 18 structures of --peft_keep" in run.log
    assert "4 in each step, with the weight 1e+06; 2 more are held out" in run.log
    options = run.adapter_config()["training"]["options"]
    assert (options["peft_keep"], options["peft_keep_weight"]) == ("kept.xyz", 1e6)
    for text in (info(str(run.adapter())), (run.adapter() / "README.md").read_text()):
        assert "--peft_keep=kept.xyz --peft_keep_weight=1000000.0" in text
    assert "peft_keep" not in runs[None].adapter_config()["training"]["options"]


def test_what_is_said_of_an_epoch_is_what_its_adapter_does(runs, inputs):
    """With the averages of the weights, which were evaluated."""
    run, held_out = runs[1e-12], others(20)[::10]
    foundation = torch.load(inputs / "foundation.model", weights_only=False)
    forces = interaction(foundation, held_out)[1]
    now = interaction(mace_peft.load_adapter(foundation, run.adapter(stage_two=True)), held_out)[1]
    lengths = np.concatenate([np.linalg.norm(a - b, axis=1) for a, b in zip(now, forces, strict=True)])
    assert moved(run)[run.progress().result(stage_two=True).epoch] == pytest.approx(1000 * lengths.mean(), abs=0.006)


def test_a_run_keeps_what_is_made_of_its_elements(inputs, tmp_path, uncompiled):
    run = Run(tmp_path)
    train_here(inputs, **PEFT | {"max_num_epochs": 1}, peft_keep="auto", work_dir=tmp_path)
    assert "kept for 180 structures of --peft_keep auto, 4 in each step, with the weight 0.01; 20 more" in run.log
    assert len(moved(run)) == 1


MISTAKES = {
    "missing file": ({"peft_keep": "nowhere.xyz"}, "--peft_keep nowhere.xyz does not exist: .* use auto"),
    "empty file": ({"peft_keep": "empty.xyz"}, "empty.xyz (has no structures|cannot be read)"),
    "folder": ({"peft_keep": "."}, "error: . is no regular file"),
    "one structure": ({"peft_keep": "one.xyz"}, "one.xyz has one structure, .* give more"),
    "no cell": ({"peft_keep": "nocell.xyz"}, "structure 1 of nocell.xyz is periodic, and has no cell"),
    "no cell, looked at": ({"peft_keep": "nocell.xyz", "dry_run": True}, "structure 1 of nocell.xyz is periodic"),
    "no foundation": ({"peft": "mmea", "foundation_model": "gates.model", "peft_keep": "kept.xyz"},
                      "--peft_keep kept.xyz cannot go with foundation model gates.model, whose weights hold a part"),
    "element": ({"peft_keep": "nitrogen.xyz"}, "nitrogen.xyz has structures of N, .* this run knows H C O"),
    "nothing to make": ({"peft_keep": "auto"}, "no molecule and no crystal to keep can be made of H C O"),
    "weight": ({"peft_keep": "auto", "peft_keep_weight": 0}, "--peft_keep_weight 0 is not a number above 0"),
    "weight as a word": ({"peft_keep": "auto", "peft_keep_weight": "much"}, "--peft_keep_weight much is not a number"),
    "weight of nothing": ({"peft_keep_weight": 2}, "--peft_keep_weight 2 has no effect without --peft_keep"),
    "no method": ({"peft": None, "peft_rank": None, "peft_keep": "auto"}, "--peft_keep auto has no effect without"),
    "LBFGS": ({"peft_keep": "auto", "lbfgs": True}, "--peft_keep auto cannot go with --lbfgs"),
}


@pytest.mark.parametrize("options, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_the_training(inputs, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(made_structures, "molecules", lambda known: [])
    monkeypatch.setattr(made_structures, "crystals", lambda known: [])
    monkeypatch.setattr(run_train.tools, "train", lambda **given: pytest.fail("it trains"))
    given = {**PEFT, **options}
    flags = [f"--{name}" for name in ("lbfgs", "dry_run") if given.pop(name, False)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_here(inputs, *flags, **given, work_dir=tmp_path)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("mace_run_train: error: ") and said.count("\n") == 1
    assert re.search(words, said), said


AUTO = {"peft_keep": "auto"}
CHANGED = {
    "no more": (AUTO, {}, "was made with --peft_keep auto, with which a restart goes on, and this run has none"),
    "new": ({}, AUTO, "was made without --peft_keep, with which a restart goes on, and this run asks for auto"),
    "weight": (AUTO, AUTO | {"peft_keep_weight": 1}, "with --peft_keep_weight 0.01, .* this run asks for 1.0"),
}


@pytest.mark.parametrize("earlier, later, words", CHANGED.values(), ids=CHANGED)
def test_a_restart_that_would_keep_otherwise_stops(inputs, tmp_path, capsys, uncompiled, earlier, later, words):
    train_here(inputs, **PEFT | {"max_num_epochs": 1}, **earlier, work_dir=tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_here(inputs, "--restart_latest", **PEFT | {"max_num_epochs": 2}, **later, work_dir=tmp_path)
    assert re.search(words, capsys.readouterr().err)
