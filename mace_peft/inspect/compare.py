"""What a foundation and adapters predict for labelled structures, as values beside the labels."""

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase.stress import voigt_6_to_full_3x3_stress
from mace.data import Configuration
from torch import nn
from tqdm import tqdm

from mace_peft.adapter.directory import read_sizes
from mace_peft.adapter.load import load_adapter
from mace_peft.backbones import backbone_of
from mace_peft.backbones.batches import batches, check_elements
from mace_peft.backbones.foundation import load_foundation
from mace_peft.errors import PeftError, check_choice, did_you_mean, one_line
from mace_peft.labels import check_labelled, check_states, from_atoms, has, is_weighed, keys_of, label_keys, read
from mace_peft.model.inject import eject

Values = dict[str, np.ndarray]  # by label: energies per atom (n), forces (atoms, 3), stress (n, 3, 3)


class Quantity(NamedTuple):
    """What a label is called: in the table, where they are counted, and its unit."""

    short: str
    counted: str
    unit: str


QUANTITIES = {"energy": Quantity("E", "energies", "eV/atom"), "forces": Quantity("F", "forces on atoms", "eV/A"),
              "stress": Quantity("stress", "stresses", "eV/A^3")}


def compare(foundation: str, adapters: Sequence[str | os.PathLike], structures: str, **options
            ) -> tuple[Values, list[tuple[str, Values]]]:
    """The labels, and the predictions of each model by its name: eV/atom, eV/A and eV/A^3, of structures that have the
    label.

    foundation: the file of a MACE model, or a name that MACE knows. With adapters it predicts with their E0s, scale and
    shift, as each run started from it, since the energies of another level of theory would be far off; without, as it
    is. structures: a file that ASE reads. options: those of ``prepare``. Shows its progress on a terminal.

    Raises PeftError where ``prepare`` does, before anything is computed; and for a prediction of NaN or infinity.
    """
    return prepare(foundation, adapters, structures, **options)()


def prepare(foundation: str, adapters: Sequence[str | os.PathLike], structures: str, *, energy_key: str | None = None,
            forces_key: str | None = None, stress_key: str | None = None, device: str = "cpu",
            default_dtype: str | None = None, batch_size: int = 10, head: str | None = None,
            models: Callable[..., Iterator[tuple[str, nn.Module]]] | None = None
            ) -> Callable[[], tuple[Values, list[tuple[str, Values]]]]:
    """The function that does what ``compare`` is to do, once all that is given has been checked.

    The keys are those of the file, by default MACE's REF_energy, REF_forces and REF_stress. default_dtype: that of each
    adapter's training unless given. head: the one that predicts, where there are several. models: makes those that
    predict with the adapters, in the place of ``models_of``.

    Raises PeftError if a file cannot be read, holds no labels or is of another kind, where ``load_adapter`` does, and
    for elements, heads or a device that are not there.
    """
    check_order(foundation, adapters)
    if default_dtype is not None:
        check_choice("--default_dtype", default_dtype, ("float32", "float64"))
    if batch_size < 1:
        raise PeftError(f"--batch_size {batch_size} is not allowed: use a whole number of at least 1")
    check_device(device)
    descriptions = {str(adapter): read_sizes(adapter)[0] for adapter in adapters}  # before what takes long
    labelled = read_labelled(structures, {"energy": energy_key, "forces": forces_key, "stress": stress_key})
    labels = {name: values for name in QUANTITIES if len(values := labels_of(labelled, name))}
    if not labels:
        raise PeftError(f"no label of {structures} has a weight, so that there is no error to tell: leave out the "
                        "weights of 0")
    numbers = {int(number) for configuration in labelled for number in configuration.atomic_numbers}
    for adapter, description in descriptions.items():
        check_elements(numbers, description["elements"] or numbers, f"the adapter {adapter}")
    loaded = load_foundation(foundation)
    check_elements(numbers, loaded.atomic_numbers.tolist(), foundation)
    if default_dtype is not None:
        loaded = loaded.to(getattr(torch, default_dtype))
    dtypes = {adapter: default_dtype or description["dtype"] for adapter, description in descriptions.items()}
    named = (models or models_of)(foundation, loaded, dtypes, numbers) if adapters else [(foundation, loaded)]
    headed = [(name, model, choose_head(name, model, head)) for name, model in named]
    return functools.partial(predict_all, headed, labelled, labels, device, batch_size)


def predict_all(headed: list[tuple[str, nn.Module, str]], labelled: list[Configuration], labels: Values, device: str,
                batch_size: int) -> tuple[Values, list[tuple[str, Values]]]:
    """The labels, and the predictions of these models, which have names and heads."""
    total = len(headed) * math.ceil(len(labelled) / batch_size)
    with tqdm(total=total, desc="evaluate", unit="batch", disable=None) as progress:
        predictions = []
        for name, model, head in headed:
            of_head = [dataclasses.replace(configuration, head=head) for configuration in labelled]
            predictions.append((name, predict(name, model.to(device), of_head, labels, batch_size, progress)))
            model.to("cpu")
    return labels, predictions


