"""The head of the foundation that a run starts from is the one of its name, or the one that is asked for."""

import argparse

import pytest
import torch
from mace.tools.scripts_utils import remove_pt_head
from runs import Run, reach_training, write_inputs
from tiny import configurations, predict, tiny_mace

from mace_peft import PeftConfig, PeftError, inject
from mace_peft.model.adapted import trainable_parameters
from mace_peft.train.foundation_head import choose_foundation_head, with_one_head

pytestmark = pytest.mark.usefixtures("double_precision")

GATES = ("gates", "mmea")


def options(**changed) -> argparse.Namespace:
    return argparse.Namespace(**{"heads": None, "foundation_head": None, "train_file": None, "valid_file": None,
                                 "test_file": None, "test_dir": None,
                                 "energy_key": "REF_energy", "multiheads_finetuning": False, "pt_train_file": None,
                                 "foundation_model": "a.model"} | changed)


@pytest.mark.parametrize("known, names, given, chosen", [
    (["one", "two"], ["two"], None, "two"), (["one", "two"], ["new"], None, "one"),
    (["one", "two"], ["two"], "one", "one"), (["pt_head", "Default"], None, None, "Default"),
    (["pt_head", "two"], ["new"], None, "two"),
    (["one", "two"], ["new", "other"], None, "one"), (["Default"], ["two"], None, None),
])
def test_the_head_of_the_run_s_name_or_the_first(known, names, given, chosen):
    heads = None if names is None else str({name: {"train_file": "a.xyz"} for name in names})
    args = options(heads=heads, foundation_head=given)
    choose_foundation_head(args, argparse.Namespace(heads=known), False)
    assert args.foundation_head == chosen


@pytest.mark.parametrize("names, given, words", [
    (["one", "two"], None, "choose it by --foundation_head"), (["two", "new"], None, "choose it by --foundation_head"),
    (["two"], "tow", "--foundation_head tow is not in the foundation model, which has one, two, did you mean two"),
])
def test_where_it_is_not_clear_the_run_asks(names, given, words):
    args = options(heads=str({name: {"train_file": "a.xyz"} for name in names}), foundation_head=given)
    with pytest.raises(PeftError, match=words):
        choose_foundation_head(args, argparse.Namespace(heads=["one", "two"]), False)


def two_heads(method: str, **config) -> torch.nn.Module:
    """A model of two heads that differ in all, with gates that have learnt."""
    model = tiny_mace(heads=("one", "two"))
    with torch.no_grad():
        model.atomic_energies_fn.atomic_energies[1] -= 0.5
        inject(model, PeftConfig(method, rank=2, train_also="readouts.*", **config))
        for parameter in trainable_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", GATES)
@pytest.mark.parametrize("head", ["one", "two"])
def test_one_head_of_an_adapted_model_predicts_as_it_did(method, head):
    model = two_heads(method)
    structures = configurations(3)
    for atoms in structures:
        atoms.info["head"] = head
    single = with_one_head(model, head, remove_pt_head)
    assert single.heads == [head]
    torch.testing.assert_close(predict(single, structures), predict(model, structures), rtol=1e-10, atol=1e-10)


def test_a_run_goes_on_from_the_head_of_its_name(tmp_path):
    model = two_heads("mmea")
    folder = write_inputs(tmp_path, foundation=model)
    heads = {"two": {"train_file": str(folder / "train.xyz"), "valid_file": str(folder / "valid.xyz"),
                     "E0s": dict(zip((1, 6, 8), model.atomic_energies_fn.atomic_energies[1].tolist(), strict=True))}}
    given = reach_training(folder, peft="mmea", heads=str(heads), train_file=None, valid_file=None, test_file=None,
                           E0s=None)
    structures = configurations(3)
    for atoms in structures:
        atoms.info["head"] = "two"
    torch.testing.assert_close(predict(given["model"], structures), predict(model, structures), rtol=1e-8, atol=1e-8)
    assert "The run starts from the head two of the foundation, which has one, two" in Run(folder / "reached").log


def test_replay_weighs_its_head(tmp_path):
    folder = write_inputs(tmp_path)
    options = {"multiheads_finetuning": True, "force_mh_ft_lr": True, "pt_train_file": folder / "train.xyz",
               "pt_valid_file": folder / "valid.xyz", "weight_pt_head": 0.25, "peft": "elora", "peft_rank": 1}
    given = reach_training(folder, **options)
    weights = {given["model"].heads[item.head]: item.weight.item() for item in given["train_loader"].dataset}
    assert weights == {"pt_head": 0.25, "Default": 1.0}
