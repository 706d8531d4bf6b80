"""Which arithmetic MACE's blocks compute with: their own, or the cheaper one of this folder."""

import contextlib
from collections.abc import Iterator

from mace.modules import blocks
from mace.modules.symmetric_contraction import Contraction

from mace_peft.fast.contraction import CONTRACTION_OF_MACE, by_element
from mace_peft.fast.messages import SUM_OF_MACE, summed
from mace_peft.patching import replaced


@contextlib.contextmanager
def compute_with(contract, sum_messages) -> Iterator[None]:
    with replaced(Contraction, "forward", contract), replaced(blocks, "scatter_sum", sum_messages):
        yield


def fast_arithmetic() -> contextlib.AbstractContextManager[None]:
    """The cheaper one for a while, in a model with ``fast_messages``."""
    return compute_with(by_element, summed)


def arithmetic_of_mace() -> contextlib.AbstractContextManager[None]:
    """MACE's own for a while: TorchScript compiles nothing else."""
    return compute_with(CONTRACTION_OF_MACE, SUM_OF_MACE)
