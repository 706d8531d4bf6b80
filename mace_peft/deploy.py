"""A fine-tune where it is used: in ASE, and as one file for PyTorch, LAMMPS and what else takes a MACE model."""

import copy
import inspect
import io
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from mace.calculators import LAMMPS_MACE, MACECalculator
from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE
from torch import nn
from tqdm import tqdm

from mace_peft.adapter.directory import read_sizes
from mace_peft.adapter.load import load_adapter
from mace_peft.backbones import backbone_of
from mace_peft.backbones.foundation import load_foundation
from mace_peft.e3nn import compile as compile_to_torchscript
from mace_peft.elements import symbols
from mace_peft.errors import PeftError, check_choice, did_you_mean, one_line, printable
from mace_peft.files import REMEDY, write_complete
from mace_peft.inspect import compare
from mace_peft.inspect.gain_ranges import Guard
from mace_peft.model.adapted import is_adapted, is_switched_off
from mace_peft.model.inject import fold, settle_isolated_atoms
from mace_peft.model.strength import check_strength
from mace_peft.structures import check_structure

# what MACECalculator takes under no name, and what ``calculator`` takes itself
NOT_NAMED = ("head", "compute_atomic_stresses", "strength")


class AdaptedCalculator(MACECalculator):
    """MACE's calculator, which refuses elements that the adapter has never seen, and predictions that are no numbers.

    It warns once where gains of gates are far from those on the training set (``mace_peft.inspect.gain_ranges``).

    ``calculate`` raises PeftError for them, with the directory of the ``adapter``.
    """

    def __init__(self, *args, adapter: str | os.PathLike, **options):
        super().__init__(*args, **options)
        self.adapter = adapter
        self.computed_by = self.adapters_now()
        self.guards = [Guard(model) for model in self.models]

    def adapters_now(self) -> list[object]:
        """What tells, by identity, whether the models predict as before: what each adapter brought, and if it is on."""
        return [mark for model in self.models
                for mark in (getattr(model, "peft_originals", None), type(model), is_switched_off(model))]

    def check_state(self, atoms, tol=1e-15):
        """ASE's: what has changed since the results. They are given up where the adapters have."""
        if not all(map(operator.is_, self.adapters_now(), self.computed_by)):
            self.reset()
        return super().check_state(atoms, tol=tol)

    def get_property(self, name, atoms=None, allow_calculation=True):
        # without atoms, ASE's would not look at the state, and give results of adapters that are no longer there
        return super().get_property(name, self.atoms if atoms is None else atoms, allow_calculation)

    def check_atoms(self, atoms: Atoms | None) -> None:
        """Raise PeftError for what the model has no prediction of; without atoms there is nothing to check."""
        if atoms is None:
            return
        new = set(atoms.numbers.tolist()) - set(self.z_table.zs)
        if new:
            raise PeftError(f"the structure has {symbols(new)}, and the adapter was trained for "
                            f"{symbols(self.z_table.zs)}: use the foundation, or an adapter trained for these elements")
        check_structure(atoms.positions, atoms.cell.array, atoms.pbc, name_of(atoms))

    def get_hessian(self, atoms=None):
        self.check_atoms(self.atoms if atoms is None else atoms)
        return super().get_hessian(atoms)

    def get_descriptors(self, atoms=None, *args, **options):
        self.check_atoms(self.atoms if atoms is None else atoms)
        return super().get_descriptors(atoms, *args, **options)

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        self.check_atoms(atoms)
        self.computed_by = self.adapters_now()
        for guard in self.guards:
            guard.begin()
        super().calculate(atoms, properties, system_changes)
        odd = [name for name, value in self.results.items() if not is_finite(value)]
        if odd:
            self.reset()  # or ASE would give what is left to who asks next
            raise PeftError(f"the adapter {self.adapter} gives {', '.join(odd)} of NaN or infinity for "
                            f"{name_of(atoms)}, which may be unlike all that it was trained for, or have atoms upon "
                            "one another: check the structure, or use the foundation")
        for guard in self.guards:
            guard.check(atoms)


def is_finite(value: object) -> bool:
    return value is None or bool(np.isfinite(np.asarray(value, dtype=float)).all())


def name_of(atoms: Atoms | None) -> str:
    return "the structure" if atoms is None else f"{atoms.get_chemical_formula()} ({len(atoms)} atoms)"


def calculator(foundation: nn.Module | str | os.PathLike, adapter: str | os.PathLike, strength: float | None = None,
               **options) -> MACECalculator:
    """ASE calculator of the fine-tuned model: energies in eV, forces in eV/A, stress in eV/A^3.

    foundation: the MACE model that the adapter was trained from, its file, or a name that MACE knows; a model is not
    changed. adapter: the adapter directory. strength: 0 to 1, see ``load_adapter``. options: those of
    ``MACECalculator``, such as ``device`` and ``head``; ``default_dtype`` is that of the training unless given.

    Raises PeftError where ``load_adapter`` does, and for a foundation, head, device or option that cannot be used. The
    calculator raises it for a structure with elements that the adapter was not trained for, for one that is none, and
    for a prediction of NaN or infinity.
    """
    check_options(options)
    compare.check_device(options.get("device", "cpu"))
    model = deployable(foundation, adapter, options.pop("default_dtype", None), strength)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if options.get("compile_mode") is not None and is_adapted(model):
        raise PeftError(f"compile_mode {options['compile_mode']} does not go with gates, which PyTorch's compiler does "
                        "not know: leave it out")
    head, heads = options.get("head"), list(getattr(model, "heads", None) or ["Default"])
    if head is not None or len(heads) > 1 and "default" not in map(str.lower, heads):  # which MACE takes
        compare.choose_head("the model", model, head)
    return AdaptedCalculator(models=[model], default_dtype=dtype, adapter=adapter, **options)


