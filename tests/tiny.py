"""Small real MACE models and data that tests share: built in memory, in seconds, from a seed."""

import copy

import mace  # noqa: F401  before e3nn
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from e3nn import o3
from hypothesis import strategies as st
from mace import data, modules, tools
from mace.tools import torch_geometric
from releases import since

ELEMENTS = (1, 6, 8)


MADE: dict[str, torch.nn.Module] = {}


def tiny_mace(dtype=torch.float64, seed=0, **options):
    """A model of these options (``new_mace``): a copy, for to make one takes longer than most tests with it.

    torch's random numbers go on from the seed.
    """
    key = repr((dtype, seed, sorted(options.items())))
    if key not in MADE:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.manual_seed(seed)
        try:
            MADE[key] = new_mace(**options)
        finally:
            torch.set_default_dtype(before)
    torch.manual_seed(seed)
    return copy.deepcopy(MADE[key])


def new_mace(elements=ELEMENTS, channels=4, max_L=1, max_ell=2, correlation=3, interactions=2, heads=("Default",),
             first="RealAgnosticInteractionBlock", later="RealAgnosticResidualInteractionBlock",
             model_class=modules.ScaleShiftMACE, **options):
    """A ScaleShiftMACE with random weights, on the CPU; as MACE saves one, every parameter is trainable."""
    atomic_energies, scale, shift = -np.arange(1.0, len(elements) + 1), 0.8, 0.1
    if len(heads) > 1:
        atomic_energies, scale, shift = (np.stack([value] * len(heads)) for value in (atomic_energies, scale, shift))
    if issubclass(model_class, modules.ScaleShiftMACE):
        options = {"atomic_inter_scale": scale, "atomic_inter_shift": shift, **options}
    return model_class(
        r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=max_ell,
        interaction_cls=modules.interaction_classes[later],
        interaction_cls_first=modules.interaction_classes[first],
        num_interactions=interactions, num_elements=len(elements),
        hidden_irreps=(channels * o3.Irreps.spherical_harmonics(max_L)).sort().irreps.simplify(),
        MLP_irreps=o3.Irreps("8x0e"), gate=torch.nn.functional.silu,
        avg_num_neighbors=3.0, atomic_numbers=list(elements),
        atomic_energies=atomic_energies, correlation=correlation, radial_MLP=[8, 8, 8], radial_type="bessel",
        heads=list(heads), **options)


def medium_mace():
    """A model of MACE-OFF23-medium shape with three elements and random weights.

    Where cuEquivariance is installed, MACE would take fewer paths for its contractions unless told; 0.3.13 always takes
    all.
    """
    paths = {"use_reduced_cg": False} if since("0.3.14") else {}
    return modules.ScaleShiftMACE(
        r_max=5.0, num_bessel=8, num_polynomial_cutoff=5, max_ell=3,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        interaction_cls_first=modules.RealAgnosticInteractionBlock,
        num_interactions=2, num_elements=3, hidden_irreps=o3.Irreps("128x0e+128x1o"), MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu, atomic_energies=np.zeros(3), avg_num_neighbors=10.0, atomic_numbers=[1, 6, 8],
        correlation=3, radial_MLP=[64, 64, 64], radial_type="bessel", atomic_inter_scale=1.0, atomic_inter_shift=0.0,
        heads=["Default"], **paths)


def configurations(count=8, name="CH3OH", seed=0, periodic=False) -> list[Atoms]:
    """Rattled copies of a molecule with REF_energy (eV) and REF_forces (eV/A) of a Lennard-Jones potential."""
    random = np.random.default_rng(seed)
    atoms = molecule(name)
    if periodic:
        atoms.set_cell([6.0, 6.0, 6.0])
        atoms.pbc = True
    labelled = []
    for _ in range(count):
        copy = atoms.copy()
        copy.positions += random.normal(scale=0.05, size=copy.positions.shape)
        copy.calc = LennardJones(sigma=1.0, epsilon=0.2, rc=4.0)
        copy.info["REF_energy"] = copy.get_potential_energy()
        copy.arrays["REF_forces"] = copy.get_forces()
        copy.calc = None
        labelled.append(copy)
    return labelled


def batch(model, structures: list[Atoms]) -> dict:
    """The structures as one batch, the way the model takes it."""
    return loaded(model, structures).to_dict()


def loaded(model, structures: list[Atoms]) -> torch_geometric.batch.Batch:
    """The structures as one batch in the model's dtype, the way MACE's data loaders give it."""
    dtype, before = next(model.parameters()).dtype, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        table = tools.AtomicNumberTable(model.atomic_numbers.tolist())
        dataset = [data.AtomicData.from_config(
            data.config_from_atoms(atoms, head_name=atoms.info.get("head", model.heads[-1])),
            z_table=table, cutoff=4.0, heads=model.heads) for atoms in structures]
        loader = torch_geometric.dataloader.DataLoader(dataset, batch_size=len(dataset), shuffle=False)
        return next(iter(loader))
    finally:
        torch.set_default_dtype(before)


def predict(model, structures: list[Atoms]) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies (eV, one per structure) and forces (eV/A, atoms of all structures x 3)."""
    output = model(batch(model, structures), training=False, compute_force=True)
    return output["energy"].detach(), output["forces"].detach()


def assert_equal(actual, expected):
    """Predictions to the last bit."""
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(actual, expected, tolerance=1e-10):
    """Predictions, relative to their norms."""
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 0.5) -> torch.nn.Module:
    """The module with weights from N(0, scale) in the place of all its trainable ones. Returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def irreps_lists(max_blocks: int = 5):
    """Hypothesis strategy of irreps as text: repeats, any order, 0o and single channels among them."""
    block = st.tuples(st.integers(1, 3), st.sampled_from(["0e", "0o", "1o", "1e", "2e"]))
    return st.lists(block, min_size=1, max_size=max_blocks).map(lambda b: "+".join(f"{mul}x{ir}" for mul, ir in b))
