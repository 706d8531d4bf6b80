"""Fine-tunes by ``mace_run_train --peft``: the files they leave, what trains, and what stays as it was."""

import copy
import dataclasses
import functools
import gc
import logging
import os
import re
import subprocess
import sys
import weakref

import ase.io
import mace
import numpy as np
import pytest
import torch
import yaml
from mace import data
from mace.calculators import MACECalculator
from mace.tools import AtomicNumberTable, MetricsLogger, evaluate, torch_geometric
from mace.tools.tables_utils import create_error_table
from mace.tools.train import valid_err_log
from runs import (
    E0S,
    FEWER_ELEMENTS,
    MOLECULE,
    NAME,
    STAGES,
    Run,
    environment,
    fork,
    reach_training,
    train,
    train_here,
    write_inputs,
)
from tiny import configurations, predict

import mace_peft
from mace_peft import PeftConfig, inject, load_adapter, trainable_parameters
from mace_peft.adapter.facts import error_rows, error_table
from mace_peft.inspect.info import info
from mace_peft.methods.mmea import BOUND
from mace_peft.model import isolated
from mace_peft.model.adapted import fingerprint
from mace_peft.model.targets import find_targets, unit
from mace_peft.quiet import HARMLESS
from mace_peft.train.checkpoints import measures

pytestmark = pytest.mark.usefixtures("double_precision")

ATOMIC_ENERGIES = "atomic_energies_fn.atomic_energies"


@dataclasses.dataclass
class Case:
    molecule: str
    peft: dict
    flags: tuple = ()
    more: dict = dataclasses.field(default_factory=dict)
    as_yaml: bool = False

    @property
    def config(self) -> PeftConfig:
        """The settings of the run: E0s that were fitted train along."""
        given = {name.removeprefix("peft_"): value for name, value in self.peft.items() if name != "peft"}
        if self.more.get("E0s") in ("average", "estimated"):
            given["train_also"] = ",".join([*filter(None, [given.get("train_also")]), isolated.E0S])
        return PeftConfig(method=self.peft["peft"], **given)

    @property
    def stages(self) -> list[bool]:
        return [False, True] if "--swa" in self.flags else [False]

    @property
    def merges(self) -> bool:
        """Whether NAME.model is a plain MACE model."""
        return not self.config.row.has_gates


ESTIMATED = "estimated" if hasattr(data, "estimate_e0s_from_foundation") else "average"  # mace-torch 0.3.15 and later
CASES = {
    "mmea-products": Case(
        MOLECULE, {"peft": "mmea", "peft_rank": 2, "peft_targets": "products", "peft_train_also": "readouts.*"},
        ("--swa", "--ema"), {"start_swa": 2, "max_num_epochs": 3},
    ),
    "elora-products": Case(
        FEWER_ELEMENTS, {"peft": "elora", "peft_rank": 3, "peft_targets": "products", "peft_alpha": 6.0},
        ("--swa",), {"start_swa": 1, "E0s": ESTIMATED},
    ),
    "mmea-published": Case(
        FEWER_ELEMENTS, {"peft": "mmea", "peft_rank": 2, "peft_targets": "published", "peft_gate": "exp"},
        more={"E0s": E0S[FEWER_ELEMENTS]},
    ),
    "elora-published": Case(
        MOLECULE, {"peft": "elora", "peft_rank": 2, "peft_targets": "published", "peft_alpha": 5.0},
        ("--ema",), {"E0s": "average", "ema_decay": 0.5}, as_yaml=True,
    ),
    "scales-all": Case(
        FEWER_ELEMENTS, {"peft": "scales", "peft_targets": "all"}, ("--swa",),
        {"start_swa": 1, "E0s": E0S[FEWER_ELEMENTS]},
    ),
    "gates-all": Case(MOLECULE, {"peft": "gates", "peft_rank": 2, "peft_targets": "all"}),
    "full": Case(MOLECULE, {"peft": "full"}, ("--ema",), {"E0s": "average"}),
}
EVERY = pytest.mark.parametrize("name", CASES)


