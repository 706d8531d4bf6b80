"""The labels of structures, in whatever format they are read: one that is missing has no weight, and is not counted.

MACE gives labels of 0 and full weight to structures that lack one, where the key is one that ASE takes over
(``energy``, ``forces``, ``stress``) and in HDF5 files made so.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import ase
import ase.io
import numpy as np
from ase.data import chemical_symbols
from mace.data import Configuration, KeySpecification, config_from_atoms
from mace.tools import DefaultKeys

from mace_peft.errors import PeftError, one_line
from mace_peft.files import check_regular
from mace_peft.structures import check_apart, check_structure, has_stress_in_vain, log_stresses_left_out

LABELS = ("energy", "forces", "stress", "virials", "dipole", "charges", "polarizability")
STATES = ("total_charge", "total_spin", "elec_temp")  # numbers of a structure on which predictions may depend
VECTORS = ("dipole", "polarizability")  # labels whose components may have weights of their own
DEFAULT_KEYS = {name.removesuffix("_key"): key for name, key in DefaultKeys.keydict().items()}
ISOLATED = "IsolatedAtom"  # the config_type of the atoms alone that give E0s


def load_from_xyz(file_path: str, key_specification: KeySpecification, head_name: str = "Default",
                  config_type_weights: dict | None = None, extract_atomic_energies: bool = False,
                  keep_isolated_atoms: bool = False, no_data_ok: bool = False) -> tuple[dict, list[Configuration]]:
    """What MACE's function of this name gives, with the labels that ASE took over under their own keys.

    Returns the energies of isolated atoms (eV, by atomic number), of those that have one, and the configurations.
    Raises PeftError if the file cannot be read, is empty, or has no label under the keys.
    """
    structures = read(file_path)
    put_in_head(structures, key_specification.info_keys["head"], head_name, file_path)
    check_states(structures, key_specification, file_path)
    for atoms in structures:
        give_back(atoms, key_specification)
        if "config_type" in atoms.info:
            atoms.info["config_type"] = str(atoms.info["config_type"])  # ASE reads a number where it can
    energies = {}
    if extract_atomic_energies:
        energies = energies_alone(structures, key_specification.info_keys["energy"], file_path)
        if not keep_isolated_atoms:
            structures = [atoms for atoms in structures if not is_alone(atoms)]
        if not structures:
            raise PeftError(f"{file_path} has isolated atoms alone: add structures to train on")
    configurations = [config_from_atoms(atoms, key_specification, config_type_weights, head_name)
                      for atoms in structures]
    log_stresses_left_out(sum(map(has_stress_in_vain, configurations)), file_path)
    for number, configuration in enumerate(configurations):
        weigh(configuration, f"structure {number} of {file_path}")
    if not no_data_ok:
        check_labelled(configurations, structures, key_specification, file_path)
    return energies, configurations


def check_labelled(configurations: Sequence[Configuration], structures: Sequence[ase.Atoms],
                   key_specification: KeySpecification, file_path: str) -> None:
    """Raise PeftError if none of the configurations, made of these structures, has a label to train on."""
    counts = count(configurations, weighed=False)
    if not (counts["energy"] or counts["forces"] or counts["dipole"]):
        raise PeftError(f"no structure of {file_path} has a label: its keys are {', '.join(keys_of(structures))}, and "
                        f"{keys_asked(key_specification)} are asked for: give those of the file by --energy_key and "
                        "--forces_key")


def label_keys(**keys: str | None) -> KeySpecification:
    """MACE's own keys of labels, but those that are given: ``label_keys(energy="energy", forces=None)``."""
    specification = KeySpecification.from_defaults()
    for held in (specification.info_keys, specification.arrays_keys):
        held.update({name: key for name, key in keys.items() if key is not None and name in held})
    return specification


