"""A fine-tuned SevenNet where it is used: as a checkpoint that ``sevenn`` reads, and as TorchScript for LAMMPS.

In ASE it is ``SevenNetCalculator(model, file_type="model_instance")``, with adapters or without.
"""

import copy
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import sevenn
import torch
from sevenn.nn.scale import get_resolved_shift_scale
from sevenn.scripts import deploy
from sevenn.util import load_checkpoint
from torch import nn

from mace_peft.backbones.sevennet import load_foundation
from mace_peft.errors import PeftError
from mace_peft.files import REMEDY, complete, write_complete
from mace_peft.model.adapted import is_adapted
from mace_peft.model.inject import fold
from mace_peft.patching import replaced

__all__ = ["checkpoint_entries", "load_foundation", "save_checkpoint", "save_torchscript"]


def checkpoint_entries(model: nn.Module, settings: dict) -> dict[str, dict]:
    """The entries ``config`` and ``model_state_dict`` of a checkpoint of sevenn, low-rank updates and scales merged.

    settings: the ``config`` of the checkpoint, or of the run, that the model is from. The model, adapted or merged, is
    not changed. Raises PeftError for gates, of which such a checkpoint keeps nothing.
    """
    merged = folded(model)
    if is_adapted(merged):
        raise PeftError(f"the gates of {merged.peft_config.method} depend on each atom's surroundings, and sevenn "
                        "rebuilds a checkpoint without them: use elora, scales or elora+scales, or save_torchscript "
                        "for LAMMPS in serial")
    shift, scale = get_resolved_shift_scale(merged.rescale_atomic_energy, merged.type_map, merged.modal_map)
    # the weights are as this sevenn has them: of an older version, its reader would convert them once more
    written = settings | {"version": sevenn.__version__, "shift": shift, "scale": scale}
    # torch.fx adds constants to the state dict of a copy, which the reader does not know
    weights = {name: tensor for name, tensor in merged.state_dict().items() if "._tensor_constant" not in name}
    return {"config": written, "model_state_dict": weights}


def folded(model: nn.Module) -> nn.Module:
    """A copy without adapters, but for gates."""
    model = copy.deepcopy(model)
    return fold(model) if is_adapted(model) else model


def save_checkpoint(model: nn.Module, foundation: str | os.PathLike, path: str | os.PathLike) -> None:
    """Write a checkpoint for ``sevenn get_model``, ``SevenNetCalculator``, ``sevenn inference`` and ``sevenn train``.

    model: merged, or with adapters that merge, which it keeps. foundation: the checkpoint from which the model was
    made, or its name in sevenn; the settings are from there. Raises PeftError where ``checkpoint_entries`` does, for
    another foundation, and where nothing can be written.
    """
    name = os.fspath(foundation)
    expected = {key: tensor.shape for key, tensor in load_foundation(name).state_dict().items()}
    checkpoint = load_checkpoint(name)
    entries = checkpoint_entries(model, checkpoint.config)
    found = {key: tensor.shape for key, tensor in entries["model_state_dict"].items()}
    if found != expected:
        odd = min(key for key, _ in found.items() ^ expected.items())
        raise PeftError(f"{odd} of the model is not as in {name}, of another shape or in one of them alone: give the "
                        "foundation that the model was made from")
    content = {**checkpoint.get_checkpoint_dict(), **entries, "epoch": 0, "optimizer_state_dict": {},
               "scheduler_state_dict": {}}
    complete(torch.save, remedy=REMEDY)(content, path)


def save_torchscript(model: nn.Module, foundation: str | os.PathLike, path: str | os.PathLike,
                     modal: str | None = None) -> None:
    """Write TorchScript for LAMMPS' ``pair_style e3gnn``, as ``sevenn get_model`` does for one process.

    It has the gates, too, and the model is not changed. foundation: as for ``save_checkpoint``. modal: the modality,
    where the model has several. Raises PeftError where nothing can be written.
    """
    read = SimpleNamespace(config=load_checkpoint(os.fspath(foundation)).config,
                           build_model=lambda **backend: folded(model))
    with tempfile.TemporaryDirectory() as folder, replaced(deploy, "load_checkpoint", lambda name: read):
        made = Path(folder, "model.pt")
        deploy.deploy(os.fspath(foundation), str(made), modal=modal)
        write_complete(path, made.read_bytes(), remedy=REMEDY)