def every_stage(cases=CASES):
    """Parametrises a test by ``name`` and ``stage_two`` of each model that the cases leave."""
    stages = [(name, stage) for name in cases for stage in CASES[name].stages]
    return pytest.mark.parametrize("name, stage_two", [pytest.param(*s, id=s[0] + STAGES[s[1]]) for s in stages])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The finished run of each case, by name."""

    @functools.cache
    def run(name: str) -> Run:
        case = CASES[name]
        folder = write_inputs(tmp_path_factory.mktemp(name), case.molecule)
        if not case.as_yaml:
            return fork(folder, *case.flags, **case.more, **case.peft)
        (folder / "peft.yaml").write_text(yaml.safe_dump(case.peft))
        return train(folder, *case.flags, f"--config={folder / 'peft.yaml'}", **case.more)

    return run


@pytest.fixture(scope="module")
def before_training(finished):
    """What MACE hands to its training loop in each case, without ``--peft``."""

    @functools.cache
    def stock(name: str) -> dict:
        return reach_training(finished(name).folder, **CASES[name].more)

    return stock


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with inputs, for runs in this process."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def unseen(name: str) -> list:
    """Structures that no run has seen."""
    return configurations(3, CASES[name].molecule, seed=7)


def shapes(tensors) -> list[tuple]:
    return sorted(tuple(tensor.shape) for tensor in tensors)


# --- what a run leaves ------------------------------------------------------------------------------------------------


@EVERY
def test_a_run_succeeds_and_leaves_its_files(finished, name):
    run = finished(name)
    assert run.returncode == 0, run.stderr
    stems = [NAME + STAGES[stage] for stage in CASES[name].stages]
    left = {path.name for path in run.folder.glob(f"{NAME}*")}
    assert left == {stem + end for stem in stems for end in (".model", "_compiled.model", "_adapter")}
    for stage in CASES[name].stages:
        files = {path.name for path in run.adapter(stage).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "INFO: Done\n" in run.log and "In ASE: " in run.log.splitlines()[-1]
    assert "ERROR" not in run.log


@every_stage()
def test_the_adapter_directory_holds_the_settings_and_what_trained(finished, name, stage_two):
    run = finished(name)
    described = run.adapter_config(stage_two)
    assert PeftConfig(**described["peft"]) == CASES[name].config
    foundation = torch.load(run.folder / "foundation.model", weights_only=False)
    origin = {"name": "foundation.model", "head": None, "fingerprint": fingerprint(foundation)}
    assert described["foundation"] == origin
    assert dict(zip(described["elements"], described["E0s"][0], strict=True)) == run.printed_E0s()
    checkpoint, tensors = run.result(stage_two), run.adapter_tensors(stage_two)
    assert checkpoint.keys() == tensors.keys()
    assert all(torch.equal(tensor, checkpoint[key]) for key, tensor in tensors.items())


@every_stage()
def test_the_foundation_and_the_adapter_directory_give_the_trained_model(finished, name, stage_two):
    run = finished(name)
    foundation = torch.load(run.folder / "foundation.model", weights_only=False)
    loaded = predict(load_adapter(foundation, run.adapter(stage_two)), unseen(name))
    torch.testing.assert_close(loaded, predict(run.model(stage_two), unseen(name)), rtol=1e-10, atol=1e-10)


@every_stage()
def test_the_saved_model_predicts_as_the_trained_one(finished, before_training, name, stage_two):
    """The trained one: MACE's model before training, with adapters, and the tensors of the checkpoint."""
    run = finished(name)
    trained = inject(copy.deepcopy(before_training(name)["model"]), CASES[name].config)
    trained.load_state_dict({**trained.state_dict(), **run.result(stage_two)})
    trained.atomic_energies_fn.atomic_energies.copy_(torch.tensor([list(run.printed_E0s().values())]))
    expected = predict(trained, unseen(name))
    torch.testing.assert_close(predict(run.model(stage_two), unseen(name)), expected, rtol=1e-10, atol=1e-10)


@every_stage()
def test_the_compiled_model_predicts_as_the_saved_one(finished, name, stage_two):
    run = finished(name)
    compiled = torch.jit.load(run.folder / f"{NAME}{STAGES[stage_two]}_compiled.model")
    expected = predict(run.model(stage_two), unseen(name))
    torch.testing.assert_close(predict(compiled, unseen(name)), expected, rtol=1e-10, atol=1e-10)


