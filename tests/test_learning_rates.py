"""Without ``--lr``, a run takes the rate that was best for its method; one that is given is taken, whatever it is."""

import logging

import pytest
import yaml
from combined import write_small
from mace.cli import run_train
from releases import since
from runs import reach_training, train_here

from mace_peft.methods import METHODS
from mace_peft.train import plugin
from mace_peft.train.learning_rates import RATES, NotGiven, settle_rates, unmark

PEFT = {"peft": "scales"}  # whose rate is not MACE's default
RATE = METHODS["scales"].lr


def parse(*argv: str):
    plugin.install(run_train)
    return run_train.tools.build_default_arg_parser().parse_args(["--name=a", *argv])


@pytest.fixture
def said(caplog):
    """Settles the rates of the options; returns them and what the log says."""

    def settle(*argv):
        args = parse(*argv)
        with caplog.at_level(logging.INFO):
            settle_rates(args, METHODS["scales"])
        assert not any(isinstance(getattr(args, name), NotGiven) for name in RATES)
        return (args.lr, args.swa_lr), caplog.messages

    return settle


@pytest.mark.parametrize("argv, rates, lines", [
    ([], (RATE, 0.001), [f"Learning rate {RATE:g}, which was best for scales in sweeps, for no --lr is given"]),
    (["--lr=0.01"], (0.01, 0.001), [f"Learning rate 0.01; in sweeps {RATE:g} was best for scales"]),  # MACE's default
    (["--swa"], (RATE, RATE / 5), [f"Learning rate {RATE:g}, which", f"rate {RATE / 5:g} in stage two, a fifth of"]),
    (["--swa", "--lr=0.1"], (0.1, 0.02), ["Learning rate 0.1; in", "rate 0.02 in stage two, a fifth of --lr"]),
    (["--swa", "--lr=0.1", "--stage_two_lr=0.001"], (0.1, 0.001), ["Learning rate 0.1; in"]),
    (["--lbfgs"], (0.01, 0.001), []),
])
def test_rates_that_are_not_given_are_those_of_the_method(said, argv, rates, lines):
    settled, log = said(*argv)
    assert settled == pytest.approx(rates)
    assert len(log) == len(lines) and all(line in message for line, message in zip(lines, log, strict=True))


def test_a_rate_of_a_yaml_file_is_given(said, tmp_path):
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump({"lr": 0.01, "swa_lr": 0.001, "swa": True}))
    settled, log = said(f"--config={tmp_path / 'rates.yaml'}")
    assert settled == (0.01, 0.001) and len(log) == 1


def test_without_peft_the_defaults_are_plain_numbers():
    args = parse()
    assert repr(args.lr) == "0.01" and f"{args.swa_lr}" == "0.001"  # as MACE's --help and debug log have them
    unmark(args)
    assert type(args.lr) is type(args.swa_lr) is float


@pytest.mark.usefixtures("uncompiled")
def test_the_rates_reach_the_optimizer_and_a_restart(tmp_path, capsys):
    """Also the rates of parts, which are multiples of --lr; a restart without --lr goes on with what it was."""
    folder = write_small(tmp_path)
    more = {"lr_params_factors": '{"products_lr_factor": 3.0}'} if since("0.3.15") else {}
    options = PEFT | {"lr": None, "max_num_epochs": 1, "multiheads_finetuning": None} | more
    run = train_here(folder, **options)
    assert f"Learning rate {RATE:g}, which was best for scales" in run.log
    assert "INFO: No data are replayed: " in run.log and "Materials Project" not in run.log  # MACE would warn
    given = reach_training(folder, "--restart_latest", "--swa", work_dir=folder, **options | {"max_num_epochs": 3})
    groups = given["optimizer"].param_groups
    assert {group["initial_lr"] for group in groups} == {RATE, *([3 * RATE] if more else [])}
    assert {group["swa_lr"] for group in groups} == {RATE / 5}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_here(folder, "--restart_latest", **options | {"lr": 0.01})
    said = capsys.readouterr().err
    assert f"was made with --lr {RATE}, with which a restart goes on, and this run asks for 0.01" in said
