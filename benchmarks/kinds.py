"""Which method is best where the target is near to the foundation, and where it is far: errors at home and abroad.

    pip install tblite
    python recipes/data.py rmd17/ethanol rmd17/malonaldehyde acac
    python benchmarks/kinds.py --foundation foundation_float32.model --pretraining pretrain_valid.xyz

runs the cells that have no result yet, adds each to results/kinds.json, and writes the table of docs/results/kinds.md.
Far: the published labels. Near: those of GFN2-xTB, which the foundation was trained on. All are trained as in gates.py,
but that gradients are clipped at 10, as by default in MACE; some also at 100, as in the published protocol.
Abroad are structures like those that the foundation was trained on, with labels of its own level: how far their forces
have moved, and, where the target is near, the error there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable

import ase.io
import gates
import mace  # noqa: F401  before e3nn
import numpy as np
import torch
from ase import Atoms
from environment import environment
from errors import predict
from kinds_report import write_report
from mace.modules import WeightedEnergyForcesLoss
from mace.modules.lora import inject_LoRAs
from studies import CLIP, labelled_forces, mae, read_arguments, rounded, run_cells

from mace_peft import PeftConfig, choose_ranks, inject, start_along_gradients
from mace_peft.train.data.made_structures import made_of
from mace_peft.train.self_replay import SelfReplay

TRAINED, TESTED = 50, 200
CLIPS = CLIP, 100  # of gradients: the published protocol has 100
# the published placement, but that a product block is gated on all of its output and not in its linear layer
PRODUCTS_WHOLE = ("node_embedding,interactions.*.linear_up,interactions.*.linear,interactions.*.skip_tp,"
                  "interactions.*.conv_tp_weights,products.?,products.?.symmetric_contractions,readouts.*")


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings, the rates that were best on ethanol, others that were tried there, and the weight of self-replay.

    config: None is MACE's ``--lora``, of the rank that ``elora`` has.
    """

    config: PeftConfig | None
    near: float
    far: float
    others: tuple[float, ...] = ()
    keep: float | None = None


ROWS = {
    "full": Row(PeftConfig("full"), 0.0025, 0.005, (0.00125, 0.01)),
    "MACE's --lora": Row(None, 0.16, 0.16, (0.02, 0.08, 0.32)),
    "best": Row(PeftConfig("best"), 0.02, 0.02, (0.04, 0.08)),
    **{f"best, keep {weight:g}": Row(PeftConfig("best"), 0.02, 0.02, keep=weight) for weight in (0.01, 0.02, 0.05)},
    "best, start published": Row(PeftConfig("best", start="published"), 0.005, 0.005, (0.01,)),
    "best, start fan-in": Row(PeftConfig("best", start="fan-in"), 0.02, 0.02),
    "best at 5 %": Row(PeftConfig("best", budget="5%"), 0.02, 0.04),
    "best at 1 %": Row(PeftConfig("best", budget="1%"), 0.02, 0.04),
    "elora": Row(PeftConfig("elora"), 0.005, 0.005, (0.01,)),
    "elora, start gradient": Row(PeftConfig("elora", start="gradient"), 0.02, 0.02),
    "small": Row(PeftConfig("small"), 0.02, 0.02),
    "small, start gradient": Row(PeftConfig("small", start="gradient"), 0.02, 0.02),
    "mmea": Row(PeftConfig("mmea"), 0.005, 0.005),
    "mmea, products whole": Row(PeftConfig("mmea", targets=PRODUCTS_WHOLE), 0.005, 0.005),
}
LONG = {"full": {"near": (0.0025,), "far": (0.0025, 0.005)}, "best": {"near": (0.02,), "far": (0.01, 0.02)}}
EPOCHS = 60, 200  # of longer runs
DECIDE = ("full", "MACE's --lora", "best", "best, keep 0.01")  # with a second and a third seed


