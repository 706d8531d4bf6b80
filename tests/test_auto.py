"""``--peft auto``: short trials choose method and rate, and leave the run as it would be with these options."""

import importlib
import itertools
import math
import re
from argparse import Namespace

import pytest
import torch
from combined import assert_same
from runs import Run, reach_training, relabel, train_here, write_inputs
from tiny import tiny_mace

from mace_peft import PeftConfig, PeftError
from mace_peft.methods import METHODS
from mace_peft.train.adapt import those_that_fit
from mace_peft.train.auto_candidates import METHODS_TRIED, Candidate, candidates, methods_that_take
from mace_peft.train.auto_trials import LEAST, affordable, choose, rounds
from mace_peft.train.options import read_settings

steps_of_mace = importlib.import_module("mace.tools.train")  # MACE binds that name to a function, too

pytestmark = pytest.mark.usefixtures("uncompiled")
OPTIONS = {"peft": "auto", "peft_rank": 2, "lr": None, "batch_size": 1, "max_num_epochs": 20}
STEPS = 20 * 8  # of the run, with the 8 structures of the training set


# --- the table --------------------------------------------------------------------------------------------------------


def take(**settings):
    return methods_that_take(settings, lambda config: None)


def test_methods_are_tried_at_their_rates_first_and_at_half_and_twice_that():
    configs, refused = take()
    assert [config.method for config in configs] == list(METHODS_TRIED) and not refused
    table = candidates(configs, None)
    assert [candidate.config.method for candidate in table] == 3 * list(METHODS_TRIED)
    own = [METHODS[method].lr for method in METHODS_TRIED]
    assert [candidate.lr for candidate in table] == own + [lr / 2 for lr in own] + [2 * lr for lr in own]
    assert candidates(configs, 0.3) == [Candidate(PeftConfig(method), 0.3) for method in METHODS_TRIED]


@pytest.mark.parametrize("settings, methods", [
    ({"rank": 2}, ["best", "mmea", "small"]), ({"gate": "exp"}, ["mmea"]), ({"budget": "2%"}, ["best", "small"]),
    ({"alpha": 2.0}, ["best", "mmea", "small"]), ({"targets": "all"}, ["best", "mmea", "small"])])
def test_methods_on_which_a_setting_does_not_act_are_not_tried(settings, methods):
    configs, refused = take(**settings)
    assert [config.method for config in configs] == methods
    assert all(getattr(config, name) == value for config in configs for name, value in settings.items())
    assert refused.keys() == set(METHODS_TRIED) - set(methods)


def test_settings_that_no_method_takes_are_refused():
    with pytest.raises(PeftError, match="method auto tries best, mmea, small, full, and none of them takes this: "
                                        "best: gate exp has no effect on best.*; mmea: budget 5% has no effect"):
        take(gate="exp", budget="5%")


# --- the halving ------------------------------------------------------------------------------------------------------


def test_the_trials_take_at_most_their_share():
    for count, steps in itertools.product(range(2, 13), range(0, 4000, 7)):
        plan = rounds(count, steps)
        assert sum(left * each for left, each in plan) <= steps
        assert [left for left, _ in plan][0] == count and plan[-1][0] == 2
        assert all(after == math.ceil(before / 2) for (before, _), (after, _) in zip(plan, plan[1:], strict=False))


def test_a_short_run_tries_the_first_of_the_table():
    assert affordable(12, 100 * LEAST * 12) == 12
    assert affordable(4, 100 * LEAST * 12) == 4
    few = 10 * LEAST  # two methods, for as many steps as are the least
    assert affordable(12, few) == 2
    with pytest.raises(PeftError, match=rf"a fifth of the run's {few - 1}: use method best, or more"):
        affordable(12, few - 1)


def pretend(losses, steps):
    """What is chosen where a trial has these losses, by its place in the table; and the steps of each."""
    table = [Candidate(PeftConfig("elora"), 0.001 * (1 + place)) for place in range(len(losses))]
    taken = dict.fromkeys(table, 0)

    def begin(candidate):
        def train(more):
            taken[candidate] += more
            loss = losses[table.index(candidate)]
            return loss(taken[candidate]) if callable(loss) else loss
        return train

    chosen = choose(table, steps, begin)
    return table.index(chosen), list(taken.values())


