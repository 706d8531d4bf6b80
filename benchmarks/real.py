"""Which method is best on a foundation that people use: SevenNet-0, errors at home and on what it was trained on.

    pip install -r recipes/sevennet/requirements.txt && pip install --no-deps .      (docs/sevennet.md)
    python recipes/data.py rmd17/ethanol rmd17/malonaldehyde
    python benchmarks/real.py --trained_on random_400.xyz --tungsten w_slabs

runs the cells that have no result yet, adds each to results/real.json, and writes the table of docs/results/real.md.
The weights come with the package sevenn. trained_on: frames of MPtrj, which SevenNet-0 has learnt; tungsten: a folder
with train.xyz and test.xyz of slabs. Both have REF_energy (eV) and REF_forces (eV/A). All are trained alike: Adam with
a cosine schedule, batches of 5 of 50 configurations, energies per atom that weigh 1, forces that weigh 1000, and
gradients that are clipped at 10.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

import ase.io
import numpy as np
import torch
from ase import Atoms
from environment import environment
from kinds_report import write_report
from sevenn.atom_graph_data import AtomGraphData
from sevenn.train.dataload import unlabeled_atoms_to_graph
from studies import CLIP, labelled_forces, mae, read_arguments, rounded, run_cells
from torch import nn
from torch_geometric.loader import DataLoader

from mace_peft import PeftConfig, choose_ranks, inject, start_along_gradients
from mace_peft.sevennet import load_foundation
from mace_peft.train.data.made_structures import made_of

FOUNDATION, CUTOFF = "7net-0", 5.0  # A
EPOCHS = {"ethanol": 30, "malonaldehyde": 30, "tungsten": 8}
TRAINED, TESTED, BATCH = 50, 100, 5


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings, the rate that was best on ethanol, others that were tried there, and the weight of self-replay."""

    config: PeftConfig
    lr: float
    others: tuple[float, ...] = ()
    keep: float = 0.0


ROWS = {
    "full": Row(PeftConfig("full"), 0.003, (0.001, 0.01)),
    "best": Row(PeftConfig("best"), 0.02, (0.01, 0.04)),
    "best, keep 0.05": Row(PeftConfig("best"), 0.02, keep=0.05),
    "elora": Row(PeftConfig("elora"), 0.03, (0.01,)),
    "scales": Row(PeftConfig("scales"), 0.02),
}
DECIDE = ("full", "best")  # with a second and a third seed


def cells() -> list[dict]:
    """First the rates, then each row on each target, and more seeds."""
    rates = [("ethanol", name, lr, 1) for name, row in ROWS.items() for lr in (row.lr, *row.others)]
    chosen = [(data, name, row.lr, seed) for seed, data, (name, row) in itertools.product(
        (1, 2, 3), EPOCHS, ROWS.items()) if seed == 1 or name in DECIDE]
    return [{"kind": "real", "data": data, "row": name, "lr": lr, "clip": CLIP, "seed": seed}
            for data, name, lr, seed in dict.fromkeys((*rates, *chosen))]


def read(args, data: str) -> tuple[list[Atoms], list[Atoms]]:
    """The structures to train and to test on."""
    folder = args.tungsten if data == "tungsten" else args.data / "rmd17" / data
    return tuple(ase.io.read(folder / f"{name}.xyz", f":{count}")
                 for name, count in (("train", TRAINED), ("test", TESTED)))


def graphs(structures: list[Atoms]) -> list[AtomGraphData]:
    made = []
    for atoms in structures:
        graph = AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, CUTOFF))
        graph["total_energy"] = torch.tensor(atoms.info["REF_energy"], dtype=torch.float32)
        graph["force_of_atoms"] = torch.tensor(atoms.arrays["REF_forces"], dtype=torch.float32)
        made.append(graph)
    return made


def loss(model: nn.Module, batch: AtomGraphData) -> torch.Tensor:
    found = model(batch)
    per_atom = (found["inferred_total_energy"] - batch["total_energy"]) / batch["num_atoms"]
    return (per_atom**2).mean() + 1000 * ((found["inferred_force"] - batch["force_of_atoms"]) ** 2).mean()


