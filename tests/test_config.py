"""PeftConfig: every value outside its rules is refused in one line that names the value and the remedy."""

import ast
import json
from pathlib import Path

import pytest

from mace_peft import PeftConfig, PeftError

METHODS = "use mmea or gates or elora or scales or elora+scales or small or best or full"
PLACES = ["glob", "'interactions.*.linear'", "a placement"]
# settings, what the message names: the setting, the value, and what to use instead
REFUSED = [
    ({"method": "lora"}, ["method 'lora'", "did you mean elora", METHODS]),
    ({"method": "MMEA"}, ["method 'MMEA'", METHODS]),
    ({"method": None}, ["method None", METHODS]),
    ({"method": ["mmea"]}, ["method ['mmea']", METHODS]),
    ({"gate": "expp"}, ["gate 'expp'", "did you mean exp", "use bounded or exp"]),
    ({"gate": "sigmoid"}, ["gate 'sigmoid'", "use bounded or exp"]),
    ({"gate": "static"}, ["gate 'static'", "use bounded or exp"]),
    ({"rank": 0}, ["rank 0", "at least 1"]),
    ({"rank": -3}, ["rank -3", "at least 1"]),
    ({"rank": 2.5}, ["rank 2.5", "whole number"]),
    ({"rank": 4.0}, ["rank 4.0", "whole number"]),
    ({"rank": "16"}, ["rank '16'", "whole number"]),
    ({"rank": True}, ["rank True", "whole number"]),
    ({"rank": [16]}, ["rank [16]", "whole number"]),
    ({"alpha": 0}, ["alpha 0", "above 0"]),
    ({"alpha": -1.5}, ["alpha -1.5", "above 0"]),
    ({"alpha": float("nan")}, ["alpha nan", "above 0"]),
    ({"alpha": float("inf")}, ["alpha inf", "above 0"]),
    ({"alpha": "1"}, ["alpha '1'", "above 0"]),
    ({"init_std": -0.001}, ["init_std -0.001", "from 0 up"]),
    ({"init_std": float("nan")}, ["init_std nan", "from 0 up"]),
    ({"init_std": float("inf")}, ["init_std inf", "from 0 up"]),
    ({"init_std": "0.1"}, ["init_std '0.1'", "from 0 up"]),
    ({"targets": ""}, ["targets ''", *PLACES]),
    ({"targets": " , "}, ["targets ' , '", *PLACES]),
    ({"targets": 5}, ["targets 5", *PLACES]),
    ({"targets": ["products.*", 5]}, ["targets ['products.*', 5]", *PLACES]),
    ({"targets": []}, ["targets ''", *PLACES]),
    ({"targets": "products.*," * 600}, ["targets 'products.*,", "6600 characters, of at most 5000", "a placement"]),
    ({"train_also": "*" * 5001}, ["train_also '***", "5001 characters, of at most 5000", "leave it out"]),
    ({"train_also": {"readouts.*"}}, ["train_also {'readouts.*'}", "comma-separated"]),
    ({"targets": "a\x1b[31m\nb"}, [r"targets 'a\x1b[31m\nb' has signs that cannot be printed", *PLACES]),
    ({"train_also": "a,\u202eb"}, [r"train_also 'a,\u202eb' has signs that cannot be printed", "leave it out"]),
    ({"targets": ",".join(map(str, range(201)))}, ["targets '0,1,2", "has 201 patterns, of at most 200"]),
    ({"train_also": " , "}, ["train_also ' , '", "leave it out"]),
    ({"rank": "auto", "method": "scales"}, ["rank auto", "scales, which has no rank", "leave it out"]),
    ({"rank": 4, "method": "scales"}, ["rank 4", "scales, which has no rank", "leave it out"]),
    ({"alpha": 4, "method": "scales"}, ["alpha 4", "scales, which has no low-rank updates", "leave it out"]),
    ({"budget": "5%", "method": "scales"}, ["budget 5%", "scales, which has no rank", "leave it out"]),
    ({"rank_pattern": {"linear": 2}, "method": "scales"}, ["rank_pattern {'linear': 2}", "no rank", "leave it out"]),
    ({"alpha": 4, "method": "gates"}, ["alpha 4", "gates, which has no low-rank updates", "leave it out"]),
    ({"init_std": 0.1, "method": "elora"}, ["init_std 0.1", "elora, which has no gates", "leave it out"]),
    ({"start": "zero", "method": "elora"}, ["start 'zero' is unknown", "use published or fan-in or gradient"]),
    ({"start": "fan-in", "method": "gates"}, ["start fan-in", "gates, which has no low-rank updates", "leave it out"]),
    ({"gate": "exp", "method": "elora"}, ["gate exp", "elora, which has no gates", "leave it out"]),
    ({"gate": "exp", "method": "elora+scales"}, ["gate exp", "elora+scales, which has no gates", "leave it out"]),
    ({"targets": "all", "method": "full"}, ["targets all", "full, which has no adapters", "leave it out"]),
    ({"rank": 4, "method": "full"}, ["rank 4", "full, which has no rank", "leave it out"]),
    ({"gate": "exp", "method": "small"}, ["gate exp", "small, which has no gates", "leave it out"]),
    ({"rank": 4, "budget": "5%"}, ["budget 5%", "rank 4", "leave it out", "use rank auto"]),
    ({"rank": 4, "rank_pattern": {"linear": 2}}, ["rank_pattern {'linear': 2}", "rank 4", "use rank auto"]),
    ({"rank": "auto", "rank_pattern": 5}, ["rank_pattern 5", "{name of a module: rank}"]),
    ({"rank": "auto", "rank_pattern": {5: 5}}, ["rank_pattern 5", "{name of a module: rank}"]),
    ({"rank": "auto", "rank_pattern": {"linear": 0}}, ["rank_pattern linear", "0", "at least 1"]),
]


