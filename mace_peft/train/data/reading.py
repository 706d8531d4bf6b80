"""What a run reads: its heads, their files, labels and E0s. What is wrong with them is said before the training."""

import argparse
import ast
import logging
import types
from collections import Counter
from pathlib import Path

from mace import data
from mace.tools.scripts_utils import check_path_ase_read, get_files_with_suffix

from mace_peft.elements import symbols
from mace_peft.errors import PeftError
from mace_peft.labels import ISOLATED, count
from mace_peft.train.data.datasets import HDF5Dataset, check_elements_listed, parts_of
from mace_peft.train.data.e0s import asked_E0s, check_energies_known, complete, narrow, with_energy
from mace_peft.train.data.files import check_files, listed_elements, read_statistics, weights_by_type
from mace_peft.train.data.heads import PT_HEAD, REPLAY_SETS
from mace_peft.train.data.labels_and_loss import check_labels


class Reading:
    """Stand-ins for the functions with which ``mace_run_train`` reads, and what they have seen.

    check_known: raises PeftError for elements (atomic numbers) that the model to start from does not know.
    heads: MACE's configuration of each head, in the order of the run. E0s: what each asks for, see ``asked_E0s``.
    counts: how many structures have each label, by head and part ("train" or "valid"); weighed: with a weight.
    """

    def __init__(self, original: types.SimpleNamespace, args: argparse.Namespace, check_known):
        self.original = original
        self.args = args
        self.check_known = check_known
        self.heads: list = []
        self.E0s: dict[str, str | dict[int, float]] = {}
        self.counts: dict[tuple[str, str], dict[str, int]] = {}
        self.weighed: dict[tuple[str, str], dict[str, int]] = {}
        self.opened: set[tuple[str, str]] = set()

    def dict_head_to_dataclass(self, head: dict, head_name: str, args: argparse.Namespace):
        """MACE's configuration of a head, with what its statistics file says unless an option says otherwise.

        Of the sets that MACE downloads for replay, it takes one, whichever is asked for.
        """
        if head_name == PT_HEAD and self.args.pt_train_file in REPLAY_SETS:
            head = {**head, "train_file": self.args.pt_train_file}
        config = self.original.dict_head_to_dataclass(head, head_name, args)
        check_files(config, args)
        if config.statistics_file is not None and head_name != PT_HEAD:
            read_statistics(config)
        elements = listed_elements(config)
        config.atomic_numbers = None if elements is None else str(elements)
        if head_name != PT_HEAD:
            self.check_known(elements or [])
            config.config_type_weights = str(weights_by_type(config))
        self.E0s[head_name] = asked_E0s(config.E0s, head_name)
        config.E0s = str(self.E0s[head_name])
        self.check_E0s_possible(config)
        self.heads.append(config)
        return config

    def check_E0s_possible(self, config) -> None:
        """Raise PeftError for a way to E0s that the files or the release of MACE do not allow."""
        if config.E0s not in ("average", "estimated", ISOLATED.lower()):
            return
        files = [config.train_file] if isinstance(config.train_file, str) else config.train_file
        if not all(check_path_ase_read(file) for file in files):
            what = "no --E0s" if config.E0s == ISOLATED.lower() else f"--E0s {config.E0s}"
            raise PeftError(f"{what}, and the training files of the head {config.head_name} are not XYZ files alone, "
                            "of which MACE takes E0s: give them as a dictionary or a JSON file, or --E0s foundation")
        if config.E0s == "estimated" and not hasattr(data, "estimate_e0s_from_foundation"):
            raise PeftError(f"--E0s estimated, of the head {config.head_name}, needs mace-torch 0.3.15 or later: "
                            "upgrade it, or use average")

    def get_dataset_from_xyz(self, **kwargs) -> tuple:
        """MACE's sets of a head, and the energies of isolated atoms if these are what it takes as E0s."""
        config = self.heads[-1]
        try:
            collections, alone = self.original.get_dataset_from_xyz(**kwargs)
        except AssertionError:  # newer releases of MACE want two structures at least to split a set
            collections = None
        if collections is None or not collections.valid:
            raise PeftError(f"the head {config.head_name} has no structures to validate with: give more, another "
                            "--valid_fraction, or a --valid_file")
        elements = elements_of(collections.train, collections.valid)
        self.check_known(sorted(elements))
        check_energies_known(collections.train, alone, config, kwargs["train_path"])
        if config.head_name == PT_HEAD:
            for configuration in (*collections.train, *collections.valid):
                configuration.weight *= self.args.weight_pt_head
        if config.E0s != ISOLATED.lower():
            if alone:
                logging.info(f"The isolated atoms ({symbols(alone)}) in the training set of the head "
                             f"{config.head_name} give no E0s: --E0s {config.E0s} does")
            return collections, None
        listed = ast.literal_eval(config.atomic_numbers) if config.atomic_numbers else []
        return collections, complete(alone or {}, {*elements, *listed}, f"no --E0s is given, and the isolated atoms "
                                     f"with an energy (config_type={ISOLATED}) in {', '.join(kwargs['train_path'])}")

    def get_atomic_energies(self, E0s: str, train_collection: list | None, z_table) -> dict[int, float]:
        (config,) = [head for head in self.heads if head.z_table is z_table]
        if E0s == "average":
            return data.compute_average_E0s(with_energy(train_collection), z_table)
        return complete(dict(self.E0s[config.head_name]), z_table.zs, f"the --E0s of the head {config.head_name}")

    def dict_to_array(self, energies: dict, heads: list[str]):
        """MACE's array of E0s, of the elements of the run alone: with others it would have too many columns."""
        if not self.args.foundation_model_elements:
            narrow(energies, {z for head in self.heads for z in head.z_table.zs})
        return self.original.dict_to_array(energies, heads)

    def given(self, head_name: str) -> set[int]:
        """The elements of the head's data, and those of which E0s were given: as numbers, or by isolated atoms."""
        (config,) = [head for head in self.heads if head.head_name == head_name]
        asked = self.E0s[head_name]
        return {*config.z_table.zs, *(asked if isinstance(asked, dict) else config.atomic_energies_dict or {})}

    def load_dataset_for_path(self, **kwargs):
        """MACE's data of one file, or of all XYZ files of a head; raises PeftError for elements that have no place."""
        config, z_table = kwargs["head_config"], kwargs["z_table"]
        if config.collections is not None:
            tests = [configuration for _, configurations in config.collections.tests for configuration in
                     configurations]
            for what, part in (("training", config.collections.train), ("validation", config.collections.valid),
                               ("test", tests)):
                check_elements_listed(sorted(elements_of(part)), z_table.zs,
                                      f"the {what} set of the head {config.head_name}")
        dataset = self.original.load_dataset_for_path(**kwargs)
        if kwargs.get("collection") is None:
            # MACE opens the training files first, and one may be the validation file as well
            opened = (config.head_name, kwargs["file_path"])
            part = "train" if kwargs["file_path"] in config.train_file and opened not in self.opened else "valid"
            self.opened.add(opened)
            for file in parts_of(dataset):
                self.add(config.head_name, part, file.counts, file.weighed)
                file.weight = self.args.weight_pt_head if config.head_name == PT_HEAD else 1.0
        return dataset

    def add(self, head_name: str, part: str, counts: Counter[str], weighed: Counter[str]) -> None:
        self.counts.setdefault((head_name, part), count([])).update(counts)
        self.weighed.setdefault((head_name, part), count([])).update(weighed)

    def check_before_training(self) -> None:
        """Raise PeftError for labels that do not go with the loss."""
        for config in self.heads:
            check_types(config)
            for part in ("train", "valid") if config.collections is not None else ():
                configurations = getattr(config.collections, part)
                self.add(config.head_name, part, count(configurations, weighed=False), count(configurations))
        check_labels(self.args, self.heads, self.counts, self.weighed)

    def check_tests(self, z_table, heads: list[str]) -> None:
        """Open the folders of test sets, which MACE opens after the training.

        Raises PeftError for a file that cannot be used, and for two of one name: MACE would evaluate one of them.
        """
        seen: dict[str, str] = {}
        for config in self.heads:
            files = get_files_with_suffix(config.test_dir, "_test.h5") if config.test_dir is not None else []
            for file in files:
                HDF5Dataset(file, self.args.r_max, z_table, heads=heads, head=config.head_name)
                other = seen.setdefault(Path(file).name, file)
                if other != file:
                    raise PeftError(f"{other} and {file} have one name, by which MACE tells test sets apart: rename "
                                    "one")


def check_types(config) -> None:
    """Raise PeftError for a weight of a type that no structure of the head has."""
    if config.collections is None or config.head_name == PT_HEAD:
        return
    parts = (config.collections.train, config.collections.valid)
    held = {str(configuration.config_type) for part in parts for configuration in part}
    missing = [name for name in weights_by_type(config) if name not in held | {"Default", ISOLATED}]
    if missing:
        raise PeftError(f"--config_type_weights has {missing[0]}, a config_type that no structure of the head "
                        f"{config.head_name} has, which has {', '.join(sorted(held))}: correct it, or leave it out")


def elements_of(*parts: list) -> set[int]:
    return {int(z) for part in parts for configuration in part for z in configuration.atomic_numbers}