def cells() -> list[dict]:
    """First what decides: the rates, then each row on each target, and more seeds."""
    rates = [(kind, "ethanol", name, lr, clip, 1) for clip, (name, row), kind in itertools.product(
        CLIPS, ROWS.items(), ("near", "far")) for lr in dict.fromkeys((row.near, row.far, *row.others))]
    chosen = [(kind, data, name, getattr(row, kind), CLIPS[0], seed) for seed, data, (name, row), kind in
              itertools.product((1, 2, 3), gates.SETS, ROWS.items(), ("near", "far")) if seed == 1 or name in DECIDE]
    short = [dict(zip(("kind", "data", "row", "lr", "clip", "seed"), cell, strict=True))
             for cell in dict.fromkeys((*rates, *chosen))]
    return short + [{"kind": kind, "data": data, "row": row, "lr": lr, "clip": CLIP, "seed": seed, "epochs": epochs}
                    for seed, epochs, data, (row, rates) in itertools.product((1, 2), EPOCHS, gates.SETS, LONG.items())
                    for kind, lrs in rates.items() for lr in lrs]


def label(structures: list[Atoms]) -> list[Atoms]:
    """The structures without a cell, and with energies and forces of GFN2-xTB."""
    from tblite.ase import TBLite  # which cells of the other kind need not have

    labelled = []
    for atoms in structures:
        free = Atoms(atoms.numbers, atoms.positions, calculator=TBLite(method="GFN2-xTB", verbosity=0))
        made = Atoms(atoms.numbers, atoms.positions, info={"REF_energy": free.get_potential_energy()})
        made.arrays["REF_forces"] = free.get_forces()
        labelled.append(made)
    return labelled


def read(args, cell: dict) -> tuple[list[Atoms], list[Atoms]]:
    """The structures to train and to test on, with the labels of the cell's kind."""
    folder, test = gates.SETS[cell["data"]]
    sets = [ase.io.read(args.data / folder / name, f":{count}")
            for name, count in (("train.xyz", TRAINED), (f"{test}.xyz", TESTED))]
    return tuple(map(label, sets) if cell["kind"] == "near" else sets)


def adapt(model: torch.nn.Module, config: PeftConfig | None, training: list[Atoms]) -> None:
    if config is None:
        inject_LoRAs(model, rank=16, alpha=1)  # alpha: MACE's default
        return
    if config.rank == "auto":
        config = choose_ranks(model, config, training, forces_key="REF_forces")
    inject(model, config)
    if config.start == "gradient":
        start_along_gradients(model, training, forces_key="REF_forces")


def kept(model: torch.nn.Module, weight: float | None, seed: int) -> Callable[[], torch.Tensor]:
    """The loss of self-replay of that weight, as of ``--peft_keep auto``; none without a weight."""
    if weight is None:
        return lambda: 0
    options = argparse.Namespace(peft_keep="auto", peft_keep_weight=weight, seed=seed)
    loss = WeightedEnergyForcesLoss(energy_weight=1, forces_weight=1000)
    return SelfReplay(made_of(model.atomic_numbers.tolist()), model, model, loss, options, 5).next_loss


def run(cell: dict, args) -> dict:
    """Fine-tune, and measure at home and abroad."""
    torch.set_default_dtype(torch.float32)
    training, testing = read(args, cell)
    model, base = (gates.fit_E0s(torch.load(args.foundation, weights_only=False), training) for _ in range(2))
    elements = set(model.atomic_numbers.tolist())
    abroad = [atoms for atoms in ase.io.read(args.pretraining, "::3") if elements >= set(atoms.numbers)]
    torch.manual_seed(cell["seed"])
    adapt(model, ROWS[cell["row"]].config, training)
    began = time.process_time()
    gates.train(model, training, cell["lr"], cell["clip"], kept(model, ROWS[cell["row"]].keep, cell["seed"]),
                cell.get("epochs"))
    seconds = time.process_time() - began
    gates.fit_E0s(model, training)
    home, away, unmoved = (predict(*of, "cpu") for of in ((model, testing), (model, abroad), (base, abroad)))
    labels = labelled_forces(abroad)
    return {**cell, "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "mae_e": mae(home[0], np.array([atoms.info["REF_energy"] for atoms in testing])),
            "mae_f": mae(home[1], labelled_forces(testing)), "moved": mae(away[1], unmoved[1]),
            "abroad": mae(away[1], labels), "abroad_base": mae(unmoved[1], labels),
            "seconds": rounded(seconds), "environment": environment()}


def main() -> None:
    args = read_arguments(__doc__, "kinds.json", **gates.FOUNDATION)
    write_report(run_cells(cells(), run, args))


if __name__ == "__main__":
    main()
