"""However a run ends, it has a result, and its last lines say which: trained, or the start where that is better."""

import operator
import re

import pytest
import torch
from combined import PEFT, assert_same, write_small
from mace.cli import run_train
from mace.tools import tables_utils
from runs import NAME, Run, around_training, relabel, train_here
from tiny import configurations, predict

from mace_peft import load_adapter
from mace_peft.train import results
from mace_peft.train.progress import Progress, Stage

pytestmark = pytest.mark.usefixtures("uncompiled")

NO_STEP = {"lr": 1e-30, "swa_lr": 1e-30, "clip_grad": 1.0}  # the weights stay as they are, and so does the loss


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return relabel(write_small(tmp_path_factory.mktemp("inputs")))


def fine_tune(inputs, folder, *flags, **options) -> Run:
    train_here(inputs, *flags, **PEFT | {"work_dir": folder} | options)
    return Run(folder)


def epochs(log: str) -> list[int]:
    return [int(epoch) for epoch in re.findall(r"INFO: Epoch (\d+): ", log)]


def last_lines(run: Run) -> list[str]:
    """The lines about results, which are the last of the log but for those that say how to use them."""
    lines = run.log.splitlines()
    said = [line.partition("Result in ")[2] for line in lines if "Result in " in line]
    assert said and all("In ASE: " in line for line in lines[-len(said):]) and "Result in " in lines[-len(said) - 1]
    return said


def check_files(inputs, run: Run, stage_two: bool) -> None:
    """The model and the adapter of the stage are there, and are the same."""
    structures = configurations(2, seed=7)
    loaded = load_adapter(torch.load(inputs / "foundation.model", weights_only=False), run.adapter(stage_two))
    for made, held in zip(predict(loaded, structures), predict(run.model(stage_two), structures), strict=True):
        torch.testing.assert_close(made, held, rtol=1e-10, atol=1e-10)


# --- when it ends -----------------------------------------------------------------------------------------------------


def test_patience_ends_the_training(inputs, tmp_path):
    run = fine_tune(inputs, tmp_path, **NO_STEP, patience=2, max_num_epochs=6)
    assert "Stopping optimization after 2 epochs without improvement" in run.log
    assert epochs(run.log) == [0, 1, 2]


def test_patience_ends_stage_one_and_then_stage_two(inputs, tmp_path):
    """Stage two has all its epochs, from the first on."""
    run = fine_tune(inputs, tmp_path, "--swa", "--save_all_checkpoints", **NO_STEP, start_swa=4, patience=1,
                    max_num_epochs=9)
    assert epochs(run.log) == [0, 1, 4, 5]
    assert "Stopping optimization after 1 epochs without improvement and starting Stage Two" in run.log
    assert list(run.checkpoints()) == [0, 1] and list(run.checkpoints(stage_two=True)) == [4, 5]


@pytest.mark.parametrize("flags, options, said", [
    ([], {"max_num_epochs": 0}, ["no epoch of stage one was trained"]),
    (["--swa"], {"start_swa": 0, "max_num_epochs": 1}, ["no epoch of stage one was trained", "epoch 0 of stage two"]),
    ([], {"batch_size": 100, "max_num_epochs": 1}, ["epoch 0 of stage one"]),
], ids=["no epochs", "no stage one", "no full batch"])
def test_stages_without_epochs_and_batches_without_enough_have_results(inputs, tmp_path, flags, options, said):
    run = fine_tune(inputs, tmp_path, *flags, **options)
    for stage_two, line in enumerate(said):
        check_files(inputs, run, bool(stage_two))
        assert line in last_lines(run)[stage_two]
    if "batch_size" in options:
        assert "8 configurations fill no batch of 100: they come in one of 8" in run.log
        assert sum(line["mode"] == "opt" for line in run.metrics) == 1


