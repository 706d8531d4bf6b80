"""Make the foundation model's training data: small HCNO molecules at GFN2-xTB, as pretrain.xyz and pretrain_valid.xyz.

Every molecule of molecules.smi gets a 3D structure from RDKit and one Langevin MD trajectory per temperature, run by
tblite's GFN2-xTB, from which spaced frames are kept with their energy (eV) and forces (eV/A). The isolated
atoms H, C, N and O of the same method go into the training file.

    python make_pretraining_data.py --out data        # about 12 minutes on one core; --workers for more

The result depends on --seed only, not on --workers.
"""

import argparse
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.constraints import FixCom
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.neighborlist import natural_cutoffs, neighbor_list
from rdkit import Chem
from rdkit.Chem import AllChem
from tblite.ase import TBLite
from tqdm import tqdm

# Spin multiplicities of the atoms' ground states.
MULTIPLICITY = {"H": 2, "C": 3, "N": 4, "O": 3}


def structure(smiles, seed):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(mol, randomSeed=seed) != 0:
        AllChem.EmbedMolecule(mol, randomSeed=seed, useRandomCoords=True)
    AllChem.MMFFOptimizeMolecule(mol)
    return Atoms([atom.GetSymbol() for atom in mol.GetAtoms()], mol.GetConformer().GetPositions())


def bonds(atoms, stretch):
    """Pairs closer than `stretch` times the sum of the covalent radii."""
    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=stretch))
    return set(zip(first.tolist(), second.tolist(), strict=True))


def sample(job, frames, temperatures, interval, max_force, seed):
    """Labelled frames of one molecule, and how many were refused."""
    index, smiles, name = job
    rng = np.random.default_rng([seed, index])
    start = structure(smiles, seed + 1)
    start_bonds = bonds(start, 1.2)
    kept, refused = [], 0
    for temperature in temperatures:
        atoms = start.copy()
        atoms.set_constraint(FixCom())
        atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
        dyn = Langevin(atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, fixcm=False, rng=rng)
        try:
            dyn.run(4 * interval)
            for _ in range(frames):
                dyn.run(interval)
                forces = atoms.get_forces(apply_constraint=False)
                # A bond stretched by half or a new contact ends the trajectory: what follows is another molecule.
                if not (start_bonds <= bonds(atoms, 1.5) and bonds(atoms, 1.1) <= bonds(start, 1.5)):
                    raise CalculationFailed("bonds broken or formed")
                if np.abs(forces).max() > max_force:
                    refused += 1
                    continue
                frame = Atoms(atoms.symbols, atoms.positions - atoms.get_center_of_mass(), pbc=False)
                frame.info.update(REF_energy=atoms.get_potential_energy(), config_type=name, temperature=temperature)
                frame.arrays["REF_forces"] = forces
                kept.append(frame)
        except CalculationFailed:
            done = sum(frame.info["temperature"] == temperature for frame in kept)
            refused += frames - done
    return kept, refused


def isolated(symbol):
    atoms = Atoms(symbol, [(0.0, 0.0, 0.0)], pbc=False)
    atoms.calc = TBLite(method="GFN2-xTB", multiplicity=MULTIPLICITY[symbol], verbosity=0)
    atoms.info.update(REF_energy=atoms.get_potential_energy(), config_type="IsolatedAtom")
    atoms.arrays["REF_forces"] = np.zeros((1, 3))
    atoms.calc = None
    return atoms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecules", type=Path, default=Path(__file__).with_name("molecules.smi"))
    parser.add_argument("--frames", type=int, default=10, help="frames per molecule and temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 600.0, 900.0, 1200.0], help="K")
    parser.add_argument("--interval", type=int, default=25, help="MD steps of 0.5 fs between two frames")
    parser.add_argument("--max-force", type=float, default=15.0, help="eV/A; frames above it are dropped")
    parser.add_argument("--valid-fraction", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("data"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    jobs = [(index, *line.split()) for index, line in enumerate(args.molecules.read_text().splitlines()) if line]
    work = partial(
        sample,
        frames=args.frames,
        temperatures=args.temperatures,
        interval=args.interval,
        max_force=args.max_force,
        seed=args.seed,
    )
    with Pool(args.workers) as pool:
        results = list(tqdm(pool.imap(work, jobs), total=len(jobs), mininterval=10))
    for (_, smiles, name), (kept, refused) in zip(jobs, results, strict=True):
        if refused:
            print(f"{name} ({smiles}): {refused} frames dropped, {len(kept)} kept")
    frames = [frame for kept, _ in results for frame in kept]
    order = np.random.default_rng(args.seed).permutation(len(frames))
    cut = round(args.valid_fraction * len(frames))
    valid, train = ([frames[i] for i in part] for part in (order[:cut], order[cut:]))
    write(args.out / "pretrain.xyz", [isolated(symbol) for symbol in MULTIPLICITY] + train)
    write(args.out / "pretrain_valid.xyz", valid)
    print(f"{len(jobs)} molecules, {len(train)} training and {len(valid)} validation geometries")


if __name__ == "__main__":
    main()
