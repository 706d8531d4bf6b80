"""HDF5 and LMDB files as MACE reads them, but for labels that are missing, which have no weight.

Each structure is looked at when the file is opened, without its neighbours: what MACE would find out in an epoch, or
after the last one, is said before the training.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from mace import data
from mace.data import AtomicData, Configuration, KeySpecification, config_from_atoms
from torch.utils.data import ConcatDataset

from mace_peft.elements import symbols
from mace_peft.errors import PeftError, one_line
from mace_peft.labels import DEFAULT_KEYS, count, give_back, weigh
from mace_peft.structures import has_stress_in_vain, log_stresses_left_out

LMDB_KEYS = KeySpecification.from_defaults()  # MACE reads LMDB files with no others


class AsRead:
    """In the place of MACE's ``AtomicData``, to have the configuration that it would be made from."""

    @classmethod
    def from_config(cls, configuration: Configuration, **options) -> Configuration:
        return configuration


class Checked:
    """What both formats share: each structure is read, checked, weighed and counted.

    counts: how many structures have each label; weighed: with a weight; in_vain: stresses that are left out. weight:
    multiplies those of all structures.
    """

    weight = 1.0

    def look_at_all(self, file_path: str) -> None:
        """Raise PeftError for a structure that cannot be read or used; log how many have each label."""
        self.counts, self.weighed, self.in_vain = count([]), count([]), 0
        for index in range(len(self)):
            try:
                configuration = self.configuration(index)
            except PeftError:
                raise
            except Exception as error:  # a file of another layout fails in many ways
                raise unreadable(f"structure {index} of {file_path}", error) from error
            check_elements_listed(configuration.atomic_numbers.tolist(), self.z_table.zs, file_path)
            self.counts.update(count([configuration], weighed=False))
            self.weighed.update(count([configuration]))
        if not len(self):
            raise PeftError(f"{file_path} has no structures: give a file that has some")
        log_counts(f"{file_path}, {len(self)} structures", self.weighed)
        log_stresses_left_out(self.in_vain, file_path)

    def weighed_as_read(self, configuration: Configuration, index: int) -> Configuration:
        """The configuration with weights for the labels that it has."""
        self.in_vain += has_stress_in_vain(configuration)
        weigh(configuration, f"structure {index} of {self.file_path}")
        return configuration

    def __getitem__(self, index: int) -> AtomicData:
        configuration = self.configuration(index)
        configuration.weight *= self.weight
        return AtomicData.from_config(configuration, z_table=self.z_table, cutoff=self.r_max,
                                      heads=self.kwargs.get("heads", ["Default"]))


class HDF5Dataset(Checked, data.HDF5Dataset):
    """A file of ``mace_prepare_data``. MACE itself gives all structures of a run with several heads to the last one."""

    def __init__(self, file_path: str, r_max: float, z_table, **kwargs):
        with opened(file_path):
            super().__init__(file_path, r_max, z_table, AsRead, **kwargs)
            self.length = sum(len(batch) for batch in self.file.values())  # the last one may be shorter
        self.look_at_all(file_path)
        self._file.close()  # each process that reads on opens it for itself
        self._file = None

    def configuration(self, index: int) -> Configuration:
        configuration = super(Checked, self).__getitem__(index)  # by way of AsRead
        configuration.head = self.kwargs.get("head", configuration.head)
        return self.weighed_as_read(configuration, index)


class LMDBDataset(Checked, data.LMDBDataset):
    """A database of ASE: the labels of its calculators, or what is under the keys that MACE has by default."""

    def __init__(self, file_path: str, r_max: float, z_table, **kwargs):
        with opened(file_path):
            super().__init__(file_path, r_max, z_table, **kwargs)
        self.file_path = file_path
        self.look_at_all(file_path)

    def configuration(self, index: int) -> Configuration:
        atoms = self.AseDB.get_atoms(self.AseDB.ids[index])
        results = getattr(atoms.calc, "results", {})
        for name, holder in (("energy", atoms.info), ("forces", atoms.arrays), ("stress", atoms.info)):
            if results.get(name) is not None:
                holder[DEFAULT_KEYS[name]] = results[name]
        give_back(atoms, LMDB_KEYS)
        configuration = config_from_atoms(atoms, LMDB_KEYS, head_name=self.kwargs.get("head", "Default"))
        return self.weighed_as_read(configuration, index)


def dataset_from_sharded_hdf5(files: str, z_table, r_max: float, **kwargs) -> ConcatDataset:
    """The HDF5 files of a folder as one set, as MACE's function of this name has them."""
    paths = sorted(path for path in Path(files).iterdir() if path.suffix in (".h5", ".hdf5"))
    return ConcatDataset([HDF5Dataset(str(path), r_max, z_table, **kwargs) for path in paths])


def log_dataset_contents(dataset: Sequence[Configuration], dataset_name: str) -> None:
    """MACE's line on a set of data, with numbers of structures in the place of sums of weights."""
    log_counts(dataset_name, count(dataset))


def log_counts(dataset_name: str, counts: dict[str, int]) -> None:
    logging.info(f"{dataset_name} [{', '.join(f'{name}: {number}' for name, number in counts.items())}]")


def parts_of(dataset: Checked | ConcatDataset) -> list[Checked]:
    """The files of a set."""
    return dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]


def check_elements_listed(elements: list[int], listed: list[int], where: str) -> None:
    """Raise PeftError for elements (atomic numbers) that the model will not have."""
    new = set(elements) - set(listed)
    if new:
        raise PeftError(f"{where} has {symbols(new)}, and the model will have {symbols(listed)}, the elements of "
                        "--atomic_numbers or of the training and validation data: leave out what has others, or add "
                        "them to --atomic_numbers, with E0s for them")


def unreadable(what: str, error: Exception) -> PeftError:
    return PeftError(f"{what} cannot be read ({one_line(error)}): make it anew with mace_prepare_data (HDF5) or ASE "
                     "(LMDB), or give an extended XYZ file")


@contextlib.contextmanager
def opened(file_path: str) -> Iterator[None]:
    """Raise PeftError in the place of what a file that is missing, damaged or of another kind causes."""
    missing = [path for path in file_path.split(":") if not Path(path).exists()]
    if missing:
        raise PeftError(f"{missing[0]} does not exist: check the path")
    try:
        yield
    except Exception as error:  # h5py and LMDB fail in many ways
        raise unreadable(file_path, error) from error
