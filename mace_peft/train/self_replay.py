"""Self-replay (``--peft_keep``): the training holds the model to what its foundation predicts for other structures.

The foundation is still there, frozen, in the model: its predictions, with the adapters off, are the labels, computed
once at the start. In each step a batch of these structures passes through the model as it is, and their loss is
added to the run's own. Some structures are held out: they show how far the forces on others have moved.
"""

import argparse
import logging
from collections.abc import Callable, Sequence

import torch
from ase import Atoms
from mace.data import AtomicData
from mace.modules import WeightedEnergyForcesLoss
from mace.tools.torch_geometric.batch import Batch
from torch import Tensor, nn

from mace_peft.backbones.batches import graphs
from mace_peft.errors import PeftError
from mace_peft.labels import from_atoms, label_keys
from mace_peft.model.adapted import base_of, without_E0s

EVERY = 10  # of the structures, one is held out


class SelfReplay:
    """The loss of structures that are kept, and how far the model has moved on those that are held out.

    The loss is ``--peft_keep_weight`` times that of MACE's ``weighted``,
    w_E mean(((E - E_base) / N)^2) + w_F mean((F - F_base)^2), for N atoms, forces F in eV/A, and interaction energies E
    in eV: without the E0s, each model's own, so that neither those that the run fits and trains nor those of the
    foundation enter. The weights w_E and w_F are those of the loss of stage one, in stage two as well. The processes of
    a run share each batch.

    model: what trains; base: it, or its form without cuEquivariance, which gives the labels with the adapters off;
    loss: that of stage one; batch_size: of the run, beside which each step has as many kept structures. taken: how many
    structures the steps have had so far, in an order that the seed alone tells, so that a restart has to know no more.
    Raises PeftError for a structure that cannot be computed, and for one of which the foundation predicts no finite
    numbers.
    """

    def __init__(self, structures: Sequence[Atoms], model: nn.Module, base: nn.Module, loss: nn.Module,
                 args: argparse.Namespace, batch_size: int):
        labelled = label(base_of(base), structures, batch_size, args.peft_keep)
        self.held_out = labelled[::EVERY]
        self.structures = [graph for number, graph in enumerate(labelled) if number % EVERY]
        self.model = model
        self.loss_fn = WeightedEnergyForcesLoss(*(args.peft_keep_weight * float(getattr(loss, f"{name}_weight", 0))
                                                  for name in ("energy", "forces")))
        self.seed, self.taken = args.seed, 0
        distributed = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else 0
        self.processes = torch.distributed.get_world_size() if distributed else 1
        self.batch_size = batch_size
        logging.info(f"Self-replay: the foundation's predictions are kept for {len(self.structures)} structures of "
                     f"--peft_keep {args.peft_keep}, {self.batch_size} in each step, with the weight "
                     f"{args.peft_keep_weight:g}; {len(self.held_out)} more are held out")

    def beside(self, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The loss function of the run, plus the loss of the next kept structures."""
        def loss(*, pred: dict[str, Tensor], ref: Batch) -> Tensor:
            return loss_fn(pred=pred, ref=ref) + self.next_loss()

        return loss

    def next_loss(self) -> Tensor:
        """The loss of this process's share of the next structures."""
        places = range(self.taken + self.rank, self.taken + self.batch_size * self.processes, self.processes)
        self.taken += self.batch_size * self.processes
        ref, pred = predict(without_E0s(self.model), [self.structures[self.at(place)] for place in places], True)
        return self.loss_fn(ref=ref, pred=pred)

    def at(self, place: int) -> int:
        """Which structure comes at that place of the order; each pass over the structures has an order of its own."""
        turn, place = divmod(place, len(self.structures))
        order = torch.randperm(len(self.structures), generator=torch.Generator().manual_seed(self.seed + turn))
        return int(order[place])

    def moved(self) -> float:
        """The mean length of F - F_base (eV/A) over the atoms of the structures that are held out."""
        lengths = []
        for start in range(0, len(self.held_out), self.batch_size):
            ref, pred = predict(without_E0s(self.model), self.held_out[start:start + self.batch_size], False)
            lengths.append((pred["forces"].detach() - ref.forces).norm(dim=-1))
        return torch.cat(lengths).mean().item()

    def tell(self, epoch: int) -> None:
        logging.info(f"Epoch {epoch}: forces have moved from the foundation's by {1000 * self.moved():.2f} meV/A on "
                     f"average on the {len(self.held_out)} structures of --peft_keep that are held out")


def label(base: nn.Module, structures: Sequence[Atoms], batch_size: int, where: str) -> list[AtomicData]:
    """The structures as the base takes them, with its interaction energies (eV) and forces (eV/A) as labels.

    They go to the heads of the base in turn, those that are held out as well. Raises PeftError for a label that is not
    finite.
    """
    configurations = from_atoms(structures, label_keys(), where)
    for number, configuration in enumerate(configurations):
        configuration.head = base.heads[(number + number // EVERY) % len(base.heads)]
    labelled, alone = graphs(base, configurations), without_E0s(base)
    for start in range(0, len(labelled), batch_size):
        part = labelled[start:start + batch_size]
        ref, pred = predict(alone, part, False)
        forces = pred["forces"].detach().cpu().split([len(graph.positions) for graph in part])
        for number, graph in enumerate(part):
            graph.energy, graph.forces = pred["energy"][number].detach().cpu(), forces[number]
            graph.energy_weight = graph.forces_weight = torch.ones_like(graph.energy)
            if not (graph.energy.isfinite() and graph.forces.isfinite().all()):
                raise PeftError(f"the foundation predicts NaN or infinity for structure {start + number} of {where}: "
                                "leave it out")
    return labelled


def predict(model: nn.Module, structures: list[AtomicData], training: bool) -> tuple[Batch, dict[str, Tensor]]:
    """The structures as a batch on the model's device, and its predictions."""
    batch = Batch.from_data_list(structures).to(next(model.parameters()).device)
    return batch, model(batch.to_dict(), training=training, compute_force=True)
