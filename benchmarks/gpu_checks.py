"""What gpu_right.py checks of one adapted model on a card: each check gives by how much it differs from the CPU."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import threading
from pathlib import Path

import ase.build
import numpy as np
import torch
from ase import Atoms
from models import ELEMENTS, labelled, make_batch
from torch import nn
from variants import Trainee, adapted, default

from mace_peft import PeftConfig, calculator, inject, load_adapter, save_adapter, trainable_parameters
from mace_peft.backbones.foundation import rebuild
from mace_peft.e3nn import compile as compile_to_torchscript
from mace_peft.fast.messages import fast_messages
from mace_peft.model.adapted import fingerprint
from mace_peft.model.inject import eject, fold, freeze, settle_isolated_atoms

STEPS, RATE = 10, 1e-3
THREADS, PREDICTIONS = 8, 5
FEWER = (1, 6, 8)  # elements


@dataclasses.dataclass
class Subject:
    """One adapted model on the CPU, and the same one that was made on the card."""

    base: nn.Module
    config: PeftConfig
    device: str
    dtype: str

    def __post_init__(self):
        torch.manual_seed(0)
        self.here = adapted(self.base, self.config)
        self.there = with_adapters(copy.deepcopy(self.base).to(self.device), self.config, self.here)
        self.expected = outputs(self.here, self.batch("cpu"))

    def batch(self, device: str | None = None):
        return make_batch(structures(), getattr(torch, self.dtype), device or self.device)

    def far(self, model: nn.Module, device: str | None = None) -> dict[str, float]:
        """By how much the model, which is on the card or the device, differs from what the CPU has computed."""
        return distances(outputs(model, self.batch(device)), self.expected)


def structures(elements: tuple[int, ...] = ELEMENTS) -> list[Atoms]:
    """Acetamide in a periodic cell, twice, or what it has of these elements; labelled."""
    found = [labelled(ase.build.molecule("CH3CONH2", cell=[6.0, 6.5, 7.0], pbc=True), seed) for seed in range(2)]
    return [atoms[np.isin(atoms.numbers, elements)] for atoms in found]


@torch.no_grad()
def with_adapters(base: nn.Module, config: PeftConfig, source: nn.Module) -> nn.Module:
    """The base with adapters that are made where it is, and have the numbers of the source's."""
    model, numbers = inject(base, config), trainable_parameters(source)
    for name, parameter in trainable_parameters(model).items():
        parameter.copy_(numbers[name])
    return model


