"""What is special to a kind of model, behind one object that ``backbone_of`` finds."""

import importlib
import sys

from torch import nn

from mace_peft.backbones.e3nn import Backbone
from mace_peft.errors import PeftError

__all__ = ["Backbone", "backbone_of", "load_foundation"]

# by the name of a backbone: what loads its foundation models
LOADERS = {"mace": "mace_peft.backbones.foundation", "sevennet": "mace_peft.backbones.sevennet"}


def backbone_of(model: nn.Module) -> Backbone:
    """What knows this kind of model. Raises PeftError for what is no model, or one in which nothing can be adapted."""
    if not isinstance(model, nn.Module):
        raise PeftError(f"{str(model)!r:.80} is no model: give one that torch.load has loaded, for example")
    known = []
    if "mace" in sys.modules:  # or the model is none of MACE's
        from mace_peft.backbones.mace import Mace

        known.append(Mace())
    if "sevenn" in sys.modules:
        from mace_peft.backbones.sevennet import SevenNet

        known.append(SevenNet())
    for backbone in [*known, Backbone()]:
        if backbone.fits(model):
            return backbone
    raise PeftError(f"{type(model).__name__} is neither a MACE model nor made of e3nn's layers, so that nothing in it "
                    "can be adapted: give a model that is")


def load_foundation(name: str, backbone: str) -> nn.Module:
    """The foundation model of that file or name, on the CPU, for an adapter of the backbone of that name.

    Raises PeftError if it cannot be loaded.
    """
    if backbone not in LOADERS:
        raise PeftError(f"{name} cannot be loaded by its name, for the adapter is of a model of the kind "
                        f"{backbone!r:.200}: give the model itself")
    try:
        loader = importlib.import_module(LOADERS[backbone])
    except ModuleNotFoundError as error:
        raise PeftError(f"{name} cannot be loaded, for a model of the kind {backbone} needs the package {error.name}, "
                        "which is not installed: use an environment that has it") from None
    return loader.load_foundation(name)
