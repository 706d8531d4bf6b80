"""A run that is cut off after an epoch and restarted ends as the run that was not: the same files, to the last bit."""

import re
import shutil

import pytest
import torch
from combined import PEFT, write_small
from runs import NAME, Run, relabel, train_here

from mace_peft.train import loop
from mace_peft.train.checkpoint_files import CompleteCheckpointIO

pytestmark = pytest.mark.usefixtures("uncompiled")

EPOCHS = 4
# each with another optimizer, scheduler, average, stage and rule for what is kept
CASES = {
    "plateau, ema": (["--ema", "--amsgrad"], {"scheduler_patience": 0, "lr": 0.05}),
    "exponential": ([], {"scheduler": "ExponentialLR", "lr_scheduler_gamma": 0.7, "optimizer": "adamw"}),
    "stage two, ema": (["--swa", "--ema", "--amsgrad"], {"start_swa": 2, "swa_lr": 0.02, "eval_interval": 2}),
    "schedule-free, stage two": (["--swa"], {"optimizer": "schedulefree", "start_swa": 1, "eval_interval": 2}),
    "lbfgs": (["--lbfgs", "--ema"], {"max_num_epochs": 2}),
    "all are kept": (["--save_all_checkpoints", "--swa"], {"start_swa": 3}),
    "the best are kept": (["--keep_checkpoints"], {"lr": 0.05}),
    "patience": (["--swa", "--ema"], {"patience": 1, "start_swa": 3, "lr": 0.1, "swa_lr": 0.1}),
    "worse than the start": (["--ema"], {"lr": 1.0}),
    "replay of two heads": ([], {"heads": True}),
    "what is kept": (["--swa", "--ema"], {"start_swa": 2, "peft_keep": "auto", "peft_keep_weight": 5}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return relabel(write_small(tmp_path_factory.mktemp("inputs")))


class CutOff(Exception):
    pass


def run_or_cut(inputs, folder, flags, options, cut=None):
    """Fine-tune in the folder; cut: end after that many epochs, before anything is done with their results."""
    options = {**PEFT, "max_num_epochs": EPOCHS, "work_dir": folder, "batch_size": 3, **options}
    if options.pop("heads", False):
        head = {"train_file": str(inputs / "train.xyz"), "valid_file": str(inputs / "valid.xyz"), "E0s": "average"}
        options |= {"heads": {"one": head, "two": head}, "train_file": None, "valid_file": None, "test_file": None,
                    "E0s": None}
    train_epoch, done = loop.train_epoch, []

    def counted(*arguments):
        if len(done) == cut:
            raise CutOff
        train_epoch(*arguments)
        done.append(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", counted)
        try:
            train_here(inputs, *flags, **options)
        except CutOff:
            pass
    return Run(folder), len(done)


def files(run: Run) -> dict[str, object]:
    """What the checkpoints hold, and the adapters and models."""
    held = {path.name: torch.load(path, weights_only=False) for path in (run.folder / "checkpoints").glob("*.pt")}
    for stage_two in (False, True):
        if run.adapter(stage_two).exists():
            held[run.adapter(stage_two).name] = run.adapter_tensors(stage_two)
            held[f"{NAME} {stage_two}"] = run.model(stage_two).state_dict()
    return held


def differences(value, other, at="") -> list[str]:
    """Where two nested values differ."""
    if isinstance(value, torch.Tensor):
        return [] if torch.equal(value, other) else [at]
    if isinstance(value, dict):
        if value.keys() != other.keys():
            return [f"{at}: {value.keys() ^ other.keys()}"]
        return [found for key in value for found in differences(value[key], other[key], f"{at}/{key}")]
    if isinstance(value, (list, tuple)):
        assert len(value) == len(other), at
        return [found for i, held in enumerate(value) for found in differences(held, other[i], f"{at}/{i}")]
    return [] if value == other else [f"{at}: {value} {other}"]


def evaluations(run: Run) -> list:
    return [(line["epoch"], line["head"], line["loss"]) for line in run.metrics
            if line["mode"] == "eval" and line["epoch"] is not None]


@pytest.mark.parametrize("flags, options", CASES.values(), ids=CASES)
def test_a_run_cut_off_after_each_epoch_ends_as_the_whole_one(inputs, tmp_path, flags, options):
    whole, epochs = run_or_cut(inputs, tmp_path / "whole", flags, options)
    for _ in range(epochs):
        cut, _ = run_or_cut(inputs, tmp_path / "cut", [*flags, "--restart_latest"], options, cut=1)
    assert evaluations(cut) == evaluations(whole)
    assert differences(files(cut), files(whole)) == []
    said = re.findall("Result in .*", whole.log)
    assert said and re.findall("Result in .*", cut.log)[-len(said):] == said


@pytest.mark.parametrize("ended_at", [1, 3])
def test_a_run_that_ended_goes_on_with_more_epochs(inputs, tmp_path, ended_at):
    """As users do: a longer run after one that has left its files. Once more, it has nothing left to train."""
    flags, options = ["--swa", "--ema"], {"start_swa": 2}
    whole, _ = run_or_cut(inputs, tmp_path / "whole", flags, options)
    run_or_cut(inputs, tmp_path / "longer", flags, options | {"max_num_epochs": ended_at})
    longer, _ = run_or_cut(inputs, tmp_path / "longer", [*flags, "--restart_latest"], options)
    assert differences(files(longer), files(whole)) == []
    longer, more = run_or_cut(inputs, tmp_path / "longer", [*flags, "--restart_latest"], options)
    assert more == 0 and evaluations(longer) == evaluations(whole)
    assert differences(files(longer), files(whole)) == []


def test_a_checkpoint_alone_is_enough_to_go_on(inputs, tmp_path):
    """It holds the raw weights beside their averages."""
    flags, options = ["--swa", "--ema", "--keep_checkpoints"], {"start_swa": 2}
    whole, _ = run_or_cut(inputs, tmp_path / "whole", flags, options)
    (tmp_path / "cut/checkpoints").mkdir(parents=True)
    for stage_two, epoch in ((False, 0), (False, 1), (True, 2)):
        if epoch in whole.checkpoints(stage_two):
            shutil.copy(whole.checkpoints(stage_two)[epoch], tmp_path / "cut/checkpoints")
    cut, _ = run_or_cut(inputs, tmp_path / "cut", [*flags, "--restart_latest"], options)
    assert differences(files(cut), files(whole)) == []


def test_a_kill_between_the_files_of_an_epoch_costs_nothing(inputs, tmp_path):
    """The checkpoint of the epoch is there, and the file from which a restart goes on is of the epoch before."""
    whole, _ = run_or_cut(inputs, tmp_path / "whole", ["--ema"], {})
    write, written = CompleteCheckpointIO.write, []

    def write_and_end(self, name, content):
        if len(written) == 5:  # two for each epoch: the third has its checkpoint
            raise CutOff
        write(self, name, content)
        written.append(name.rpartition("_")[2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompleteCheckpointIO, "write", write_and_end)
        run_or_cut(inputs, tmp_path / "cut", ["--ema"], {})
    assert written == ["epoch-0.pt", "restart.pt", "epoch-1.pt", "restart.pt", "epoch-2.pt"]
    cut, _ = run_or_cut(inputs, tmp_path / "cut", ["--ema", "--restart_latest"], {})
    assert differences(files(cut), files(whole)) == []


@pytest.mark.parametrize("changed", [{"forces_weight": 1e4}, {"forces_weight": 1e-4}, {"valid_file": "train.xyz"}],
                         ids=["heavier", "lighter", "other_data"])
def test_a_restart_measures_what_it_has_to_beat_by_its_own_loss_and_data(inputs, tmp_path, changed):
    changed = {name: inputs / value if name == "valid_file" else value for name, value in changed.items()}
    run_or_cut(inputs, tmp_path / "cut", ["--ema"], {"max_num_epochs": 2})
    cut, _ = run_or_cut(inputs, tmp_path / "cut", ["--ema", "--restart_latest"], changed)
    fresh, _ = run_or_cut(inputs, tmp_path / "fresh", ["--ema"], changed | {"max_num_epochs": 1})
    assert cut.log.count("losses of before are measured again") == 1
    assert cut.progress().stage.start == pytest.approx(fresh.progress().stage.start, rel=1e-10)
    losses = {epoch: loss for epoch, _, loss in evaluations(cut)}
    assert cut.progress().stage.best in [losses[2], losses[3]] or cut.progress().stage.epoch < 2


def test_a_restart_with_more_patience_goes_on(inputs, tmp_path):
    still = {"lr": 1e-30, "patience": 1}
    run_or_cut(inputs, tmp_path, [], still)
    run, more = run_or_cut(inputs, tmp_path, ["--restart_latest"], still | {"patience": 3})
    assert more == 2 and [epoch for epoch, *_ in evaluations(run)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name, value", [("lr", 0.5), ("weight_decay", 0.1), ("ema_decay", 0.5), ("lr_factor", 0.1)])
def test_a_restart_with_an_option_that_would_not_act_stops(inputs, tmp_path, capsys, name, value):
    run_or_cut(inputs, tmp_path, ["--ema"], {"lr": 0.02}, cut=1)
    with pytest.raises(SystemExit):
        run_or_cut(inputs, tmp_path, ["--ema", "--restart_latest"], {"lr": 0.02} | {name: value})
    said = capsys.readouterr().err
    assert f"was made with --{name} " in said and f"this run asks for {value}" in said


@pytest.mark.parametrize("flags, options, cause", [
    ([], {}, "was made with --ema"), (["--ema", "--lbfgs"], {}, "was made with Adam and"),
    (["--ema"], {"optimizer": "schedulefree"}, "was made with Adam and"),
    (["--ema"], {"scheduler": "ExponentialLR"}, "and ReduceLROnPlateau"),
], ids=["ema", "lbfgs", "optimizer", "scheduler"])
def test_a_restart_with_another_optimizer_stops(inputs, tmp_path, capsys, flags, options, cause):
    run_or_cut(inputs, tmp_path, ["--ema"], {}, cut=1)
    with pytest.raises(SystemExit):
        run_or_cut(inputs, tmp_path, [*flags, "--restart_latest"], options)
    assert cause in capsys.readouterr().err