def check_options(options: Iterable[str]) -> None:
    """Raise PeftError for names that are no options of ``MACECalculator``, which ignores them, or name its models."""
    known = {*inspect.signature(MACECalculator).parameters, *inspect.signature(Calculator).parameters, *NOT_NAMED}
    known -= {"kwargs", "models", "model_paths"}
    for name in options:
        if name not in known:
            raise PeftError(f"the calculator has no option {name}{did_you_mean(name, known)}: leave it out")


def deployable(
    foundation: nn.Module | str | os.PathLike, adapter: str | os.PathLike, dtype: str | None = None,
    strength: float | None = None,
) -> nn.Module:
    """The trained model in evaluation mode, low-rank updates folded, in the dtype given or that of the training."""
    if not isinstance(foundation, (str, os.PathLike)):
        backbone_of(foundation)  # raises for what is no model
    elif Path(foundation).is_dir() and Path(adapter).is_file():
        raise PeftError(f"{foundation} is a directory and {adapter} a file: give the foundation model first, and then "
                        "the adapter directory")
    description, _ = read_sizes(adapter)
    dtype = dtype or description["dtype"]
    check_choice("default_dtype", dtype, ("float32", "float64"))
    if strength is not None:
        check_strength(strength)
    model = copy.deepcopy(foundation) if isinstance(foundation, nn.Module) else load_foundation(str(foundation), dtype)
    # the dtype first: what narrows the elements divides weights
    return settle_isolated_atoms(fold(load_adapter(model.to(getattr(torch, dtype)), adapter, strength)).eval())


def for_mliap(model: nn.Module, head: str) -> nn.Module:
    model.lammps_mliap = True
    return LAMMPS_MLIAP_MACE(model, head=head)


FORMATS: dict[str, Callable[[nn.Module, BinaryIO, str], None]] = {
    "model": lambda model, file, head: torch.save(model, file),
    "torchscript": lambda model, file, head: torch.jit.save(compile_to_torchscript(model), file),
    "lammps": lambda model, file, head: torch.jit.save(compile_to_torchscript(LAMMPS_MACE(model, head=head)), file),
    "lammps-mliap": lambda model, file, head: torch.save(for_mliap(model, head), file),
}
COMPILED = {"torchscript": "PyTorch", "lammps": "LAMMPS"}  # what loads these instead of MACE


def export(foundation: str, adapter: str, out: str, format: str, head: str | None = None,
           strength: float | None = None) -> str:
    """Write the fine-tuned model to one file; returns a sentence that says what it is and what it needs.

    format: ``model``, a MACE model as ``mace_run_train`` saves it; ``torchscript``; ``lammps``, for
    ``pair_style mace``; ``lammps-mliap``, for ``pair_style mliap unified``. head: the one for LAMMPS to use, where
    there are several. strength: 0 to 1, see ``load_adapter``.

    Raises PeftError if something does not fit, or cannot be written. The file is there complete, or not at all.
    """
    path = Path(out)
    if not path.parent.is_dir():
        cause = "is no directory" if path.parent.exists() else "does not exist"
        raise PeftError(f"{out} cannot be written, for {path.parent} {cause}: make it, or give another path")
    if path.is_dir():
        raise PeftError(f"{out} cannot be written, for it is a directory: give the name of a file")
    if path.exists() and Path(foundation).exists() and path.samefile(foundation):
        raise PeftError(f"{out} is the foundation, which the adapter needs: give another file name")
    if is_part_of(path, Path(adapter)):
        raise PeftError(f"{out} is in the directory of the adapter or a link to a file of it, which it would destroy: "
                        "give another file name")
    with tqdm(total=3, desc="load", disable=None) as progress:
        model = deployable(foundation, adapter, strength=strength)
        head = choose_head(model, head, format)
        needs = COMPILED.get(format, "mace-torch and mace-peft" if is_adapted(model) else "mace-torch")
        progress.update()
        progress.set_description(f"write {format}")
        content = io.BytesIO()  # torch's own writers may end the process where the disk is full
        try:
            FORMATS[format](model, content, head)
        except Exception as error:  # TorchScript says in many ways what it does not know
            if format not in COMPILED:
                raise
            raise PeftError(f"--format {format} cannot be made, for TorchScript does not compile this "
                            f"{type(model).__name__} ({one_line(error)}): use model or lammps-mliap") from error
        write_complete(path, content.getbuffer(), remedy=REMEDY)
        progress.update(2)
    return f"Wrote {printable(out)} ({format}, {path.stat().st_size / 1e6:.1f} MB), which needs {needs} to load"


def is_part_of(path: Path, adapter: Path) -> bool:
    """Whether the path, or what it links to, is in the adapter's directory."""
    if adapter.resolve() in (path.resolve().parent, path.parent.resolve()):
        return True
    files = adapter.iterdir() if path.exists() and adapter.is_dir() else ()
    return any(file.exists() and path.samefile(file) for file in files)  # hard links, too


def choose_head(model: nn.Module, head: str | None, format: str) -> str:
    """The head given, or the only one. Raises PeftError where LAMMPS would have to choose, or if there is none such."""
    heads = list(model.heads)
    if head is None:
        if len(heads) > 1 and format.startswith("lammps"):
            raise PeftError(f"the model has the heads {', '.join(heads)}, and LAMMPS uses one: add <head>")
        return heads[-1]
    if head not in heads:
        raise PeftError(f"<head> {head!r} is none of {', '.join(heads)}{did_you_mean(head, heads)}: use one of them")
    if not format.startswith("lammps"):
        raise PeftError(f"<head> {head} has no effect on the format {format}, which keeps every head: leave it out")
    return head
