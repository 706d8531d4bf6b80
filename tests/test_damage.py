"""Damaged, foreign and hostile adapter directories are refused, or give the same adapter."""

import copy
import dataclasses
import io
import json
import os
import pickle
import random
import sys
import traceback

import pytest
import torch
from mace import modules
from safetensors.torch import load, save
from tiny import randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, eject, inject, load_adapter, save_adapter, trainable_parameters
from mace_peft.adapter import directory as storage
from mace_peft.adapter.description import FIELDS, OPTIONAL
from mace_peft.adapter.directory import read_adapter
from mace_peft.inspect.info import info
from mace_peft.model.adapted import is_adapted

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = PeftConfig("mmea", rank=2, targets="products", train_also="readouts.0.*")


def small_mace(**options):
    return tiny_mace(channels=2, max_ell=1, correlation=1, **options)


@pytest.fixture(scope="module")
def shared_foundation():
    return small_mace()


@pytest.fixture
def foundation(shared_foundation):
    """A model that is the same for every test, whatever a test does to it."""
    return copy.deepcopy(shared_foundation)


@pytest.fixture(scope="module")
def saved(shared_foundation, tmp_path_factory):
    """The two files of an adapter: {name: bytes}."""
    model = randomise(inject(copy.deepcopy(shared_foundation), SETTINGS))
    directory = save_adapter(model, tmp_path_factory.mktemp("saved"))
    return {name: (directory / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE)}


def write(directory, files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).unlink(missing_ok=True)  # some file systems are slow to overwrite
        (directory / name).write_bytes(content)
    return directory


def sealed(files, description=None, tensors=None):
    """The files with another description or other tensors, and the checksums of these."""
    description = json.loads(files[CONFIG_FILE]) if description is None else description
    tensors = load(files[TENSOR_FILE]) if tensors is None else tensors
    return storage.contents(description, tensors)


def edited(files, edit):
    """The files with another description, and the checksum of it."""
    description = json.loads(files[CONFIG_FILE])
    edit(description)
    return sealed(files, description)


def everything(model):
    """All that loading could change: what the model is, its values and what of it trains."""
    return (type(model), set(vars(model)), {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
            {name: value.numpy().tobytes() for name, value in model.state_dict().items()})


def refusal(foundation, directory):
    """The one line that refuses the directory; the foundation stays as it is."""
    before = everything(foundation)
    with pytest.raises(PeftError) as error:
        load_adapter(foundation, directory)
    assert everything(foundation) == before
    message = str(error.value)
    assert message and "\n" not in message
    return message


def meaning(directory):
    """All that the directory says, in values that compare bit by bit."""
    settings, description, tensors = read_adapter(directory)
    return settings, json.dumps(description, sort_keys=True), {
        name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_foundation_of_the_same_shape(foundation, saved, tmp_path):
    for name, parameter in foundation.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        message = refusal(foundation, write(tmp_path, saved))
        assert "weights differ" in message and "give that" in message, name
        with torch.no_grad():
            parameter.view(-1)[0] -= 1e-3


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -100, -8, -1])
def test_truncated_tensors(foundation, saved, tmp_path, length):
    tensors = saved[TENSOR_FILE][:length]
    message = refusal(foundation, write(tmp_path, saved | {TENSOR_FILE: tensors}))
    assert str(tmp_path) in message and "copy" in message


def test_a_flipped_bit_anywhere_in_the_tensors(foundation, saved, tmp_path):
    """In the length of the header, in the header and in the numbers."""
    write(tmp_path, saved)
    for at in range(0, len(saved[TENSOR_FILE]), 3):
        content = bytearray(saved[TENSOR_FILE])
        content[at] ^= 1 << at % 8
        (tmp_path / TENSOR_FILE).write_bytes(content)
        with pytest.raises(PeftError, match="checksum differs|cannot be read|no adapter|lacks|format"):
            read_adapter(tmp_path)
    assert "checksum differs" in refusal(foundation, tmp_path)  # of the numbers, in the last place