def from_atoms(structures: Iterable[ase.Atoms], keys: KeySpecification, where: str) -> list[Configuration]:
    """The structures, which stay as they are, with labels as MACE takes them. Raises PeftError where ``weigh`` does."""
    configurations = []
    for atoms in structures:
        labelled = atoms.copy()
        labelled.calc = atoms.calc
        give_back(labelled, keys)
        configurations.append(config_from_atoms(labelled, keys))
    log_stresses_left_out(sum(map(has_stress_in_vain, configurations)), where)
    for number, configuration in enumerate(configurations):
        weigh(configuration, f"structure {number} of {where}")
    return configurations


def put_in_head(structures: Sequence[ase.Atoms], key: str, head_name: str, file_path: str) -> None:
    """Give the structures the head of the run that has their file, as MACE does; say so where they name another."""
    named = {str(atoms.info[key]) for atoms in structures if key in atoms.info} - {head_name}
    if named:
        logging.warning(f"Structures of {file_path} name the head {', '.join(sorted(named))} (--head_key {key}), and "
                        f"all go to the head {head_name}, which has the file: give each head its file in --heads")
    for atoms in structures:
        atoms.info[key] = head_name


def check_states(structures: Sequence[ase.Atoms], key_specification: KeySpecification, file_path: str) -> None:
    """Raise PeftError for a key of a charge, spin or temperature that no structure has; say if some structures lack it,
    for which MACE has a value of its own."""
    for name in STATES:
        key = key_specification.info_keys.get(name, DEFAULT_KEYS.get(name))
        having = sum(key in atoms.info for atoms in structures)
        if not having and key != DEFAULT_KEYS.get(name):
            raise PeftError(f"--{name}_key {key}: no structure of {file_path} has it; the keys are "
                            f"{', '.join(keys_of(structures))}: give one of them, or leave it out")
        if 0 < having < len(structures):
            logging.warning(f"{len(structures) - having} of {len(structures)} structures of {file_path} have no {name} "
                            f"({key}), and MACE takes its default for them")


def energies_alone(structures: Sequence[ase.Atoms], key: str, file_path: str) -> dict[int, float]:
    """The energies (eV) of isolated atoms, by atomic number.

    Raises PeftError for one that is no finite number, and for two of one element that differ.
    """
    energies: dict[int, float] = {}
    for atoms in structures:
        if is_alone(atoms) and key in atoms.info:
            element, value = int(atoms.numbers[0]), numbers(key, atoms.info[key], f"an isolated atom in {file_path}")
            if value.size != 1 or not np.isfinite(value).all():
                raise PeftError(f"{key} of the isolated atom {chemical_symbols[element]} in {file_path} is "
                                f"{atoms.info[key]!r:.60}: give its energy in eV, or leave the atom out")
            energy = value.item()
            if energies.setdefault(element, energy) != energy:
                raise PeftError(f"{file_path} has isolated atoms of {chemical_symbols[element]} with the energies "
                                f"{energies[element]} and {energy} eV: leave one")
    return energies


def is_alone(atoms: ase.Atoms) -> bool:
    return len(atoms) == 1 and atoms.info.get("config_type") == ISOLATED


def read(file_path: str) -> list[ase.Atoms]:
    """All structures of a file that ASE reads. Raises PeftError if there are none, or it cannot be read."""
    if not os.path.exists(file_path):  # ASE would read another, for what stands before an @
        raise PeftError(f"{file_path} does not exist: give the path of a file, of which all structures are read")
    check_regular(file_path)
    try:
        structures = ase.io.read(file_path, ":")
    except Exception as error:  # formats of all kinds, which fail in as many ways
        raise PeftError(f"{file_path} cannot be read ({one_line(error)}): give an extended XYZ file, or another that "
                        "ASE reads") from error
    structures = structures if isinstance(structures, list) else [structures]
    if not structures:
        raise PeftError(f"{file_path} has no structures: give a file that has some")
    return structures


