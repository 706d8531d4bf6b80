"""What an adapter has learnt, as plain values: gains of MMEA, singular values of low-rank updates."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import mace  # noqa: F401  before e3nn, see mace_peft.methods
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from e3nn import o3
from mace import data
from mace.tools import AtomicNumberTable, torch_geometric
from torch import Tensor, nn
from tqdm import trange

from mace_peft.adapted import LowRank, gates
from mace_peft.config import PeftError
from mace_peft.foundation import default_dtype_of, symbols
from mace_peft.methods import MMEA, ContractionUpdate, LinearUpdate, MatrixUpdate
from mace_peft.methods.elora import Update
from mace_peft.methods.mmea import SCALAR
from mace_peft.models import adapted_blocks, check_adapted
from mace_peft.scaled import Scaled, ScaledLowRank
from mace_peft.targets import unit

BOX = {"whislo": 1, "q1": 25, "med": 50, "q3": 75, "whishi": 99}  # percentiles, by their names in Axes.bxp
BATCH = 10  # structures evaluated at once


def gain_statistics(model: nn.Module, structures: list[Atoms]) -> dict:
    """How the gains of each gate are distributed over the atoms of the structures and the channels of an irrep.

    Returns ``{"peft": settings, "structures": number, "atoms": {element: number}, "blocks": {module: {irrep: {element:
    box}}}}``. A box has the percentiles of ``BOX``; gains are dimensionless, and 1 leaves the features as they are.
    Gates that only shift 0e channels are left out. Shows its progress on a terminal.

    Raises PeftError if no gate has a gain, if a structure is empty or has elements that the model does not know, or if
    gains are not finite or not one row per atom.
    """
    check_adapted(model)
    config = model.peft_config
    names = gates_with_gains(model)
    if not names:
        raise PeftError(f"--peft {config.method} with targets {config.targets} has no gains to draw: draw an adapter "
                        "of --peft mmea, with targets that give irreps other than 0e")
    check_structures(model, structures)
    gains: dict[MMEA, list[np.ndarray]] = {gate: [] for gate in names}

    def listen(gate: MMEA, inputs: tuple[Tensor, Tensor]) -> None:
        gains[gate].append(gate.coefficients(inputs[0])[0].cpu().numpy())

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for gate in names:
            hooks.callback(gate.register_forward_pre_hook(listen).remove)
        for start in trange(0, len(structures), BATCH, desc="gains", unit="batch", disable=None):
            model(batch(model, structures[start : start + BATCH]), training=False, compute_force=False)
    numbers = np.concatenate([structure.numbers for structure in structures])
    atoms = {chemical_symbols[number]: int((numbers == number).sum()) for number in np.unique(numbers)}
    blocks = {name: distributions(name, gate, gains[gate], numbers) for gate, name in names.items()}
    return {"peft": config.to_dict(), "structures": len(structures), "atoms": atoms, "blocks": blocks}


def gates_with_gains(model: nn.Module) -> dict[MMEA, str]:
    """The gates of an adapted model that have gains, and the names of their modules."""
    return {gate: f"{name}, messages" if kind == "messages" else name for name, block in adapted_blocks(model)
            for kind, gate in gates(block).items() if gate.b2.numel()}


def check_structures(model: nn.Module, structures: list[Atoms]) -> None:
    """Raise PeftError unless there are structures, all have atoms, and the model knows their elements."""
    if not structures or not all(len(structure) for structure in structures):
        raise PeftError(f"{'a structure' if structures else 'the list of structures'} is empty: gains are those of "
                        "atoms, so give structures that have some")
    known = model.atomic_numbers.tolist()
    unknown = {number for structure in structures for number in structure.numbers.tolist()} - set(known)
    if unknown:
        raise PeftError(f"the structures have {symbols(unknown)}, which the model does not know (it knows "
                        f"{symbols(known)}): leave out the structures with other elements")


def batch(model: nn.Module, structures: list[Atoms]) -> dict[str, Tensor]:
    """The structures as one batch, as MACE's data loaders make it, in the dtype and on the device of the model."""
    table, keys = AtomicNumberTable(model.atomic_numbers.tolist()), data.KeySpecification.from_defaults()
    with default_dtype_of(model):
        graphs = [data.AtomicData.from_config(data.config_from_atoms(structure, keys), table, float(model.r_max),
                                              heads=getattr(model, "heads", None)) for structure in structures]
        return torch_geometric.Batch.from_data_list(graphs).to(next(model.parameters()).device).to_dict()


