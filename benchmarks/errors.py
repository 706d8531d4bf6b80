"""Errors of a model on labelled structures.

    python benchmarks/errors.py --model run.model --device cpu test.xyz ... [--refit pretraining.xyz ...]

prints JSON: for each file, energy (eV, of the whole structure) and force (eV/A) MAE and RMSE.
"""

from __future__ import annotations

import argparse
import json

import ase.io
import numpy as np
import torch
from ase import Atoms
from mace import data, tools
from mace.tools import torch_geometric


def predict(model: torch.nn.Module, structures: list[Atoms], device: str) -> tuple[np.ndarray, np.ndarray]:
    """Energies (n) in eV, and the forces (atoms of all structures, 3) in eV/A."""
    torch.set_default_dtype(next(model.parameters()).dtype)
    table = tools.AtomicNumberTable(model.atomic_numbers.tolist())
    graphs = [data.AtomicData.from_config(data.config_from_atoms(atoms, head_name=model.heads[0]), z_table=table,
                                          cutoff=float(model.r_max), heads=model.heads) for atoms in structures]
    energies, forces = [], []
    for batch in torch_geometric.dataloader.DataLoader(graphs, batch_size=50, shuffle=False):
        output = model(batch.to(device).to_dict(), training=False)
        energies.append(output["energy"].detach().cpu().numpy())
        forces.append(output["forces"].detach().cpu().numpy())
    return np.concatenate(energies), np.concatenate(forces)


def errors(model: torch.nn.Module, structures: list[Atoms], device: str, refit: bool = False) -> dict[str, float]:
    """refit: energies may differ by a constant for each element, as do the E0s of two levels of theory."""
    energies, forces = predict(model, structures, device)
    energy = energies - np.array([atoms.info["REF_energy"] for atoms in structures])
    force = forces - np.concatenate([atoms.arrays["REF_forces"] for atoms in structures])
    if refit:
        counts = np.array([[(atoms.numbers == number).sum() for number in model.atomic_numbers.tolist()]
                           for atoms in structures])
        energy = energy - counts @ np.linalg.lstsq(counts, energy, rcond=None)[0]
    return {"count": len(structures), "mae_e": np.abs(energy).mean(), "rmse_e": np.sqrt((energy**2).mean()),
            "mae_f": np.abs(force).mean(), "rmse_f": np.sqrt((force**2).mean())}


def known(model: torch.nn.Module, structures: list[Atoms]) -> list[Atoms]:
    """The structures of elements that the model has: MACE narrows a foundation to those of the training set."""
    elements = set(model.atomic_numbers.tolist())
    return [atoms for atoms in structures if elements >= set(atoms.numbers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--refit", nargs="*", default=[], help="files whose energies may differ by a constant for each "
                        "element; structures of elements that the model lacks are left out")
    args = parser.parse_args()
    model = torch.load(args.model, map_location=args.device, weights_only=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = {file: errors(model, ase.io.read(file, ":"), args.device) for file in args.files}
    found |= {file: errors(model, known(model, ase.io.read(file, ":")), args.device, refit=True)
              for file in args.refit}
    print(json.dumps({"parameters": sum(parameter.numel() for parameter in model.parameters()),
                      "readouts": sum(parameter.numel() for parameter in model.readouts.parameters()),
                      "errors": found}))


if __name__ == "__main__":
    main()
