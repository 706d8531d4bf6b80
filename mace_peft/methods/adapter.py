"""What all adapters share, and the two protocols: of weights, and of features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mace_peft.methods.weights import Part
from mace_peft.restore import restore


class Adapter(nn.Module):
    """An adapter maps the weights of one operation to the weights that it runs with.

    It is made from ``(parts, weights, **settings)``: the weights as data, their values at the start, and the settings
    that it names. ``forward(weights)`` takes ``{name: raw weight}`` and returns those that it changes, in the same
    shapes. An adapter of features says so (``on_features``), see ``MMEA``.

    kind: what trains, in the table of a run. names: the weights that it reads, set by who puts it in.
    strength: 0 to 1, by how much it acts, see ``at_strength``; an adapter of features has it in its own ``forward``.
    """

    # without annotations, which TorchScript of torch 2.1 would have to read
    names = ()
    kind = ""
    settings = ()
    on_features = False
    without_rank = None  # what is left of the adapter, as a class, where no rank was chosen

    def __init__(self):
        super().__init__()
        self.strength = 1.0

    def at_strength(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """``forward`` at the strength s: W + s (W' - W) for each weight W that the adapter makes W'.

        At 0 it gives the weights and at 1 those of ``forward``, to the last bit.
        """
        if self.strength == 0:
            return weights
        made = self(weights)
        if self.strength == 1:
            return made
        return {name: torch.lerp(weights[name], weight, self.strength) for name, weight in made.items()}

    @classmethod
    def largest_rank(cls, parts: Sequence[Part]) -> int:
        """The largest rank that is of use; 0 where the adapter has none."""
        return 0

    def low_rank_updates(self, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, each low-rank matrix that it adds, and what it is added to; none unless the adapter says so."""
        return {}

    def gains(self) -> Tensor | None:
        """The constants by which it scales output channels, if it has some."""
        return None

    def gradients_by_rank(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Matrices whose leading singular values say what each rank gains, from the gradients of the weights."""
        return [gradient for _, gradient in self.low_rank_updates(gradients).values()]

    def start_along(self, gradients: dict[str, Tensor]) -> None:
        """Turn what is random at the start towards the gradients of the weights, given by the weights' names.

        An adapter that has nothing of the kind does nothing.
        """

    def __reduce_ex__(self, protocol):
        if not type(self).__module__.startswith("mace_peft."):  # a method that another package brings
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(protocol)
        return restore, ("adapter", type(self).__name__), *state

    def __repr__(self):
        return f"{type(self).__name__}({sum(p.numel() for p in self.parameters())} weights)"


class Full(Adapter):
    """A full update of each part: W <- W + s, with s = 0 at the start. Of the E0s it is a shift in eV."""

    kind = "shift"

    def __init__(self, parts: Sequence[Part], weights: dict[str, Tensor]):
        super().__init__()
        self.keys = {part.weight.replace(".", "_"): part.weight for part in parts}  # parameters' names have no dots
        self.s = nn.ParameterDict({part.weight.replace(".", "_"): torch.zeros(part.rows, part.columns)
                                   for part in parts})

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weights[name] + self.s[key].view(weights[name].shape) for key, name in self.keys.items()}