def distributions(name: str, gate: MMEA, batches: list[np.ndarray], numbers: np.ndarray) -> dict[str, dict[str, dict]]:
    """``{irrep: {element: box}}`` of gains (atoms, ..., channels) at that module; numbers: the atomic numbers."""
    rows = sum(map(len, batches))
    if rows != len(numbers):
        raise PeftError(f"the gate at {name} acted on {rows} rows for {len(numbers)} atoms, so its gains belong to no "
                        "element: draw an adapter whose targets act on each atom once")
    gains = np.concatenate(batches)
    if not np.isfinite(gains).all():
        raise PeftError(f"gains at {name} are not finite: the training has diverged, lower its learning rate")
    irreps = np.array([str(ir) for mul, ir in o3.Irreps(gate.irreps_out) for _ in range(mul) if ir != SCALAR])
    found: dict[str, dict[str, dict]] = {}
    for irrep, number in itertools.product(dict.fromkeys(irreps.tolist()), np.unique(numbers)):
        percentiles = np.percentile(gains[numbers == number][..., irreps == irrep], list(BOX.values()))
        found.setdefault(irrep, {})[chemical_symbols[number]] = dict(zip(BOX, percentiles.tolist(), strict=True))
    return found


def static_gains(model: nn.Module) -> dict:
    """The static gains exp(g) of each module, dimensionless: ``{"peft": settings, "units": {module: [gain, ...]}}``.

    Raises PeftError if the model has none, or if one is not finite.
    """
    check_adapted(model)
    units: dict[str, list[float]] = {}
    for name, block in adapted_blocks(model):
        if isinstance(block, Scaled):
            adapter = block.adapter.gains if isinstance(block, ScaledLowRank) else block.adapter
            gains = adapter.g.detach().exp().flatten()
            if not gains.isfinite().all():
                raise PeftError(f"gains of {name} are not finite: the training has diverged, lower its learning rate")
            units.setdefault(unit(model, name), []).extend(gains.tolist())
    if not units:
        raise PeftError("the adapter has no static gains to draw: draw one of --peft_gate static")
    return {"peft": model.peft_config.to_dict(), "units": units}


def update_spectra(model: nn.Module) -> dict:
    """Singular values of each low-rank update (alpha / r) A B, and the Frobenius norm of the raw weight it is added to.

    Returns ``{"peft": settings, "units": {module: [{"weight": its name, "singular_values": [at most rank, descending],
    "weight_norm": number}]}}``. A weight is one matrix of the operation: that of an irrep, a path or a layer; of a
    symmetric contraction the highest order, (elements * paths, channels).

    Raises PeftError if the model has no low-rank update, or if one is not finite.
    """
    check_adapted(model)
    config = model.peft_config
    units: dict[str, list[dict]] = {}
    for name, block in adapted_blocks(model):
        if isinstance(block, (LowRank, ScaledLowRank)):
            owner = unit(model, name)
            units.setdefault(owner, []).extend(singular_values(name, block, name[len(owner) + 1 :]))
    if not units:
        raise PeftError(f"--peft {config.method} with targets {config.targets} has no low-rank update to draw: draw an "
                        "adapter of --peft elora, or of --peft mmea with targets published")
    return {"peft": config.to_dict(), "units": units}


@torch.no_grad()
def singular_values(name: str, block: LowRank | ScaledLowRank, part: str) -> Iterator[dict]:
    updates = low_rank(block)()
    if not all(update.isfinite().all() for update in updates.values()):
        raise PeftError(f"the update of {name} is not finite: the training has diverged, lower its learning rate")
    weights = {key: block.get_parameter(key) for key in updates}
    for (key, update), (_, weight) in zip(matrices(block, updates), matrices(block, weights), strict=True):
        values = torch.linalg.svdvals(update.double())[: low_rank(block).rank]
        yield {"weight": f"{part} {key}".strip(), "singular_values": values.tolist(),
               "weight_norm": weight.double().norm().item()}


def low_rank(block: LowRank | ScaledLowRank) -> Update:
    """What gives the low-rank update of the block."""
    return block.adapter.update if isinstance(block, ScaledLowRank) else block.adapter


def matrices(block: LowRank | ScaledLowRank, weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The block's weights, or updates of them, as the matrices that are updated by low rank, each with its name."""
    adapter = low_rank(block)
    if isinstance(adapter, ContractionUpdate):
        return [("", weights["weights_max"].flatten(0, 1))]
    weight = weights["weight"]
    if isinstance(adapter, MatrixUpdate):
        return [("", weight)]
    if isinstance(adapter, LinearUpdate):
        result = {ir: weight.new_zeros(len(A), adapter.B[ir].shape[1]) for ir, A in adapter.A.items()}
        places = [result[ir][rows, columns] for ir, rows, columns in adapter.paths]
        for place, values in zip(places, weight.split([place.numel() for place in places]), strict=True):
            place.copy_(values.view_as(place))
        return list(result.items())
    paths = [i for i in block.instructions if i.has_weight]
    parts = weight.split([math.prod(i.path_shape) for i in paths])
    return [(f"{block.irreps_in1[i.i_in1].ir}⊗{block.irreps_in2[i.i_in2].ir}", values.view(-1, i.path_shape[-1]))
            for i, values in zip(paths, parts, strict=True)]
