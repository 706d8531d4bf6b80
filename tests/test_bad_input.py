"""What cannot be used stops ``mace_run_train`` with exit code 2 and one line, before it reads any data."""

import importlib.util
import io
import re

import ase.io
import pytest
import torch
import yaml
from e3nn.util import jit
from mace import modules
from mace.cli import run_train
from runs import arguments, call, reach_training, train_here, write_inputs
from tiny import configurations, tiny_mace

from mace_peft import PeftConfig, inject

MMEA = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products"}
ELORA = {"peft": "elora", "peft_rank": 2, "peft_targets": "products"}

# options, and what the line says of them: the value, the cause, the remedy
BAD_VALUES = {
    "rank 0": (MMEA | {"peft_rank": 0}, ["--peft_rank 0", "whole number of at least 1"]),
    "rank -3": (MMEA | {"peft_rank": -3}, ["--peft_rank -3", "whole number of at least 1"]),
    "rank 2.5": (MMEA | {"peft_rank": 2.5}, ["--peft_rank '2.5'", "not a whole number"]),
    "rank abc": (MMEA | {"peft_rank": "abc"}, ["--peft_rank 'abc'", "not a whole number"]),
    "rank of nothing": (MMEA | {"peft_rank": ""}, ["--peft_rank ''", "not a whole number"]),
    "rank above mmea": (MMEA | {"peft_rank": 9}, ["--peft_rank 9", "products.0", "largest useful rank here is 4"]),
    "rank above elora": (ELORA | {"peft_rank": 5}, ["--peft_rank 5", "products.0", "largest useful rank here is 4"]),
    "rank above pattern": (ELORA | {"peft_targets": "readouts.0.linear"},
                           ["--peft_rank 2", "readouts.0.linear", "largest useful rank here is 1"]),
    "alpha 0": (ELORA | {"peft_alpha": 0}, ["--peft_alpha 0", "number above 0"]),
    "alpha -1": (ELORA | {"peft_alpha": -1}, ["--peft_alpha -1", "number above 0"]),
    "alpha nan": (ELORA | {"peft_alpha": "nan"}, ["--peft_alpha nan", "number above 0"]),
    "alpha inf": (ELORA | {"peft_alpha": "inf"}, ["--peft_alpha inf", "number above 0"]),
    "alpha x": (ELORA | {"peft_alpha": "x"}, ["--peft_alpha 'x'", "not a number"]),
    "alpha of gates": (MMEA | {"peft_alpha": 4}, ["--peft_alpha 4", "no effect on gates", "use published"]),
    "init_std -1": (MMEA | {"peft_init_std": -1}, ["--peft_init_std -1", "number from 0 up"]),
    "init_std nan": (MMEA | {"peft_init_std": "nan"}, ["--peft_init_std nan", "number from 0 up"]),
    "init_std x": (MMEA | {"peft_init_std": "x"}, ["--peft_init_std 'x'", "not a number"]),
    "method mmae": ({"peft": "mmae"}, ["--peft 'mmae'", "did you mean mmea", "use mmea or gates or elora"]),
    "method lora": ({"peft": "lora"}, ["--peft 'lora'", "did you mean elora", "use mmea or gates or elora"]),
    "method of nothing": ({"peft": ""}, ["--peft ''", "use mmea or gates or elora"]),
    "gate of elora": (ELORA | {"peft_gate": "exp"}, ["--peft_gate exp", "no effect on elora"]),
    "rank of scales": ({"peft": "scales", "peft_rank": 2}, ["--peft_rank 2", "no effect on scales", "leave it out"]),
    "alpha of nothing but gates": ({"peft": "gates", "peft_alpha": 2},
                                   ["--peft_alpha 2", "no effect on gates", "no low-rank updates", "leave it out"]),
    "init_std of elora": (ELORA | {"peft_init_std": 0.1}, ["--peft_init_std 0.1", "leave it out"]),
    "gate static": (MMEA | {"peft_gate": "static"}, ["--peft_gate 'static'", "use bounded or exp"]),
    "gate foo": (MMEA | {"peft_gate": "foo"}, ["--peft_gate 'foo'", "use bounded or exp"]),
    "targets product": (MMEA | {"peft_targets": "product"},
                        ["--peft_targets 'product'", "did you mean products", "products, linears, published"]),
    "targets of nothing": (MMEA | {"peft_targets": " , "},
                           ["--peft_targets ' , '", "names no module", "glob patterns such as", "a placement"]),
    "pattern without a match": (ELORA | {"peft_targets": "products.*.liner"},
                                ["--peft_targets 'products.*.liner'", "did you mean", "products.0.linear"]),
    "one pattern of two": (ELORA | {"peft_targets": "products.0.linear,interactions.7.*"},
                           ["--peft_targets 'interactions.7.*'", "matches no"]),
    "module that the method has no adapter for": (MMEA | {"peft_targets": "radial_embedding"},
                                                  ["--peft_targets 'radial_embedding'"]),
    "train_also without a match": (MMEA | {"peft_train_also": "readouts.0.linear.wight"},
                                   ["--peft_train_also 'readouts.0.linear.wight'", "matches no parameter",
                                    "did you mean readouts.0.linear.weight"]),
    "train_also beside a match": (MMEA | {"peft_train_also": "readouts.*,readout"},
                                  ["--peft_train_also 'readout'", "matches no parameter", "'readouts.*'"]),
    "rank without method": ({"peft_rank": 4}, ["--peft_rank 4", "without --peft", "add --peft with one of mmea, "]),
    "targets without method": ({"peft_targets": "linears"}, ["--peft_targets linears", "without --peft"]),
}
BAD_COMBINATIONS = {
    "no foundation": ({"foundation_model": None}, ["--peft mmea", "nothing to adapt", "--foundation_model"]),
    "lora": ({"lora": True}, ["--lora True", "--peft", "leave out"]),
    "freeze": ({"freeze": 5}, ["--freeze 5", "--peft freezes", "leave it out"]),
    "enable_oeq": ({"enable_oeq": True}, ["--enable_oeq True", "OpenEquivariance", "leave it out"]),
    "random readouts": ({"foundation_filter_elements": False}, ["--foundation_filter_elements False", "leave it out"]),
    "slash": ({"name": "sub/x"}, ["--name sub/x has a /", "--work_dir"]),
    "model": ({"model": "AtomicDipolesMACE"}, ["--model AtomicDipolesMACE", "new model", "ScaleShiftMACE"]),
}
SINCE = {"lora": pytest.mark.since("0.3.15"), "freeze": pytest.mark.since("0.3.15"),
         "enable_oeq": pytest.mark.since("0.3.14")}  # releases of mace-torch in which the options came


