"""What save_adapter writes, and the fingerprint of a foundation."""

import hashlib
import json
import os
import stat
from copy import deepcopy
from pathlib import Path

import e3nn
import mace
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import medium_mace, randomise, tiny_mace

import mace_peft
from mace_peft import PeftConfig, PeftError, eject, inject, load_adapter, save_adapter, trainable_parameters
from mace_peft.adapter.description import describe
from mace_peft.model.adapted import fingerprint

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def shared_base():
    return tiny_mace()


@pytest.fixture(scope="module")
def medium():
    return medium_mace().float()


@pytest.fixture
def base(shared_base):
    return deepcopy(shared_base)


@pytest.fixture
def model(base):
    return randomise(inject(base, PeftConfig("mmea", rank=2, targets="published", train_also="readouts.0.*")))


def names_in(directory):
    return {path.name for path in Path(directory).iterdir()}


def config_in(directory):
    return json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_directory_holds_three_files(model, tmp_path):
    directory = tmp_path / "runs" / "adapter"
    assert save_adapter(model, directory) == directory
    assert names_in(directory) == FILES
    assert names_in(directory.parent) == {"adapter"}


@pytest.mark.parametrize("path", ["{}/adapter", "{}/adapter/"])
def test_the_directory_may_be_text(model, tmp_path, path):
    assert save_adapter(model, path.format(tmp_path)) == tmp_path / "adapter"
    assert names_in(tmp_path / "adapter") == FILES


def test_the_directory_may_be_relative(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(model, "adapter")
    assert names_in(tmp_path / "adapter") == FILES


@pytest.mark.parametrize("method, targets", [("mmea", "products"), ("mmea", "published"), ("elora", "published"),
                                             ("gates", "all"), ("scales", "all"), ("elora+scales", "all")])
@pytest.mark.parametrize("train_also", [None, "readouts.*, interactions.0.skip_tp.*"])
def test_the_tensors_are_what_trains(base, tmp_path, method, targets, train_also):
    rank = None if method == "scales" else 2  # which have none
    model = randomise(inject(base, PeftConfig(method, rank=rank, targets=targets, train_also=train_also)))
    expected = trainable_parameters(model)
    tensors = load_file(save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors")
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_the_tensors_are_marked_as_torch_ones(model, tmp_path):
    """Other readers of safetensors (transformers, peft) ask for it."""
    with safe_open(save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["mace_peft"]) == config_in(tmp_path / "adapter")  # which is a copy to look at


@pytest.mark.parametrize("method, targets, parameters, most", [
    ("mmea", "products", 10_656, 60_000),
    ("mmea", "linears", 51_842, 224_000),
    ("mmea", "published", 151_346, 622_000),
    ("elora", "products", 29_616, 135_000),
    ("elora", "linears", 76_368, 322_000),
    ("elora", "published", 175_872, 720_000),
])
def test_a_directory_weighs_little_more_than_its_parameters(medium, tmp_path, method, targets, parameters, most):
    inject(medium, PeftConfig(method, targets=targets))
    try:
        directory = save_adapter(medium, tmp_path / "adapter")
    finally:
        eject(medium)
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert 4 * parameters < size <= 4 * parameters + 16_000
    assert size < most


def test_the_config_describes_the_run(base, tmp_path):
    expected, size = fingerprint(base), sum(parameter.numel() for parameter in base.parameters())
    config = PeftConfig("elora", rank=3, alpha=1.5, targets="products.*", train_also="readouts.0.*")
    directory = save_adapter(inject(base, config), tmp_path / "adapter")
    saved = config_in(directory)
    said = {name: value for name, value in saved.items() if name != "sha256"}
    assert saved.pop("sha256") == hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    assert len(saved.pop("tensors")) == 64
    assert saved == {
        "format": 1,
        "peft": config.to_dict(),
        "foundation": {"name": None, "fingerprint": expected},
        "backbone": "mace",
        "model_class": "ScaleShiftMACE",
        "elements": [1, 6, 8],
        "heads": ["Default"],
        "E0s": [[-1.0, -2.0, -3.0]],
        "scale": [0.8],
        "shift": [0.1],
        "gains": None,
        "dtype": "float64",
        "base_parameters": size,
        "versions": {"mace_peft": mace_peft.__version__, "mace": mace.__version__, "e3nn": e3nn.__version__,
                     "torch": torch.__version__},
    }
    assert PeftConfig(**saved["peft"]) == config


def test_settings_that_do_not_act_are_null(base, tmp_path):
    saved = config_in(save_adapter(inject(base, PeftConfig("scales")), tmp_path / "adapter"))["peft"]
    assert {name: value for name, value in saved.items() if value is not None} == {"method": "scales", "targets": "all"}
    assert saved.keys() == PeftConfig("mmea").to_dict().keys()


def test_the_config_names_the_foundation_that_it_was_given(base, tmp_path):
    foundation = {"name": "medium.model", "fingerprint": "abc"}
    model = inject(base, PeftConfig("mmea", rank=2, targets="products"), foundation)
    assert config_in(save_adapter(model, tmp_path / "adapter"))["foundation"] == foundation


def test_e0s_scale_and_shift_keep_every_bit(base, tmp_path):
    E0s = [-13.587222780835477, 1 / 3, -2000 / 7]
    base.atomic_energies_fn.atomic_energies.copy_(torch.tensor(E0s, dtype=torch.float64))
    base.scale_shift.scale.fill_(1 / 7)
    base.scale_shift.shift.fill_(-1 / 11)
    saved = config_in(save_adapter(inject(base, PeftConfig("mmea", rank=2, targets="products")), tmp_path / "adapter"))
    assert (saved["E0s"], saved["scale"], saved["shift"]) == ([E0s], [1 / 7], [-1 / 11])


def test_every_head_has_its_e0s(tmp_path):
    model = tiny_mace(heads=("DFT", "CC"))
    model.atomic_energies_fn.atomic_energies = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]).double()
    saved = config_in(save_adapter(inject(model, PeftConfig("mmea", rank=2, targets="products")), tmp_path / "adapter"))
    assert saved["heads"] == ["DFT", "CC"]
    assert saved["E0s"] == [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]