@EVERY
def test_a_calculator_takes_the_saved_model(finished, name):
    run, atoms = finished(name), unseen(name)[0]
    energies, forces = predict(run.model(), [atoms])
    atoms.calc = MACECalculator(model_paths=run.folder / f"{NAME}.model", device="cpu", default_dtype="float64")
    assert atoms.get_potential_energy() == pytest.approx(energies.item(), abs=1e-10)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-10)


@every_stage([name for name, case in CASES.items() if case.merges])
def test_what_merges_leaves_a_plain_mace_model(finished, before_training, name, stage_two):
    model, stock = finished(name).model(stage_two), before_training(name)["model"]
    classes, expected = [{key: type(module).__name__ for key, module in m.named_modules(remove_duplicate=False)}
                         for m in (model, stock)]
    assert classes == expected
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert vars(model).keys() == vars(stock).keys()


WITHOUT_MACE_PEFT = """
import sys
sys.modules["mace_peft"] = None
import torch
from tiny import configurations, predict

gated, results, *files = sys.argv[1:]
try:
    torch.load(gated, weights_only=False)
except ModuleNotFoundError:
    torch.save({
        file: predict(torch.load(file, weights_only=False), configurations(3, molecule, seed=7))
        for molecule, _, file in (argument.partition("=") for argument in files)
    }, results)
"""


def test_merged_and_compiled_models_predict_where_mace_peft_is_missing(finished, tmp_path):
    """The process loads no adapted model, as a check that mace_peft is missing there, and then all of the others."""
    expected = {}
    for name, case in CASES.items():
        run = finished(name)
        files = [f"{NAME}_compiled.model"] + [f"{NAME}.model"] * case.merges
        prediction = predict(run.model(), unseen(name))
        expected |= {f"{case.molecule}={run.folder / file}": prediction for file in files}
    process = [sys.executable, "-S", "-c", WITHOUT_MACE_PEFT, finished("mmea-products").folder / f"{NAME}.model",
               tmp_path / "results.pt", *expected]
    subprocess.run(process, env=environment(PYTHONPATH=os.pathsep.join(sys.path)), check=True, timeout=600)
    results = torch.load(tmp_path / "results.pt")
    for argument, prediction in expected.items():
        torch.testing.assert_close(results[argument.partition("=")[2]], prediction, rtol=1e-10, atol=1e-10)


# --- what a run says --------------------------------------------------------------------------------------------------


@EVERY
def test_the_log_lists_what_trains(finished, before_training, name):
    log, model, config = finished(name).log, before_training(name)["model"], CASES[name].config
    assert config.options() in log
    listed = re.findall(r"^\| (\S+) +\| (?:gates?|gains|shift|low-rank update|itself) +\| +([\d,]+) \|", log, re.M)
    along = {key for key, weight in model.named_parameters()
             if key.startswith("readouts.") and "readouts" in (config.train_also or "") and weight.numel()}
    if config.method == "full":
        along = {unit(model, key.rpartition(".")[0]) for key in finished(name).adapter_tensors()
                 if ".adapter." not in key}
    assert {module for module, _ in listed} == {unit(model, target) for target in find_targets(model, config)} | along
    trained = sum(tensor.numel() for tensor in finished(name).adapter_tensors().values())
    assert sum(int(number.replace(",", "")) for _, number in listed) == trained
    base = sum(parameter.numel() for parameter in model.parameters())
    assert f"Trainable: {trained:,} parameters, {100 * trained / base:.1f} % of the base's {base:,}\n" in log


@EVERY
def test_the_log_has_versions_and_times(finished, name):
    log = finished(name).log
    assert f"INFO: Versions: mace_peft {mace_peft.__version__}, mace {mace.__version__}, " in log
    assert f"torch {torch.__version__}\n" in log
    assert " s per epoch; " in log and len(re.findall(r"INFO: Time: \S+ s per epoch, [:\d]+ in all\n", log)) == 1


def test_a_run_shows_no_warning_that_nobody_can_act_on(finished):
    """Neither on stderr, but for what e3nn says at its import, before the options are read, nor in the log."""
    run = finished("elora-published")
    said = [line for line in run.stderr.splitlines() if "e3nn/o3/_wigner.py" not in line]
    assert not [line for line in said for harmless in HARMLESS if harmless in line]
    assert "WARNING" not in run.log.partition("Adapters: ")[0]