@pytest.mark.parametrize("flags, options, cause", [
    ([], {"eval_interval": 0}, "--eval_interval 0 is not a number from 1 up"),
    (["--swa"], {"loss": "forces_only"}, "--loss forces_only has no stage two"),
])
def test_stages_that_could_have_no_result_are_refused(inputs, tmp_path, capsys, flags, options, cause):
    with pytest.raises(SystemExit) as stopped:
        fine_tune(inputs, tmp_path, *flags, **options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and cause in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, options, evaluated", [
    ([], {"eval_interval": 100}, [0, 3]), ([], {"eval_interval": 2}, [0, 2, 3]),
    (["--swa"], {"eval_interval": 100, "start_swa": 2}, [0, 1, 3]),
])
def test_the_last_epoch_of_a_stage_is_evaluated(inputs, tmp_path, flags, options, evaluated):
    assert epochs(fine_tune(inputs, tmp_path, *flags, max_num_epochs=4, **options).log) == evaluated


@pytest.mark.parametrize("batch_size", [3, 5, 100])
def test_the_table_of_errors_is_of_the_whole_training_set(inputs, tmp_path, batch_size):
    run = fine_tune(inputs, tmp_path, max_num_epochs=0, batch_size=batch_size, valid_file=inputs / "train.xyz",
                    error_table="TotalMAE")
    (train,), (valid,) = (re.findall(rf"\| +{part}_Default \|(.*)", run.log) for part in ("train", "valid"))
    assert train == valid


def test_a_run_of_no_epoch_has_no_figure_and_says_so(inputs, tmp_path):
    run = fine_tune(inputs, tmp_path, max_num_epochs=0, plot=True)
    assert not list(tmp_path.rglob("*.png"))
    assert run.log.count("INFO: No figure is drawn, for no epoch was trained") == 1


def test_the_errors_of_an_earlier_run_of_the_name_are_set_aside(inputs, tmp_path):
    for _ in range(2):
        run = fine_tune(inputs, tmp_path, max_num_epochs=1)
    assert [line["epoch"] for line in run.metrics if line["mode"] == "eval"] == [None, 0]
    assert len(list(tmp_path.glob("results/*.earlier"))) == 1
    assert "is of an earlier run" not in run.log


def test_a_result_of_stage_two_that_an_earlier_run_left_is_named(inputs, tmp_path):
    fine_tune(inputs, tmp_path, "--swa", max_num_epochs=2, start_swa=1)
    run = fine_tune(inputs, tmp_path, max_num_epochs=1)
    for name in ("_stagetwo.model", "_stagetwo_adapter"):
        assert f"{NAME}{name} is of an earlier run of this name, and stays: this run has no stage two" in run.log


# --- which weights are the result -------------------------------------------------------------------------------------


def test_the_best_epoch_is_the_result_whatever_is_kept(inputs, tmp_path):
    run = fine_tune(inputs, tmp_path, "--save_all_checkpoints", lr=0.01, scheduler="ExponentialLR",
                    lr_scheduler_gamma=4, max_num_epochs=5)
    losses = [line["loss"] for line in run.metrics if line["mode"] == "eval"]
    best = losses[1:].index(min(losses[1:]))
    assert best < 4 and min(losses[1:]) < losses[0]
    checkpoint = torch.load(run.checkpoints()[best], weights_only=False)["model"]
    tensors = run.adapter_tensors()
    assert_same(tensors, {name: checkpoint[name] for name in tensors})
    assert last_lines(run) == [f"{NAME}.model and {NAME}_adapter: epoch {best} of stage one, with a validation loss of "
                               f"{losses[1 + best]:.8f} (before the training {losses[0]:.8f})"]


def test_where_no_epoch_beats_the_start_the_start_is_the_result(inputs, tmp_path):
    """Of an adapter that is trained further, too: it stays as it was."""
    first = fine_tune(inputs, tmp_path / "first", max_num_epochs=3)
    check_files(inputs, first, False)
    further = fine_tune(inputs, tmp_path / "further", "--ema", peft_adapter=first.adapter(), lr=1.0)
    assert_same(further.adapter_tensors(), first.adapter_tensors())
    (said,) = last_lines(further)
    assert "the start, as it was before the training, for no epoch of stage one was better" in said
    training = further.adapter_config()["training"]
    assert training["start"] == "adapter" and training["best_epoch"] is None
    assert all(held["start"] == pytest.approx(held["result"]) for held in training["errors"].values())
    assert "try another --lr" in said and "WARNING" in further.log.splitlines()[-2]
    check_files(inputs, further, False)


