"""The files of a head: whether they are there, of kinds that MACE reads together, and read at all."""

import argparse
import ast
import json
from pathlib import Path

from mace.tools.scripts_utils import check_path_ase_read, get_files_with_suffix

from mace_peft.errors import PeftError, one_line
from mace_peft.files import check_regular
from mace_peft.train.data.heads import REPLAY_SETS

PARTS = ("train_file", "valid_file", "test_file")


def check_files(config, args: argparse.Namespace) -> None:
    """Raise PeftError for files of the head that MACE would not read, or only after the training."""
    train, valid, test = (listed(getattr(config, part), f"--{part}") for part in PARTS)
    if train in [[name] for name in REPLAY_SETS]:
        return
    for files, part in zip((train, valid, test), PARTS, strict=True):
        for file in files:
            check_there(file, f"--{part}")
    of_ase = {part: [file for file in files if check_path_ase_read(file)]
              for part, files in (("train", train), ("valid", valid), ("test", test))}
    if valid and bool(of_ase["train"]) != bool(of_ase["valid"]):
        raise PeftError(f"--valid_file {valid[0]} is of another kind than --train_file {train[0]}, and MACE would "
                        "leave one of them out: give both as XYZ files, or both as HDF5 or LMDB")
    if not valid and not of_ase["train"]:
        raise PeftError(f"--train_file {train[0]} needs a --valid_file, since MACE splits XYZ files alone: give one")
    if not valid and not 0 < config.valid_fraction < 1:
        raise PeftError(f"--valid_fraction {config.valid_fraction} leaves nothing to train on or to validate with: "
                        "give a number between 0 and 1, or a --valid_file")
    if test and (of_ase["test"] != test or of_ase["train"] != train):
        raise PeftError(f"--test_file {test[0]} would not be read, since MACE takes XYZ files beside XYZ training "
                        "files alone: give HDF5 files by --test_dir")
    if of_ase["train"] != train and config.atomic_numbers is None and config.statistics_file is None:
        raise PeftError(f"--train_file {train[0]} needs --atomic_numbers, the elements of the data such as "
                        "'[1, 6, 8]', or a --statistics_file: MACE finds those of XYZ files alone")
    if of_ase["train"] != train and set(weights_by_type(config).values()) != {1.0}:
        raise PeftError(f"--config_type_weights {config.config_type_weights} does not act on {train[0]}: give the "
                        "weights when the file is made (mace_prepare_data), or as config_weight of its structures")
    if config.test_dir is not None:
        check_test_dir(config.test_dir, args)


def listed(files: object, option: str) -> list[str]:
    """The files as a list, as MACE makes one. Raises PeftError for what is neither text nor a list of it."""
    if files is None:
        return []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise PeftError(f"{option} {files} is neither a path nor a list of paths: give one")
    return files


def check_there(file: str, option: str) -> None:
    """Raise PeftError unless the path is there, and if it is a folder, has files of a kind that MACE reads."""
    for path in file.split(":") if file.endswith(("lmdb", "mdb")) else [file]:  # MACE joins LMDB files so
        if not Path(path).exists():
            raise PeftError(f"{option} {path} does not exist: check the path")
        if Path(path).is_dir() and not any(list(Path(path).glob(f"*.{end}")) for end in
                                           ("h5", "hdf5", "lmdb", "aselmdb", "mdb")):
            raise PeftError(f"{option} {path} is a folder without HDF5 or LMDB files: give a file, or their folder")
        if not Path(path).is_dir():
            check_regular(path)
            try:
                open(path, "rb").close()
            except OSError as error:
                raise PeftError(f"{option} {path} cannot be read ({error.strerror}): allow it, or give another "
                                "file") from None


def check_test_dir(directory: str, args: argparse.Namespace) -> None:
    """Raise PeftError if MACE, which opens the folder after the training, would find nothing there that it can read."""
    if not Path(directory).is_dir():
        raise PeftError(f"--test_dir {directory} is not a folder: check the path")
    if args.multi_processed_test:
        raise PeftError("--multi_processed_test True fails in MACE after the training: leave it out, and give test "
                        "sets as files that end on _test.h5")
    if not get_files_with_suffix(directory, "_test.h5"):
        raise PeftError(f"--test_dir {directory} has no file that ends on _test.h5, and MACE reads no others: rename "
                        "them, or give --test_file")


def read_statistics(config) -> None:
    """Give the head's configuration what its statistics file says, but for E0s where an option asks for others.

    Raises PeftError if it cannot be read, or lacks something.
    """
    path = config.statistics_file
    try:
        held = json.loads(Path(path).read_text())
        config.atomic_numbers = held["atomic_numbers"]
        config.mean, config.std, config.avg_num_neighbors = held["mean"], held["std"], held["avg_num_neighbors"]
        config.E0s = held["atomic_energies"] if config.E0s is None else config.E0s
    except FileNotFoundError:
        raise PeftError(f"--statistics_file {path} does not exist: check the path") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PeftError(f"--statistics_file {path} cannot be used ({type(error).__name__}: {one_line(error)}): make "
                        "it anew with mace_prepare_data --compute_statistics True") from None
    config.compute_avg_num_neighbors, config.statistics_file = False, None


def listed_elements(config) -> list[int] | None:
    """The elements of ``--atomic_numbers``, or of the statistics. Raises PeftError if they are none."""
    if config.atomic_numbers is None:
        return None
    try:
        held = config.atomic_numbers
        elements = sorted({int(number) for number in (ast.literal_eval(held) if isinstance(held, str) else held)})
    except (ValueError, SyntaxError, TypeError):
        elements = []
    if not elements or not all(0 < number < 119 for number in elements):
        raise PeftError(f"--atomic_numbers {config.atomic_numbers} is no list of atomic numbers: give one such as "
                        "'[1, 6, 8]'")
    return elements


def weights_by_type(config) -> dict[str, float]:
    """What ``--config_type_weights`` says. MACE itself goes on without it where it cannot read it.

    Raises PeftError if it is no dictionary of weights.
    """
    held = config.config_type_weights
    try:
        weights = ast.literal_eval(held) if isinstance(held, str) else held
        numbers = {str(name): float(weight) for name, weight in weights.items()}
        allowed = all(0 <= number < float("inf") for number in numbers.values())
    except (ValueError, SyntaxError, TypeError, AttributeError):
        allowed = False
    if allowed:
        return numbers
    raise PeftError(f"--config_type_weights {held} is no dictionary of weights from 0 up: give one such as "
                    "'{\"Default\": 1.0, \"surface\": 2.0}'")
