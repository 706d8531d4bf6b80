"""Make the fine-tuning data: gas-phase glycine at PBE/def2-SVP (density fitting), as train.xyz and test.xyz.

Geometries come from GFN2-xTB Langevin MD that starts from several conformers. Every conformer gets one trajectory
for the training file and another one, with other velocities, for the test file, so no test frame shares a
trajectory with a training frame. Each geometry is then labelled by PySCF with an energy (eV) and forces (eV/A).

    python make_target_data.py            # about 8 s a geometry on one thread

A run that was stopped goes on where it was: frames and labels found so far lie in --work.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from pyscf import dft, gto
from rdkit import Chem
from rdkit.Chem import AllChem
from tblite.ase import TBLite


def conformers(smiles, count, seed):
    """The `count` lowest MMFF conformers that differ by more than 0.2 A."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    # RDKit multiplies its seed by the conformer's number: a seed of 0 would make all of them the same.
    AllChem.EmbedMultipleConfs(mol, 50, randomSeed=seed + 1)
    energies = [energy for _, energy in AllChem.MMFFOptimizeMoleculeConfs(mol, maxIters=2000)]
    symbols = [atom.GetSymbol() for atom in mol.GetAtoms()]
    kept = []
    for index in np.argsort(energies, kind="stable"):
        positions = mol.GetConformer(int(index)).GetPositions()
        # Sorted distances tell conformers apart whatever their orientation or hydrogen numbering.
        distances = np.sort(Atoms(symbols, positions).get_all_distances()[np.triu_indices(len(symbols), 1)])
        if all(np.abs(distances - other).max() > 0.2 for _, other in kept):
            kept.append((positions, distances))
    return [Atoms(symbols, positions) for positions, _ in kept[:count]]


def sample(start, frames, temperature, interval, rng):
    """`frames` snapshots, `interval` MD steps apart, of one xTB trajectory."""
    atoms = start.copy()
    atoms.set_constraint(FixCom())
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    dyn = Langevin(atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.01 / units.fs, fixcm=False, rng=rng)
    dyn.run(4 * interval)
    snapshots = []
    for _ in range(frames):
        dyn.run(interval)
        snapshots.append(Atoms(atoms.symbols, atoms.positions - atoms.get_center_of_mass(), pbc=False))
    return snapshots


def label(atoms, basis, grid):
    """Energy (eV) and forces (eV/A), or None where the SCF does not converge."""
    mol = gto.M(atom=list(zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)), basis=basis, verbose=0)
    mf = dft.RKS(mol, xc="pbe").density_fit()
    mf.grids.level = grid
    mf.conv_tol = 1e-9
    energy = mf.kernel()
    if not mf.converged:
        return None
    gradient = mf.nuc_grad_method()
    # With the weights' own derivatives the forces sum to zero and are the true slope of the energy on this grid.
    gradient.grid_response = True
    return energy * units.Hartree, -gradient.kernel() * units.Hartree / units.Bohr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smiles", default="NCC(=O)O")
    parser.add_argument("--conformers", type=int, default=4)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=500.0, help="K")
    parser.add_argument("--interval", type=int, default=250, help="MD steps of 0.5 fs between two frames")
    parser.add_argument("--basis", default="def2-svp")
    parser.add_argument("--grid", type=int, default=3, help="PySCF grid level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("target_work"))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    sizes = {"train": args.train, "test": args.test}
    for number, (split, size) in enumerate(sizes.items()):
        frames_file = args.work / f"{split}_frames.xyz"
        if not frames_file.exists():
            starts = conformers(args.smiles, args.conformers, args.seed)
            # A few frames more than needed stand in for those whose SCF fails.
            each = -(-size // len(starts)) + 3
            trajectories = [
                sample(start, each, args.temperature, args.interval, np.random.default_rng([args.seed, number, index]))
                for index, start in enumerate(starts)
            ]
            # One frame of each trajectory in turn, so that a file cut short still holds all conformers.
            frames = [atoms for group in zip(*trajectories, strict=True) for atoms in group]
            write(frames_file, frames)
            print(f"{split}: {len(frames)} frames from {len(starts)} conformers", flush=True)

        labels = args.work / f"{split}_labels.xyz"
        done = read(labels, ":") if labels.exists() else []
        tried = done[-1].info["frame"] + 1 if done else 0
        for index, atoms in enumerate(read(frames_file, ":")):
            if index < tried or len(done) >= size:
                continue
            began = time.time()
            result = label(atoms, args.basis, args.grid)
            if result is None:
                print(f"{split} {index}: SCF not converged, dropped; the next frame takes its place", flush=True)
                continue
            atoms.info.update(REF_energy=result[0], frame=index)
            atoms.arrays["REF_forces"] = result[1]
            write(labels, atoms, append=True)
            done.append(atoms)
            print(f"{split} {index}: {result[0]:.4f} eV, {time.time() - began:.1f} s", flush=True)
        if len(done) < size:
            raise SystemExit(f"{split}: only {len(done)} of {size} geometries converged")
        for atoms in done:
            atoms.info = {"REF_energy": atoms.info["REF_energy"], "config_type": "glycine"}
        write(args.out / f"{split}.xyz", done)


if __name__ == "__main__":
    main()
