"""Structures as MACE's models take them."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from mace.data import AtomicData, Configuration
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric.batch import Batch
from torch import nn

from mace_peft.backbones.foundation import default_dtype_of, symbols
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


def check_elements(numbers: Iterable[int], known: Collection[int], who: str) -> None:
    """Raise PeftError for structures of atomic numbers that ``who`` does not know."""
    unknown = set(numbers) - set(known)
    if unknown:
        raise PeftError(f"the structures have {symbols(unknown)}, which {who} does not know (it knows "
                        f"{symbols(known)}): leave out the structures with other elements")