@pytest.mark.parametrize("settings, named", REFUSED,
                         ids=lambda value: f"{value!s:.100}" if isinstance(value, dict) else "")
def test_a_value_outside_the_rules_is_refused(settings, named):
    with pytest.raises(PeftError) as error:
        PeftConfig(**{"method": "mmea", **settings})
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert part in message, message


@pytest.mark.parametrize("settings", [
    {"rank": 4, "rank_pattern": {"x" * 150 + str(number): 1 for number in range(3000)}},
    {"method": "scales", "rank_pattern": {"x" * 10**5: 1}},
    {"rank": "auto", "rank_pattern": {"x" * 10**5: 0}}, {"rank": "auto", "budget": "x" * 10**5},
    {"targets": "," * 10**5},
], ids=["no effect on a rank", "no effect on a method", "a name", "a budget", "commas"])
def test_what_is_long_is_cut(settings):
    with pytest.raises(PeftError) as error:
        PeftConfig(**{"method": "small", **settings})
    assert len(str(error.value)) < 500


def test_on_the_command_line_settings_are_options():
    with pytest.raises(PeftError) as error:
        PeftConfig("mmea", rank=4, budget="5%")
    assert str(error.value) == "budget 5% has no effect on rank 4: leave it out, or use rank auto"
    assert error.value.on_command_line() == ("--peft_budget 5% has no effect on --peft_rank 4: leave it out, or use "
                                             "--peft_rank auto")
    with pytest.raises(PeftError) as error:
        PeftConfig("lora")
    assert error.value.on_command_line().startswith("--peft 'lora' is unknown")


GATED = {"gate": "bounded", "init_std": 0.0}
DEFAULTS = {  # those that are not None
    "mmea": {"rank": 16, "alpha": 16.0, "targets": "published", "start": "published", **GATED},
    "gates": {"rank": 16, "targets": "all", **GATED},
    "elora": {"rank": 16, "alpha": 16.0, "targets": "linears", "start": "published"},
    "scales": {"targets": "all"},
    "elora+scales": {"rank": 16, "alpha": 16.0, "targets": "linears", "start": "published"},
    "small": {"rank": "auto", "targets": "linears", "budget": "5%", "start": "published"},
    "best": {"rank": "auto", "targets": "linears", "budget": "20%", "start": "gradient"},
}

NOTHING = dict.fromkeys(("rank", "alpha", "targets", "start", "gate", "init_std", "train_also", "budget",
                         "rank_pattern"))


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults(method):
    """A setting that does not act on the method is None."""
    assert PeftConfig(method).to_dict() == {"method": method, **NOTHING, **DEFAULTS[method]}


@pytest.mark.parametrize("method", DEFAULTS)
def test_None_is_the_default(method):
    assert PeftConfig(method, **NOTHING) == PeftConfig(method)


@pytest.mark.parametrize("rank", [1, 7, 32])
def test_alpha_is_the_rank_by_default(rank):
    assert PeftConfig("elora", rank=rank).alpha == rank
    assert PeftConfig("elora", rank=rank, alpha=2).alpha == 2


@pytest.mark.parametrize("config", [
    PeftConfig("mmea"),
    PeftConfig("elora", rank=3, alpha=0.5, targets="published"),
    PeftConfig("mmea", rank=32, targets="interactions.*.linear, readouts.*", gate="exp", init_std=0.001,
               train_also="readouts.*"),
    PeftConfig("scales"),
    PeftConfig("elora+scales", rank="auto", budget=500, rank_pattern={"linear": 3}),
    *map(PeftConfig, DEFAULTS),
], ids=lambda config: config.options())
def test_settings_survive_json(config):
    assert PeftConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_of_numpy_survive_json():
    numpy = pytest.importorskip("numpy")
    config = PeftConfig("mmea", rank=numpy.int64(4), alpha=numpy.float32(2), init_std=numpy.float64(0.1))
    assert PeftConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_patterns_is_as_their_text(kind):
    config = PeftConfig("elora", targets=kind(["interactions.*.linear", "products.*"]), train_also=kind(["readouts.*"]))
    assert config == PeftConfig("elora", targets="interactions.*.linear,products.*", train_also="readouts.*")


def test_options_are_what_one_types():
    config = PeftConfig("elora", rank=3, targets="interactions.*")
    assert config.options() == ("--peft=elora --peft_rank=3 --peft_alpha=3.0 --peft_targets=interactions.* "
                                "--peft_start=published")
    assert PeftConfig("scales", targets="products").options() == "--peft=scales --peft_targets=products"
    assert PeftConfig("small").options() == ("--peft=small --peft_rank=auto --peft_targets=linears "
                                             "--peft_start=published --peft_budget=5%")


def test_settings_cannot_change():
    with pytest.raises(AttributeError):
        PeftConfig("mmea").rank = 3


def test_the_package_names_what_it_offers():
    import mace_peft

    assert set(mace_peft.__all__) <= set(dir(mace_peft))
    assert all(getattr(mace_peft, name) is not None for name in mace_peft.__all__)
    stub = ast.parse(Path(mace_peft.__file__).with_name("__init__.pyi").read_text())
    told = {(alias.name, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == {(name, f"mace_peft.{module}") for name, module in mace_peft._PUBLIC.items()}  # to type checkers
    with pytest.raises(AttributeError, match="'ejects'"):
        mace_peft.ejects  # noqa: B018
