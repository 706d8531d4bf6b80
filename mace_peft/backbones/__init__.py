"""What is special to a kind of model, behind one object that ``backbone_of`` finds."""

import sys

from torch import nn

from mace_peft.backbones.e3nn import Backbone
from mace_peft.errors import PeftError

__all__ = ["Backbone", "backbone_of"]


def backbone_of(model: nn.Module) -> Backbone:
    """What knows this kind of model. Raises PeftError for what is no model, or one in which nothing can be adapted."""
    if not isinstance(model, nn.Module):
        raise PeftError(f"{str(model)!r:.80} is no model: give one that torch.load has loaded, for example")
    known = [Backbone()]
    if "mace" in sys.modules:  # or the model is none of MACE's
        from mace_peft.backbones.mace import Mace

        known.insert(0, Mace())
    for backbone in known:
        if backbone.fits(model):
            return backbone
    raise PeftError(f"{type(model).__name__} is neither a MACE model nor made of e3nn's layers, so that nothing in it "
                    "can be adapted: give a model that is")
