"""Without ``--peft``, ``mace_run_train`` does what it does where mace-peft is not installed."""

import json
import re

import pytest
import torch
from combined import write_small
from runs import NAME, SEED, Run, call, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """The same fine-tune with and without the start-up hook."""
    folders = [write_small(tmp_path_factory.mktemp(name)) for name in ("hook", "no_hook")]
    return [train(folder, "--swa", "--ema", start_swa=2, max_num_epochs=3, hook=hook)
            for folder, hook in zip(folders, [True, False], strict=True)]


def equal(first, second) -> bool:
    """Whether nested dictionaries and lists hold the same values, and tensors of the same bits."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_both_succeed_and_leave_the_same_files(runs):
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    with_hook, without = [{path.relative_to(run.folder) for path in run.folder.rglob("*")} for run in runs]
    assert with_hook == without


@pytest.mark.parametrize("stage_two", [False, True], ids=["stage_one", "stage_two"])
def test_weights_are_the_same_to_the_last_bit(runs, stage_two):
    assert equal(*[run.model(stage_two).state_dict() for run in runs])
    assert equal(*[run.checkpoint(stage_two) for run in runs])


def test_metrics_are_the_same(runs):
    with_hook, without = [[{**line, "time": None} for line in run.metrics] for run in runs]
    assert json.dumps(with_hook) == json.dumps(without)


@pytest.mark.parametrize("log", [f"{NAME}_run-{SEED}.log", f"{NAME}_run-{SEED}_debug.log"])
def test_logs_are_the_same_but_for_times_and_folders(runs, log):
    """The debug log holds the options that MACE parsed: in 0.3.14, functions at an address are among them."""
    varying = re.compile(r"^[-\d]+ [\d:.]+ | at 0x[0-9a-f]+", re.MULTILINE)
    with_hook, without = [varying.sub("", (run.folder / "logs" / log).read_text())
                          .replace(str(run.folder), "folder").splitlines() for run in runs]
    assert with_hook == without


def test_help_lists_the_options_and_leaves_the_others_alone(tmp_path):
    with_hook, without = [call(tmp_path, ["--help"], hook=hook) for hook in (True, False)]
    assert (with_hook.returncode, without.returncode) == (0, 0)
    options = [re.findall(r"^  (--\w+)", run.stdout, re.MULTILINE) for run in (with_hook, without)]
    assert "--foundation_model" in options[1] and "--peft" not in options[1]
    added = [option for option in options[0] if option not in options[1]]
    assert [option for option in options[0] if option not in added] == options[1]
    assert "--peft" in added and all(option.startswith("--peft") for option in added)
