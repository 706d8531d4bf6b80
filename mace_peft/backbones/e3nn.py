"""Models that are made of e3nn's own layers; what other backbones add to them is in modules of their own."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from mace_peft.blocks import e3nn
from mace_peft.blocks.operation import Operations, operation_of

LINEARS = {"linear", "energies"}
PUBLISHED = LINEARS | {"tensor product", "radial MLP"}


class Backbone:
    """What the package asks about a model. These answers are those of any stack of e3nn's layers.

    operations: what its modules are to the methods. placements: the roles of the operations that a placement means.
    pattern: an example of a glob pattern, for errors. untrained: names of parameters that are constants.
    """

    name = "e3nn"
    operations: Operations = e3nn.OPERATIONS
    placements: Mapping[str, set[str]] = {"linears": LINEARS, "published": PUBLISHED, "all": PUBLISHED}
    pattern = "*.linear"
    untrained: Collection[str] = ()

    def fits(self, model: nn.Module) -> bool:
        return any(operation_of(module, self.operations) for module in model.modules())

    def receivers(self, model: nn.Module) -> dict[str, str]:
        """For each convolution the linear layer that takes its messages, by their names."""
        return {}

    def backend(self, model: nn.Module) -> str | None:
        """The accelerated backend whose layers the model has, if any."""
        return None

    def check_new(self, model: nn.Module) -> None:
        """Raise PeftError if the model takes no new adapters."""

    def describe(self, model: nn.Module) -> dict:
        """What an adapter directory says of the model: class, elements (atomic numbers) and heads, if it has such."""
        return {"model_class": type(model).__name__, "elements": None, "heads": None}

    def constants(self, model: nn.Module) -> dict[str, tuple[str, Tensor]]:
        """Names and values of the buffers that a run sets: E0s, scale and shift (eV), if it has such."""
        return {}

    def isolated_atoms(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Atoms without neighbours as the model takes them, one of each element for each head; None: it has no E0s."""
        return None

    def is_narrowed(self, foundation: nn.Module, description: dict) -> bool:
        """Whether the model has the elements and heads of that description."""
        return True

    def narrow(self, foundation: nn.Module, description: dict) -> nn.Module:
        """A new model with the foundation's weights for the elements and heads of the description."""
        return foundation
