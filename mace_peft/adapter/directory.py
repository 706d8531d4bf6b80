"""The adapter directory: adapter_model.safetensors holds the adapter; adapter_config.json and README.md are to look at.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load, save
from torch import nn

from mace_peft.adapter.card import BEGINNING, card
from mace_peft.adapter.description import (
    DTYPES,
    LARGEST_TENSORS,
    NAME,
    TENSORS,
    TRAINING,
    check_description,
    describe,
    fits,
    sealed,
)
from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError, one_line
from mace_peft.files import complete_file, make_folder, open_regular
from mace_peft.model.adapted import check_adapted, origin, trainable_parameters

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
SAID = "mace_peft"  # the name of the description in the metadata
METADATA = {"format": "pt"}  # which other readers of safetensors ask for
LARGEST_CONFIG = 2**20  # bytes


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the adapted model's trained tensors and settings to the directory; returns its path.

    The files hold what it takes to get from the foundation file to this model: the trained parameters, the elements,
    E0s (eV, one list per head, in the order of the elements), heads, scale and shift (eV), the settings, the strength,
    the name and fingerprint of the foundation, and the versions of the packages. The tensors are those of strength 1,
    whatever the strength. Other files in the directory stay, and so does a README.md that is no card of an adapter.

    Killed at any moment, or read meanwhile, it is the adapter that was there or the new one: adapter_model.safetensors
    holds all of it and takes the place of the older one in one step, after adapter_config.json, its copy to look at,
    and README.md, its card.

    Warns if the base is no longer the one that the adapters were put into. Raises PeftError, and writes nothing, if the
    model has no adapters, for what ``load_adapter`` would refuse, such as weights of NaN, and where updates are folded
    at another strength than 1, and for a path that is a file; OSError if the directory cannot be written.
    """
    check_adapted(model)
    if model.peft_folded and model.peft_strength != 1:
        raise PeftError(f"the low-rank updates of this model are folded into its weights at strength "
                        f"{model.peft_strength:g}, which its gates alone do not say: save the model itself, or the "
                        "adapter before it is folded")
    if model.peft_foundation is not None and origin(model) is not model.peft_foundation:
        warnings.warn("the weights of the base have changed since the adapters were put in, so that this adapter goes "
                      "with no other: save them too, or train them by train_also", stacklevel=2)
    trained = {name: model.peft_full.get(name, parameter).detach().to(parameter.dtype).cpu().contiguous()
               for name, parameter in trainable_parameters(model).items()}
    directory = path_of(directory)
    if directory.exists() and not directory.is_dir():
        raise PeftError(f"{directory} is a file, and an adapter is a directory: give another path")
    return write(directory, describe(model), finite(trained, "the model"))


def path_of(directory: str | os.PathLike) -> Path:
    """The directory as a path. Raises PeftError for what is none, and for "", which would be the working directory."""
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise PeftError(f"{directory!r:.80} is no path of an adapter directory: give one")
    return Path(directory)


def add_training(directory: str | os.PathLike, training: dict) -> Path:
    """Write into the adapter how it was trained, see ``TRAINING``; its tensors stay. Returns its path.

    Raises PeftError where ``read_adapter`` does, and for what is too much; OSError as ``save_adapter``.
    """
    _, description, tensors = read_adapter(directory)
    odd = [name for name, value in training.items() if not fits(value, TRAINING[name])]
    if odd:
        raise PeftError(f"an adapter directory has no place for the {odd[0]} of its training, which are too long, too "
                        f"many or no finite numbers: {training[odd[0]]!r:.200}")
    return write(Path(directory), {**description, "training": training}, tensors)