def test_the_lowest_loss_of_those_that_are_left_is_chosen(caplog):
    caplog.set_level("INFO")
    place, taken = pretend([0.5, 0.2, math.nan, 0.3, math.inf, 0.4], 5 * 360)
    assert place == 1
    assert taken == [20, 20 + 40 + 60, 20, 20 + 40 + 60, 20, 20 + 40] and sum(taken) <= 360
    table, line = caplog.messages[-1].split("\nChosen: ")
    assert "| elora  |         0.002 |   120 |      0.20000000 | chosen" in table
    assert "| elora  |         0.003 |    20 |             inf | dropped in round 1 |" in table
    assert line.startswith("--peft elora --lr 0.002, with a validation loss of 0.20000000 after 120 steps, and "
                           "0.30000000 with --peft elora --lr 0.004.")


def test_it_is_the_last_loss_that_counts():
    assert pretend([0.3, lambda steps: 10 / steps], 5 * 400) == (1, [200, 200])


def test_of_equal_losses_the_first_of_the_table_is_chosen():
    assert pretend([0.2, 0.2, 0.2], 5 * 400)[0] == 0


def test_losses_that_are_all_no_numbers_are_refused():
    with pytest.raises(PeftError, match="no trial of method auto has ended with a finite validation loss"):
        pretend([math.nan, math.inf], 5 * 400)


def test_one_candidate_needs_no_trials():
    assert pretend([math.nan], 1) == (0, [0])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return relabel(write_inputs(tmp_path_factory.mktemp("auto")))


def run_of(inputs, name, *flags, **options):
    """A run in a folder of its own."""
    train_here(inputs, *flags, work_dir=inputs / name, **{**OPTIONS, **options})
    return Run(inputs / name)


@pytest.fixture(scope="module")
def finished(inputs):
    """A run, and how many optimizer steps it has taken."""
    taken, take_step = [], steps_of_mace.take_step

    def counted(**arguments):
        taken.append(1)
        return take_step(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_of_mace, "take_step", counted)
        run = run_of(inputs, "finished", E0s="average")
    return run, len(taken)


def choice(run) -> dict:
    method, lr = re.search(r"Chosen: --peft (\S+) --lr (\S+), with a validation loss", run.log).groups()
    return {"peft": method, "lr": lr}


def test_the_trials_take_a_fifth_of_the_steps(finished):
    run, taken = finished
    assert STEPS + 2 * LEAST <= taken <= STEPS + STEPS // 5
    assert f"of the run's {STEPS} steps in all" in run.log
    assert "--peft auto does not try full: --peft_rank 2 has no effect on full" in run.log


def test_full_is_left_out_where_its_adapter_directory_would_be_too_large(inputs, monkeypatch, caplog):
    caplog.set_level("INFO")
    model, configs = tiny_mace(), [PeftConfig("best"), PeftConfig("full")]
    assert those_that_fit(configs, model) == configs
    monkeypatch.setattr("mace_peft.adapter.description.LARGEST_TENSORS", 8000)
    assert those_that_fit(configs, model) == configs[:1]
    assert re.search("--peft auto does not try full: .* bytes, .* by another --peft, or in float32", caplog.text)
    with pytest.raises(PeftError, match="what trains has .* bytes"):
        those_that_fit(configs[1:], model)


def test_the_choice_repeated_gives_the_same_weights(finished, inputs):
    """To the last bit: the trials leave the random numbers and the order of the data as they are."""
    run, _ = finished
    again = run_of(inputs, "again", E0s="average", **choice(run))
    assert "Trials" not in again.log
    found, expected = run.adapter_tensors(), again.adapter_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert run.adapter_config()["peft"] == again.adapter_config()["peft"]
    assert run.adapter_config()["peft"]["method"] == choice(run)["peft"]
    assert run.adapter_config()["training"]["options"] == again.adapter_config()["training"]["options"]


