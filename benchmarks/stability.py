"""Molecular dynamics of fine-tunes: how many trajectories stay whole, beside those of their foundation.

    python benchmarks/stability.py --start data/acac/test_300K.xyz foundation.model mmea=run/mine.model ...

For each model: Langevin dynamics at 1200, 600 and 300 K from five structures of the file, 20 ps each. A molecule is
whole while its atoms hang together (distances below 1.5 times the sum of covalent radii) and none are within half an
Angstrom of each other. Adds to results/stability.json after each temperature of a model, and leaves out what is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from environment import environment
from mace.calculators import MACECalculator
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform
from tqdm import tqdm

from mace_peft.fast.arithmetic import fast_arithmetic
from mace_peft.fast.messages import fast_messages

RESULT = Path(__file__).resolve().parent / "results" / "stability.json"
TEMPERATURES, STARTS = (1200, 600, 300), 5  # K
STEP, FRICTION, LOOK = 1.0, 0.01, 25  # fs, 1/fs, steps between two looks
APART = 20.0  # A, between the molecules that are run at once: no two feel each other
LONGEST, SHORTEST = 1.5, 0.5  # of a bond, in covalent radii; of any distance, in A


def is_whole(molecule: Atoms) -> bool:
    """Whether all atoms hang together, and none are upon one another."""
    if not np.isfinite(molecule.positions).all():
        return False
    distances, radii = pdist(molecule.positions), covalent_radii[molecule.numbers]
    bonded = squareform(distances) < LONGEST * (radii[:, None] + radii)
    return bool(distances.min() > SHORTEST and connected_components(bonded)[0] == 1)


class Trajectory:
    """One molecule; ``whole`` counts its picoseconds."""

    def __init__(self, molecule: Atoms, temperature: float, random: np.random.RandomState):
        self.whole = 0.0
        self.atoms = Atoms(molecule.numbers, molecule.positions)
        MaxwellBoltzmannDistribution(self.atoms, temperature_K=temperature, rng=random)


def placed(running: list[Trajectory]) -> np.ndarray:
    """The positions of all molecules, each around a place of its own: they move away from these in picoseconds."""
    return np.concatenate([one.atoms.positions - one.atoms.positions.mean(0) + APART * np.array([i % 4, i // 4, 0])
                           for i, one in enumerate(running)])


def together(running: list[Trajectory], temperature: float, calculator: MACECalculator,
             random: np.random.RandomState) -> tuple[Atoms, Langevin]:
    """All molecules that are whole, far apart, and their dynamics: a prediction costs less for many than for each."""
    all_atoms = Atoms()
    for trajectory in running:
        all_atoms += trajectory.atoms
    all_atoms.positions, all_atoms.calc = placed(running), calculator
    return all_atoms, Langevin(all_atoms, STEP * units.fs, temperature_K=temperature,
                               friction=FRICTION / units.fs, fixcm=False, rng=random)


def simulate(model: Path, molecules: list[Atoms], temperature: float, picoseconds: float, seed: int) -> list[float]:
    """How long each molecule stayed whole (ps)."""
    random = np.random.RandomState(seed)
    network = torch.load(model, map_location="cpu", weights_only=False)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    calculator = MACECalculator(models=[network], device="cpu", default_dtype=dtype)
    fast_messages(calculator.models[0])  # the same forces in half the time
    trajectories = [Trajectory(molecule, temperature, random) for molecule in molecules]
    running, (all_atoms, dynamics) = trajectories, together(trajectories, temperature, calculator, random)
    for _ in tqdm(range(round(1000 * picoseconds / STEP / LOOK)), desc=f"{model.name}, {temperature} K"):
        with fast_arithmetic():
            dynamics.run(LOOK)
        ends = np.cumsum([len(one.atoms) for one in running])
        for one, end in zip(running, ends, strict=True):
            one.atoms = all_atoms[end - len(one.atoms):end]
        still = [one for one in running if is_whole(one.atoms)]
        for one in still:
            one.whole += LOOK * STEP / 1000
        if not still:
            break
        if len(still) < len(running):
            running, (all_atoms, dynamics) = still, together(still, temperature, calculator, random)
        else:
            all_atoms.positions = placed(running)
    return [round(one.whole, 3) for one in trajectories]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="[NAME=]FILE", help="files of MACE models")
    parser.add_argument("--start", type=Path, required=True, help="structures of a molecule to start from")
    parser.add_argument("--ps", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    structures = ase.io.read(args.start, ":")
    molecules = structures[:: max(1, len(structures) // STARTS)][:STARTS]
    for temperature in TEMPERATURES:
        for given in args.models:
            name, _, path = given.rpartition("=")
            key = f"{args.start.parent.name}, {name or Path(path).stem}, {temperature} K, seed {args.seed}"
            results = json.loads(args.out.read_text()) if args.out.exists() else {}
            if key not in results:
                found = simulate(Path(path), molecules, temperature, args.ps, args.seed)
                results = json.loads(args.out.read_text()) if args.out.exists() else {}
                results[key] = {"ps": args.ps, "whole": found, "environment": environment()}
                args.out.write_text(json.dumps(results, indent=1) + "\n")
                print(key, found, flush=True)


if __name__ == "__main__":
    main()
