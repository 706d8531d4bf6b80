"""``--restart_latest`` with ``--peft``: a run that was cut off goes on as if it had not been."""

import shutil

import pytest
from combined import PEFT, adapters, assert_same, differ, fine_tune, train_only, write_small
from releases import since
from runs import Run, reach_training, relabel

# all structures in one batch, for a restart begins with the first order of the batches
OPTIONS = {"batch_size": 8}
# below 0.3.15 MACE goes on in stage two at the rate of stage one
STAGE_TWO = {"swa_lr": 0.02 if since("0.3.15") else 0.01, "swa_energy_weight": 50.0, "swa_forces_weight": 5.0}
# flags and options of a run; whether it is in stage two after epoch 1; its epochs, and what the restart has otherwise
CASES = {
    "adam, elora": ([], {"peft": "elora", "peft_targets": "published"}, False, 3, {}),
    "schedulefree": ([], {"optimizer": "schedulefree"}, False, 3, {}),
    "lbfgs": (["--lbfgs"], {}, False, 3, {}),
    "in stage two": (["--swa"], STAGE_TWO | {"start_swa": 1}, True, 3, {}),
    "before stage two": (["--swa"], STAGE_TWO | {"start_swa": 3}, False, 4, {"start_swa": 2}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("flags, options, stage_two, epochs, changed", CASES.values(), ids=CASES)
def test_a_continued_run_ends_as_one_that_was_not_cut_off(inputs, tmp_path, flags, options, stage_two, epochs, changed):
    """MACE repeats the checkpoint's epoch, so that epochs 0, 1 | 1 are as long as 0, 1, 2."""
    if "--lbfgs" in flags:
        inputs = relabel(shutil.copytree(inputs, tmp_path / "inputs"))
    flags, options = ["--save_all_checkpoints", *flags], OPTIONS | options
    whole, _ = train_only(inputs, tmp_path / "whole", *flags, **options, max_num_epochs=epochs)
    cut = Run(tmp_path / "continued")
    (cut.folder / "checkpoints").mkdir(parents=True)
    shutil.copy(whole.checkpoints()[0], cut.folder / "checkpoints")
    shutil.copy(whole.checkpoints(stage_two)[1], cut.folder / "checkpoints")
    before = adapters(cut, stage_two)
    continued, given = train_only(inputs, cut.folder, "--restart_latest", *flags, **options | changed,
                                  max_num_epochs=epochs - 1)
    assert given["start_epoch"] == 1
    last = "--swa" in flags
    tolerance = 1e-6 if "--lbfgs" in flags else 1e-10
    assert_same(adapters(continued, last), adapters(whole, last), tolerance)
    assert differ(adapters(whole, last), before)


@pytest.mark.parametrize("flags", [[], ["--swa"]], ids=["stage one", "stage two"])
def test_a_moving_average_goes_on_from_the_checkpoint(inputs, tmp_path, flags):
    """MACE saves the averages alone: both they and the adapters go on from there, as does the optimizer."""
    options = OPTIONS | {"start_swa": 1 if flags else None, "max_num_epochs": 2}
    run, _ = train_only(inputs, tmp_path, "--ema", *flags, **options)
    given = reach_training(inputs, "--ema", "--restart_latest", *flags, **options | {"max_num_epochs": 3}, **PEFT,
                           checkpoints_dir=tmp_path / "checkpoints")
    assert given["start_epoch"] == 1
    expected = adapters(run, bool(flags))
    held = {key: tensor for key, tensor in given["model"].state_dict().items() if key in expected}
    assert_same(held, expected)
    names = [key for key, _ in given["model"].named_parameters() if ".adapter." in key]
    assert_same(dict(zip(names, given["ema"].shadow_params, strict=True)), expected)
    checkpoint = run.checkpoint(bool(flags))["optimizer"]
    assert_same(given["optimizer"].state_dict()["state"], checkpoint["state"])


def test_a_run_cut_off_in_stage_two_leaves_all_files(inputs, tmp_path):
    options = OPTIONS | {"start_swa": 1}
    cut, _ = train_only(inputs, tmp_path, "--swa", "--ema", **options, max_num_epochs=2)
    before = adapters(cut, stage_two=True)
    run = fine_tune(inputs, tmp_path, "--swa", "--ema", "--restart_latest", **options, max_num_epochs=3)
    assert run.adapter(stage_two=True).is_dir()
    assert differ(adapters(run, stage_two=True), before)