def test_the_same_seed_chooses_the_same(finished, inputs):
    run, _ = finished
    again = run_of(inputs, "twice", "--dry_run", E0s="average")
    table = re.compile(r"^\| (?:elora|mmea|small) .*\|$", re.M)
    assert table.findall(again.log) == table.findall(run.log) != []
    assert choice(again) == choice(run)


def test_a_restart_goes_on_with_the_choice(finished, inputs, monkeypatch):
    monkeypatch.setattr("mace_peft.train.adapt.choose", None)
    run, _ = finished
    given = reach_training(inputs, "--restart_latest", work_dir=run.folder, E0s="average",
                           **OPTIONS | {"max_num_epochs": 21})
    assert given["model"].peft_config.method == choice(run)["peft"] and given["start_epoch"] == 20
    assert {group["lr"] for group in given["optimizer"].param_groups} == {float(choice(run)["lr"])}
    assert "to go on with epoch 20" in run.log and "goes on with --peft" in run.log


def test_an_absurd_rate_loses(inputs, monkeypatch):
    """The first candidate: its loss is far off after a few steps, or no number."""
    monkeypatch.setattr("mace_peft.train.auto_candidates.METHODS_TRIED", ("small", "full"))
    monkeypatch.setattr("mace_peft.train.auto_candidates.FACTORS", (1e4, 1.0))
    run = run_of(inputs, "absurd", "--dry_run", peft_rank=None, max_num_epochs=60)
    assert choice(run)["peft"] in ("small", "full") and float(choice(run)["lr"]) < 0.1
    rows = re.findall(r"^\| (\w+) +\| +(\S+) \| +(\d+) \| +(\S+) \| (.*?) +\|$", run.log, re.M)
    assert [row[1] for row in rows[:2]] == ["200", "50"] and all("dropped" in row[4] for row in rows[:2])


def test_a_trial_takes_the_first_steps_of_the_run(inputs, monkeypatch):
    """The same start, batches and optimizer: also the same weights, if the run is that of the trial."""
    weights = {}

    def noting(name, take_step):
        def step(*, model, **arguments):
            result = take_step(model=model, **arguments)
            weights.setdefault((name, id(model)), []).append(
                {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad})
            return result
        return step

    take_step = steps_of_mace.take_step
    monkeypatch.setattr(steps_of_mace, "take_step", noting("auto", take_step))
    run = run_of(inputs, "first", max_num_epochs=14)
    monkeypatch.setattr(steps_of_mace, "take_step", noting("chosen", take_step))
    run_of(inputs, "first again", max_num_epochs=1, **choice(run))
    *trials, _ = [steps for (name, _), steps in weights.items() if name == "auto"]
    (chosen,) = [steps for (name, _), steps in weights.items() if name == "chosen"]
    same = [trial for trial in trials if trial[0].keys() == chosen[0].keys()]
    assert len(trials) == 2 and len(same) == 1
    for step in range(8):
        assert_same(same[0][step], chosen[step], 1e-10)  # code of TorchScript rounds otherwise in its first calls


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(inputs, capsys, *flags, **options) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_of(inputs, "refused", *flags, **options)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mace_run_train: error: " in line]
    return line


def test_a_run_that_is_too_short_is_refused(inputs, capsys):
    line = refused(inputs, capsys, max_num_epochs=2)
    assert ("--peft auto has too few steps for its trials, which take at least 20 and at most a fifth of the run's 16: "
            "use --peft best, or more --max_num_epochs") in line


def test_settings_that_no_method_takes_are_refused_before_data_are_read(inputs, capsys):
    assert "none of them takes this: best: --peft_rank 99" in refused(inputs, capsys, peft_rank=99)


def test_options_that_leave_nothing_to_choose_are_refused(capsys):
    for given, said in {"lbfgs": "--lbfgs True cannot go with method auto", "peft_adapter": "adapter mine, which has a"
                        }.items():
        with pytest.raises(PeftError, match=said):
            read_settings(Namespace(peft="auto", **{given: "mine" if given == "peft_adapter" else True}))


def test_in_python_there_is_no_auto():
    with pytest.raises(PeftError, match="^method auto is for mace_run_train, which tries methods on its data: "):
        PeftConfig("auto")