def adapt(model: nn.Module, config: PeftConfig, training: list[AtomGraphData]) -> None:
    def differentiate(probed: nn.Module) -> None:
        for batch in DataLoader(training, batch_size=BATCH):
            loss(probed, batch).backward()

    if config.rank == "auto":
        config = choose_ranks(model, config, differentiate)
    inject(model, config)
    if config.start == "gradient":
        start_along_gradients(model, differentiate)


def kept(model: nn.Module) -> list[AtomGraphData]:
    """Structures of all elements of the foundation, as ``--peft_keep auto`` makes them, with the model's labels."""
    structures = made_of(model.type_map)
    energies, forces = predict(model, [AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, CUTOFF))
                                       for atoms in structures])
    ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
    for atoms, energy, force in zip(structures, energies, np.split(forces, ends), strict=True):
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = energy, force
    return graphs(structures)


def train(model: nn.Module, training: list[AtomGraphData], lr: float, epochs: int, keep: float,
          others: list[AtomGraphData]) -> None:
    """keep: the weight of the loss of these others, of which each step takes a batch."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=lr, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    batches = DataLoader(training, batch_size=BATCH, shuffle=True)
    beside = itertools.chain.from_iterable(itertools.repeat(DataLoader(others, batch_size=BATCH, shuffle=True)))
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            whole = loss(model, batch) + (keep * loss(model, next(beside)) if keep else 0)
            torch.autograd.backward(whole, inputs=learnt)
            torch.nn.utils.clip_grad_norm_(learnt, CLIP)
            optimizer.step()
        schedule.step()


def predict(model: nn.Module, structures: list[AtomGraphData]) -> tuple[np.ndarray, np.ndarray]:
    """Energies (eV) and forces (eV/A), of all structures one after another."""
    found = [{key: output[key].detach() for key in ("inferred_total_energy", "inferred_force")}
             for output in map(model, DataLoader(structures, batch_size=BATCH))]
    return tuple(torch.cat([output[key] for output in found]).numpy() for key in found[0])


def fit_E0s(model: nn.Module, structures: list[Atoms], labelled: list[AtomGraphData]) -> None:
    """Shift the energies of elements, by least squares, so that those of the structures are met."""
    elements = sorted({number for atoms in structures for number in atoms.numbers})
    counts = np.array([[(atoms.numbers == number).sum() for number in elements] for atoms in structures])
    missing = np.array([atoms.info["REF_energy"] for atoms in structures]) - predict(model, labelled)[0]
    found = torch.tensor(np.linalg.lstsq(counts, missing, rcond=None)[0], dtype=torch.float32)
    with torch.no_grad():
        model.rescale_atomic_energy.shift[[model.type_map[number] for number in elements]] += found


def run(cell: dict, args) -> dict:
    """Fine-tune, and measure at home and abroad."""
    training, testing = read(args, cell["data"])
    abroad = ase.io.read(args.trained_on, "::10")
    learning, asked, away = map(graphs, (training, testing, abroad))
    torch.manual_seed(cell["seed"])
    model = load_foundation(FOUNDATION)
    model.set_is_batch_data(True)
    unmoved, start = predict(model, away)[1], predict(model, asked)[1]
    fit_E0s(model, training, learning)
    row = ROWS[cell["row"]]
    others = kept(model) if row.keep else learning
    adapt(model, row.config, learning)
    began = time.process_time()
    train(model, learning, cell["lr"], EPOCHS[cell["data"]], row.keep, others)
    seconds = time.process_time() - began
    fit_E0s(model, training, learning)
    (energies, forces), (_, moved) = predict(model, asked), predict(model, away)
    labels, labels_away = map(labelled_forces, (testing, abroad))
    return {**cell, "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "mae_e": mae(energies, np.array([atoms.info["REF_energy"] for atoms in testing])),
            "mae_f": mae(forces, labels), "before": mae(start, labels), "moved": mae(moved, unmoved),
            "abroad": mae(moved, labels_away), "abroad_base": mae(unmoved, labels_away), "seconds": rounded(seconds),
            "environment": environment("sevenn")}


def main() -> None:
    args = read_arguments(__doc__, "real.json", trained_on="frames that the foundation was trained on",
                          tungsten="folder of slabs of tungsten")
    write_report(run_cells(cells(), run, args))


if __name__ == "__main__":
    main()
