"""What is special to SevenNet (arXiv 2402.03789): elements, modalities, the takers of messages, and its checkpoints."""

from sevenn.nn.sequential import AtomGraphSequential
from sevenn.util import load_checkpoint
from torch import nn

from mace_peft.backbones.e3nn import LINEARS, PUBLISHED, Backbone
from mace_peft.blocks import sevennet
from mace_peft.errors import PeftError, one_line

CONVOLUTION = "_convolution"


class SevenNet(Backbone):
    """Any model that sevenn builds. Its layers are e3nn's, each inside a block that knows the names of its data."""

    name = "sevennet"
    operations = sevennet.OPERATIONS
    placements = {"linears": LINEARS, "published": PUBLISHED, "all": PUBLISHED | {"convolution"}}
    pattern = "*_self_interaction_2.*"

    def fits(self, model: nn.Module) -> bool:
        return isinstance(model, AtomGraphSequential)

    def receivers(self, model: nn.Module) -> dict[str, str]:
        layers = [name.removesuffix(CONVOLUTION) for name, _ in model.named_children() if name.endswith(CONVOLUTION)]
        return {f"{layer}{CONVOLUTION}.convolution": f"{layer}_self_interaction_2.linear" for layer in layers}

    def describe(self, model: nn.Module) -> dict:
        return {"model_class": type(model).__name__, "elements": list(map(int, model.type_map)),
                "heads": list(model.modal_map or ()) or None}


def load_foundation(name: str) -> nn.Module:
    """The model of that checkpoint, or of a name that sevenn knows, such as 7net-0, on the CPU.

    Raises PeftError if there is no such checkpoint, or if it holds no model.
    """
    try:
        return load_checkpoint(name).build_model()
    except Exception as error:  # of a file that torch cannot read, of another program, or a download that fails
        raise PeftError(f"foundation model {name} cannot be loaded ({one_line(error)}): give a checkpoint of sevenn, "
                        "or a name that it knows, such as 7net-0") from error
