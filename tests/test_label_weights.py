"""Weights of structures act with every loss, and with weights of 1 each loss is that of MACE."""

import numpy as np
import pytest
import torch
from mace import modules
from mace.data import AtomicData
from mace.tools.torch_geometric.dataloader import DataLoader
from test_labels import COUNT, CUTOFF, LOSSES, TABLE, predicted, whole

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_structures_act_with_every_loss(name):
    """A loss is linear in them: MACE's own huber, universal and l1l2energyforces are not."""
    items = [AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF) for config in whole()]
    off = {key: 1.01 * value.detach() + 0.001 for key, value in predicted().items()}

    def value(weights) -> float:
        for item, weight in zip(items, weights, strict=True):
            item.weight = torch.tensor(float(weight))
        return LOSSES[name]()(ref=next(iter(DataLoader(items, batch_size=COUNT, shuffle=False))), pred=off).item()

    alone = [value(row) for row in np.eye(COUNT)]
    assert min(alone) > 0
    assert value([0.5, 2, 0, 3]) == pytest.approx(np.dot([0.5, 2, 0, 3], alone), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_with_weights_of_1_losses_are_those_of_mace(name):
    items = [AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF) for config in whole()]
    for item in items:
        item.forces = 60 * item.forces / item.forces.norm(dim=-1).min()  # of all of the ranges of the universal loss
    ref = next(iter(DataLoader(items, batch_size=COUNT, shuffle=False)))
    off = {key: 1.01 * value.detach() + 0.001 for key, value in predicted().items()}
    original = getattr(modules, LOSSES[name].__name__)
    assert LOSSES[name]()(ref=ref, pred=off).item() == pytest.approx(original()(ref=ref, pred=off).item(), rel=1e-12)
