"""The accuracy benchmark: real cells on a small foundation, what it tries, and what it writes."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mace.cli import run_train
from runs import write_inputs
from tiny import batch, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, inject
from mace_peft.blocks.mace import OPERATIONS
from mace_peft.e3nn import o3

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the folder, by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def docs(benchmark, monkeypatch, tmp_path):
    """A folder with a page of all parts that a report writes."""
    folder = tmp_path / "docs"
    (folder / "figures").mkdir(parents=True)
    parts = ("versions", "molecules", "acac", "claims", "forgetting", "rates", "sizes", "ranks", "small", "chosen",
             "messages", "ablations", "E0s", "aims", "clipping", "falling")
    figures = [f"![](figures/accuracy_{name}.png)" for name in ("summary", "curves", "forgetting", "sizes")]

    def marks(*parts: str) -> str:
        return "\n".join(f"<!-- {part} -->\n\n<!-- end of {part} -->" for part in parts)

    (folder / "results").mkdir()
    (folder / "results.md").write_text("\n".join([marks("summary"), figures[0]]))
    (folder / "results" / "all.md").write_text("\n".join([marks(*parts), *figures[1:]]))
    (tmp_path / "README.md").write_text(marks("which", "why"))
    monkeypatch.setattr(benchmark("pages"), "DOCS", folder)
    return folder


@pytest.mark.since("0.3.16")
def test_a_cell_runs_and_is_not_run_again(benchmark, docs, monkeypatch, tmp_path):
    accuracy, cells = benchmark("accuracy"), benchmark("cells")
    folder = write_inputs(tmp_path)
    data = tmp_path / "data" / "rmd17" / "ethanol"
    data.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        shutil.copy(folder / f"{part}.xyz", data)
    cell = cells.Cell("ethanol", "mmea products, shared", 0.01, epochs=3, rank=2, train=6)
    monkeypatch.setitem(cells.EXPERIMENTS, "ranks", lambda results, rates: iter([cell]))
    out = tmp_path / "accuracy.json"
    arguments = ["accuracy.py", f"--foundation={folder}/foundation.model", f"--pretraining={folder}/test.xyz",
                 f"--data={tmp_path}/data", f"--work={tmp_path}/work", f"--out={out}", "--experiments", "ranks"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        accuracy.main()
    assert stop.value.code is None
    result = json.loads(out.read_text())[cell.key]
    # W1, b1 and W0, b0 of 4 scalars and rank 2 in two blocks, and in the first, which has vectors, a gain and its bias
    assert result["parameters"] == 2 * (4 * 2 + 2 + 2 * 4 + 4) + (2 + 1)
    assert len(result["curve"]["mae_f"]) == 3
    assert result["errors"].keys() == {"test", "pretraining"}
    test, pretraining = result["errors"]["test"], result["errors"]["pretraining"]  # the same structures
    assert test["mae_f"] == pretraining["mae_f"] > 0 and test["rmse_e"] >= pretraining["rmse_e"]
    # of the second run there is nothing to do
    written = out.stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        accuracy.main()
    assert stop.value.code is None
    assert out.stat().st_mtime_ns == written


@pytest.mark.since("0.3.16")
def test_a_model_from_scratch_has_the_shape_of_the_foundation(benchmark, tmp_path):
    accuracy = benchmark("accuracy")
    torch.save(tiny_mace(), tmp_path / "foundation.model")
    args = SimpleNamespace(foundation=tmp_path / "foundation.model", data=tmp_path, device="cpu")
    line = accuracy.command(benchmark("cells").Cell("ethanol", "scratch", 0.01), args)
    args = run_train.tools.build_default_arg_parser().parse_args(line[3:])
    assert args.foundation_model is None and args.E0s == "average" and args.model == "ScaleShiftMACE"
    assert (args.hidden_irreps, args.MLP_irreps, args.radial_MLP) == ("4x0e+4x1o", "8x0e", "[8, 8, 8]")
    assert (args.r_max, args.max_ell, args.correlation, args.num_interactions) == (4.0, 2, 3, 2)
    assert (args.num_radial_basis, args.num_cutoff_basis) == (4, 5)


@pytest.mark.since("0.3.15")
def test_parameters_of_MACE_LoRA_are_those_that_train(benchmark):
    said = "INFO: Original model has 1200 trainable parameters.\nINFO: Model with LoRA has 1530 trainable parameters."
    assert benchmark("accuracy").trained(benchmark("cells").Cell("ethanol", "MACE LoRA", 0.01), {}, said, None) == 330


@pytest.mark.parametrize("kind", ["static", "shared", "scalars"])
def test_an_ablation_holds_back_a_part_of_the_gate(benchmark, kind):
    train, mmea = benchmark("train"), importlib.import_module("mace_peft.methods.mmea")
    torch.manual_seed(0)
    gate = mmea.MMEA("4x0e+3x1o", "4x0e+3x1o+2x2e", rank=2)
    start = {name: parameter.detach().clone() for name, parameter in gate.named_parameters()}
    for name, change in train.HELD[kind].items():
        getattr(gate, name).register_hook(change)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1, amsgrad=True)
    x, h, target = torch.randn(20, 13), torch.randn(20, 23), torch.randn(20, 23)
    for _ in range(5):
        optimizer.zero_grad()
        (gate(x, h) - target).square().sum().backward()
        optimizer.step()
    gains, shifts = gate.coefficients(x)
    changed = {name for name, parameter in gate.named_parameters() if not torch.equal(parameter, start[name])}
    match kind:
        case "static":
            assert changed == {"b2", "b0"}
            assert torch.equal(gains, gains[:1].expand_as(gains)) and gains.std() > 0
        case "scalars":
            assert changed == {"W1", "b1", "W0", "b0"} and torch.equal(gains, torch.ones_like(gains))
        case "shared":
            assert changed == set(start)
            assert torch.equal(gains, gains[:, :1].expand_as(gains)) and gains[:, 0].std() > 0
    counts = {"static": 5 + 4, "scalars": 4 * 2 + 2 + 2 * 4 + 4, "shared": 4 * 2 + 2 + 2 * 4 + 4 + 2 + 1}
    assert train.learnt(kind, gate.state_dict()) == counts[kind]


def test_gates_of_messages_can_see_the_atom_that_sends(benchmark, monkeypatch):
    """The features of the sender drive gains of the weights of its messages."""
    plain = tiny_mace()
    monkeypatch.setitem(OPERATIONS, o3.TensorProduct, benchmark("senders").BY_SENDERS)
    model = inject(tiny_mace(), PeftConfig("gates", rank=2, targets="interactions.*.conv_tp"))
    inputs, gains = batch(model, configurations(2)), []

    def look(gate, given):
        assert len(given[0]) == inputs["edge_index"].shape[1]
        gains.append(gate.coefficients(given[0])[0].detach())

    for interaction in model.interactions:
        randomise(interaction.conv_tp.adapter).register_forward_pre_hook(look)
    gated = model(inputs)["energy"]
    for interaction in plain.interactions:
        interaction.conv_tp_weights.register_forward_hook(lambda mlp, _, weights: gains.pop(0) * weights)
    assert torch.equal(gated, plain(inputs)["energy"])


def result(cells, cell, force: float) -> dict:
    """Made up, as of a run with this error."""
    errors = {"count": 3, "mae_e": force / 2, "rmse_e": force, "mae_f": force, "rmse_f": 2 * force}
    return {**vars(cell), "environment": {"commit": "c", "machine": "m", "versions": {"torch": "1"}}, "seconds": 1.0,
            "curve": {"mae_e": [force], "mae_f": [2 * force, force]},
            "parameters": 1000 if cell.method == "full" else 10,
            "errors": {name: errors for name in (*cell.tests, *(["pretraining"] if cell.tests else []))}}


def test_the_sweep_goes_on_until_the_best_is_between_others(benchmark):
    cells = benchmark("cells")
    best = {method: cells.LADDER[place % 7] for place, method in enumerate(cells.TRAINED)}
    results = {}
    for _ in range(5):
        tried = list(cells.sweep(results, {}))
        results |= {cell.key: result(cells, cell, 1 + abs(cells.LADDER.index(cell.lr) - cells.LADDER.index(
            best[cell.method]))) for cell in tried}
    assert cells.learning_rates(results) == {"foundation": 0.0, **best, **{
        name: best["mmea products"] for name in cells.ABLATED}}
    counts = [sum(cell.method == method for cell in tried) for method in cells.TRAINED[:7]]
    assert counts == [4, 4, 4, 4, 5, 6, 6]
    assert {cell.tests for cell in tried} == {()}


def test_cells_wait_for_their_learning_rate(benchmark):
    cells = benchmark("cells")
    waiting = cells.EXPERIMENTS.keys() - {"sweep", "small", "messages", "clipping", "falling"}
    assert all(not list(cells.EXPERIMENTS[name]({}, {})) for name in waiting)
    main = list(cells.EXPERIMENTS["main"]({}, {"full": 0.001}))
    assert {(cell.method, cell.lr) for cell in main} == {("full", 0.001)} and len(main) == 15
    every = [cell.key for name in cells.EXPERIMENTS
             for cell in cells.EXPERIMENTS[name]({}, dict.fromkeys(cells.METHODS, 0.01))]
    assert len(set(every)) < len(every)  # experiments share cells


def test_ablations_are_what_the_program_that_trains_has_to_know(benchmark):
    cells = benchmark("cells")
    found = {method: cells.Cell("ethanol", method, 0.01).ablation for method in cells.METHODS}
    assert {method: name for method, name in found.items() if name} == {
        "mmea products, static": "static", "mmea products, shared": "shared", "mmea products, scalars": "scalars",
        "gates, senders": "senders"}


def test_any_number_of_configurations_takes_as_many_steps(benchmark):
    cells = benchmark("cells")
    sizes = list(cells.sizes({}, dict.fromkeys(cells.TRAINED, 0.01)))
    assert {cell.train for cell in sizes} == {10, 25, 50, 100, 200}
    for cell in sizes:
        options = cell.options()
        assert options["max_num_epochs"] * cell.train / options["batch_size"] == 2000
        assert options["max_num_epochs"] / options["eval_interval"] <= 200


def test_clipping_at_10_has_a_table_of_its_own(benchmark):
    cells, report = benchmark("cells"), benchmark("accuracy_report")
    results = {cell.key: result(cells, cell, 0.1 * cell.lr) for cell in cells.clipped({}, {})}
    lines = report.clipping(benchmark("accuracy_results").Results(results)).splitlines()
    assert lines[0] == "| lr | 0.0025 | 0.005 | 0.01 | 0.02 |"
    assert lines[2:] == ["| full | 0.2 | 0.5 | 1.0 |  |", "| best |  |  | 1.0 | 2.0 |"]


@pytest.mark.since("0.3.15")
def test_the_report_has_what_was_measured(benchmark, docs):
    cells, report = benchmark("cells"), benchmark("accuracy_report")
    swept = {cell.key: result(cells, cell, 0.1 / cell.lr) for cell in cells.sweep({}, {})}
    for _ in range(3):
        swept |= {cell.key: result(cells, cell, 0.1 / cell.lr) for cell in cells.sweep(swept, {})}
    rates = cells.learning_rates(swept)
    force = {method: 0.010 + 0.001 * place for place, method in enumerate(cells.METHODS)}
    results = {cell.key: result(cells, cell, force[cell.method] + 0.002 * cell.seed)
               for name in cells.EXPERIMENTS for cell in cells.EXPERIMENTS[name](swept, rates)} | swept
    (docs / "results" / "kinds.md").write_text("<!-- summary -->\nof another study\n<!-- end of summary -->")
    report.write_report(results)
    assert "of another study" in (docs / "results" / "kinds.md").read_text()
    page, top = ((docs / name).read_text() for name in ("results/all.md", "results.md"))
    assert "| full | 1,000 (100.0 %) | 8.00 ± 1.00 | 16.0 ± 2.0 |" in page  # force[full] = 12, seeds 1 to 3 add 2 to 6
    assert "| MMEA below ELoRA, rMD17, force | 8.7 % | -4.3 % | -13.0 |" in page  # 24 against 23
    assert "| MMEA below ELoRA, AcAc at 600 K, force RMSE | better | -4.3 % |  |" in page
    assert "| mmea published: trained, of all parameters | 20.1 % | 1.0 % | -19.1 |" in page
    assert "| scales / MACE LoRA | 1.05 |" + 6 * " **1.444** |" in page  # 26 against 18
    readme = (docs.parent / "README.md").read_text()
    small = "| 5 % of the parameters | `--lr 0.3 --swa_lr 0.06 --peft small` | 10 (1.0 %) | 1.69 |"
    assert small in readme  # 27 against 16
    assert "| force error, full = 1 | 1.31 | 1.50 | 1.12 | 1.00 |" in readme and "no data set" not in readme
    assert "| `--peft small` | 10 (1.0 %) | 1.69 | 1.69 to 1.69 | " in top
    assert page.count("**") == 2 * (len(cells.TRAINED) + 18)  # one best learning rate each, and what is missed
    for name in ("summary", "curves", "forgetting", "sizes"):
        assert (docs / "figures" / f"accuracy_{name}.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no marks <!-- nothing -->"):
        benchmark("pages").fill(docs / "results.md", {"nothing": ""})


def test_errors_are_those_of_the_predictions(benchmark):
    errors, model, structures = benchmark("errors"), tiny_mace(), configurations(3, "H2O") + configurations(2, "CH3OH")
    energies, forces = predict(model, structures)
    energies = energies.numpy() - np.array([atoms.info["REF_energy"] for atoms in structures])
    forces = forces.numpy() - np.concatenate([atoms.arrays["REF_forces"] for atoms in structures])
    found = errors.errors(model, structures, "cpu")
    assert found == pytest.approx({"count": 5, "mae_e": np.abs(energies).mean(), "rmse_e": (energies**2).mean() ** 0.5,
                                   "mae_f": np.abs(forces).mean(), "rmse_f": (forces**2).mean() ** 0.5})
    # labels that differ by a constant for each element are the same to a refit
    for atoms in structures:
        atoms.info["REF_energy"] += 5.0 * (atoms.numbers == 1).sum() - 3.0 * (atoms.numbers == 8).sum()
    refit = errors.errors(model, structures, "cpu", refit=True)
    assert refit["mae_f"] == found["mae_f"] and refit["rmse_e"] < found["rmse_e"]
    for atoms in structures:
        atoms.info["REF_energy"] -= 7.0 * (atoms.numbers == 6).sum()
    assert errors.errors(model, structures, "cpu", refit=True)["rmse_e"] == pytest.approx(refit["rmse_e"], rel=1e-6)


def test_errors_leave_out_what_the_model_does_not_know(benchmark):
    errors = benchmark("errors")
    model = tiny_mace(elements=(1, 8))
    structures = configurations(3, "H2O") + configurations(2, "CH3OH")
    assert [len(atoms) for atoms in errors.known(model, structures)] == [3, 3, 3]
