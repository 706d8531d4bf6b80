"""E0s, the energies of isolated atoms in eV: those that are asked for, for the elements of the run, or one line.

MACE drops an explicit ``--E0s`` where the training file has isolated atoms or there is a statistics file, and fails in
many ways where E0s and elements differ.
"""

import ast
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from mace import data
from torch import nn

from mace_peft.elements import symbols
from mace_peft.errors import PeftError, did_you_mean, one_line
from mace_peft.labels import ISOLATED, has, keys_of, read

WORDS = {"average", "estimated", "foundation", ISOLATED.lower()}
REMEDY = "give a dictionary of atomic numbers and eV such as '{1: -13.6, 8: -2042.1}', a JSON file of one, or one of " \
         "average, estimated, foundation and IsolatedAtom"


def asked_E0s(option: object, head: str) -> str | dict[int, float]:
    """What ``--E0s`` or E0s in ``--heads`` ask for: one of the words in lower case, or E0s by atomic number.

    option: a word, a path, the text of a dictionary, or a dictionary, each also by head; None asks for isolated atoms.
    Raises PeftError for anything else.
    """
    if option is None:
        return ISOLATED.lower()
    if isinstance(option, str) and option.strip().lower() in WORDS:
        return option.strip().lower()
    given = from_text(option) if isinstance(option, str) else option
    if not isinstance(given, dict) or not given:
        raise PeftError(f"--E0s {option} is no dictionary: {REMEDY}")
    if all(isinstance(value, (dict, str)) for value in given.values()):
        if head not in given:
            raise PeftError(f"--E0s {option} has no entry for the head {head}: add one, or give it in --heads")
        return asked_E0s(given[head], head)
    energies = {}
    for element, energy in given.items():
        try:
            number, value = int(element), float(energy)
        except (TypeError, ValueError):
            raise PeftError(f"--E0s {option} has the entry {element!r}: {energy!r}: {REMEDY}") from None
        if not 0 < number < 119 or not np.isfinite(value):
            raise PeftError(f"--E0s {option} has the entry {element!r}: {energy!r}: {REMEDY}")
        energies[number] = value
    return energies


def from_text(option: str) -> object:
    """What the text says, or the JSON file that it names. Raises PeftError if it is neither."""
    if option.endswith(".json"):
        try:
            return json.loads(Path(option).read_text())
        except FileNotFoundError:
            raise PeftError(f"--E0s {option} does not exist: check the path") from None
        except (OSError, ValueError) as error:
            raise PeftError(f"--E0s {option} cannot be read ({one_line(error)}): {REMEDY}") from None
    try:
        return ast.literal_eval(option)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise PeftError(f"--E0s {option} is neither a word that MACE knows nor a dictionary"
                        f"{did_you_mean(option.lower(), WORDS)}: {REMEDY}") from None


def complete(energies: dict[int, float], elements: Iterable[int], what: str) -> dict[int, float]:
    """The E0s. Raises PeftError if they lack one of the elements (atomic numbers)."""
    missing = set(elements) - set(energies)
    if missing:
        raise PeftError(f"{what} have {symbols(energies) or 'none'}, and the data have {symbols(missing)} as well: add "
                        f"E0s for {symbols(missing)}, or give --E0s foundation")
    return energies


def with_energy(configurations: list[data.Configuration]) -> list[data.Configuration]:
    """The structures that have an energy to take E0s from."""
    return [configuration for configuration in configurations if has(configuration, "energy")]


def check_energies_known(configurations: list[data.Configuration], alone: dict[int, float] | None, config,
                         files: list[str]) -> None:
    """Raise PeftError if E0s are to be taken from the energies of structures that have none.

    alone: the energies of isolated atoms, by atomic number. config: MACE's configuration of their head. files: what
    they were read from.
    """
    taken = "without --E0s, the run" if config.E0s == ISOLATED.lower() else f"--E0s {config.E0s}"
    if config.E0s in ("average", "estimated", ISOLATED.lower()) and not with_energy(configurations) and not alone:
        key = config.key_specification.info_keys["energy"]
        raise PeftError(f"{taken} takes E0s from energies, and no structure of {files[0]} has one under the key {key} "
                        f"(--energy_key): its keys are {', '.join(keys_of(read(files[0])))}: give one of them by "
                        "--energy_key, or other --E0s")


def narrow(energies: dict[str, dict[int, float]], elements: Iterable[int]) -> None:
    """Leave out, in place, E0s of elements (atomic numbers) that the model will not have, and say so."""
    for head, of_head in energies.items():
        extra = set(of_head) - set(elements)
        for element in extra:
            del of_head[element]
        if extra:
            logging.info(f"Left out: E0s of {symbols(extra)} for head {head}, elements that the data lack")


def put_E0s_right(model: nn.Module, known: dict[int, float], atomic_energies, given: list[set[int]]) -> None:
    """Give the model the E0s (eV; heads x elements) that the run determined and logged.

    mace-torch 0.3.16 overwrites them by the foundation's when the elements are all of the foundation's. given: for
    each head the atomic numbers of those that were given, or are in its data; other elements, for which MACE has 0
    (``--foundation_model_elements``), take the E0 that is known of them.
    """
    held = model.atomic_energies_fn.atomic_energies
    elements = model.atomic_numbers.tolist()
    wanted = torch.as_tensor(atomic_energies).to(held).reshape(len(given), len(elements)).clone()
    for row, present in enumerate(given):
        for column, element in enumerate(elements):
            if element not in present:
                wanted[row, column] = known[element]
    wanted = wanted.reshape(held.shape)
    if not torch.equal(held, wanted):
        logging.info(f"E0s put right: MACE had made them {held.flatten().tolist()}, and they are "
                     f"{wanted.flatten().tolist()} (eV, for {symbols(elements)})")
        held.copy_(wanted)
