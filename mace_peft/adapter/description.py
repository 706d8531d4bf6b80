"""What an adapter says of itself: its fields, their limits and its checksum."""

import hashlib
import json
import math
import sys
from typing import NamedTuple

import torch
from torch import nn

import mace_peft
from mace_peft import e3nn
from mace_peft.backbones import backbone_of
from mace_peft.config import LONGEST_PATTERNS, PeftConfig
from mace_peft.errors import PeftError
from mace_peft.model.adapted import origin, trainable_parameters
from mace_peft.model.summary import size_of_base

FORMAT = 1
LARGEST_TENSORS = 2**27  # bytes: 16 million parameters in float64


class AtMost(NamedTuple):
    """A kind of text, list or object, and the most characters or entries it may have."""

    most: int
    kind: object


# What the fields hold, see ``fits``. The limits lie far above what a run writes.
NAME = AtMost(300, str)
PATTERNS = AtMost(LONGEST_PATTERNS, str)
NUMBERS = AtMost(200, [float])
DTYPES = ("float64", "float32", "float16", "bfloat16")
SHA256 = AtMost(64, str)
ELEMENT = range(1, 119)
RANK = range(1, 10**6 + 1)
TENSORS = AtMost(5000, {NAME: {"dtype": NAME, "shape": AtMost(10, ([], [range(2**31)])), "data_offsets": [int]}})
COUNT = range(2**53)
FILES = (AtMost(1000, [NAME]), [])
ERRORS = AtMost(50, {NAME: float})
OPTIONS = AtMost(100, {NAME: (NAME, float, range(-2**63, 2**63), bool)})
# How a run has trained the adapter. heads: names of files, without their folders, and numbers of structures. options:
# of ``mace_run_train``. epochs: how many the run has come to; best_epoch and stage: whose weights these are, None where
# they are the start. errors, by set of structures, of the start and of the result: by MACE's names, in eV and A.
TRAINING = {
    "date": NAME,
    "heads": AtMost(50, {NAME: {"E0s": NAME, "train_file": FILES, "valid_file": FILES, "test_file": FILES,
                                "train": COUNT, "valid": COUNT}}),
    "loss": NAME,
    "options": OPTIONS,
    "epochs": COUNT,
    "best_epoch": (COUNT, None),
    "stage": ("one", "two", None),
    "start": ("foundation", "adapter", "random gates"),
    "errors": AtMost(1000, {NAME: {"structures": COUNT, "start": ERRORS, "result": ERRORS}}),
}
ORIGIN = {"name": (NAME, None), "fingerprint": SHA256}
FIELDS = {
    "format": int,
    "peft": {"method": NAME, "rank": (RANK, "auto", None), "alpha": (float, None), "targets": (PATTERNS, None),
             "start": (NAME, None), "gate": (NAME, None), "init_std": (float, None), "train_also": (PATTERNS, None),
             "budget": (NAME, None), "rank_pattern": (AtMost(5000, {NAME: RANK}), None)},
    "foundation": (ORIGIN, ORIGIN | {"head": (NAME, None)}),
    "backbone": NAME,
    "model_class": NAME,
    "elements": (AtMost(200, [ELEMENT]), None),
    "heads": (AtMost(50, [NAME]), None),
    "E0s": (AtMost(50, [NUMBERS]), None),
    "scale": (NUMBERS, None),
    "shift": (NUMBERS, None),
    "gains": (AtMost(5000, {NAME: {"low": float, "high": float}}), None),
    "dtype": DTYPES,
    "base_parameters": COUNT,
    "versions": AtMost(20, {NAME: NAME}),
    "tensors": SHA256,
    "sha256": SHA256,
    "strength": float,
    "training": TRAINING,
}
OPTIONAL = {"strength", "training"}  # it is 1; no run has saved the adapter


def versions() -> dict[str, str]:
    """Of the packages on which an adapter depends."""
    packages = [mace_peft, sys.modules.get("mace"), sys.modules.get("sevenn"), e3nn, torch]
    return {one.__name__.removeprefix("mace_peft."): str(one.__version__) for one in packages if one}


