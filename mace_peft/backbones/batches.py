"""Structures as MACE's models take them."""

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from ase import Atoms
from mace.data import AtomicData, Configuration, config_from_atoms
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric.batch import Batch
from torch import nn

from mace_peft.backbones.foundation import default_dtype_of, dtype_for_building
from mace_peft.elements import symbols
from mace_peft.errors import PeftError


def batches(model: nn.Module, configurations: Sequence[Configuration], size: int) -> Iterator[Batch]:
    """The configurations in batches of that size, as MACE's data loaders give them, in the model's dtype and on its
    device."""
    device = next(model.parameters()).device
    for start in range(0, len(configurations), size):
        with default_dtype_of(model):
            batch = Batch.from_data_list(graphs(model, configurations[start : start + size]))
        yield batch.to(device)


def graphs(model: nn.Module, configurations: Sequence[Configuration]) -> list[AtomicData]:
    """The configurations with their neighbours, in the model's dtype, on the CPU."""
    table, heads = AtomicNumberTable(model.atomic_numbers.tolist()), getattr(model, "heads", None)
    with default_dtype_of(model):
        return [AtomicData.from_config(configuration, table, float(model.r_max), heads=heads)
                for configuration in configurations]


@functools.lru_cache(maxsize=16)
def isolated_atoms(elements: tuple[int, ...], heads: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An atom of each element (atomic number) for each head, without neighbours: a batch as MACE's models take it."""
    table, cutoff = AtomicNumberTable(list(elements)), 1.0  # A; no atom is near another
    with dtype_for_building(dtype):
        alone = [config_from_atoms(Atoms([element]), head_name=head) for head in heads for element in elements]
        atoms = [AtomicData.from_config(one, table, cutoff, heads=list(heads)) for one in alone]
        return Batch.from_data_list(atoms).to_dict()


def check_elements(numbers: Iterable[int], known: Collection[int], who: str) -> None:
    """Raise PeftError for structures of atomic numbers that ``who`` does not know."""
    unknown = set(numbers) - set(known)
    if unknown:
        raise PeftError(f"the structures have {symbols(unknown)}, which {who} does not know (it knows "
                        f"{symbols(known)}): leave out the structures with other elements")
