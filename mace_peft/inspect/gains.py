"""The gains that an adapter has learnt, as plain values: those of gates at the atoms of structures, and constants."""

import itertools
import math

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from mace.data import KeySpecification, config_from_atoms
from torch import nn
from tqdm import tqdm

from mace_peft.backbones.batches import batches, check_elements
from mace_peft.blocks.adapted import adapted_blocks, adapters_of
from mace_peft.e3nn import o3
from mace_peft.errors import PeftError
from mace_peft.inspect.gain_ranges import gates_with_gains, watched
from mace_peft.methods import MMEA
from mace_peft.methods.mmea import SCALAR
from mace_peft.model.adapted import check_adapted
from mace_peft.model.targets import unit

BOX = {"whislo": 1, "q1": 25, "med": 50, "q3": 75, "whishi": 99}  # percentiles, by their names in Axes.bxp
BATCH = 10  # structures evaluated at once


def gain_statistics(model: nn.Module, structures: list[Atoms]) -> dict:
    """How the gains of each gate are distributed over the atoms of the structures and the channels of an irrep.

    Returns ``{"peft": settings, "structures": number, "atoms": {element: number}, "blocks": {module: {irrep: {element:
    box}}}, "ranges": {module: ends}}``. A box has the percentiles of ``BOX``; the ends are those of all gains on the
    training set (``gain_ranges``). Gains are dimensionless, and 1 leaves the features as they are. Gates that only
    shift 0e channels are left out. Shows its progress on a terminal.

    Raises PeftError if no gate has a gain, if a structure is empty or has elements that the model does not know, or if
    gains are not finite or not one row per atom.
    """
    check_adapted(model)
    config = model.peft_config
    names = gates_with_gains(model)
    if not names:
        raise PeftError(f"<method> {config.method} at {config.targets or 'no module'} has no gates with gains to draw: "
                        "draw an adapter of mmea or gates, with targets that give irreps other than 0e")
    check_structures(model, structures)
    gains: dict[str, list[np.ndarray]] = {name: [] for name in names.values()}
    plain = [config_from_atoms(structure, KeySpecification.from_defaults()) for structure in structures]
    total = math.ceil(len(plain) / BATCH)
    with torch.no_grad(), watched(model, lambda name, found: gains[name].append(found.cpu().numpy())):
        for batch in tqdm(batches(model, plain, BATCH), total=total, desc="gains", unit="batch", disable=None):
            model(batch.to_dict(), training=False, compute_force=False)
    numbers = np.concatenate([structure.numbers for structure in structures])
    atoms = {chemical_symbols[number]: int((numbers == number).sum()) for number in np.unique(numbers)}
    blocks = {name: distributions(name, gate, gains[name], numbers) for gate, name in names.items()}
    return {"peft": config.to_dict(), "structures": len(structures), "atoms": atoms, "blocks": blocks,
            "ranges": model.peft_gains or {}}


def check_structures(model: nn.Module, structures: list[Atoms]) -> None:
    """Raise PeftError unless there are structures, all have atoms, and the model knows their elements."""
    if not structures or not all(len(structure) for structure in structures):
        raise PeftError(f"{'a structure' if structures else 'the list of structures'} is empty: gains are those of "
                        "atoms, so give structures that have some")
    numbers = {number for structure in structures for number in structure.numbers.tolist()}
    check_elements(numbers, model.atomic_numbers.tolist(), "the model")


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


def constant_gains(model: nn.Module) -> dict:
    """The gains exp(g) of scales, dimensionless: ``{"peft": settings, "units": {module: [gain, ...]}}``.

    Raises PeftError if the model has none, or if one is not finite.
    """
    check_adapted(model)
    units: dict[str, list[float]] = {}
    for name, block in adapted_blocks(model).items():
        for gains in [adapter.gains() for adapter in adapters_of(block).values()]:
            if gains is not None:
                if not gains.isfinite().all():
                    raise PeftError(f"gains of {name} are not finite: the training has diverged, lower its rate")
                units.setdefault(unit(model, name), []).extend(gains.tolist())
    if not units:
        raise PeftError("the adapter has no constant gains to draw: draw one of scales, elora+scales or small")
    return {"peft": model.peft_config.to_dict(), "units": units}