def describe(model: nn.Module) -> dict:
    """What adapter_config.json says of an adapted model, but for the checksums.

    Raises PeftError for what an adapter directory has no place for: long names, numbers that are not finite, and more
    of them than it may hold.
    """
    backbone = backbone_of(model)
    check_size(sum(tensor.nbytes for tensor in trainable_parameters(model).values()), model.peft_config)
    full = {field: model.peft_full.get(name, buffer) for field, (name, buffer) in backbone.constants(model).items()}
    held = {field: torch.atleast_2d(buffer) if field == "E0s" else torch.atleast_1d(buffer)
            for field, buffer in full.items()}
    said = {
        "format": FORMAT,
        "peft": model.peft_config.to_dict(),
        "foundation": origin(model),
        "backbone": backbone.name,
        **backbone.describe(model),
        **{field: held[field].tolist() if field in held else None for field in ("E0s", "scale", "shift")},
        "gains": model.peft_gains,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "base_parameters": size_of_base(model),
        "versions": versions(),
        **({} if model.peft_strength == 1 else {"strength": model.peft_strength}),
    }
    for name in improper(said):
        raise PeftError(f"an adapter directory has no place for the {name} {said[name]!r:.200} of this model, which "
                        "are too long, too many or no finite numbers: change them in the model")
    return said


def check_size(size: int, config: PeftConfig) -> None:
    """Raise PeftError if what trains with these settings has more bytes than an adapter directory may hold."""
    if size > LARGEST_TENSORS:
        less = "another <method>" if config.row.trains_base else "other <targets> or a smaller <rank>"
        raise PeftError(f"what trains has {size:,} bytes, and an adapter directory holds at most {LARGEST_TENSORS:,}: "
                        f"let less train, by {less}, or in float32")


def improper(description: dict) -> list[str]:
    """The fields that hold no proper value."""
    return [name for name, value in description.items() if not fits(value, FIELDS[name])]


def checksum(said: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def sealed(description: dict) -> dict:
    """The description with the checksum of all that it says."""
    said = {name: value for name, value in description.items() if name != "sha256"}
    return {**said, "sha256": checksum(said)}


def check_description(description: object, path: object) -> dict:
    """The description. Raises PeftError unless it is complete, of a known format, as saved, and within the limits."""
    if not isinstance(description, dict) or not fits(description.get("format"), int) or description["format"] < 1:
        raise PeftError(f"{path} is no adapter of mace-peft: give the NAME_adapter directory that a run left")
    if description["format"] > FORMAT:
        raise PeftError(f"{path} has format {description['format']!r:.20}, and this mace-peft {mace_peft.__version__} "
                        f"reads up to {FORMAT}: install a newer mace-peft")
    missing, unknown = set(FIELDS) - OPTIONAL - set(description), set(description) - set(FIELDS)
    if missing or unknown:
        raise PeftError(f"{path} lacks {sorted(missing)} and has the unknown fields {str(sorted(unknown)):.300}: save "
                        "or copy the adapter again")
    if description != sealed(description):
        raise PeftError(f"{path} is not what was saved, for its checksum differs: save or copy the adapter again")
    odd = improper(description)
    if odd:
        raise PeftError(f"{path} holds no proper value of {', '.join(odd)}: save the adapter again")
    return description


def fits(value: object, kind: object) -> bool:
    """Whether a JSON value is of the kind.

    That is a type; None; a text, that one; a range of whole numbers; [kind], a list of such entries, not empty; [],
    the empty one; {"name": kind}, an object of these fields; {kind: kind}, one of any fields of that kind;
    (kind, kind), either; or ``AtMost``. Numbers are finite.
    """
    if isinstance(kind, AtMost):
        return isinstance(value, (str, list, dict)) and len(value) <= kind.most and fits(value, kind.kind)
    if kind is None or isinstance(kind, str) or kind == []:
        return value == kind
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and value != [] and all(fits(entry, kind[0]) for entry in value)
    if isinstance(kind, dict) and isinstance(value, dict) and all(isinstance(name, str) for name in kind):
        return value.keys() == kind.keys() and all(fits(value[name], kind[name]) for name in kind)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(name, of) and fits(entry, to) for name, entry in value.items()
                                               for of, to in kind.items())
    return type(value) is kind and (kind is not float or math.isfinite(value))