def test_a_float32_model_is_saved_as_one(base, tmp_path):
    model = inject(base.float(), PeftConfig("mmea", rank=2, targets="products"))
    directory = save_adapter(model, tmp_path / "adapter")
    assert config_in(directory)["dtype"] == "float32"
    assert {t.dtype for t in load_file(directory / "adapter_model.safetensors").values()} == {torch.float32}


def test_saving_changes_nothing_in_the_model(model, tmp_path):
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    save_adapter(model, tmp_path / "adapter")
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


# --- replacing and failing --------------------------------------------------------------------------------------------


def test_an_old_adapter_is_replaced(model, tmp_path):
    directory = save_adapter(model, tmp_path / "adapter")
    randomise(model, seed=7)
    save_adapter(model, directory)
    assert names_in(tmp_path) == {"adapter"} and names_in(directory) == FILES
    tensors = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(tensors[name], parameter) for name, parameter in trainable_parameters(model).items())


def fail_at(monkeypatch, name, call):
    """That call of ``os.fsync`` for a file, which is half written, or of ``os.replace`` finds the disk full."""
    original, calls = getattr(os, name), []

    def attempt(first, *others):
        if name == "fsync" and stat.S_ISDIR(os.fstat(first).st_mode):
            return original(first)
        calls.append(first)
        if len(calls) == call:
            if name == "fsync":
                os.ftruncate(first, os.fstat(first).st_size // 2)
            raise OSError("no space left on device")
        return original(first, *others)

    monkeypatch.setattr(os, name, attempt)


@pytest.mark.parametrize("there_already", [False, True])
@pytest.mark.parametrize("name, call", [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_a_failure_leaves_what_was_there_and_no_more(model, tmp_path, monkeypatch, name, call, there_already):
    directory = tmp_path / "runs" / "adapter"
    if there_already:
        save_adapter(model, directory)
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    randomise(model, seed=7)
    fail_at(monkeypatch, name, call)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, directory)
    monkeypatch.undo()
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("call", [2, 3])
def test_a_failure_between_the_files_leaves_the_old_adapter(model, tmp_path, monkeypatch, call):
    save_adapter(model, tmp_path / "adapter")
    expected = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    randomise(model, seed=7)
    fail_at(monkeypatch, "replace", call)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "adapter")
    monkeypatch.undo()
    loaded = trainable_parameters(load_adapter(eject(model), tmp_path / "adapter"))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert names_in(tmp_path / "adapter") == FILES


def test_a_failure_leaves_the_directories_that_hold_something_else(model, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").touch()
    fail_at(monkeypatch, "fsync", 2)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "runs" / "deep" / "adapter")
    assert names_in(tmp_path / "runs") == {"notes.txt"}


def test_other_files_in_the_directory_stay(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_adapter(model, tmp_path)
    assert names_in(tmp_path) == FILES | {"notes.txt"} and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["# My project\n", "", "---\nlibrary_name: peft\n---\n"])
def test_a_readme_that_is_no_card_stays(model, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    save_adapter(model, tmp_path)
    assert names_in(tmp_path) == FILES and (tmp_path / "README.md").read_text() == text


def test_the_card_is_that_of_the_adapter(model, tmp_path):
    """The older one is replaced; texts that a stranger chose have no effect as Markdown, HTML or Python."""
    save_adapter(model, tmp_path)
    assert "MMEA adapter of `a foundation model`" in (tmp_path / "README.md").read_text()
    odd = "x`|<b>\n# '\x1b[1m"
    other = inject(eject(model), PeftConfig("elora", rank=3), {"name": odd, "head": None, "fingerprint": 64 * "0"})
    save_adapter(other, tmp_path)
    text = (tmp_path / "README.md").read_text()
    number = sum(parameter.numel() for parameter in trainable_parameters(other).values())
    assert text.startswith("---\nlibrary_name: mace-peft\n") and "MMEA" not in text
    assert "| foundation | `x'\\|<b>\\n# '\\x1b[1m` |" in text
    assert f"`{number:,} (float64), " in text and "H -1, C -2, O -3" in text and "hcoxm3Vwgy" in text
    assert "## Errors" not in text  # no run has measured any
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.count("\n") == 3 and compile(code, "README.md", "exec")


def test_a_file_in_the_place_of_the_directory_survives(model, tmp_path):
    (tmp_path / "adapter").write_text("something else")
    with pytest.raises(PeftError, match="adapter is a file, and an adapter is a directory"):
        save_adapter(model, tmp_path / "adapter")
    assert names_in(tmp_path) == {"adapter"} and (tmp_path / "adapter").read_text() == "something else"


@pytest.mark.parametrize("directory", ["", None])
def test_what_is_no_path_is_refused(model, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: save_adapter(model, directory), lambda: load_adapter(model, directory)):
        with pytest.raises(PeftError, match="is no path of an adapter directory"):
            call()
    assert names_in(tmp_path) == set()


def test_a_model_without_adapters_is_refused(base, tmp_path):
    with pytest.raises(PeftError, match="has no adapters"):
        save_adapter(base, tmp_path / "adapter")
    with pytest.raises(PeftError, match="is no model"):
        save_adapter(tmp_path / "adapter", base)
    assert names_in(tmp_path) == set()


def spoil_weight(model):
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).view(-1)[-1] = torch.nan


@pytest.mark.parametrize("spoil, expected", [
    (spoil_weight, "in the model holds NaN or infinity"),
    (lambda model: model.atomic_energies_fn.atomic_energies.view(-1)[0].fill_(torch.inf), "no place for the E0s"),
    (lambda model: setattr(model, "heads", ["h" * 400]), "no place for the heads"),
    (lambda model: model.peft_foundation.update(name="f" * 400), "no place for the foundation"),
], ids=["weight", "E0s", "head", "name"])
def test_what_could_not_be_loaded_is_not_saved(model, tmp_path, spoil, expected):
    save_adapter(model, tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    spoil(model)
    with pytest.raises(PeftError, match=expected) as error:
        save_adapter(model, tmp_path / "adapter")
    assert len(str(error.value)) < 500
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_weights(base, shared_base):
    expected = fingerprint(shared_base)
    assert len(expected) == 64 and int(expected, 16)
    assert fingerprint(base) == expected
    assert fingerprint(base.requires_grad_(False)) == expected
    assert fingerprint(base.float()) == expected
    assert fingerprint(base.double()) == expected
    assert fingerprint(tiny_mace(seed=1)) != expected


def test_every_weight_counts(base):
    seen = {fingerprint(base)}
    for parameter in base.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        seen.add(fingerprint(base))
    assert len(seen) == 1 + len(list(base.parameters()))


def test_the_fingerprint_knows_which_weight_is_which(base):
    expected = fingerprint(base)
    up, down = base.interactions[0].linear_up, base.node_embedding.linear
    with torch.no_grad():
        a, b = up.weight.flatten()[:12].clone(), down.weight.flatten()[:12].clone()
        up.weight.view(-1)[:12], down.weight.view(-1)[:12] = b, a
    assert fingerprint(base) != expected


def test_the_fingerprint_holds_names():
    layer = torch.nn.Linear(2, 2)
    assert fingerprint(torch.nn.ModuleDict({"a": layer})) != fingerprint(torch.nn.ModuleDict({"b": layer}))


def test_injection_remembers_the_fingerprint_of_its_base(base):
    expected = fingerprint(base)
    model = randomise(inject(base, PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*")))
    assert model.peft_foundation == {"name": None, "fingerprint": expected}


def test_more_than_an_adapter_may_hold_is_refused_before_the_training(monkeypatch):
    monkeypatch.setattr("mace_peft.adapter.description.LARGEST_TENSORS", 1000)
    with pytest.raises(PeftError, match=r"what trains has [\d,]+ bytes, and an adapter directory holds at most 1,000"):
        describe(inject(tiny_mace(), PeftConfig("full")))
