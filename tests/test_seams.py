"""The table of the names that a run replaces, in each release; and what the command does without the fast ones."""

import collections

import pytest
import torch
from mace.cli import run_train
from releases import since
from runs import reach_training, train_here, write_inputs
from tiny import assert_close

from mace_peft.fast.messages import FastProduct
from mace_peft.train.data.reading import Reading
from mace_peft.train.finetune import FineTune
from mace_peft.train.not_finite import FiniteLosses
from mace_peft.train.results import Results
from mace_peft.train.seams import SEAMS, originals


def bound():
    """What the names are bound to now."""
    owners = [(seam.find_owner(run_train), seam.name) for seam in SEAMS if since(seam.since)]
    return {(str(owner), name): getattr(owner, name) for owner, name in owners}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.owner}.{seam.name}")
def test_each_name_is_there_from_its_release_on(seam):
    assert hasattr(seam.find_owner(run_train), seam.name) == since(seam.since)
    owner, _, name = seam.stand_in.rpartition(".")
    classes = {"finite": FiniteLosses, "reading": Reading, "results": Results, "": FineTune}
    attributes = {"backward", "save_file", "jit"}  # made for each run
    assert hasattr(classes[owner] if owner in classes else getattr(FineTune, owner), name) or name in attributes


def test_each_name_is_replaced_once_and_by_one():
    for key in ("name", "stand_in"):
        owners = collections.Counter((seam.owner if key == "name" else "", getattr(seam, key)) for seam in SEAMS)
        assert not [what for what, count in owners.items() if count > 1]
    assert set(vars(originals(run_train))) == {seam.stand_in.rpartition(".")[2] for seam in SEAMS if since(seam.since)}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options, ends", [({}, False), ({"lr": 1e12, "max_num_epochs": 5}, True)])
def test_after_a_run_all_names_are_bound_as_before(tmp_path, options, ends):
    before = bound()
    run = {"peft": "elora", "peft_rank": 2, "max_num_epochs": 1} | options
    write_inputs(tmp_path)
    if ends:
        with pytest.raises(SystemExit):
            train_here(tmp_path, **run)
    else:
        train_here(tmp_path, **run)
    assert {key: value for key, value in bound().items() if value is not before[key]} == {}


@pytest.mark.usefixtures("uncompiled")
def test_without_fast_paths_the_steps_are_mace_s_own(tmp_path):
    write_inputs(tmp_path)
    weights = {}
    for fast in (True, False):
        run = {"peft": "mmea", "peft_rank": 2, "max_num_epochs": 2, "name": f"fast_{fast}", "peft_fast": fast}
        given = reach_training(tmp_path, **run)
        assert any(isinstance(module, FastProduct) for module in given["model"].modules()) == fast
        train_here(tmp_path, **run)
        weights[fast] = torch.load(tmp_path / f"fast_{fast}.model", weights_only=False).state_dict()
    numbers = [name for name, value in weights[True].items() if value.is_floating_point() and value.numel()]
    # Adam makes steps of equal length of gradients that are rounding, as that of a hidden layer at the start
    assert_close(*[[weights[fast][name] for name in numbers] for fast in (True, False)], tolerance=1e-8)