def give_back(atoms: ase.Atoms, key_specification: KeySpecification) -> None:
    """Put the labels that ASE has moved to a calculator under their keys again."""
    results = getattr(atoms.calc, "results", {})
    for keys, holder in ((key_specification.info_keys, atoms.info), (key_specification.arrays_keys, atoms.arrays)):
        for key in keys.values():
            if key not in holder and results.get(key) is not None:
                holder[key] = results[key]


def weigh(configuration: Configuration, where: str) -> None:
    """Give labels that are missing, or NaN throughout, no weight.

    Raises PeftError for one of another shape than it has to be, or that is NaN or infinite in part, since weights are
    those of whole labels; for weights that are none; and for a structure that is none.
    """
    atoms = len(configuration.atomic_numbers)
    for check in (check_structure, check_apart):
        check(configuration.positions, configuration.cell, configuration.pbc, where)
    for name, value in configuration.properties.items():
        if name in STATES and value is not None and numbers(name, value, where).size != 1:
            raise PeftError(f"{name} of {where} is {value!r:.60}: give a number, or leave it out")
        if name not in LABELS:
            continue
        if value is not None:
            value = numbers(name, value, where)
            if value.shape not in shapes(name, atoms):
                raise PeftError(f"{name} of {where} has the shape {value.shape}, and not {shapes(name, atoms)[0]}: "
                                "correct it, or leave it out, which gives it no weight")
        if value is None or np.isnan(value).all() or name == "stress" and has_stress_in_vain(configuration):
            configuration.properties[name] = None
        elif not np.isfinite(value).all():
            raise PeftError(f"{name} of {where} holds NaN or infinity: correct it, or leave the whole label out, "
                            "which gives it no weight")
    for name in LABELS:
        if configuration.properties.get(name) is None:
            configuration.property_weights[name] = 0.0
    for name, weight in {"config_weight": configuration.weight, **configuration.property_weights}.items():
        value = numbers(f"the weight {name}", 1.0 if weight is None else weight, where)
        if not (np.isfinite(value).all() and (value >= 0).all() and (value.size == 1 or name in VECTORS)):
            raise PeftError(f"the weight {name} of {where} is {weight}: give a number from 0 up")


def numbers(name: str, value: object, where: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise PeftError(f"{name} of {where} is {value!r:.60}: give numbers, or leave it out") from None


def shapes(name: str, atoms: int) -> list[tuple[int, ...]]:
    """The shapes that the label may have: MACE takes symmetric tensors in Voigt's notation too."""
    tensor = [(3, 3), (6,), (9,)]
    return {"energy": [()], "forces": [(atoms, 3)], "stress": tensor, "virials": tensor, "dipole": [(3,)],
            "charges": [(atoms,)], "polarizability": [(3, 3), (9,), (1, 3, 3)]}[name]


def count(configurations: Iterable[Configuration], weighed: bool = True) -> Counter[str]:
    """How many of the configurations have each label, 0 where none has. weighed: labels of weight 0 do not count."""
    counts = Counter(dict.fromkeys(LABELS, 0))
    for configuration in configurations:
        for name in LABELS:
            counts[name] += has(configuration, name) and (not weighed or is_weighed(configuration, name))
    return counts


def has(configuration: Configuration, name: str) -> bool:
    return configuration.properties.get(name) is not None


def is_weighed(configuration: Configuration, name: str) -> bool:
    weight = configuration.property_weights.get(name)
    return bool(configuration.weight != 0 and np.any(1.0 if weight is None else weight))


def keys_of(structures: Sequence[ase.Atoms]) -> list[str]:
    """The keys that labels of these structures may be under."""
    found = {key for atoms in structures for key in (*atoms.info, *atoms.arrays, *getattr(atoms.calc, "results", {}))}
    return sorted(found - {"numbers", "positions", "config_type", "head"}) or ["none"]


def keys_asked(key_specification: KeySpecification) -> str:
    return " and ".join({**key_specification.info_keys, **key_specification.arrays_keys}[name]
                        for name in ("energy", "forces"))