def outputs(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """Energies (eV), forces (eV/A) and stress (eV/A^3), on the CPU."""
    found = model(batch.to_dict(), training=False, compute_force=True, compute_stress=True)
    return {name: found[name].detach().cpu().double() for name in ("energy", "forces", "stress")}


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest differences, in terms of the largest number of the kind."""
    return {name: ((value - expected[name]).abs().max() / expected[name].abs().max()).item()
            for name, value in found.items()}


def largest(several: list[dict[str, float]]) -> dict[str, float]:
    return {name: max((one[name] for one in several), key=lambda value: (value != value, value))  # NaN before all
            for name in several[0]}


# --- what is done with a model ----------------------------------------------------------------------------------------


def made_there(subject: Subject) -> dict[str, float]:
    return subject.far(subject.there)


def moved(subject: Subject) -> dict[str, float]:
    """``.to()`` the CPU and back, with adapters; then on to the card from the CPU, where it was made."""
    model = copy.deepcopy(subject.there).to("cpu")
    back = subject.far(model, "cpu")
    again, other = model.to(subject.device), copy.deepcopy(subject.here).to(subject.device)
    return largest([back, subject.far(again), subject.far(other)])


def loaded(subject: Subject) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(subject.there, Path(folder) / "adapter")
        return subject.far(load_adapter(copy.deepcopy(subject.base).to(subject.device), Path(folder) / "adapter"))


def loaded_for_fewer_elements(subject: Subject) -> dict[str, float]:
    """The model is made anew on the card, for the elements of the adapter."""
    here = rebuild(subject.base, list(FEWER), ["Default"], [[-1.0] * len(FEWER)])
    config = default(here, subject.config.method, subject.config.targets)  # of ranks that it can use
    here = inject(here, config, {"name": "base", "fingerprint": fingerprint(subject.base)})
    batch = make_batch(structures(FEWER), getattr(torch, subject.dtype), "cpu", FEWER)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(here, Path(folder) / "adapter")
        there = load_adapter(copy.deepcopy(subject.base).to(subject.device), Path(folder) / "adapter")
    there_batch = make_batch(structures(FEWER), getattr(torch, subject.dtype), subject.device, FEWER)
    return distances(outputs(there, there_batch), outputs(here, batch))


def folded(subject: Subject) -> dict[str, float]:
    """``merge``, but that gates stay."""
    return subject.far(fold(copy.deepcopy(subject.there)))


def compiled(subject: Subject) -> dict[str, float]:
    """``NAME_compiled.model`` of a run on the card, there and on the CPU. TorchScript makes code in the first calls."""
    model = compile_to_torchscript(settle_isolated_atoms(fold(copy.deepcopy(subject.there))).eval())
    with tempfile.TemporaryDirectory() as folder:
        torch.jit.save(model, f"{folder}/compiled.model")
        return largest([subject.far(torch.jit.load(f"{folder}/compiled.model", map_location=device), device)
                        for device in (subject.device, "cpu")] + [subject.far(model) for _ in range(3)])


def in_ASE(subject: Subject) -> dict[str, float]:
    """The calculator on the card, against that on the CPU."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(subject.here, Path(folder) / "adapter")
        for device in (subject.device, "cpu"):
            atoms = structures()[0]
            atoms.calc = calculator(subject.base, Path(folder) / "adapter", device=device)
            found.append({"energy": torch.tensor(atoms.get_potential_energy()), "forces": torch.tensor(
                atoms.get_forces()), "stress": torch.tensor(atoms.get_stress())})
    return distances(*found)


def threaded(subject: Subject) -> dict[str, float]:
    """Threads that predict with one model at the same time."""
    found, errors = [], []

    def predict() -> None:
        try:
            found.extend(subject.far(subject.there) for _ in range(PREDICTIONS))
        except Exception as error:  # of a thread: raised below
            errors.append(error)

    threads = [threading.Thread(target=predict) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return largest(found)


def trained(subject: Subject) -> dict[str, float]:
    """Losses of training steps as a run takes them, with all that makes them cheap."""
    return {"losses": compared(losses(subject.there, subject.batch()), losses(subject.here, subject.batch("cpu")))}


def losses(model: nn.Module, batch) -> list[float]:
    """Of a copy of the model."""
    model = fast_messages(copy.deepcopy(model))
    trainee = Trainee(model, list(trainable_parameters(model).values()), restricted=True, fast=True, peft=True)
    for group in trainee.optimizer.param_groups:
        group["lr"] = RATE
    return [float(trainee.step(batch)) for _ in range(STEPS)]


def compared(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def ranks(subject: Subject) -> dict[str, float]:
    """Those that are chosen on the card: how many are others."""
    there = dict(default(copy.deepcopy(subject.base).to(subject.device), subject.config.method).rank_pattern)
    return {"ranks": float(len(there.items() ^ dict(subject.config.rank_pattern).items()))}


def with_tf32(subject: Subject) -> dict[str, float]:
    """With the shorter products of matrices that torch allows on request: to be known, for nothing bounds it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return subject.far(subject.there)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- cuEquivariance ---------------------------------------------------------------------------------------------------


def on_cueq(subject: Subject) -> dict[str, float]:
    """What ``--enable_cueq`` trains: predictions, losses, and what comes back from it."""
    from mace.cli.convert_e3nn_cueq import run as convert

    from mace_peft.train.cuequivariance import accelerate, copy_trained

    device = torch.device(subject.device)  # as mace_run_train has it: MACE fuses convolutions for the text alone
    model = accelerate(subject.there, eject(copy.deepcopy(subject.there)), lambda base: convert(base, device=device))
    back = copy_trained(model, copy.deepcopy(subject.there))
    return largest([subject.far(model), subject.far(back)]) | {
        "losses": compared(losses(freeze(model), subject.batch()), losses(subject.here, subject.batch("cpu")))}


def deployed_on_cueq(subject: Subject) -> dict[str, float]:
    """What ``MACECalculator(enable_cueq=True)`` makes of the result, with convolutions in one kernel on a card."""
    from mace.cli.convert_e3nn_cueq import run as convert

    return subject.far(convert(settle_isolated_atoms(fold(copy.deepcopy(subject.there))), device=subject.device))


# --- cases ------------------------------------------------------------------------------------------------------------

WHOLE = {"made there": made_there, "moved": moved, "loaded": loaded,
         "loaded for fewer elements": loaded_for_fewer_elements, "folded": folded, "compiled": compiled, "ASE": in_ASE,
         "eight threads": threaded, "ten steps": trained}
SHORT = {"made there": made_there, "ten steps": trained}
ON_CUEQ = {"trained on cuEquivariance": on_cueq, "deployed on cuEquivariance": deployed_on_cueq}