@pytest.mark.parametrize("length", [0, 1, 300, -3])
def test_a_truncated_config(foundation, saved, tmp_path, length):
    assert "cannot be read" in refusal(foundation, write(tmp_path, saved | {CONFIG_FILE: saved[CONFIG_FILE][:length]}))


@pytest.mark.parametrize("field", sorted(set(FIELDS) - OPTIONAL - {"format"}))
def test_a_missing_field(foundation, saved, tmp_path, field):
    description = json.loads(saved[CONFIG_FILE])
    del description[field]
    write(tmp_path, saved | {CONFIG_FILE: json.dumps(description).encode()})
    assert f"lacks ['{field}']" in refusal(foundation, tmp_path)


@pytest.mark.parametrize("field, value", [
    ("E0s", [[-1.0, -2.0, -3.5]]),
    ("shift", [0.2]),
    ("scale", [1]),
    ("peft", dataclasses.replace(SETTINGS, alpha=1.0).to_dict()),
    ("peft", dataclasses.replace(SETTINGS, rank=1, alpha=None).to_dict()),
    ("dtype", "float32"),
    ("sha256", 64 * "0"),
])
def test_a_config_changed_by_hand(foundation, saved, tmp_path, field, value):
    description = json.loads(saved[CONFIG_FILE])
    assert description[field] != value
    description[field] = value
    write(tmp_path, saved | {CONFIG_FILE: json.dumps(description).encode()})
    assert "checksum differs" in refusal(foundation, tmp_path)


@pytest.mark.parametrize("content, expected", [
    (b"[]", "no adapter of mace-peft"),
    (b"3", "no adapter of mace-peft"),
    (b"null", "no adapter of mace-peft"),
    (b'"format"', "no adapter of mace-peft"),
    (b"{}", "no adapter of mace-peft"),
    (b'{"format": true}', "no adapter of mace-peft"),
    (b'{"format": 0}', "no adapter of mace-peft"),
    (b'{"format": 1e999}', "no adapter of mace-peft"),
    (b'{"format": 2}', "install a newer mace-peft"),
    (b'{"format": 1, "\\n": 1}', r"unknown fields ['\n']"),
    (b'{"format": ' + b"9" * 5000 + b"}", "cannot be read"),
    (b" " * 2**20 + b"1", "bytes, of at most"),
    (b"[" * 200_000, "cannot be read"),
    (b'{"peft": ' * 100_000, "cannot be read"),
    (b'{"format": "\xff\xfe"}', "cannot be read"),
    (b"\x80\x04N.", "cannot be read"),
    (b"", "cannot be read"),
])
def test_a_config_that_is_something_else(foundation, saved, tmp_path, content, expected):
    assert expected in refusal(foundation, write(tmp_path, saved | {CONFIG_FILE: content}))


def into(field, **values):
    """An edit that sets these values in an object of the config."""
    return lambda description: description[field].update(values)


TRAINED = {
    "date": "2026-01-02", "loss": "a loss", "options": {"lr": 0.01, "ema": True, "seed": 1, "error_table": "TotalMAE"},
    "heads": {"Default": {"E0s": "average", "train_file": ["train.xyz"], "valid_file": [], "test_file": [], "train": 9,
                          "valid": 1}},
    "epochs": 2, "best_epoch": None, "stage": None, "start": "foundation",
    "errors": {"train": {"structures": 9, "start": {"mae_e": 1.0, "mae_f": 0.5},
                         "result": {"mae_e": 0.5, "mae_f": 0.0}}},
}


def trained(**values):
    """An edit that says how the adapter was trained, with these values in it."""
    return lambda description: description.update(training={**copy.deepcopy(TRAINED), **values})


