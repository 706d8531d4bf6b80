"""PeftConfig: every value outside its rules is refused in one line that names the value and the remedy."""

import json

import pytest

from mace_peft import PeftConfig, PeftError

# settings, what the message names: the option, the value, and what to use instead
REFUSED = [
    ({"method": "lora"}, ["--peft ", "'lora'", "did you mean elora", "use mmea or elora"]),
    ({"method": "MMEA"}, ["--peft ", "'MMEA'", "use mmea or elora"]),
    ({"method": None}, ["--peft ", "None", "use mmea or elora"]),
    ({"method": ["mmea"]}, ["--peft ", "mmea", "use mmea or elora"]),
    ({"gate": "expp"}, ["--peft_gate", "'expp'", "did you mean exp", "use exp or residual"]),
    ({"gate": "sigmoid"}, ["--peft_gate", "'sigmoid'", "use exp or residual"]),
    ({"rank": 0}, ["--peft_rank", "0", "at least 1"]),
    ({"rank": -3}, ["--peft_rank", "-3", "at least 1"]),
    ({"rank": 2.5}, ["--peft_rank", "2.5", "whole number"]),
    ({"rank": 4.0}, ["--peft_rank", "4.0", "whole number"]),
    ({"rank": "16"}, ["--peft_rank", "16", "whole number"]),
    ({"rank": True}, ["--peft_rank", "True", "whole number"]),
    ({"rank": None}, ["--peft_rank", "None", "whole number"]),
    ({"alpha": 0}, ["--peft_alpha", "0", "above 0"]),
    ({"alpha": -1.5}, ["--peft_alpha", "-1.5", "above 0"]),
    ({"alpha": float("nan")}, ["--peft_alpha", "nan", "above 0"]),
    ({"alpha": float("inf")}, ["--peft_alpha", "inf", "above 0"]),
    ({"alpha": "1"}, ["--peft_alpha", "1", "above 0"]),
    ({"init_std": -0.001}, ["--peft_init_std", "-0.001", "from 0 up"]),
    ({"init_std": float("nan")}, ["--peft_init_std", "nan", "from 0 up"]),
    ({"init_std": float("inf")}, ["--peft_init_std", "inf", "from 0 up"]),
    ({"init_std": None}, ["--peft_init_std", "None", "from 0 up"]),
    ({"targets": ""}, ["--peft_targets", "''", "products, linears, published", "glob"]),
    ({"targets": " , "}, ["--peft_targets", "' , '", "products, linears, published", "glob"]),
    ({"targets": None}, ["--peft_targets", "None", "products, linears, published", "glob"]),
    ({"targets": ["products.*"]}, ["--peft_targets", "products.*", "products, linears, published", "glob"]),
    ({"train_also": ["readouts.*"]}, ["--peft_train_also", "readouts.*", "comma-separated"]),
    ({"train_also": " , "}, ["--peft_train_also", "' , '", "leave it out"]),
    ({"rank": "auto", "gate": "static"}, ["--peft_rank auto", "static gains", "leave it out"]),
    ({"rank": 4, "gate": "static"}, ["--peft_rank 4", "static gains", "leave it out"]),
    ({"alpha": 4, "gate": "static"}, ["--peft_alpha 4", "static gains", "leave it out"]),
    ({"init_std": 0.1, "method": "elora"}, ["--peft_init_std 0.1", "elora", "leave it out"]),
    ({"gate": "residual", "method": "elora"}, ["--peft_gate residual", "elora", "use --peft_gate static"]),
    ({"rank": "auto", "rank_pattern": 5}, ["rank_pattern 5", "{name of a module: rank}"]),
    ({"rank": "auto", "rank_pattern": {5: 5}}, ["rank_pattern 5", "{name of a module: rank}"]),
    ({"rank": "auto", "rank_pattern": {"linear": 0}}, ["rank_pattern linear", "0", "at least 1"]),
]


@pytest.mark.parametrize("settings, named", REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_value_outside_the_rules_is_refused(settings, named):
    with pytest.raises(PeftError) as error:
        PeftConfig(**{"method": "mmea", **settings})
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert part in message, message


def test_defaults():
    assert PeftConfig("mmea").to_dict() == {
        "method": "mmea", "rank": 16, "alpha": 16.0, "targets": "products", "gate": "exp", "init_std": 0.0,
        "train_also": None, "budget": None, "rank_pattern": None}


@pytest.mark.parametrize("rank", [1, 7, 32])
def test_alpha_is_the_rank_by_default(rank):
    assert PeftConfig("elora", rank=rank).alpha == rank
    assert PeftConfig("elora", rank=rank, alpha=2).alpha == 2


@pytest.mark.parametrize("config", [
    PeftConfig("mmea"),
    PeftConfig("elora", rank=3, alpha=0.5, targets="published"),
    PeftConfig("mmea", rank=32, targets="interactions.*.linear, readouts.*", gate="residual", init_std=0.001,
               train_also="readouts.*"),
])
def test_settings_survive_json(config):
    assert PeftConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_of_numpy_survive_json():
    numpy = pytest.importorskip("numpy")
    config = PeftConfig("mmea", rank=numpy.int64(4), alpha=numpy.float32(2), init_std=numpy.float64(0.1))
    assert PeftConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_options_are_what_one_types():
    config = PeftConfig("elora", rank=3, targets="interactions.*")
    assert config.options() == "--peft=elora --peft_rank=3 --peft_alpha=3.0 --peft_targets=interactions.*"
    assert PeftConfig("mmea", gate="static").options() == "--peft=mmea --peft_targets=products --peft_gate=static"


def test_settings_cannot_change():
    with pytest.raises(AttributeError):
        PeftConfig("mmea").rank = 3


def test_the_package_names_what_it_offers():
    import mace_peft

    assert set(mace_peft.__all__) <= set(dir(mace_peft))
    assert all(getattr(mace_peft, name) is not None for name in mace_peft.__all__)
    with pytest.raises(AttributeError, match="'ejects'"):
        mace_peft.ejects  # noqa: B018
