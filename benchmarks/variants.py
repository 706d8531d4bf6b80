"""What is compared: ways to fine-tune one model, and forms of it to predict with."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable

import numpy as np
import torch
from mace import modules
from mace.modules.lora import inject_LoRAs
from mace.tools.train import take_step
from models import molecules
from torch import nn
from torch_ema import ExponentialMovingAverage

from mace_peft import PeftConfig, choose_ranks, inject, merge, trainable_parameters
from mace_peft.fast.arithmetic import fast_arithmetic
from mace_peft.fast.backward import backward_to
from mace_peft.fast.messages import fast_messages
from mace_peft.methods import METHODS
from mace_peft.model.inject import fold
from mace_peft.model.targets import find_targets
from mace_peft.patching import replaced
from mace_peft.train.checkpoints import checkpoint_of

RANK = 16
WITH_ADAPTERS = {method: row for method, row in METHODS.items() if row.adapters}  # of the table
PLACEMENTS = ("products", "linears", "published", "all")
STAGES = ("as MACE", "to what trains")
ADAPTERS = [*((method, placement) for method in ("mmea", "elora") for placement in PLACEMENTS[:3]), ("scales", "all")]
STAGED = [(method, placement) for method, placement in ADAPTERS if placement != "linears"]


@dataclasses.dataclass
class Trainee:
    """A model with what MACE trains it by: its loss, Adam, EMA and clipping, at the options' defaults."""

    model: nn.Module
    averaged: list[nn.Parameter]
    restricted: bool  # the backward pass goes to what trains alone
    fast: bool  # and messages and contractions are computed in the cheaper way
    peft: bool = False

    def __post_init__(self):
        groups = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.restricted:
            groups = list(self.model.parameters())
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(groups, lr=1e-5, amsgrad=True)
        self.ema = ExponentialMovingAverage(self.averaged, decay=0.99)
        self.loss = modules.WeightedEnergyForcesLoss(energy_weight=1.0, forces_weight=100.0)
        self.backward = backward_to(lambda: self.trained)

    def step(self, batch) -> float:
        """One step of MACE's training; returns its loss."""
        with (replaced(torch.Tensor, "backward", self.backward) if self.restricted else contextlib.nullcontext(),
              fast_arithmetic() if self.fast else contextlib.nullcontext()):
            loss, _ = take_step(
                model=self.model, loss_fn=self.loss, batch=batch, optimizer=self.optimizer, ema=self.ema,
                output_args={"forces": True, "virials": False, "stress": False}, max_grad_norm=10.0,
                device=batch.positions.device)
        return loss

    def resident(self) -> dict[str, int]:
        """Bytes between two steps, of the model and of what the training adds to it."""
        state = [value for held in self.optimizer.state.values() for value in held.values()]
        return {"model": size(self.model.state_dict().values()), "optimizer": size(state),
                "EMA": size(self.ema.shadow_params)}

    def checkpoint(self) -> int:
        """Bytes of MACE's checkpoint."""
        checkpoint = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "lr_scheduler": {}}
        content = io.BytesIO()
        if self.peft:
            checkpoint = checkpoint_of(checkpoint, self.model, self.model.peft_config)
        torch.save(checkpoint, content)
        return content.tell()


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def full(base: nn.Module, cheap: bool = False) -> Trainee:
    """As MACE trains it, or with cheaper messages and contractions."""
    model = copy.deepcopy(base)
    model = fast_messages(model) if cheap else model
    return Trainee(model, list(model.parameters()), restricted=False, fast=cheap)


def lora(base: nn.Module) -> Trainee:
    """MACE's own ``--lora``: its optimizer and EMA hold the frozen parameters too."""
    model = inject_LoRAs(copy.deepcopy(base), rank=RANK, alpha=1.0).to(next(base.parameters()).device)
    return Trainee(model, list(model.parameters()), restricted=False, fast=False)


def adapted(base: nn.Module, config: PeftConfig) -> nn.Module:
    """With adapters that do something, as after training."""
    model = inject(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def placed(method: str, placement: str) -> PeftConfig:
    return PeftConfig(method, rank=None if METHODS[method].rank is None else RANK, targets=placement)


def default(base: nn.Module, method: str, placement: str | None = None) -> PeftConfig:
    """The method as ``mace_run_train`` has it, at its placement or another one; a narrow base takes lower ranks."""
    rank = METHODS[method].rank
    if rank == "auto":
        structures = [atoms[np.isin(atoms.numbers, base.atomic_numbers.cpu())] for atoms in molecules(2)]
        budget = "5%" if channels_of(base) >= RANK else "50%"
        return choose_ranks(base, PeftConfig(method, targets=placement, budget=budget), structures)
    return PeftConfig(method, rank=rank and min(rank, channels_of(base)), targets=placement)


def channels_of(base: nn.Module) -> int:
    """Of the scalars between the layers."""
    return base.products[0].linear.irreps_out.count("0e")


def peft(base: nn.Module, config: PeftConfig, levers: int = 2) -> Trainee:
    """As ``mace_run_train --peft`` trains it, or with the first few of what makes that cheap: the backward pass to what
    trains, messages and contractions in the cheaper way.
    """
    model = adapted(base, config)
    model = fast_messages(model) if levers > 1 else model
    return Trainee(model, list(trainable_parameters(model).values()), levers > 0, levers > 1, peft=True)


def floor(base: nn.Module, placement: str) -> Trainee:
    """Adapters that cost nothing: one number is added to what each target gives."""
    model = fast_messages(copy.deepcopy(base).requires_grad_(False))
    for name in find_targets(base, placed("mmea", placement)):
        block = model.get_submodule(name)
        block.register_parameter("number", nn.Parameter(next(base.parameters()).new_zeros(())))
        block.register_forward_hook(lambda module, inputs, output: output + module.number)
    return Trainee(model, [p for p in model.parameters() if p.requires_grad], restricted=True, fast=True)


TRAINED: dict[str, Callable[[nn.Module], Trainee]] = {
    "full": full,
    "MACE LoRA": lora,
    **{f"{method} {placement}": lambda base, name=(method, placement): peft(base, placed(*name))
       for method, placement in ADAPTERS},
    **{f"{method} {placement}, {stage}": lambda base, name=(method, placement), levers=levers:
       peft(base, placed(*name), levers)
       for method, placement in STAGED for levers, stage in enumerate(STAGES)},
    "full, cheaper": lambda base: full(base, cheap=True),
    **{f"floor {placement}": lambda base, placement=placement: floor(base, placement) for placement in PLACEMENTS},
}

# without all or a part of what makes a step cheap
LEVERS = [name for name in TRAINED if ", " in name]

PREDICTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "base": copy.deepcopy,
    "base again": copy.deepcopy,  # the noise
    **{f"{method} {placement}": lambda base, name=(method, placement): adapted(base, placed(*name))
       for method, placement in ADAPTERS},
    "mmea published, saved": lambda base: fold(adapted(base, placed("mmea", "published"))),  # as a run leaves it
    "elora published, merged": lambda base: merge(adapted(base, placed("elora", "published"))),
}
# low-rank updates have no TorchScript form until they are folded into the weights
SCRIPTED = ["base", "base again", "mmea products", "mmea linears", "mmea published, saved", "elora published, merged"]