EDITS = {
    **{f"a training with {name}": (trained(**values), "no proper value of training") for name, values in {
        "no date": {"date": None}, "a long loss": {"loss": "x" * 301}, "an unknown entry": {"more": 1},
        "a folder of files": {"heads": {"Default": {**TRAINED["heads"]["Default"], "train_file": "train.xyz"}}},
        "a list as an option": {"options": {"lr": [0.1]}},
        "many options": {"options": dict.fromkeys(map(str, range(101)), 1)},
        "a large number": {"epochs": 10**20}, "no whole number": {"epochs": 1.5}, "another stage": {"stage": "three"},
        "no errors": {"errors": {"train": {}}},
        "an error that is NaN": {"errors": {"train": {"structures": 1, "start": {"e": float("nan")}, "result": {}}}},
        "many sets": {"errors": dict.fromkeys(map(str, range(1001)), TRAINED["errors"]["train"])},
    }.items()},
    "a newer format": (lambda d: d.update(format=2), "has format 2, and this mace-peft"),
    "a format of many digits": (lambda d: d.update(format=10**4000), f"has format 1{'0' * 19}, and this mace-peft"),
    "an unknown field": (lambda d: d.update({"new\nfield": 1}), r"unknown fields ['new\nfield']"),
    "an unknown setting": (into("peft", novelty=1), "no proper value of peft"),
    "a missing setting": (lambda d: d["peft"].pop("alpha"), "no proper value of peft"),
    "a rank in two lines": (into("peft", rank="1\n2"), "no proper value of peft"),
    "an unknown method": (into("peft", method="lora\n"), "method 'lora\\n' is unknown"),
    "a rank that is too large": (into("peft", rank=3), "does not fit: rank 3"),
    "another rank": (into("peft", rank=1, alpha=1.0), "of another shape"),
    "other targets": (into("peft", targets="linears"), "missing, unknown or of another shape"),
    "no such targets": (into("peft", targets="linear_9"), "does not fit: targets 'linear_9'"),
    "a setting that does not act": (into("peft", method="elora"), "gate bounded has no effect on elora"),
    "another method": (into("peft", method="elora", gate=None, init_std=None), "missing, unknown or of another shape"),
    "less that trains along": (into("peft", train_also=None), "missing, unknown or of another shape"),
    "another foundation": (into("foundation", name="a\nb", fingerprint="c\nd"), "foundation ('a\\nb') whose weights"),
    "a foundation without fingerprint": (lambda d: d["foundation"].pop("fingerprint"), "no proper value of foundation"),
    "no backbone": (lambda d: d.update(backbone=None), "no proper value of backbone"),
    "another backbone": (lambda d: d.update(backbone="e3nn"), "backbone 'e3nn', and the foundation has 'mace'"),
    "another class": (lambda d: d.update(model_class="MACE"), "'MACE', and the foundation has 'ScaleShiftMACE'"),
    "a dtype that no model has": (lambda d: d.update(dtype="int8"), "no proper value of dtype"),
    "more heads than a model has": (lambda d: d.update(heads=[str(n) for n in range(51)]), "no proper value of heads"),
    "an element that the foundation lacks": (lambda d: d.update(elements=[1, 6, 7]), "the foundation does not know"),
    "no elements": (lambda d: d.update(elements=[]), "no proper value of elements"),
    "elements in text": (lambda d: d.update(elements="HCO"), "no proper value of elements"),
    "no heads": (lambda d: d.update(heads=[]), "no proper value of heads"),
    "a head too many": (lambda d: d.update(heads=["Default", "other"]), "does not fit"),
    "an E0 that is NaN": (lambda d: d.update(E0s=[[-1.0, float("nan"), -3.0]]), "no proper value of E0s"),
    "an E0 too few": (lambda d: d.update(E0s=[[-1.0, -2.0]]), "does not fit its foundation"),
    "E0s of uneven heads": (lambda d: d.update(E0s=[[-1.0, -2.0, -3.0], [-1.0]]), "does not fit its foundation"),
    "no E0s": (lambda d: d.update(E0s=None), "does not fit its foundation"),
    "no shift, but other E0s": (lambda d: d.update(shift=None, E0s=[[9.0, 9.0, 9.0]]), "does not fit its foundation"),
}


@pytest.mark.parametrize("edit, expected", EDITS.values(), ids=EDITS)
def test_a_config_with_its_checksum_that_does_not_fit(foundation, saved, tmp_path, edit, expected):
    assert expected in refusal(foundation, write(tmp_path, edited(saved, edit)))