def check_order(foundation: str, adapters: Sequence[str | os.PathLike]) -> None:
    """Raise PeftError for a directory in the place of the foundation, and a file in that of an adapter."""
    if Path(foundation).is_dir():
        raise PeftError(f"{foundation} is a directory, and the foundation's file comes first: give that, and after it "
                        "the adapter directories")
    for adapter in adapters:
        if Path(adapter).is_file():
            raise PeftError(f"{adapter} is a file, and adapters are directories: give the foundation's file first, and "
                            "after it the NAME_adapter directories that runs left")


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # in as many ways as there are devices
        raise PeftError(f"<device> {device} cannot be used ({one_line(error)}): use cpu, or a device that this PyTorch "
                        "has") from None


def read_labelled(path: str, given: dict[str, str | None]) -> list[Configuration]:
    """The structures of the file with their labels. given: a key of the file for each, or None for MACE's.

    Raises PeftError if it cannot be read or has no labels, or none under a key that was given.
    """
    keys, structures = label_keys(**given), read(path)
    check_states(structures, keys, path)
    labelled = from_atoms(structures, keys, path)
    for name, key in given.items():
        if key is not None and not any(has(configuration, name) for configuration in labelled):
            raise PeftError(f"--{name}_key {key}: no structure of {path} has a label under it; the keys are "
                            f"{', '.join(keys_of(structures))}: give one of them, or leave it out")
    check_labelled(labelled, structures, keys, path)
    return labelled


def models_of(foundation: str, loaded: nn.Module, dtypes: dict[str, str], numbers: Collection[int]
              ) -> Iterator[tuple[str, nn.Module]]:
    """The models of the adapters, in these dtypes, with names. Before each comes the foundation as its run started,
    unless it was there with the same E0s (of the elements of the structures), scale and shift."""
    starts = []
    for adapter, dtype in dtypes.items():
        model = load_adapter(copy.deepcopy(loaded).to(getattr(torch, dtype)), adapter)
        constants = {field: buffer for field, (_, buffer) in backbone_of(model).constants(model).items()}
        present = [number in numbers for number in model.atomic_numbers.tolist()]
        constants["E0s"] = torch.atleast_2d(constants["E0s"])[:, present]
        start = {field: values.tolist() for field, values in constants.items()}
        if start not in starts:
            starts.append(start)
            if model.peft_folded:
                raise PeftError(f"the weights of {foundation} hold a part of what its run has learnt, and its gates "
                                f"the rest, which {adapter} replaces: give the foundation of that run, or evaluate "
                                "each model by itself")
            yield f"{foundation}, E0s of {adapter}", start_of(model)
        yield adapter, model


def start_of(trained: nn.Module) -> nn.Module:
    """A copy of the model without its adapter, but with its E0s, scale and shift."""
    start = copy.deepcopy(trained)
    constants = {name: buffer.clone() for name, buffer in backbone_of(start).constants(start).values()}
    eject(start)
    for name, value in constants.items():
        start.get_buffer(name).copy_(value)
    return start


def choose_head(name: str, model: nn.Module, head: str | None) -> str:
    """The head given, or the only one. Raises PeftError if there are several, or if there is none such."""
    heads = list(model.heads)
    if head is None and len(heads) > 1:
        raise PeftError(f"{name} has the heads {', '.join(heads)}: choose one by <head>")
    if head is not None and head not in heads:
        raise PeftError(f"<head> {head!r} is none of {name}, which has {', '.join(heads)}{did_you_mean(head, heads)}: "
                        "use one of them")
    return head or heads[0]


def labels_of(configurations: Sequence[Configuration], name: str) -> np.ndarray:
    """The labels of this name that are there and have a weight, see ``Values``."""
    found = []
    for configuration in configurations:
        if counts(configuration, name):
            value = np.asarray(configuration.properties[name], dtype=float)
            if name == "stress":
                value = voigt_6_to_full_3x3_stress(value) if value.size == 6 else value.reshape(3, 3)
            found.append(value / len(configuration.atomic_numbers) if name == "energy" else value)
    return join(found, name)


def counts(configuration: Configuration, name: str) -> bool:
    return has(configuration, name) and is_weighed(configuration, name)


def join(values: list[np.ndarray], name: str) -> np.ndarray:
    return np.concatenate(values) if name == "forces" and values else np.array(values)


def predict(name: str, model: nn.Module, configurations: Sequence[Configuration], labels: Values, size: int,
            progress: tqdm) -> Values:
    """The model's predictions where there are labels. Raises PeftError for NaN and infinity, with the model's name."""
    found: dict[str, list[np.ndarray]] = {label: [] for label in labels}
    model.eval().requires_grad_(False)
    number = 0
    for batch in batches(model, configurations, size):
        output = model(batch.to_dict(), training=False, compute_force=True, compute_stress="stress" in labels)
        arrays = {label: output[label].detach().cpu().double().numpy() for label in labels}
        for at, (first, end) in enumerate(zip(batch.ptr[:-1].tolist(), batch.ptr[1:].tolist(), strict=True)):
            for label, array in arrays.items():
                value = array[first:end] if label == "forces" else array[at]
                if not np.isfinite(value).all():
                    raise PeftError(f"{name} gives {label} of NaN or infinity for structure {number}, which may be "
                                    "unlike all that it was trained for, or have atoms upon one another: check it")
                if counts(configurations[number], label):
                    found[label].append(value / (end - first) if label == "energy" else value)
            number += 1
        progress.update()
    return {label: join(values, label) for label, values in found.items()}
