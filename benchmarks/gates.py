"""Which gain a gate should have: errors at home, and forces and gains on structures unlike all in training.

    python recipes/data.py rmd17/ethanol rmd17/malonaldehyde acac
    python benchmarks/gates.py --foundation foundation_float32.model --pretraining pretrain_valid.xyz

runs the cells that have no result yet, adds each to results/gates.json, and writes the table of docs/gains.md. All are
trained alike, by less than ``mace_run_train``: Adam with a cosine schedule, batches of 5 of 50 configurations, and
forces that weigh 1000.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

import ase.io
import away
import mace  # noqa: F401  before e3nn
import numpy as np
import torch
from ase import Atoms
from environment import environment
from errors import predict
from gates_report import write_report
from mace import data, modules, tools
from mace.tools import torch_geometric
from studies import labelled_forces, mae, read_arguments, rounded, run_cells
from torch import Tensor
from torch.nn.functional import silu

from mace_peft import PeftConfig, inject
from mace_peft.fast.arithmetic import fast_arithmetic
from mace_peft.fast.messages import fast_messages
from mace_peft.methods import MMEA
from mace_peft.model import isolated
from mace_peft.model.adapted import is_adapted
from mace_peft.patching import replaced

FOUNDATION = {"foundation": "foundation model, float32", "pretraining": "structures like those it was trained on"}
SETS = {"ethanol": ("rmd17/ethanol", "test"), "malonaldehyde": ("rmd17/malonaldehyde", "test"),
        "acac": ("acac", "test_300K")}
EPOCHS, TRAINED, TESTED = 20, 50, 200


@dataclasses.dataclass(frozen=True)
class Form:
    """How a gate makes gains and shifts of what drives it: ``MMEA.coefficients``, in parts.

    hidden: of the first layer; gain: of the second. biased: whether the shift has a bias; where scalars vanish it is as
    published, or (``vanishing``) fades with them.
    """

    hidden: Callable[[Tensor], Tensor] = silu
    gain: Callable[[Tensor], Tensor] = torch.exp
    vanishing: bool = True
    biased: bool = True

    def coefficients(self, gate: MMEA, x: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.cat([block for block, count in zip(x.split(gate.sizes_in, -1), gate.scalars, strict=True) if count],
                      -1)
        z = self.hidden(s @ gate.W1 + gate.b1)
        if self.vanishing:
            z = z - self.hidden(gate.b1)
        square = (s * s).sum(-1, keepdim=True)
        present = square / (1 + square) if self.vanishing else 1
        return self.gain(z @ gate.W2 + gate.b2), z @ gate.W0 + (present * gate.b0 if self.biased else 0)


def tanh(c: float) -> Callable[[Tensor], Tensor]:
    return lambda g: torch.exp(c * torch.tanh(g / c))


FORMS = {
    "exp": Form(vanishing=False),  # as published
    **{f"tanh, c = {c}": Form(torch.tanh, tanh(c)) for c in (0.5, 1.0, 2.0)},
    "silu, c = 1.0": Form(silu, tanh(1.0)),
    "silu, c = 1.0, no bias": Form(silu, tanh(1.0), biased=False),
    "tanh, 1 + 0.5 tanh(2 g)": Form(torch.tanh, lambda g: 1 + 0.5 * torch.tanh(2 * g)),
    "silu, 1 + g": Form(silu, lambda g: 1 + g),
}


# what has no gates, beside them: settings, and the learning rate that is best for it in docs/results/settings.md
UNGATED = {"ELoRA": (PeftConfig("elora"), 0.01), "scales": (PeftConfig("scales"), 0.02), "full": (None, 0.005)}


def cells() -> list[dict]:
    """The rates first, on ethanol; then the other sets at each form's best; then a second seed."""
    gated = [{"data": name, "form": form, "targets": targets, "lr": lr, "seed": seed}
             for seed, name, lr, targets, form in itertools.product(
                 (1, 2), SETS, (0.005, 0.02), ("published", "products"), FORMS)]
    return gated + [{"data": name, "form": method, "targets": config.targets if config else "all parameters", "lr": lr,
                     "seed": seed} for seed, name, (method, (config, lr)) in itertools.product(
                         (1, 2), SETS, UNGATED.items())]


def loader(model: torch.nn.Module, structures: list[Atoms], shuffle: bool):
    table = tools.AtomicNumberTable(model.atomic_numbers.tolist())
    keys = data.KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    graphs = [data.AtomicData.from_config(data.config_from_atoms(atoms, keys, head_name=model.heads[0]), z_table=table,
                                          cutoff=float(model.r_max), heads=model.heads) for atoms in structures]
    return torch_geometric.dataloader.DataLoader(graphs, batch_size=5, shuffle=shuffle)


def fit_E0s(model: torch.nn.Module, structures: list[Atoms]) -> torch.nn.Module:
    """Give the model E0s that fit the energies of the structures, as ``--E0s=estimated`` does. Returns it."""
    numbers = model.atomic_numbers.tolist()
    counts = np.array([[(atoms.numbers == number).sum() for number in numbers] for atoms in structures])
    energies, _ = predict(model, structures, "cpu")
    missing = np.array([atoms.info["REF_energy"] for atoms in structures]) - energies
    E0s = np.linalg.lstsq(counts, missing, rcond=None)[0]
    model.atomic_energies_fn.atomic_energies += torch.tensor(E0s).to(model.atomic_energies_fn.atomic_energies)
    return model