def test_texts_of_a_training_are_shown_in_lines_of_their_own(saved, tmp_path):
    """Whatever a stranger has written there, and however large its numbers are."""
    odd = "x\x1b[2J\n| `a` |\u202e"
    errors = {odd: {"structures": 2**53 - 1, "start": {"mae_e": 1e308, "mae_f": 1.0}, "result": {"mae_e": -1e-308}}}
    head = {**TRAINED["heads"]["Default"], "train_file": [odd], "E0s": odd}
    edit = trained(date=odd, loss=odd, options={odd: odd, "error_table": "TotalMAE"}, heads={odd: head}, errors=errors)
    directory = write(tmp_path / "adapter", edited(saved, edit))
    said = info(str(directory))
    assert all(line.isprintable() and len(line) < 600 for line in said.splitlines())
    usual = info(str(write(tmp_path / "other", edited(saved, trained()))))
    assert said.count("\n") == usual.count("\n") - 1  # one of the two errors
    storage.add_training(directory, json.loads((directory / CONFIG_FILE).read_text())["training"])
    card = (directory / "README.md").read_text()
    assert card.replace("\n", "").isprintable() and "`x\\x1b[2J\\n\\| 'a' \\|\\u202e`" in card


def test_a_training_that_has_no_place_leaves_the_adapter(saved, tmp_path):
    before = meaning(write(tmp_path, saved))
    with pytest.raises(PeftError, match="no place for the loss of its training"):
        storage.add_training(tmp_path, TRAINED | {"loss": "x" * 301})
    assert meaning(tmp_path) == before
    storage.add_training(tmp_path, TRAINED)
    settings, description, tensors = meaning(tmp_path)
    said = json.loads(description)
    assert said.pop("training") == TRAINED and (settings, tensors) == (before[0], before[2])
    assert {**said, "sha256": None} == {**json.loads(before[1]), "sha256": None}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number(foundation, saved, tmp_path, value):
    for name in [name for name, tensor in load(saved[TENSOR_FILE]).items() if tensor.numel()]:
        tensors = load(saved[TENSOR_FILE])
        tensors[name].view(-1)[-1] = value
        message = refusal(foundation, write(tmp_path, sealed(saved, tensors=tensors)))
        assert f"{name!r} in {tmp_path} holds NaN or infinity" in message and "--lr" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_tensors_of_a_kind_that_no_weights_are(foundation, saved, tmp_path, dtype):
    tensors = {name: torch.zeros(tensor.shape).to(dtype) for name, tensor in load(saved[TENSOR_FILE]).items()}
    message = refusal(foundation, write(tmp_path, sealed(saved, tensors=tensors)))
    assert f"is of {dtype}, as no weights are: save or copy" in message


def test_tensors_with_their_checksum_that_do_not_fit(foundation, saved, tmp_path):
    tensors = load(saved[TENSOR_FILE])
    for name in tensors:
        others = {key: value for key, value in tensors.items() if key != name}
        for wrong in (others, others | {f"{name}\n": tensors[name]}, others | {name: tensors[name][..., None]}):
            message = refusal(foundation, write(tmp_path, sealed(saved, tensors=wrong)))
            assert repr(name) in message and "missing, unknown or of another shape" in message
    message = refusal(foundation, write(tmp_path, sealed(saved, tensors=tensors | {"more": torch.zeros(1)})))
    assert "'more' are missing, unknown" in message


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 100, b"\x02" + 7 * b"\0" + b"[]", b"\x80\x04N.",
                                     save({}), save({}, metadata={"a": "b"}), save({}, metadata={"format": "pt"})])
def test_tensors_that_are_something_else(foundation, saved, tmp_path, content):
    message = refusal(foundation, write(tmp_path, saved | {TENSOR_FILE: content}))
    assert f"{tmp_path} cannot be read" in message or f"{TENSOR_FILE} is no adapter of mace-peft" in message


@pytest.mark.parametrize("there", [(), (CONFIG_FILE,), (TENSOR_FILE,)])
def test_a_directory_without_both_files(foundation, saved, tmp_path, there):
    message = refusal(foundation, write(tmp_path, {name: saved[name] for name in there}))
    missing = CONFIG_FILE if there == (TENSOR_FILE,) else TENSOR_FILE
    assert f"{tmp_path} is no adapter directory, for {missing} is missing" in message