def test_a_stage_two_that_only_harms_leaves_the_result_of_stage_one(inputs, tmp_path):
    run = fine_tune(inputs, tmp_path, "--swa", start_swa=2, swa_lr=100.0, max_num_epochs=3)
    assert_same(run.adapter_tensors(stage_two=True), run.adapter_tensors())
    one, two = last_lines(run)
    assert "of stage one, with a validation loss" in one
    assert "of stage one, for no epoch of stage two was better" in two and "try another --swa_lr" in two


# --- what fails after the training ------------------------------------------------------------------------------------

STOPS = {"structures": "data.AtomicData.from_config", "batches": "torch_geometric.dataloader.DataLoader",
         "state": "tools.CheckpointState", "copy": "deepcopy", "file": "torch.save",
         "description": "convert_to_json_format", "settings": "extract_config_mace_model"}


def fail(*args, **kwargs):
    raise RuntimeError("injected")


def with_fault(inputs, folder, path: str) -> Run:
    """A run of two stages, in which MACE's name fails once the training has ended."""
    where, _, name = path.rpartition(".")
    owner = operator.attrgetter(where)(run_train) if where else run_train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, getattr(owner, name))  # in the end it is bound to this again

        def train_and_break(train, **arguments):
            progress = train(**arguments)
            patch.setattr(owner, name, fail)
            return progress

        with around_training(train_and_break):
            return fine_tune(inputs, folder, "--swa", start_swa=1)


def check_both_stages(inputs, folder) -> None:
    run = Run(folder)
    for stage_two in (False, True):
        check_files(inputs, run, stage_two)
    assert len(last_lines(run)) == 2
    assert [run.adapter_config(stage_two)["training"]["best_epoch"] for stage_two in (False, True)] == [
        run.progress().result(stage_two).epoch for stage_two in (False, True)]


@pytest.mark.parametrize("path", STOPS.values(), ids=STOPS)
def test_a_step_that_fails_after_the_training_costs_no_result(inputs, tmp_path, capsys, path):
    with pytest.raises(SystemExit) as stopped:
        with_fault(inputs, tmp_path, path)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "the training is done and its results are saved" in said and "(RuntimeError: injected)" in said
    check_both_stages(inputs, tmp_path)


def test_after_a_failure_a_restart_writes_what_is_missing(inputs, tmp_path):
    with pytest.raises(SystemExit):
        with_fault(inputs, tmp_path, "torch.save")
    held = Run(tmp_path).adapter_tensors(stage_two=True)
    run = fine_tune(inputs, tmp_path, "--swa", "--restart_latest", start_swa=1)
    assert "Error-table on TEST" in run.log
    assert_same(run.adapter_tensors(stage_two=True), held)


def test_tables_that_fail_are_told_of_and_the_run_goes_on(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(tables_utils, "evaluate", fail)
    fine_tune(inputs, tmp_path, "--swa", start_swa=1)
    line = "No table of errors is computed (RuntimeError: injected)"
    assert Run(tmp_path).log.count(line) == 4  # of two stages, each on training and test structures
    check_both_stages(inputs, tmp_path)
    assert Run(tmp_path).adapter_config()["training"]["errors"] == {}


def test_figures_and_texts_that_fail_are_told_of_and_the_run_goes_on(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_train.TrainingPlotter, "plot", fail)
    monkeypatch.setattr(results, "add_training", fail)
    run = fine_tune(inputs, tmp_path, plot=True, plot_frequency=1)
    assert run.log.count("No figure is drawn (RuntimeError: injected)") == 3  # after two epochs, and in the end
    assert run.log.count(f"{run.adapter()} does not say how it was trained (injected)") == 2
    assert "training" not in run.adapter_config() and len(last_lines(run)) == 1
    check_files(inputs, run, False)


@pytest.mark.parametrize("stages, lbfgs, remedy", [(1, False, "try another --lr"), (2, False, "try another --swa_lr"),
                                                   (1, True, "try a run without --lbfgs")])
def test_the_remedy_for_a_run_without_a_better_epoch_acts_on_its_optimizer(stages, lbfgs, remedy):
    progress = Progress({}, [Stage(1.0, best=0.5 if number else 2.0, epoch=3) for number in reversed(range(stages))])
    _, line = results.outcome(progress, stages == 2, lbfgs)
    assert line.endswith(remedy)
