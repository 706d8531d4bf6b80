"""An atom without neighbours keeps the energy that the foundation gives it, its E0 (plus the model's shift)."""

import pytest
import torch
from ase import Atoms
from tiny import ELEMENTS, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, disable_adapter, inject
from mace_peft.model.adapted import adapted_blocks

PLACEMENTS = ("products", "linears", "published", "all")
CASES = {
    **{f"mmea {targets}": {"method": "mmea", "targets": targets, "gate": "bounded"} for targets in PLACEMENTS},
    **{f"gates {targets}": {"method": "gates", "targets": targets, "gate": "bounded"} for targets in PLACEMENTS},
    **{f"elora {targets}": {"method": "elora", "targets": targets} for targets in PLACEMENTS},
}


@pytest.mark.parametrize("heads", [("Default",), ("a", "b")], ids=["one_head", "two_heads"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_an_isolated_atom_keeps_its_energy(settings, heads):
    model = inject(tiny_mace(heads=heads), PeftConfig(rank=2, **settings))
    for block in adapted_blocks(model).values():
        randomise(block.adapter)
    alone = [Atoms([element], info={"head": head}) for element in ELEMENTS for head in heads]
    together = configurations(1)
    (energies, forces), (learnt, _) = predict(model, alone), predict(model, together)
    with disable_adapter(model):
        torch.testing.assert_close(energies, predict(model, alone)[0], rtol=0, atol=1e-12)
        assert not torch.allclose(learnt, predict(model, together)[0], rtol=1e-6)
    assert not forces.any()
