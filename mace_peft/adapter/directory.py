"""The adapter directory: adapter_config.json and adapter_model.safetensors."""

import contextlib
import hashlib
import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

import mace_peft
from mace_peft import e3nn
from mace_peft.backbones import backbone_of
from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError, one_line
from mace_peft.model.adapted import check_adapted, origin, trainable_parameters

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
FORMAT = 1

# What the fields of adapter_config.json hold, see ``fits``.
TEXT_OR_NONE = (str, type(None))
NUMBERS_OR_NONE = ([float], type(None))
ORIGIN = {"name": TEXT_OR_NONE, "fingerprint": str}
FIELDS = {
    "format": int,
    "peft": {"method": str, "rank": (int, "auto", type(None)), "alpha": (float, type(None)), "targets": str,
             "gate": TEXT_OR_NONE, "init_std": (float, type(None)), "train_also": TEXT_OR_NONE, "budget": TEXT_OR_NONE,
             "rank_pattern": ({str: int}, type(None))},
    "foundation": (ORIGIN, ORIGIN | {"head": TEXT_OR_NONE}),
    "backbone": str,
    "model_class": str,
    "elements": ([int], type(None)),
    "heads": ([str], type(None)),
    "E0s": ([[float]], type(None)),
    "scale": NUMBERS_OR_NONE,
    "shift": NUMBERS_OR_NONE,
    "dtype": str,
    "versions": {str: str},
    "sha256": str,
}


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the adapted model's trained tensors and settings to the directory; returns its path.

    The files hold what it takes to get from the foundation file to this model: the trained parameters, the elements,
    E0s (eV, one list per head, in the order of the elements), heads, scale and shift (eV), the settings, the name and
    fingerprint of the foundation, and the versions of the packages. Other files in the directory stay.

    Killed at any moment it leaves the adapter that was there or the new one: each file is complete before it takes the
    place of an older one, the tensors go first, and ``read_adapter`` takes a config that has not got there yet.

    Warns if the base is no longer the one that the adapters were put into. Raises PeftError if the model has no
    adapters, OSError if the directory cannot be written.
    """
    check_adapted(model)
    if model.peft_foundation is not None and origin(model) is not model.peft_foundation:
        warnings.warn("the weights of the base have changed since the adapters were put in, so that this adapter goes "
                      "with no other: save them too, or train them by train_also", stacklevel=2)
    directory = Path(directory)
    trained = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable_parameters(model).items()}
    tensors = save(trained, metadata={"format": "pt"})
    description = describe(model)
    description["sha256"] = checksum(description, tensors)
    contents = {TENSOR_FILE: tensors, CONFIG_FILE: (json.dumps(description, indent=2) + "\n").encode()}
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        finish_killed_save(directory)
        for name, content in contents.items():
            unfinished(directory, name).write_bytes(content)
        for name in contents:
            unfinished(directory, name).replace(directory / name)
    except BaseException:
        undo_save(directory, made)
        raise
    return directory


def unfinished(directory: Path, name: str) -> Path:
    return directory / f".{name}.unfinished"


def finish_killed_save(directory: Path) -> None:
    """Put the config in place that an earlier save, killed, has left behind its tensors."""
    later = unfinished(directory, CONFIG_FILE)
    if unfinished(directory, TENSOR_FILE).exists():
        return  # killed earlier than that: what was there is complete
    try:
        check_description(json.loads(later.read_bytes()), later, (directory / TENSOR_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # none is there, or it is none of these tensors
        return
    later.replace(directory / CONFIG_FILE)


def undo_save(directory: Path, made: list[Path]) -> None:
    """Remove what a failed save has left, unless its tensors are in place already: then its config has to stay."""
    if unfinished(directory, TENSOR_FILE).exists():
        for name in (TENSOR_FILE, CONFIG_FILE):
            unfinished(directory, name).unlink(missing_ok=True)
    for path in made:
        with contextlib.suppress(OSError):  # it holds something, or was not made
            path.rmdir()


def describe(model: nn.Module) -> dict:
    """What adapter_config.json says of an adapted model, but for the checksum."""
    backbone = backbone_of(model)
    held = {field: torch.atleast_2d(buffer) if field == "E0s" else torch.atleast_1d(buffer)
            for field, (_, buffer) in backbone.constants(model).items()}
    packages = [mace_peft, sys.modules.get("mace"), e3nn, torch]
    return {
        "format": FORMAT,
        "peft": model.peft_config.to_dict(),
        "foundation": origin(model),
        "backbone": backbone.name,
        **backbone.describe(model),
        **{field: held[field].tolist() if field in held else None for field in ("E0s", "scale", "shift")},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {one.__name__.removeprefix("mace_peft."): one.__version__ for one in packages if one},
    }


def checksum(description: dict, tensors: bytes) -> str:
    """SHA-256 of what the two files say: a changed file, or two files of different saves, do not go unseen."""
    said = {name: value for name, value in description.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode() + tensors).hexdigest()


def read_adapter(directory: str | os.PathLike) -> tuple[PeftConfig, dict, dict[str, torch.Tensor]]:
    """The settings, the description (``describe``) and the tensors of an adapter directory. No code from it runs.

    Raises PeftError if a file is missing, damaged or changed, or was written by a newer mace-peft.
    """
    directory = Path(directory)
    try:
        tensors = (directory / TENSOR_FILE).read_bytes()
        description = matching_description(directory, tensors)
        return PeftConfig(**description["peft"]), description, finite(load(tensors), directory)
    except PeftError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PeftError(f"{directory} is no adapter directory, for {Path(error.filename).name} is missing: give the "
                        "NAME_adapter directory that a run left") from None
    except Exception as error:  # damaged files fail in many ways, such as UnicodeDecodeError or RecursionError
        raise PeftError(f"the adapter in {directory} cannot be read ({one_line(error)}): save or copy it "
                        "again") from None


def matching_description(directory: Path, tensors: bytes) -> dict:
    """The description that belongs to the tensors: a save that was killed has put it in place or is about to."""
    later = unfinished(directory, CONFIG_FILE)
    path = directory / CONFIG_FILE
    try:
        return check_description(json.loads(path.read_text(encoding="utf-8")), path, tensors)
    except (OSError, ValueError):
        if not later.exists():
            raise
    try:
        return check_description(json.loads(later.read_text(encoding="utf-8")), later, tensors)
    except ValueError:
        raise PeftError(f"the files in {directory} belong to different saves: save or copy the adapter again") from None


def check_description(description: dict, path: Path, tensors: bytes) -> dict:
    """Raise PeftError unless the description is complete, of a known format and that of the tensors."""
    if not isinstance(description, dict) or not fits(description.get("format"), int) or description["format"] < 1:
        raise PeftError(f"{path} is no adapter config of mace-peft: give the NAME_adapter directory that a run left")
    if description["format"] > FORMAT:
        raise PeftError(f"{path} has format {description['format']}, and this mace-peft {mace_peft.__version__} reads "
                        f"up to {FORMAT}: install a newer mace-peft")
    missing, unknown = set(FIELDS) - set(description), set(description) - set(FIELDS)
    if missing or unknown:
        raise PeftError(f"{path} lacks {sorted(missing)} and has the unknown fields {sorted(unknown)}: save or copy "
                        "the adapter again")
    if description["sha256"] != checksum(description, tensors):
        raise PeftError(f"{path} and {TENSOR_FILE} are not what was saved, for their checksum differs: save or copy "
                        "the adapter again")
    odd = [name for name, kind in FIELDS.items() if not fits(description[name], kind)]
    if odd:
        raise PeftError(f"{path} holds no proper value of {', '.join(odd)}: save the adapter again")
    return description


def fits(value: object, kind: object) -> bool:
    """Whether a JSON value is of the kind: a type; a text, that one; [kind], a list of such entries, not empty;
    {name: kind}, an object of these fields; {str: kind}, one of any fields; or (kind, kind), either. Numbers have to be
    finite.
    """
    if isinstance(kind, str):
        return value == kind
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and value != [] and all(fits(entry, kind[0]) for entry in value)
    if isinstance(kind, dict) and str in kind:
        return isinstance(value, dict) and all(fits(entry, kind[str]) for entry in value.values())
    if isinstance(kind, dict):
        return isinstance(value, dict) and value.keys() == kind.keys() and all(fits(value[k], kind[k]) for k in kind)
    return type(value) is kind and (kind is not float or math.isfinite(value))


def finite(tensors: dict[str, torch.Tensor], directory: Path) -> dict[str, torch.Tensor]:
    """Raise PeftError for a weight that is no number."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise PeftError(f"{bad[0]!r} in {directory} holds NaN or infinity, for its training diverged: train again with "
                        "a lower --lr")
    return tensors
