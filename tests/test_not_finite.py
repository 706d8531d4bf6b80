"""A loss that is not finite stops a run with ``--peft``, one line says which, and the last good checkpoint stays."""

import functools
import math
import re
import types

import ase.io
import numpy as np
import pytest
import torch
from mace.cli import run_train
from runs import Run, fork, train_here, write_inputs
from tiny import tiny_mace

from mace_peft.train.record import Record

pytestmark = pytest.mark.usefixtures("uncompiled")

PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products"}
# the learning rate of epoch 0, and what it is multiplied by after each epoch: the training diverges in the second one
DIVERGES = {"peft_gate": "exp", "lr": 0.01, "scheduler": "ExponentialLR", "lr_scheduler_gamma": 1e9}
FAR = 1e200  # eV, or eV/A: its square is no number
LINE = re.compile(
    r"mace_run_train: error: (?P<loss>the (?:training|validation) loss of .*) is (?P<value>-?inf|nan); (?P<cause>.*); "
    r"(?:no checkpoint has been saved|the last good checkpoint is (?P<path>\S+), from which --restart_latest "
    r"goes on at the same --lr)\n")


@pytest.fixture
def stopped(capsys):
    """Runs the command in this process; returns the parts of the line with which it stops."""

    def stop(folder, *flags, **options) -> dict[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train_here(folder, *flags, **options)
        assert stopped.value.code == 2
        return LINE.fullmatch(capsys.readouterr().err).groupdict()

    return stop


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


def spoil(folder, part: str, label: str, value: float, which: int = 0) -> None:
    """Set one energy, or one component of one force, of that configuration."""
    path = folder / f"{part}.xyz"
    structures = ase.io.read(path, ":")
    if label == "energy":
        structures[which].info["REF_energy"] = value
    else:
        structures[which].arrays["REF_forces"][-1, 2] = value
    ase.io.write(path, structures)


@pytest.fixture
def batches(monkeypatch):
    """Notes, for each batch of two that a loss is taken of, whether its labels have squares."""
    original, noted = run_train.get_loss_fn, []

    def note(loss_fn, args, given, loss):
        labels = given["ref"]
        if labels.num_graphs == 2:
            noted.append(all((labels[key].abs() < FAR).all().item() for key in ("energy", "forces")))

    def get_loss_fn(*args, **kwargs):
        loss_fn = original(*args, **kwargs)
        loss_fn.register_forward_hook(note, with_kwargs=True)
        return loss_fn

    monkeypatch.setattr(run_train, "get_loss_fn", get_loss_fn)
    return noted


def losses(run: Run, mode: str) -> list[float]:
    """What the results file has of the training ("opt") or of the validation ("eval")."""
    return [line["loss"] for line in run.metrics if line["mode"] == mode]


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, label, value", [
    ("train", "forces", np.nan), ("train", "energy", np.inf), ("valid", "energy", -np.inf), ("test", "forces", np.inf)])
def test_a_label_that_is_not_finite_is_named_before_any_training(inputs, capsys, part, label, value):
    spoil(inputs, part, label, value, which=2)
    with pytest.raises(SystemExit):
        train_here(inputs, **PEFT)
    assert f"{label} of structure 2 of {inputs / part}.xyz holds NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize("label, flags", [("forces", []), ("energy", ["--lbfgs"])], ids=["adam", "lbfgs"])
def test_a_label_of_the_training_data_is_named_with_epoch_and_batch(inputs, batches, stopped, label, flags):
    spoil(inputs, "train", label, FAR, which=2)
    said = stopped(inputs, *flags, **PEFT, batch_size=2)
    assert said["loss"] == f"the training loss of epoch 0, batch {batches.index(False) + 1} of 4,"
    assert not Run(inputs).checkpoints()


def test_a_label_of_the_validation_data_is_named_before_any_training(inputs, stopped):
    spoil(inputs, "valid", "energy", -FAR, which=4)
    said = stopped(inputs, **PEFT)
    assert said["loss"] == "the validation loss of head Default before training"
    assert not losses(Run(inputs), "opt")


def test_the_head_is_named_though_another_decides_on_checkpoints(inputs, stopped):
    good = {"train_file": str(inputs / "train.xyz"), "valid_file": str(inputs / "test.xyz"), "E0s": "average"}
    spoil(inputs, "valid", "forces", FAR)
    heads = {"first": good, "second": good | {"valid_file": str(inputs / "valid.xyz")}, "third": good}
    said = stopped(inputs, **PEFT, heads=heads, train_file=None, valid_file=None, test_file=None, E0s=None)
    assert said["loss"] == "the validation loss of head second before training"