@pytest.mark.parametrize("name", ["nothing", "file", CONFIG_FILE])
def test_a_path_that_is_no_directory(foundation, saved, tmp_path, name):
    write(tmp_path, saved)
    (tmp_path / "file").touch()
    assert f"{tmp_path / name} is no adapter directory" in refusal(foundation, tmp_path / name)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_directory_in_the_place_of_a_file(foundation, saved, tmp_path, name):
    write(tmp_path, saved)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "is no regular file" in refusal(foundation, tmp_path)


def test_the_tensors_of_one_save_with_the_config_of_another_are_the_adapter_of_the_tensors(saved, tmp_path):
    """As a save leaves them that is killed between the two."""
    expected = meaning(write(tmp_path, saved))
    model = randomise(inject(small_mace(), PeftConfig("elora", rank=1, targets="linears")), seed=1)
    save_adapter(model, tmp_path)
    (tmp_path / TENSOR_FILE).write_bytes(saved[TENSOR_FILE])
    assert meaning(tmp_path) == expected


def test_an_adapter_that_is_to_be_swapped_stays_if_the_other_is_refused(foundation, saved, tmp_path):
    good = write(tmp_path / "good", saved)
    model = load_adapter(foundation, good)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    E0s = [[-9.0, -9.0, -9.0]]
    for edit in (lambda d: d.update(E0s=E0s, shift=None),
                 lambda d: (d.update(E0s=E0s), d["peft"].update(rank=1, alpha=1.0)),
                 lambda d: d["peft"].update(rank=99), lambda d: d.update(elements=[1, 7], E0s=[[-9.0, -9.0]])):
        with pytest.raises(PeftError, match="does not fit"):
            load_adapter(model, write(tmp_path / "bad", edited(saved, edit)))
        assert model.peft_config == SETTINGS
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_parameters_of_a_foundation_stay_frozen_if_the_adapter_is_refused(foundation, saved, tmp_path):
    foundation.readouts.requires_grad_(False)
    assert "of another shape" in refusal(foundation, write(tmp_path, edited(saved, into("peft", rank=1, alpha=1.0))))


def test_an_adapter_of_a_model_without_scale_and_shift_loads(tmp_path):
    model = randomise(inject(small_mace(model_class=modules.MACE), PeftConfig("mmea", rank=2, targets="products")))
    expected = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    save_adapter(model, tmp_path)
    loaded = trainable_parameters(load_adapter(eject(model), tmp_path))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_what_python_prints_of_an_error_holds_no_text_of_the_directory(tmp_path):
    model = small_mace(heads=("one", "two"))
    files = storage.contents(json.loads((save_adapter(inject(model, SETTINGS), tmp_path) / CONFIG_FILE).read_text()),
                             load((tmp_path / TENSOR_FILE).read_bytes()))
    write(tmp_path, edited(files, into("foundation", head="\x1b]0;owned\x07")))
    with pytest.raises(PeftError) as error:
        load_adapter(eject(model), tmp_path)
    assert "\x1b" not in "".join(traceback.format_exception(error.value))


# --- random mutations -------------------------------------------------------------------------------------------------


def mutate_bytes(choice: random.Random, content: bytes) -> bytes:
    start = choice.randrange(len(content) + 1)
    end = min(len(content), start + choice.choice([1, 1, 2, 8, 100]))
    before, part, after = content[:start], content[start:end], content[end:]
    noise = choice.randbytes(len(part) or 1)
    flipped = bytes(byte ^ (1 << choice.randrange(8)) for byte in part)
    return choice.choice([
        before,
        before + after,
        before + flipped + after,
        before + noise + after,
        before + noise + part + after,
        before + part + part + after,
        before + bytes(len(part)) + after,
        before + part.swapcase() + after,
        after + part + before,
        before + b" " + part + after,
    ])


def containers(value):
    """The objects and lists of a JSON value, itself among them."""
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