def foundation_with_E0s(run: Run) -> torch.nn.Module:
    """The foundation file, with the E0s that the log prints."""
    foundation = torch.load(run.folder / "foundation.model", weights_only=False)
    elements = foundation.atomic_numbers.tolist()
    for z, energy in run.printed_E0s().items():
        foundation.atomic_energies_fn.atomic_energies[..., elements.index(z)] = energy
    return foundation


def evaluate_on(run: Run, part: str, model: torch.nn.Module, given: dict) -> tuple[float, dict]:
    """Loss and errors of the model on the structures of a file of the run, by MACE's own functions."""
    keys = data.KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    structures = ase.io.read(run.folder / f"{part}.xyz", ":")
    table = AtomicNumberTable(model.atomic_numbers.tolist())
    dataset = [data.AtomicData.from_config(data.config_from_atoms(atoms, key_specification=keys), cutoff=4.0,
                                           z_table=table) for atoms in structures]
    loader = torch_geometric.dataloader.DataLoader(dataset, batch_size=5)
    return evaluate(model, given["loss_fn"], loader, given["output_args"], torch.device("cpu"))


@EVERY
def test_the_first_validation_is_the_foundations_own(finished, before_training, name, tmp_path, caplog):
    """Digit for digit: the foundation file with the E0s that the log prints, evaluated by MACE's own functions."""
    run, given = finished(name), before_training(name)
    loss, metrics = evaluate_on(run, "valid", foundation_with_E0s(run), given)
    caplog.set_level("INFO")
    valid_err_log(loss, metrics, MetricsLogger(str(tmp_path), "valid"), "PerAtomRMSE", None, "Default")
    assert caplog.messages[-1].startswith("Initial: ")
    assert f"INFO: {caplog.messages[-1]}\n" in run.log


@EVERY
def test_training_lowers_the_error(finished, name):
    errors = [line["rmse_f"] for line in finished(name).metrics if line["mode"] == "eval"]
    assert errors[-1] < errors[0]


@every_stage()
def test_the_error_table_is_that_of_the_saved_model(finished, before_training, name, stage_two):
    run, given = finished(name), before_training(name)
    loaders = {"train_Default": given["train_loader"], "valid_Default": given["valid_loaders"]["Default"]}
    table = create_error_table("PerAtomRMSE", loaders, run.model(stage_two), given["loss_fn"], given["output_args"],
                               log_wandb=False, device="cpu")
    tables = run.log.split("Error-table on TRAIN and VALID:\n")[1:]
    assert len(tables) == len(CASES[name].stages)
    assert tables[stage_two].startswith(str(table))
    assert "Error-table on TEST:" in tables[stage_two]


@every_stage()
def test_the_adapter_says_how_it_was_trained(finished, before_training, name, stage_two):
    """Its errors are those of the foundation with the E0s of the run, and of the saved model."""
    run, given = finished(name), before_training(name)
    training = run.adapter_config(stage_two)["training"]
    for part, number in {"train": 8, "valid": 5, "test": 3}.items():
        held = training["errors"][part]
        assert held["structures"] == number
        for of, model in {"start": foundation_with_E0s(run), "result": run.model(stage_two)}.items():
            errors = evaluate_on(run, part, model, given)[1]
            for error in ("mae_e", "mae_e_per_atom", "rmse_e_per_atom", "mae_f", "rmse_f"):
                assert held[of][error] == pytest.approx(errors[error], rel=1e-8), (part, of, error)
    files = {f"{part}_file": [f"{part}.xyz"] for part in ("train", "valid", "test")}
    assert training["heads"]["Default"].items() >= (files | {"train": 8, "valid": 5}).items()
    assert training["options"].items() >= {"lr": 0.01, "batch_size": 4, "seed": 1, "optimizer": "adam"}.items()
    assert ("ema_decay" in training["options"]) == ("--ema" in CASES[name].flags)
    stage = run.progress().result(stage_two)
    assert training["best_epoch"] == stage.epoch and training["epochs"] == run.progress().epoch
    assert training["start"] == "foundation"
    assert ("energy_weight=1000.0" if stage_two else "energy_weight=1.0") in training["loss"]
    for file in ("README.md", "adapter_config.json"):
        assert str(run.folder) not in (run.adapter(stage_two) / file).read_text()


