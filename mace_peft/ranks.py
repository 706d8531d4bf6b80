"""``--peft_rank auto``: the rank of each module, from the gradients that the training set gives at the start.

The gradient G of a weight says what a small update of it gains: one of rank r at most the r largest singular values of
G. Of MMEA's gates, G is the gradient of the last layer of a wide gate. Ranks grow one by one, each time where the next
singular value is largest for the parameters that it costs, until the budget is spent.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from mace.tools.torch_geometric.dataloader import DataLoader
from prettytable import PrettyTable
from torch import Tensor, nn
from torch.utils.data import Subset

from mace_peft.adapted import Adapted, LowRank, gates
from mace_peft.config import PeftConfig, PeftError
from mace_peft.injection import inject
from mace_peft.measure import matrices
from mace_peft.models import adapted_blocks
from mace_peft.scaled import ScaledLowRank, ShiftedEnergies
from mace_peft.targets import find_targets

WIDE = 32  # hidden channels of a gate whose gradients are looked at, and the largest rank that it can get
STRUCTURES = 256  # of the training set, at most


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


def choose_ranks(model: nn.Module, config: PeftConfig, differentiate: Callable[[nn.Module], None]) -> PeftConfig:
    """The settings with ``rank_pattern`` for this model, which has no adapters and stays as it is.

    ``differentiate(model)`` leaves the gradients of the loss in the parameters of the model that it is given. Raises
    PeftError if the rank is not ``auto``, if the budget is too small for any adapter, or if a gradient is not finite.
    """
    if config.rank != "auto":
        raise PeftError(f"rank {config.rank} leaves no ranks to choose: use rank auto")
    base = sum(parameter.numel() for parameter in model.parameters())
    budget = budget_of(config, base)
    # what is made here, on the CPU, is not what trains: the run's random numbers go on as before
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        candidates, spent = find_candidates(model, config, differentiate)
    if not any(any(candidate.gains) for candidate in candidates.values()):
        raise PeftError(f"--peft_rank auto finds nothing in --peft_targets {config.targets!r} that the training set "
                        "would change by an update of low rank: choose other targets, or check the labels")
    while True:
        affordable = [c for c in candidates.values() if c.worth > 0 and spent + c.cost <= budget]
        if not affordable:
            break
        best = max(affordable, key=lambda candidate: candidate.worth)
        spent += best.cost
        best.rank += 1
    if spent > budget or not any(candidate.rank for candidate in candidates.values()):
        least = spent + min(candidate.first for candidate in candidates.values() if any(candidate.gains))
        raise PeftError(f"--peft_budget {config.budget} is {budget:,} of the base's {base:,} parameters, and the "
                        f"smallest adapter takes {least:,}: give more, or other --peft_targets")
    ranks = {name: candidate.rank for name, candidate in candidates.items() if candidate.rank}
    logging.info(f"Ranks chosen for a budget of {config.budget} ({budget:,} parameters, {spent:,} used), by the "
                 f"singular values of the first gradients:\n{listing(candidates)}")
    return dataclasses.replace(config, rank_pattern=of_first_process(ranks))


def of_first_process(ranks: dict[str, int]) -> dict[str, int]:
    """With ``--distributed`` all processes have come to ranks that could differ by rounding: those of the first."""
    shared = [ranks]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def differentiate(args: Namespace, dataset: Sequence, loss: nn.Module, output_args: dict, model: nn.Module) -> None:
    """Add up the gradients of MACE's loss over the dataset, or an even part of it, in the model's parameters."""
    model.to(args.device)
    part = Subset(dataset, range(0, len(dataset), math.ceil(len(dataset) / STRUCTURES)))
    for batch in DataLoader(part, batch_size=min(args.batch_size, args.valid_batch_size), shuffle=False):
        batch = batch.to(args.device)
        output = model(batch.to_dict(), training=True, compute_force=output_args["forces"],
                       compute_virials=output_args["virials"], compute_stress=output_args["stress"])
        torch.autograd.backward(loss(pred=output, ref=batch), inputs=list(model.parameters()))


def budget_of(config: PeftConfig, base: int) -> int:
    share = config.budget.endswith("%")
    return int(base * float(config.budget[:-1]) / 100) if share else int(config.budget)


def find_candidates(model: nn.Module, config: PeftConfig, differentiate) -> tuple[dict[str, Candidate], int]:
    """The candidates by module, and the parameters of static gains and shifts, which need no rank."""
    targets = find_targets(model, config)
    probe = {name: probe_rank(kind, model.get_submodule(name)) for name, kind in targets.items()
             if kind is not ShiftedEnergies}
    probe_config = dataclasses.replace(config, rank_pattern=probe)
    adapted = inject(copy.deepcopy(model), probe_config).requires_grad_(True)
    differentiate(adapted)
    candidates, gains = {}, 0
    for name, block in adapted_blocks(adapted):
        if name not in probe:
            gains += sum(parameter.numel() for parameter in block.adapter.parameters())
            continue
        of_gains = block.adapter.gains.g.numel() if isinstance(block, ScaledLowRank) else 0
        first, second = (size(targets[name], model.get_submodule(name), config, rank) for rank in (1, 2))
        candidates[name] = Candidate(singular_values(name, block), first - of_gains, second - first)
        gains += of_gains
    return candidates, gains


def probe_rank(kind: type[Adapted], block: nn.Module) -> int:
    return 1 if issubclass(kind, (LowRank, ScaledLowRank)) else min(WIDE, kind.largest_rank(block))


def size(kind: type[Adapted], block: nn.Module, config: PeftConfig, rank: int) -> int:
    """Parameters of the block's adapter of that rank."""
    adapter = kind.make_adapter(block, dataclasses.replace(config, rank=rank, budget=None, rank_pattern=None))
    return sum(parameter.numel() for parameter in adapter.parameters())


def singular_values(name: str, block: Adapted) -> list[float]:
    """What each rank gains: singular values of the gradient of the module's matrices, the n-th of all added up."""
    if isinstance(block, (LowRank, ScaledLowRank)):
        gradients = {key: gradient_of(parameter) for key, parameter in block.named_parameters()
                     if not key.startswith("adapter.")}
        found = [gradient for _, gradient in matrices(block, gradients)]
    else:
        found = [torch.cat([gradient_of(gate.W2), gradient_of(gate.W0)], -1) for gate in gates(block).values()]
    if not all(gradient.isfinite().all() for gradient in found):
        raise PeftError(f"the gradient at {name} is not finite, so that no rank can be chosen: check the labels of the "
                        "training set")
    summed = torch.zeros(max(min(gradient.shape) for gradient in found), dtype=torch.float64)
    for gradient in found:
        values = torch.linalg.svdvals(gradient.cpu().double())  # mps has no doubles
        rounding = max(gradient.shape) * torch.finfo(gradient.dtype).eps * values.max()
        summed[: len(values)] += torch.where(values > rounding, values, 0)
    return summed.tolist()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def listing(candidates: dict[str, Candidate]) -> str:
    table = PrettyTable(["module", "rank", "parameters", "kept of the gradient"], align="r")
    table.align["module"] = "l"
    for name, candidate in candidates.items():
        cost = candidate.first + (candidate.rank - 1) * candidate.further if candidate.rank else 0
        total = sum(candidate.gains)
        kept = 100 * sum(candidate.gains[: candidate.rank]) / total if total else 0
        table.add_row([name, candidate.rank, f"{cost:,}", f"{kept:.0f} %"])
    return table.get_string()
