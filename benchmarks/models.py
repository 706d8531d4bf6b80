"""Models and structures for the benchmarks, made on the spot: no data are needed."""

from __future__ import annotations

import ase.build
import mace  # noqa: F401  before e3nn
import numpy as np
import torch
from ase import Atoms
from e3nn import o3
from mace import data, modules, tools
from mace.tools import torch_geometric

ELEMENTS = (1, 6, 7, 8)
# channels; medium is the shape of MACE-OFF23 medium, quickstart that of the quickstart's foundation
SHAPES = {"medium": {"channels": 128}, "small": {"channels": 64}, "quickstart": {"channels": 32},
          "tiny": {"channels": 4, "max_ell": 1, "correlation": 2}}
CUTOFF = 5.0  # A


def make_model(shape: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A ScaleShiftMACE of random weights for H, C, N and O."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    options = {"max_ell": 3, "correlation": 3} | SHAPES[shape]
    channels = options.pop("channels")
    return modules.ScaleShiftMACE(
        r_max=CUTOFF, num_bessel=8, num_polynomial_cutoff=5, num_interactions=2,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        interaction_cls_first=modules.RealAgnosticInteractionBlock,
        num_elements=len(ELEMENTS), atomic_numbers=list(ELEMENTS), atomic_energies=np.zeros(len(ELEMENTS)),
        hidden_irreps=o3.Irreps(f"{channels}x0e+{channels}x1o"), MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu, avg_num_neighbors=15.0, radial_MLP=[64, 64, 64], radial_type="bessel",
        atomic_inter_scale=1.0, atomic_inter_shift=0.0, heads=["Default"], use_reduced_cg=False,
        **options).to(device)


def molecules(count: int) -> list[Atoms]:
    """Rattled copies of 21 atoms: an ether beside an amide."""
    pair = ase.build.molecule("CH3CH2OCH3") + moved(ase.build.molecule("CH3CONH2"), [0.0, 3.5, 0.0])
    return [labelled(pair.copy(), seed) for seed in range(count)]


def cell() -> list[Atoms]:
    """Liquid acetone of its density: 20 molecules, 200 atoms, in a periodic cube."""
    side, random = 13.46, np.random.default_rng(0)  # A
    places = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)[:20] * side / 3
    liquid = Atoms(cell=[side] * 3, pbc=True)
    for place in places:
        acetone = ase.build.molecule("CH3COCH3")
        acetone.rotate(random.uniform(0, 360), random.normal(size=3), center="COP")
        liquid += moved(acetone, place)
    return [labelled(liquid, 0)]


BATCHES = {"5 x 21 atoms": lambda: molecules(5), "32 x 21 atoms": lambda: molecules(32), "200 atoms, periodic": cell}


def moved(atoms: Atoms, to) -> Atoms:
    atoms.positions += np.asarray(to) - atoms.positions.mean(0)
    return atoms


def labelled(atoms: Atoms, seed: int) -> Atoms:
    """Rattled, with energies (eV) and forces (eV/A) at random: a loss needs some."""
    random = np.random.default_rng(seed)
    atoms.positions += random.normal(scale=0.03, size=atoms.positions.shape)
    atoms.info["REF_energy"] = random.normal()
    atoms.arrays["REF_forces"] = random.normal(size=atoms.positions.shape)
    return atoms


def make_batch(structures: list[Atoms], dtype: torch.dtype, device: str, elements: tuple[int, ...] = ELEMENTS):
    """One batch, as MACE's data loaders give it to a model of these elements."""
    torch.set_default_dtype(dtype)
    table = tools.AtomicNumberTable(list(elements))
    dataset = [data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=table, cutoff=CUTOFF)
               for atoms in structures]
    loader = torch_geometric.dataloader.DataLoader(dataset, batch_size=len(dataset), shuffle=False)
    return next(iter(loader)).to(device)