@every_stage()
def test_the_last_lines_state_the_result(finished, name, stage_two):
    """As ``info`` and the card do; what the last ones say loads the model."""
    run = finished(name)
    training = run.adapter_config(stage_two)["training"]
    end, said = run.log.split("INFO: Done\n")[1], info(str(run.adapter(stage_two)))
    card = (run.adapter(stage_two) / "README.md").read_text()
    assert error_table(training) in end and said.endswith(error_table(training))
    rows = error_rows(training)
    assert [row[0] for row in rows] == ["train", "train", "valid", "valid", "test", "test"]
    for _, _, error, start, result, lower in rows:
        assert f" | {error} | {start} | {result} | {lower} |" in card
    (atoms,), python = unseen(name)[:1], re.findall("In ASE: (.*)", end)[stage_two]
    exec(python, {"atoms": atoms})
    energies, forces = predict(run.model(stage_two), [atoms])
    assert atoms.get_potential_energy() == pytest.approx(energies.item(), abs=1e-10)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-10)
    assert ("MACECalculator" in python) == CASES[name].merges


# --- what trains ------------------------------------------------------------------------------------------------------


@every_stage()
def test_nothing_but_adapters_and_what_trains_along_changes(finished, before_training, name, stage_two):
    """To the last bit, against the model that MACE configures without ``--peft``."""
    run, model = finished(name), before_training(name)["model"]
    start, checkpoint = model.state_dict(), run.checkpoint(stage_two)
    along = {key for key, weight in model.named_parameters() if key.startswith("readouts.") and weight.numel()}
    of_full = {key for key in finished(name).adapter_tensors() if ".adapter." not in key}
    along = {"mmea-products": along, "full": of_full}.get(name, set())
    assert {key for key in checkpoint["model"] if ".adapter." not in key} == along
    assert checkpoint["base"].keys() == start.keys() - along
    changed = {key for key in checkpoint["base"] if checkpoint["base"][key] != measures(start[key])}
    assert changed <= {ATOMIC_ENERGIES}
    assert not any(torch.equal(start[key], checkpoint["model"][key]) for key in along)
    saved = run.model(stage_two).state_dict()
    shift = run.adapter_tensors(stage_two).get("atomic_energies_fn.adapter.s.atomic_energies", torch.zeros(1))
    assert (shift == 0).all() or CASES[name].config.method == "scales" or isolated.E0S in CASES[name].config.train_also
    E0s = torch.tensor(list(run.printed_E0s().values())) + shift
    assert torch.equal(saved[ATOMIC_ENERGIES].flatten(), E0s.flatten())
    if name == "mmea-products":  # the others have updates folded in
        assert {key for key in start if not torch.equal(start[key], saved[key])} - {ATOMIC_ENERGIES} == along


@every_stage()
def test_the_optimizer_in_the_checkpoint_holds_what_trains(finished, name, stage_two):
    run = finished(name)
    optimizer, trained = run.checkpoint(stage_two)["optimizer"], run.adapter_tensors(stage_two)
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(trained)
    assert shapes(state["exp_avg"] for state in optimizer["state"].values()) == shapes(trained.values())


@pytest.mark.parametrize("name, flags", [*((name, []) for name in CASES), ("mmea-products", ["--lbfgs"])],
                         ids=[*CASES, "mmea-products-lbfgs"])
def test_optimizer_and_average_hold_what_trains(inputs, name, flags):
    given = reach_training(inputs, "--ema", *flags, **CASES[name].peft)
    trained = trainable_parameters(given["model"])
    held = [parameter for group in given["optimizer"].param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in trained.values()}
    assert len(held) == len(trained)
    assert shapes(given["ema"].shadow_params) == shapes(trained.values())
    frozen = {key for key, parameter in given["model"].named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key, _ in given["model"].named_parameters()} - trained.keys()