ODD_VALUES = (None, True, False, 0, 1, -1, 2, 0.0, -0.0, 0.5, 1e300, float("nan"), float("inf"), 10**400, "", "1",
              "mmea", "\ud800", "a\nb", "*", [], {}, [[]], [0], [1.0], ["Default"], {"name": None})


def mutate_json(choice: random.Random, description: dict) -> dict:
    """One value anywhere in the tree changed, deleted, wrapped or added."""
    description = copy.deepcopy(description)
    container = choice.choice(list(containers(description)))
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    value = copy.deepcopy(choice.choice([*ODD_VALUES, *description.values()]))
    if not keys or choice.random() < 0.2:
        if isinstance(container, dict):
            container[choice.choice(["a\nb", "head", "format", ""])] = value
        else:
            container.insert(choice.randrange(len(container) + 1), value)
        return description
    key = choice.choice(keys)
    if choice.random() < 0.3:
        del container[key]
    else:
        container[key] = choice.choice([value, value, str(container[key]), [container[key]], {"a": container[key]}])
    return description


def mutated(choice: random.Random, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with one of them mutated, or swapped; the checksum is what it was."""
    name = choice.choice([CONFIG_FILE, TENSOR_FILE])
    if choice.random() < 0.01:
        return {CONFIG_FILE: files[TENSOR_FILE], TENSOR_FILE: files[CONFIG_FILE]}
    if name == CONFIG_FILE and choice.random() < 0.5:
        return files | {name: json.dumps(mutate_json(choice, json.loads(files[name]))).encode()}
    content = files[name]
    for _ in range(choice.choice([1, 1, 2, 3])):
        content = mutate_bytes(choice, content)
    return files | {name: content}


def test_ten_thousand_mutations_give_an_error_or_the_same_adapter(saved, tmp_path):
    expected = meaning(write(tmp_path, saved))
    choice, same = random.Random(0), 0
    for number in range(10_000):
        write(tmp_path, mutated(choice, saved))
        try:
            found = meaning(tmp_path)
        except PeftError as error:
            assert "\n" not in str(error), number
        else:
            same += 1
            assert found == expected, number
    assert 10 < same < 2000  # such as white space in the config


def test_mutations_with_their_checksum_give_an_error_or_a_model(shared_foundation, foundation, saved, tmp_path):
    choice, loaded = random.Random(0), 0
    for number in range(200):
        files = sealed(saved, mutate_json(choice, json.loads(saved[CONFIG_FILE])))
        before = everything(foundation)
        try:
            model = load_adapter(foundation, write(tmp_path, files))
        except PeftError as error:
            assert "\n" not in str(error), number
            assert everything(foundation) == before, number
        else:
            loaded += 1
            assert is_adapted(model)
            foundation = copy.deepcopy(shared_foundation)
    assert 5 < loaded < 100  # such as another E0 or another name of the foundation


# --- no code runs -----------------------------------------------------------------------------------------------------


class Bait:
    """Its pickle makes the file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_no_code_from_the_directory(foundation, saved, tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    zipped = io.BytesIO()
    torch.save(Bait(trap), zipped)
    hostile, zipped, code = pickle.dumps(Bait(trap)), zipped.getvalue(), f"import os; os.mkdir({str(trap)!r})".encode()
    for run, poison in ((pickle.loads, hostile), (exec, code),
                        (lambda content: torch.load(io.BytesIO(content), weights_only=False), zipped)):
        run(poison)
        trap.rmdir()

    names = ("__init__", "conftest", "adapter_config", "sitecustomize", "json", "torch", "mace_peft", "safetensors")
    bait = {f"{name}.py": code for name in names}
    bait |= {"adapter_model.bin": zipped, "adapter_model.pt": hostile, "adapter_config.pkl": hostile}
    directory = write(tmp_path / "adapter", bait | saved)
    monkeypatch.chdir(directory)
    load_adapter(copy.deepcopy(foundation), directory)
    for poison in (hostile, zipped, code):
        for files in ({CONFIG_FILE: poison}, {TENSOR_FILE: poison}):
            refusal(foundation, write(directory, saved | files))
    assert not trap.exists()
    assert not [name for name, module in sys.modules.items() if str(directory) in str(getattr(module, "__file__", ""))]