def compiled() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(jit.compile(tiny_mace()), buffer)
    return buffer.getvalue()


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def without_scale_shift() -> torch.nn.Module:
    model = tiny_mace()
    model.__class__ = modules.MACE
    return model


def without_radial_embedding() -> torch.nn.Module:
    model = tiny_mace()
    del model.radial_embedding
    return model


# what writes the bytes of the foundation file, and what the line says of it
BAD_FOUNDATIONS = {
    "missing": (None, ["neither a file nor a name that MACE knows"]),
    "text": (lambda: b"# a note\n", ["cannot be loaded", ".model file"]),
    "empty": (lambda: b"", ["cannot be loaded", ".model file"]),
    "half": (lambda: saved(tiny_mace())[:5000], ["cannot be loaded", ".model file"]),
    "dict": (lambda: saved({"a": 1}), ["holds a dict", ".model file"]),
    "linear": (lambda: saved(torch.nn.Linear(2, 2)), ["holds a Linear", ".model file"]),
    "checkpoint": (lambda: saved({"model": tiny_mace().state_dict(), "optimizer": {}}),
                   ["holds a dict", ".model file"]),
    "class": (lambda: saved(without_scale_shift()), ["is a MACE", "ScaleShiftMACE"]),
    "in part": (lambda: saved(without_radial_embedding()), ["is a ScaleShiftMACE", "cannot read", "upgrade"]),
    "compiled": (compiled, ["TorchScript", ".model file that it was compiled from"]),
    "adapted by another method": (lambda: saved(inject(tiny_mace(), PeftConfig("elora", rank=2, targets="products"))),
                                  ["--peft mmea differs from the elora", "start from the foundation"]),
    "adapted with another rank": (lambda: saved(inject(tiny_mace(), PeftConfig("mmea", rank=3, targets="products"))),
                                  ["--peft_rank 2 differs from the 3", "give 3"]),
    "adapted without gains": (lambda: saved(inject(tiny_mace(), PeftConfig("elora", rank=2, targets="products"))),
                              ["--peft elora+scales differs from the elora", "give elora, or start from"],
                              {"peft": "elora+scales"}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def refusal(inputs, tmp_path, capsys):
    """Runs the command, in this process and with data that do not exist; returns the line with which it stops."""

    def refuse(*flags, **options) -> str:
        defaults = {"foundation_model": inputs / "foundation.model", "train_file": tmp_path / "missing.xyz",
                    "valid_file": None, "test_file": None, "work_dir": tmp_path / "work"}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train_here(tmp_path, *flags, **defaults | options)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("mace_run_train: error: ") and message.endswith("\n") and message.count("\n") == 1
        assert not (tmp_path / "work").exists()
        return message

    return refuse


@pytest.mark.parametrize("options, words", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_stops(refusal, options, words):
    message = refusal(**options)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("options, words", [
    pytest.param(*case, id=name, marks=SINCE.get(name, ())) for name, case in BAD_COMBINATIONS.items()])
def test_options_that_cannot_go_together_stop(refusal, options, words):
    message = refusal(**MMEA | options)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("content, words, options", [
    pytest.param(content, words, *options or [MMEA], id=name) for name, (content, words, *options)
    in BAD_FOUNDATIONS.items()])
def test_a_bad_foundation_stops(refusal, tmp_path, content, words, options):
    path = tmp_path / "bad.model"
    if content is not None:
        path.write_bytes(content())
    message = refusal(**options, foundation_model=path)
    assert [word for word in [f"foundation model {path}", *words] if word not in message] == [], message


def test_a_folder_as_foundation_stops(refusal, tmp_path):
    message = refusal(**MMEA, foundation_model=tmp_path)
    assert f"foundation model {tmp_path}" in message and "cannot be loaded" in message


def test_a_bad_value_in_a_yaml_file_stops(refusal, tmp_path):
    (tmp_path / "peft.yaml").write_text(yaml.safe_dump(MMEA | {"peft_rank": 2.5}))
    assert "--peft_rank '2.5'" in refusal(f"--config={tmp_path / 'peft.yaml'}")


@pytest.mark.parametrize("option", ["enable_cueq", pytest.param("only_cueq", marks=pytest.mark.since("0.3.14"))])
def test_cuequivariance_that_is_not_installed_stops(refusal, option, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(**MMEA, **{option: True})
    assert f"--{option} True needs cuequivariance-torch" in message and "pip install" in message


def test_options_that_only_look_like_conflicts_go_together(inputs):
    """The defaults, and values that switch nothing on, of what this release of MACE knows."""
    off = {"lora": False, "freeze": 0, "enable_cueq": False, "only_cueq": False, "enable_oeq": False}
    known = vars(run_train.tools.build_default_arg_parser().parse_args(["--name=any"]))
    given = reach_training(inputs, **MMEA, **{name: value for name, value in off.items() if name in known})
    assert given["model"].peft_config == PeftConfig("mmea", rank=2, targets="products")


@pytest.mark.parametrize("name, flags", [
    ("any.model", []), ("any_compiled.model", []), ("any_stagetwo.model", ["--swa"]),
    ("checkpoints/any_run-1.model", [])])
def test_a_run_that_would_overwrite_its_foundation_stops(tmp_path, capsys, name, flags):
    write_inputs(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    path = (tmp_path / "foundation.model").rename(tmp_path / name)
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        train_here(tmp_path, *flags, **MMEA, name="any", foundation_model=path)
    message = capsys.readouterr().err
    assert f"--name any would write its model over the foundation {path}" in message and "another --name" in message
    assert path.read_bytes() == before


def test_the_name_of_a_stage_that_is_not_trained_is_free(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "foundation.model").rename(tmp_path / "any_stagetwo.model")
    reach_training(tmp_path, **MMEA, name="any", foundation_model=tmp_path / "any_stagetwo.model")


@pytest.mark.parametrize("E0s", [pytest.param("estimated", marks=pytest.mark.since("0.3.15")), "average",
                                 "{1: -0.7, 7: -2}"])
def test_elements_that_the_foundation_lacks_stop(tmp_path, capsys, E0s):
    write_inputs(tmp_path)
    ase.io.write(tmp_path / "train.xyz", configurations(8, "NH3"))
    with pytest.raises(SystemExit) as stopped:
        reach_training(tmp_path, **MMEA, E0s=E0s, valid_file=None, test_file=None, valid_fraction=0.5)
    assert stopped.value.code == 2
    assert "the run has N, which the foundation does not know" in capsys.readouterr().err


@pytest.mark.parametrize("options, value", [
    (MMEA | {"peft_rank": "abc"}, "--peft_rank 'abc'"),
    (MMEA | {"foundation_model": "nowhere.model"}, "foundation model nowhere.model"),
], ids=["rank", "foundation"])
def test_a_process_that_stops_has_exit_code_2_and_a_line_and_no_traceback(inputs, options, value):
    run = call(inputs, arguments(inputs, **{"train_file": "missing.xyz"} | options))
    assert run.returncode == 2
    *others, last = run.stderr.splitlines()
    assert last.startswith("mace_run_train: error: ") and value in last
    assert not [line for line in others if re.search("error|Traceback|usage:", line)]