def test_gradient_clipping_sees_no_frozen_parameter(inputs, monkeypatch):
    """In every step, those after a validation included."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def clip_and_note(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append(shapes(parameter for parameter in parameters if parameter.grad is not None))
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)
    run = train_here(inputs, peft="elora", peft_rank=2, peft_targets="products")
    assert seen == [shapes(run.adapter_tensors().values())] * 4


def test_a_run_leaves_model_and_data_to_nobody(inputs):
    """They are free at once, not at some garbage collection: the memory of a GPU, and files that are open once."""
    gc.disable()
    logging.disable(logging.DEBUG)  # below 0.3.15 MACE logs the model itself, and pytest keeps what is logged
    try:
        given = reach_training(inputs, peft="mmea", peft_rank=2)
        held = [weakref.ref(given[name]) for name in ("model", "optimizer", "train_loader")]
        held += map(weakref.ref, given.pop("valid_loaders").values())
        del given
        assert not any(one() for one in held)
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()


# --- settings reach the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate, gain", [("exp", np.exp(0.5)), ("bounded", np.exp(BOUND * np.tanh(0.5 / BOUND)))])
def test_the_gate_reaches_the_model(inputs, gate, gain):
    options = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products", "peft_gate": gate}
    adapter = reach_training(inputs, **options)["model"].products[0].adapter
    torch.nn.init.constant_(adapter.b2, 0.5)
    features = torch.cat([torch.zeros(4), torch.ones(12)])  # scalars, which take no gain, and vectors
    torch.testing.assert_close(adapter(features, features), gain * features)


def test_alpha_and_rank_reach_the_model(inputs):
    """An update is alpha / rank times a product of matrices, which is rank where they are of ones."""
    options = {"peft": "elora", "peft_rank": 2, "peft_targets": "products", "peft_alpha": 7}
    linear = reach_training(inputs, **options)["model"].products[0].linear
    for parameter in linear.adapter.parameters():
        torch.nn.init.ones_(parameter)
    torch.testing.assert_close(linear.adapter({"weight": linear.weight})["weight"], linear.weight + 7)
    assert all(min(parameter.shape) == 2 for parameter in linear.adapter.parameters())


def test_the_start_reaches_the_model(inputs):
    """Random columns; the same, shorter; and singular vectors, which are orthogonal and of length 1."""
    options = {"peft": "elora", "peft_rank": 2, "peft_targets": "interactions.1.linear_up"}
    published, fan_in, gradient = (
        reach_training(inputs, **options, peft_start=start)["model"].interactions[1].linear_up.adapter.A
        for start in ("published", "fan-in", "gradient"))
    for key, A in published.items():
        torch.testing.assert_close(fan_in[key], A / len(A) ** 0.5)
        torch.testing.assert_close(gradient[key].T @ gradient[key], torch.eye(2, dtype=A.dtype))
        assert abs(A.T @ A - len(A) * torch.eye(2, dtype=A.dtype)).max() > 0.1


def test_init_std_reaches_the_model(inputs):
    options = {"peft": "mmea", "peft_rank": 4, "peft_targets": "products.0"}
    start = reach_training(inputs, **options)["model"].products[0].adapter.W0
    shifted = reach_training(inputs, **options, peft_init_std=0.25)["model"].products[0].adapter.W0
    twice = reach_training(inputs, **options, peft_init_std=0.5)["model"].products[0].adapter.W0
    assert not start.any()
    assert 0.1 < shifted.std() < 0.5
    torch.testing.assert_close(twice, 2 * shifted)


def test_patterns_reach_the_model(inputs):
    model = reach_training(inputs, peft="elora", peft_rank=2, peft_targets="products.*.linear, readouts.0.*")["model"]
    adapted = {name.split(".adapter.")[0] for name in trainable_parameters(model)}
    assert adapted == {"products.0.linear", "products.1.linear", "readouts.0.linear"}


def test_the_command_line_wins_over_the_yaml_file(inputs):
    (inputs / "peft.yaml").write_text(yaml.safe_dump({"peft": "elora", "peft_rank": 2, "peft_alpha": 1}))
    model = reach_training(inputs, f"--config={inputs / 'peft.yaml'}", peft_rank=3)["model"]
    assert model.peft_config == PeftConfig("elora", rank=3, alpha=1.0)


@pytest.mark.parametrize("name", ["mmea-published", "elora-published"])
def test_adapters_have_the_dtype_of_the_run(inputs, name):
    model = reach_training(inputs, default_dtype="float32", **CASES[name].peft)["model"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
