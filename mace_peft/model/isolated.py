"""An atom without neighbours keeps the energy that the base gives it, whatever its adapters have learnt.

In models whose first interaction has no skip connection the features of such an atom vanish, and adapters leave zero as
it is. In others, such as those for materials, something of the element is left, which adapters change: that change is
taken off the E0s.
"""

from contextvars import ContextVar

import torch
from torch import Tensor, nn

from mace_peft.backbones import backbone_of
from mace_peft.blocks.adapted import Updated, over

E0S = "atomic_energies_fn.atomic_energies"
# whether the model runs on isolated atoms in this context, for hooks that look at predictions
UNDER_WAY: ContextVar[bool] = ContextVar("isolated atoms are under way", default=False)


def E0s(model: nn.Module) -> Tensor:
    """The E0s of the model (eV) by head and element, with the shift that an adapter has learnt."""
    block = model.get_submodule(E0S.rpartition(".")[0])
    return block.adapted_weights()["atomic_energies"] if isinstance(block, Updated) else block.atomic_energies


def interaction_energies(model: nn.Module) -> Tensor:
    """What the model adds to the E0s of atoms without neighbours (eV), as its E0s by head and element."""
    energies = model.get_buffer(E0S)
    alone = over(model, {E0S: torch.zeros_like(energies)})
    atoms = backbone_of(model).isolated_atoms(model)
    before = UNDER_WAY.set(True)
    try:
        return alone.forward(atoms, training=model.training, compute_force=False)["energy"].reshape(energies.shape)
    finally:
        UNDER_WAY.reset(before)


@torch.no_grad()
def kept_by(base: nn.Module) -> Tensor | None:
    """What the base adds to the E0s of atoms without neighbours (eV).

    None where their features vanish, so that no adapter changes it.
    """
    if backbone_of(base).isolated_atoms(base) is None:
        return None
    found = interaction_energies(base)
    _, shift = backbone_of(base).constants(base).get("shift", ("", found.new_zeros(())))
    by_head = torch.atleast_1d(shift).reshape(-1, 1).expand(torch.atleast_2d(found).shape)
    return None if torch.equal(torch.atleast_2d(found), by_head) else found


def drift(model: nn.Module, of_base: Tensor) -> Tensor:
    """By how much the energies of isolated atoms differ from those of the base (eV), as the E0s by head and element."""
    found = interaction_energies(model)
    return found - of_base.to(found)