def train(model: torch.nn.Module, structures: list[Atoms], lr: float, clip: float = 100,
          further: Callable[[], Tensor] = lambda: 0, epochs: int | None = None) -> None:
    """further: a loss that is added to that of each step; epochs: ``EPOCHS`` without a number."""
    epochs = epochs or EPOCHS
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=lr, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loss = modules.WeightedEnergyForcesLoss(energy_weight=1, forces_weight=1000)
    batches = loader(model, structures, shuffle=True)
    fast_messages(model)
    with fast_arithmetic():
        for _ in range(epochs):
            for batch in batches:
                optimizer.zero_grad()
                output = model(batch.to_dict(), training=True)
                torch.autograd.backward(loss(pred=output, ref=batch) + further(), inputs=learnt)
                torch.nn.utils.clip_grad_norm_(learnt, clip)
                optimizer.step()
            schedule.step()
    fast_messages(model, fast=False)


class Gains:
    """The smallest and the largest gain of all gates while it is entered."""

    def __init__(self, model: torch.nn.Module):
        self.gates = [module for module in model.modules() if isinstance(module, MMEA) and module.W2.shape[1]]
        self.seen: list[float] = []

    def __enter__(self) -> Gains:
        self.hooks = [gate.register_forward_pre_hook(self.look) for gate in self.gates]
        return self

    def look(self, gate: MMEA, inputs: tuple) -> None:
        gains = gate.coefficients(inputs[0])[0].detach()
        if gains.numel():
            self.seen += [gains.min().item(), gains.max().item()]

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    @property
    def range(self) -> list[float]:
        return [rounded(value) for value in (min(self.seen, default=1.0), max(self.seen, default=1.0))]


def run(cell: dict, args) -> dict:
    """Fine-tune, and measure at home and away."""
    folder, test = SETS[cell["data"]]
    training = ase.io.read(args.data / folder / "train.xyz", f":{TRAINED}")
    testing = ase.io.read(args.data / folder / f"{test}.xyz", f":{TESTED}")
    torch.set_default_dtype(torch.float32)
    model, base = (fit_E0s(torch.load(args.foundation, weights_only=False), training) for _ in range(2))
    torch.manual_seed(cell["seed"])
    form = FORMS.get(cell["form"])
    config = PeftConfig("mmea", targets=cell["targets"], gate="exp") if form else UNGATED[cell["form"]][0]
    names, structures = abroad(args, testing)
    of_base = away.largest_forces(predict(base, structures, "cpu")[1], structures)
    with replaced(MMEA, "coefficients", lambda gate, x, strength=1: form.coefficients(gate, x)):
        if config is not None:
            inject(model, config)
        began = time.process_time()
        train(model, training, cell["lr"])
        seconds = time.process_time() - began
        if config is not None and (form is None or form.vanishing):  # nothing shifts isolated atoms: E0s train along
            fit_E0s(model, training)
        with Gains(model) as home:
            energies, forces = predict(model, testing, "cpu")
        with Gains(model) as far:
            _, found = predict(model, structures, "cpu")
        lone = predict(model, [Atoms([number]) for number in model.atomic_numbers.tolist()], "cpu")[0]
    largest = away.largest_forces(found, structures)
    above = ~(largest <= np.maximum(10 * of_base, 1))  # NaN is above
    worst = np.argmax(np.nan_to_num(largest / np.maximum(of_base, 0.1), nan=np.inf))
    E0s = isolated.E0s(model) if is_adapted(model) else model.atomic_energies_fn.atomic_energies
    shift = lone - E0s.detach().flatten().numpy()
    return {**cell, "mae_e": mae(energies, np.array([atoms.info["REF_energy"] for atoms in testing])),
            "mae_f": mae(forces, labelled_forces(testing)),
            "gains_home": home.range, "gains_away": far.range, "away": len(structures), "above": int(above.sum()),
            "worst": names[worst], "worst_force": rounded(largest[worst]), "worst_base": rounded(of_base[worst]),
            "lone": rounded(np.abs(shift).max()), "seconds": rounded(seconds), "environment": environment()}


def abroad(args, testing: list[Atoms]) -> tuple[list[str], list[Atoms]]:
    """Names and structures: of G2, the test molecule displaced, the foundation's own world, acetylacetone at 600 K."""
    found = away.molecules({1, 6, 7, 8})
    found |= away.displaced("test molecule", testing[0], np.random.default_rng(1))
    for name, path in {"pretraining": args.pretraining, "600 K": args.data / "acac" / "test_600K.xyz"}.items():
        found |= {f"{name} {i}": atoms for i, atoms in enumerate(ase.io.read(path, "::5"))}
    elements = set(testing[0].numbers) | {1, 6, 8}
    found = {name: atoms for name, atoms in found.items() if elements >= set(atoms.numbers)}
    return list(found), list(found.values())


def main() -> None:
    write_report(run_cells(cells(), run, read_arguments(__doc__, "gates.json", **FOUNDATION)))


if __name__ == "__main__":
    main()
