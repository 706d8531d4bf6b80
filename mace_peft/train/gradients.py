"""The gradients that a run takes for itself: those of the training set at the start, and those that DDP waits for."""

import math
from argparse import Namespace
from collections.abc import Sequence

import torch
from mace.tools.torch_geometric.dataloader import DataLoader
from torch import nn
from torch.utils.data import Subset

from mace_peft.model.ranks import STRUCTURES


def differentiate(args: Namespace, dataset: Sequence, loss: nn.Module, output_args: dict, model: nn.Module) -> None:
    """Add up the gradients of MACE's loss over the dataset, or an even part of it, in the model's parameters."""
    model.to(args.device)
    part = Subset(dataset, range(0, len(dataset), math.ceil(len(dataset) / STRUCTURES)))
    for batch in DataLoader(part, batch_size=min(args.batch_size, args.valid_batch_size), shuffle=False):
        batch = batch.to(args.device)
        output = model(batch.to_dict(), training=True, compute_force=output_args["forces"],
                       compute_virials=output_args["virials"], compute_stress=output_args["stress"])
        torch.autograd.backward(loss(pred=output, ref=batch), inputs=list(model.parameters()))


def reach_all(model: torch.nn.Module, inputs: tuple, output: dict) -> dict:
    """The output, plus zero times all that trains: a loss of it reaches, for example, the shift of the energies that
    ``--loss=forces_only`` misses.
    """
    nothing = 0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
    return {name: value + nothing if value is not None and value.requires_grad else value
            for name, value in output.items()}
