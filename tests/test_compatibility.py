"""The compatibility page names every option of MACE, and tests that exist; and rows of it that no other file shows."""

import argparse
import ast
import re
from pathlib import Path

import pytest
import torch
from mace import modules
from mace.cli import run_train
from releases import release, since
from runs import reach_training, train_here, write_inputs
from tiny import tiny_mace

from mace_peft import PeftError, trainable_parameters
from mace_peft.train import start
from mace_peft.train.plugin import SUPPORTED

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/compatibility.md").read_text()
FEATURES, REASONS = PAGE.split("## Options that cannot interact")
OPTION = re.compile(r"`(--\w+)")
HEADER = ["feature", "with `--peft`", "mace-torch", "test"]
RELEASE = r"0\.3\.\d+"
WITHOUT_MACE = "none, but sevenn 0.13"  # tests that nox -s sevenn runs
VERSIONS = re.compile(rf"{RELEASE}( - {RELEASE})?|below {RELEASE}, above {RELEASE}|{WITHOUT_MACE}")


def rows(part: str) -> list[list[str]]:
    """The cells of each row of its tables, but for the lines under the headers."""
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if set("".join(cells)) - set(" -")]


ROWS = [row for row in rows(FEATURES) if row != HEADER]


def needs(file: str, name: str) -> tuple[int, ...]:
    """The release that the test's ``since`` mark names, or the first. There is such a test."""
    tree = ast.parse((TESTS / file).read_text())
    (test,) = [item for item in tree.body if isinstance(item, ast.FunctionDef) and item.name == name]
    marks = [re.fullmatch(r"pytest\.mark\.since\('(.*)'\)", ast.unparse(mark)) for mark in test.decorator_list]
    return max(release(mark[1]) for mark in [*filter(None, marks), re.match("(.*)", SUPPORTED[0])])


def options_of_mace() -> set[str]:
    """Those of the installed MACE, without the plugin's."""
    actions = run_train.tools.build_default_arg_parser()._actions
    return {text for action in actions for text in action.option_strings if not re.match("-h|--help|--peft", text)}


def test_every_option_is_in_the_page():
    assert options_of_mace() - set(OPTION.findall(PAGE)) == set()


def test_no_option_is_in_both_parts():
    assert set(OPTION.findall(FEATURES)) & {option for options, _ in rows(REASONS)[1:] for option in
                                            OPTION.findall(options)} == set()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_says_what_holds_where_and_names_tests_that_exist(row):
    _, outcome, versions, tests = row
    assert re.match("(works|refused)", outcome)
    assert VERSIONS.fullmatch(versions)
    assert set(re.findall(RELEASE, versions)) <= set(SUPPORTED)
    first = release(SUPPORTED[0] if versions.startswith(("below", "none")) else versions.split(" - ")[0])
    named = re.findall(r"`(\w+\.py)::(\w+)`", tests)
    assert named and all(file.startswith("test_") == (versions != WITHOUT_MACE) for file, _ in named)
    assert {needs(file, name) for file, name in named} <= {release(SUPPORTED[0]), first}


@pytest.mark.since(SUPPORTED[-1])
def test_the_options_of_the_page_exist():
    assert {option for option in OPTION.findall(PAGE) if not option.startswith("--peft")} - options_of_mace() == set()


# --- rows that no other file shows ------------------------------------------------------------------------------------


def test_adapters_have_the_learning_rate_and_decay_of_the_part_they_are_in(tmp_path):
    factors = {"products_lr_factor": 0.1, "readouts_lr_factor": 0.5}
    if since("0.3.15"):
        options = {"lr_params_factors": str(factors).replace("'", '"')}
    else:
        options, factors = {}, {}  # all parts have the same learning rate
    given = reach_training(write_inputs(tmp_path), peft="mmea", peft_rank=2, peft_targets="*.linear, *.linear_up",
                           lr=0.02, weight_decay=0.3, **options)
    held = {id(parameter): group for group in given["optimizer"].param_groups for parameter in group["params"]}
    parts = set()
    for name, parameter in trainable_parameters(given["model"]).items():
        part, group = name.split(".")[0], held[id(parameter)]
        parts.add(part)
        assert group["lr"] == pytest.approx(0.02 * factors.get(f"{part}_lr_factor", 1))
        assert group["weight_decay"] == (0.3 if part == "products" else 0)
    assert parts == {"node_embedding", "interactions", "products", "readouts"}


# options that are refused, and what the line says of them
REFUSED = [
    pytest.param({"device": "xpu"}, ["--device xpu", "lose the adapters", "use cuda or cpu"], id="xpu"),
    pytest.param({"name": 250 * "a"}, [250 * "a", "File name too long", "another --name"], id="name too long"),
    *(pytest.param({"model": model}, [f"--model {model}", "new model", "ScaleShiftMACE"], id=model)
      for model in ("AtomicDipolesMACE", "EnergyDipolesMACE", "BOTNet", "ScaleShiftBOTNet")),
    pytest.param({"model": "AtomicDielectricMACE"}, ["--model AtomicDielectricMACE", "new model"],
                 marks=pytest.mark.since("0.3.14"), id="AtomicDielectricMACE"),
]


def refusal(capsys, folder: Path, **options) -> str:
    """The line with which the command stops, before it finds that there are no data and no foundation."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_here(folder, **{"peft": "mmea", "peft_rank": 2} | options)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("mace_run_train: error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("options, words", REFUSED)
def test_an_option_that_cannot_go_with_peft_is_refused(tmp_path, capsys, options, words):
    message = refusal(capsys, tmp_path, **options)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.since("0.3.14")
def test_settings_for_les_are_refused(tmp_path, capsys):
    (tmp_path / "les.yaml").write_text("strength: 1.0")
    message = refusal(capsys, tmp_path, les_arguments=tmp_path / "les.yaml")
    assert "--les_arguments {'strength': 1.0}" in message and "settings of the foundation: leave it out" in message


@pytest.mark.parametrize("stage", ["", "_stagetwo"])
def test_a_name_where_a_file_is_in_the_way_is_refused(tmp_path, capsys, stage):
    (tmp_path / f"water{stage}_adapter").touch()
    message = refusal(capsys, tmp_path, name="water")
    assert f"water{stage}_adapter is a file" in message and "another --name" in message


@pytest.mark.parametrize("asked, held", [("MACE", "MACELES"), ("ScaleShiftMACE", "PolarMACE"),
                                         ("MACELES", "ScaleShiftMACE"), ("PolarMACE", "ScaleShiftMACE")])
def test_a_model_of_another_class_than_the_foundations_is_refused(tmp_path, asked, held):
    args = argparse.Namespace(model=asked, foundation_model="a.model")
    foundation = tiny_mace()
    foundation.__class__ = type(held, (modules.ScaleShiftMACE,), {})
    with pytest.raises(PeftError, match=f"--model {asked} makes .* a.model, which is a {held}: .* use --model {held}"):
        start.check_class(args, foundation)
    start.check_class(argparse.Namespace(model=held, foundation_model="a.model"), foundation)


def test_that_is_checked_before_data_are_read(tmp_path):
    torch.save(tiny_mace(), tmp_path / "a.model")
    args = argparse.Namespace(model="MACELES", foundation_model=str(tmp_path / "a.model"), default_dtype="float64",
                              foundation_head=None)
    with pytest.raises(PeftError, match="--model MACELES makes a MACELES"):
        start.find_start(args, {"method": "mmea", "rank": 2})