# --- divergence -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory):
    """The checkpoint of a run that ends before it diverges, for each batch size."""

    @functools.cache
    def checkpoint(batch_size: int) -> dict:
        folder = write_inputs(tmp_path_factory.mktemp("first"))
        return train_here(folder, **PEFT, **DIVERGES, batch_size=batch_size, max_num_epochs=1).checkpoint()

    return checkpoint


def check_last_good(folder, path: str, expected: dict) -> None:
    """It is the only checkpoint, and that of the run that had no time to diverge."""
    checkpoints = Run(folder).checkpoints()
    assert [str(found) for found in checkpoints.values()] == [path] and list(checkpoints) == [0]
    weights = Run(folder).checkpoint()["model"]
    assert weights.keys() == expected["model"].keys()
    assert all(torch.equal(weights[key], expected["model"][key]) for key in weights)


def test_a_training_that_diverges_keeps_the_last_good_checkpoint(inputs, stopped, first_epoch):
    options = {**PEFT, **DIVERGES, "batch_size": 2}
    said = stopped(inputs, **options, max_num_epochs=5)
    done = losses(Run(inputs), "opt")
    assert np.isfinite(done).all() and 4 <= len(done) < 8
    assert said["loss"] == f"the training loss of epoch 1, batch {len(done) - 4 + 1} of 4,"
    assert said["cause"] == ("its data are finite, but the model is far off: start again with a lower --lr (in stage "
                             "two --swa_lr) or --clip_grad")
    check_last_good(inputs, said["path"], first_epoch(2))
    goes_on = train_here(inputs, "--restart_latest", **options, max_num_epochs=1)
    assert "Loaded Stage one model from epoch 0 for evaluation" in goes_on.log
    assert all(tensor.isfinite().all() for tensor in goes_on.adapter_tensors().values())


def test_a_validation_loss_stops_before_its_checkpoint(inputs, stopped, first_epoch):
    """With one batch in each epoch, the validation is the first to see what the second epoch did."""
    said = stopped(inputs, **PEFT, **DIVERGES, batch_size=8, max_num_epochs=5)
    assert said["loss"] == "the validation loss of head Default after epoch 1"
    assert np.isfinite(losses(Run(inputs), "opt")).all() and len(losses(Run(inputs), "opt")) == 2
    assert not np.isfinite(losses(Run(inputs), "eval")[-1])
    assert "the model is far off" in said["cause"]
    check_last_good(inputs, said["path"], first_epoch(8))


@pytest.mark.parametrize("flags, remedy", [([], "lower --lr"), (["--lbfgs"], "start again without --lbfgs")])
def test_a_label_far_from_the_prediction_is_not_taken_for_one_that_is_not_finite(inputs, stopped, flags, remedy):
    spoil(inputs, "train", "energy", FAR)
    said = stopped(inputs, *flags, **PEFT)
    assert said["value"] == "inf" and remedy in said["cause"] and said["cause"].startswith("its data are finite")


def test_a_foundation_that_is_not_finite_is_named(tmp_path, stopped):
    foundation = tiny_mace()
    torch.nn.init.constant_(foundation.interactions[0].linear.weight, torch.inf)
    said = stopped(write_inputs(tmp_path, foundation=foundation), **PEFT)
    assert said["loss"] == "the validation loss of head Default before training"
    assert "its data are finite" in said["cause"] and "check --foundation_model and --E0s" in said["cause"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_users_see_one_line_and_no_traceback(inputs):
    spoil(inputs, "train", "forces", FAR)
    run = fork(inputs, **PEFT)
    assert run.returncode == 2 and LINE.fullmatch(run.stderr)


def test_without_peft_the_losses_are_those_of_mace(inputs):
    """It trains on, and NaN gets into its checkpoint."""
    spoil(inputs, "train", "forces", np.nan)
    run = train_here(inputs, max_num_epochs=2)
    assert len(losses(run, "opt")) == 4 and np.isnan(losses(run, "opt")[-1])
    assert np.isnan(losses(run, "eval")[-1]) and list(run.checkpoints()) == [1]
    assert any(tensor.isnan().any() for tensor in run.checkpoint()["model"].values())


def test_errors_that_the_table_leaves_out_are_said(caplog):
    """As those of a test set with a structure from which the model is far off."""
    record = Record(None, None, [], types.SimpleNamespace(stage_two=False), None)
    record.name_of, record.of_start["test"] = lambda loader: "test", {}
    loader, errors = types.SimpleNamespace(dataset=[1, 2]), {"loss": math.nan, "mae_e": 0.1, "mae_f": math.nan}
    record.evaluate(lambda *_, **__: (math.nan, errors), None, data_loader=loader, output_args={"stress": True})
    assert "Errors on the set test are NaN or infinite" in caplog.text
    assert record.of_result[False]["test"] == {"mae_e": 0.1}
