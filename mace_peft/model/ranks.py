"""``--peft_rank auto``: the rank of each module, and where its update begins, from the first gradients.

The gradient G of a weight says what a small update of it gains: one of rank r at most the r largest singular values of
G. Of MMEA's gates, G is the gradient of the last layer of a wide gate. Ranks grow one by one, each time where the next
singular value is largest for the parameters that it costs, until the budget is spent.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from ase import Atoms
from prettytable import PrettyTable
from torch import Tensor, nn

from mace_peft.backbones import backbone_of
from mace_peft.blocks.adapted import Adapted, Updated, adapted_blocks, adapters_of
from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError
from mace_peft.model.adapted import check_adapted
from mace_peft.model.inject import inject
from mace_peft.model.targets import Target, find_targets

STRUCTURES = 256  # that are looked at, at most
BATCH = 10  # structures at once
WIDE = 32  # hidden channels of a gate whose gradients are looked at, and the largest rank that it can get


@dataclasses.dataclass
class Candidate:
    """What the ranks 1, 2, ... of a module gain, and the parameters that the first and each further one cost."""

    gains: list[float]
    first: int
    further: int
    rank: int = 0

    @property
    def cost(self) -> int:
        """Of the next rank."""
        return self.further if self.rank else self.first

    @property
    def worth(self) -> float:
        return self.gains[self.rank] / self.cost if self.rank < len(self.gains) else 0.0


def choose_ranks(model: nn.Module, config: PeftConfig, data: Sequence[Atoms] | Callable[[nn.Module], None], *,
                 forces_key: str | None = None) -> PeftConfig:
    """The settings with ``rank_pattern`` for this model, which has no adapters and stays as it is.

    data: labelled structures, whose forces (eV/A, under ``forces_key``, by default MACE's REF_forces) a MACE model
    shall learn; E0s do not act on these. Or, for any model and loss, a function: ``data(model)`` leaves the gradients
    of the loss in the parameters of the model that it is given, as a run has them.

    Raises PeftError if the rank is not ``auto``, if the budget is too small for any adapter, if a gradient is not
    finite, and for structures without forces or of elements that the model does not know.
    """
    if config.rank != "auto":
        raise PeftError(f"rank {config.rank} leaves no ranks to choose: use rank auto")
    differentiate = data if callable(data) else learn_forces(model, data, forces_key)
    base = sum(parameter.numel() for parameter in model.parameters())
    share = config.budget.endswith("%")
    budget = int(base * float(config.budget[:-1]) / 100) if share else int(config.budget)
    # what is made here, on the CPU, is not what trains: the run's random numbers go on as before
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        candidates, spent = find_candidates(model, config, differentiate)
    if not any(any(candidate.gains) for candidate in candidates.values()):
        raise PeftError(f"<rank> auto finds nothing in <targets> {config.targets!r} that the training set "
                        "would change by an update of low rank: choose other targets, or check the labels")
    while affordable := [c for c in candidates.values() if c.worth > 0 and spent + c.cost <= budget]:
        best = max(affordable, key=lambda candidate: candidate.worth)
        spent += best.cost
        best.rank += 1
    if spent > budget or not any(candidate.rank for candidate in candidates.values()):
        least = spent + min(candidate.first for candidate in candidates.values() if any(candidate.gains))
        raise PeftError(f"<budget> {config.budget} is {budget:,} of the base's {base:,} parameters, and the "
                        f"smallest adapter takes {least:,}: give more, or other <targets>")
    logging.info(f"Ranks chosen for a budget of {config.budget} ({budget:,} parameters, {spent:,} used), by the "
                 f"singular values of the first gradients:\n{listing(candidates)}")
    shared = [{name: candidate.rank for name, candidate in candidates.items() if candidate.rank}]
    if torch.distributed.is_initialized():  # by rounding, the processes could have come to other ones
        torch.distributed.broadcast_object_list(shared)
    return dataclasses.replace(config, rank_pattern=shared[0])


def start_along_gradients(model: nn.Module, data: Sequence[Atoms] | Callable[[nn.Module], None], *,
                          forces_key: str | None = None) -> nn.Module:
    """Let the low-rank updates of an adapted model begin where its first gradients point. Returns the model.

    That is the start ``gradient``. The model predicts what it predicted: gates and scales stay as they are, and so do
    updates that have been trained. data: as for ``choose_ranks``. Raises PeftError if the model has no adapters, if it
    has no low-rank updates or all of them have been trained, and as ``choose_ranks`` does for structures and gradients.
    """
    check_adapted(model)
    blocks = untrained_updates(model)
    if not any(low_rank_updates(model).values()):
        raise PeftError(f"the adapters of <method> {model.peft_config.method} have no low-rank updates, which alone "
                        "have a start: leave it out")
    if not blocks:
        raise PeftError("the updates of this model have been trained, and another start would change what it predicts: "
                        "choose the start of new ones, after inject")
    differentiate = data if callable(data) else learn_forces(model, data, forces_key)
    probed = copy.deepcopy(model).requires_grad_(True)
    differentiate(probed)
    for name, block in blocks.items():
        weights = probed.get_submodule(name).own_weights()
        block.adapter.start_along(gradients_of(name, weights))
    return model


def untrained_updates(model: nn.Module) -> dict[str, Updated]:
    """The blocks whose weights have low-rank updates, all zero, as at their start."""
    return {name: model.get_submodule(name) for name, updates in low_rank_updates(model).items()
            if updates and not any(update.any() for update in updates)}


def low_rank_updates(model: nn.Module) -> dict[str, list[Tensor]]:
    """Those of each block whose weights have an adapter, by its name."""
    return {name: [update for update, _ in block.adapter.low_rank_updates(block.own_weights()).values()]
            for name, block in adapted_blocks(model).items() if isinstance(block, Updated)}


def gradients_of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of tensors of the module of that name, zero where the loss did not reach. Raises PeftError for
    those that are not finite."""
    found = {key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for key, tensor in tensors.items()}
    if not all(gradient.isfinite().all() for gradient in found.values()):
        raise PeftError(f"the gradient at {name} is not finite, so that no rank and no start can be chosen: check the "
                        "labels of the training set")
    return found


def learn_forces(model: nn.Module, structures: Sequence[Atoms], key: str | None) -> Callable[[nn.Module], None]:
    """What leaves the gradients of MACE's loss of forces in a model, from an even part of the structures.

    Raises PeftError for a model that is none of MACE's, and for structures that it cannot learn from.
    """
    if backbone_of(model).name != "mace":
        raise PeftError(f"this {type(model).__name__} takes no structures: give a function that leaves the gradients "
                        "of its loss")
    from mace.modules import WeightedForcesLoss  # here and below: other models go without mace-torch

    from mace_peft.backbones.batches import batches, check_elements
    from mace_peft.labels import count as count_labels
    from mace_peft.labels import from_atoms, keys_of, label_keys

    structures = [structures] if isinstance(structures, str) else list(structures)
    if not all(isinstance(atoms, Atoms) for atoms in structures):  # one structure gives its single atoms
        raise PeftError("the structures are no list of ase.Atoms: give one, as ase.io.read(file, ':') does")
    check_elements({number for atoms in structures for number in atoms.numbers.tolist()},
                   model.atomic_numbers.tolist(), "the model")
    keys = label_keys(forces=key)
    labelled = from_atoms(structures, keys, "the list")
    if not count_labels(labelled)["forces"]:
        raise PeftError(f"no structure has forces under the key {keys.arrays_keys['forces']}: give theirs as "
                        f"forces_key; the keys are {', '.join(keys_of(structures))}")

    def differentiate(adapted: nn.Module) -> None:
        loss = WeightedForcesLoss()
        for batch in batches(adapted, labelled[:: math.ceil(len(labelled) / STRUCTURES)], BATCH):
            output = adapted(batch.to_dict(), training=True, compute_force=True)
            torch.autograd.backward(loss(pred=output, ref=batch), inputs=list(adapted.parameters()))

    return differentiate


def find_candidates(model: nn.Module, config: PeftConfig, differentiate) -> tuple[dict[str, Candidate], int]:
    """The candidates by module, and the parameters of what needs no rank: scales, and shifts of E0s."""
    targets = find_targets(model, config)
    # a gate shows what ranks it is worth when it is wide; the gradients of weights do not depend on the rank
    probe = {name: min(WIDE, target.largest_rank(model.get_submodule(name))) if target.adapter.on_features else 1
             for name, target in targets.items() if "rank" in target.adapter.settings}
    adapted = inject(copy.deepcopy(model), dataclasses.replace(config, rank_pattern=probe)).requires_grad_(True)
    differentiate(adapted)
    candidates, unranked = {}, 0
    for name, block in adapted_blocks(adapted).items():
        target, plain_block = targets[name], model.get_submodule(name)
        left = target if name not in probe else target._replace(adapter=target.adapter.without_rank)
        always = 0 if left.adapter is None else size(left, plain_block, config, 1)
        unranked += always
        if name in probe:
            first, second = (size(target, plain_block, config, rank) for rank in (1, 2))
            candidates[name] = Candidate(singular_values(name, block), first - always, second - first)
    return candidates, unranked


def size(target: Target, block: nn.Module, config: PeftConfig, rank: int) -> int:
    """Parameters of the block's adapter of that rank."""
    adapter = target.make(block, dataclasses.replace(config, rank=rank, budget=None, rank_pattern=None))
    return sum(parameter.numel() for parameter in adapter.parameters())


def singular_values(name: str, block: Adapted) -> list[float]:
    """What each rank gains: singular values of the gradients of the module's matrices, the n-th of all added up."""
    found = []
    for adapter in adapters_of(block).values():
        tensors = block.own_weights() if isinstance(block, Updated) else dict(adapter.named_parameters())
        found += adapter.gradients_by_rank(gradients_of(name, tensors))
    summed = torch.zeros(max(min(gradient.shape) for gradient in found), dtype=torch.float64)
    for gradient in found:
        values = torch.linalg.svdvals(gradient.cpu().double())  # mps has no doubles
        rounding = max(gradient.shape) * torch.finfo(gradient.dtype).eps * values.max()
        summed[: len(values)] += torch.where(values > rounding, values, 0)
    return summed.tolist()


def listing(candidates: dict[str, Candidate]) -> str:
    table = PrettyTable(["module", "rank", "parameters", "kept of the gradient"], align="r")
    table.align["module"] = "l"
    for name, candidate in candidates.items():
        cost = candidate.first + (candidate.rank - 1) * candidate.further if candidate.rank else 0
        total = sum(candidate.gains)
        kept = 100 * sum(candidate.gains[: candidate.rank]) / total if total else 0
        table.add_row([name, candidate.rank, f"{cost:,}", f"{kept:.0f} %"])
    return table.get_string()