def write(directory: Path, description: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Write the files of the adapter, see ``save_adapter``."""
    files = contents(description, tensors)
    text = card(description, {name: tensor.numel() for name, tensor in tensors.items()})
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        make_folder(directory)
        # the inner file has its name first
        with complete_file(directory / TENSOR_FILE, files[TENSOR_FILE]), \
                complete_file(directory / CONFIG_FILE, files[CONFIG_FILE]):
            if is_replaceable(directory / CARD_FILE):
                with complete_file(directory / CARD_FILE, text.encode()):
                    pass
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # it holds something, or was not made
                path.rmdir()
        raise
    return directory


def is_replaceable(path: Path) -> bool:
    """Whether the path is free, or has the card of an adapter: what else is there is somebody's."""
    try:
        with open_regular(path, LARGEST_CONFIG) as file:
            return file.read(len(BEGINNING)) == BEGINNING.encode()
    except FileNotFoundError:
        return True
    except (PeftError, OSError):  # such as a link, or a folder
        return False


def contents(description: dict, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The two files that are read again, by their names."""
    plain = io.BytesIO(save(tensors))
    description = sealed({**description, "tensors": checksum_of_tensors(plain, read_header(plain))})
    return {TENSOR_FILE: save(tensors, metadata={**METADATA, SAID: json.dumps(description)}),
            CONFIG_FILE: (json.dumps(description, indent=2) + "\n").encode()}


def read_adapter(directory: str | os.PathLike) -> tuple[PeftConfig, dict, dict[str, torch.Tensor]]:
    """The settings, the description (``describe``) and the tensors of an adapter directory. No code from it runs.

    Raises PeftError if a file is missing, damaged, changed, too large or a link, or if a newer mace-peft wrote it.
    """
    with opened(directory) as (file, config, description, _):
        file.seek(0)
        return config, description, finite(load(file.read()), str(directory))


def read_sizes(directory: str | os.PathLike) -> tuple[dict, dict[str, int]]:
    """The description, and how many numbers each tensor has: their checksum is checked, and none of them is kept.

    Raises PeftError where ``read_adapter`` does, but for what it finds in the numbers.
    """
    with opened(directory) as (_, _, description, tensors):
        return description, {name: math.prod(entry["shape"]) for name, entry in tensors.items()}


@contextlib.contextmanager
def opened(directory: str | os.PathLike) -> Iterator[tuple[BinaryIO, PeftConfig, dict, dict]]:
    """The file of tensors, whose checksum is right; the settings, the description and the header; ``read_adapter``."""
    directory = path_of(directory)
    try:
        with open_regular(directory / TENSOR_FILE, LARGEST_TENSORS) as tensors, \
                open_regular(directory / CONFIG_FILE, LARGEST_CONFIG) as copy:
            check_description(json.loads(copy.read()), directory / CONFIG_FILE)
            description, header = read_description(tensors, directory / TENSOR_FILE)
            yield tensors, PeftConfig(**description["peft"]), description, header
    except PeftError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        cause = f"{Path(error.filename).name} is missing" if directory.is_dir() else "it is a file"
        remedy = "give the NAME_adapter directory that a run left"
        if not directory.exists():
            cause, remedy = "it does not exist", "check the path"
        raise PeftError(f"{directory} is no adapter directory, for {cause}: {remedy}") from None
    except Exception as error:  # damaged files fail in many ways, such as UnicodeDecodeError or RecursionError
        raise PeftError(f"the adapter in {directory} cannot be read ({one_line(error)}): save or copy it "
                        "again") from None


def read_header(file: BinaryIO) -> dict:
    """The header of safetensors: the tensors' types, shapes and places, and the metadata."""
    length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_CONFIG:
        raise ValueError(f"a header of {length:,} bytes, of at most {LARGEST_CONFIG:,}")
    return json.loads(file.read(length))


def checksum_of_tensors(file: BinaryIO, header: dict) -> str:
    """SHA-256 of the tensors, where the header, without metadata, has been read."""
    checksum = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    while part := file.read(2**20):
        checksum.update(part)
    return checksum.hexdigest()


def read_description(file: BinaryIO, path: Path) -> tuple[dict, dict]:
    """What the file says of its tensors, and the header. Raises PeftError if they are not those that were saved."""
    header = read_header(file)
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    said = metadata.pop(SAID, None) if isinstance(metadata, dict) else None
    if said is None or metadata != METADATA:
        raise PeftError(f"{path} is no adapter of mace-peft: give the NAME_adapter directory that a run left")
    description = check_description(json.loads(said), path)
    if description["tensors"] != checksum_of_tensors(file, header):
        raise PeftError(f"{path} is not what was saved, for its checksum differs: save or copy the adapter again")
    if not fits(header, TENSORS):
        raise PeftError(f"{path} holds more than {TENSORS.most:,} tensors, or one whose name is longer than "
                        f"{NAME.most} signs or whose shape is none: save the adapter again")
    return description, header


def finite(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The tensors. Raises PeftError for one of another kind than weights are, and for a weight that is no number."""
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise PeftError(f"{name!r:.300} in {where} is of {tensor.dtype}, as no weights are: save or "
                            "copy the adapter again")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise PeftError(f"{bad[0]!r:.300} in {where} holds NaN or infinity, for its training diverged: train again "
                        "with a lower --lr")
    return tensors
