"""Which gains the gates had on the training set, and a warning where those of a prediction are far from them."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from ase import Atoms
from mace.tools.torch_geometric import Batch
from torch import Tensor, nn

from mace_peft.blocks.adapted import adapted_blocks, adapters_of
from mace_peft.methods import MMEA
from mace_peft.model import isolated

MARGIN, LEAST = 0.25, 1.1  # of the width of a range, in logarithms, and as a factor: gains further outside are far


def gates_with_gains(model: nn.Module) -> dict[MMEA, str]:
    """The gates of an adapted model that have gains, and the names of their modules."""
    return {gate: name if what == "output" else f"{name}, {what}" for name, block in adapted_blocks(model).items()
            for what, gate in adapters_of(block).items() if gate.on_features and gate.b2.numel()}


@contextlib.contextmanager
def watched(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the gains (atoms, channels) of each gate, with the name of its module, while the model predicts."""
    def listen(gate: MMEA, inputs: tuple[Tensor, Tensor]) -> None:
        if not isolated.UNDER_WAY.get():
            see(names[gate], gate.coefficients(inputs[0])[0].detach())

    names = gates_with_gains(model)
    with contextlib.ExitStack() as hooks:
        for gate in names:
            hooks.callback(gate.register_forward_pre_hook(listen).remove)
        yield


@torch.no_grad()
def gain_ranges(model: nn.Module, batches: Iterable[Batch]) -> dict[str, dict[str, float]] | None:
    """The lowest and the highest gain at each gate, by the name of its module, over the atoms of MACE's batches.

    Gates whose gains are not finite have no entry. None if no gate has gains.
    """
    found: dict[str, dict[str, float]] = {}

    def see(name: str, gains: Tensor) -> None:
        if gains.numel():
            known = found.get(name, {"low": math.inf, "high": -math.inf})
            found[name] = {"low": min(known["low"], gains.min().item()), "high": max(known["high"], gains.max().item())}

    if not gates_with_gains(model):
        return None
    with watched(model, see):
        device = next(model.parameters()).device
        for batch in batches:
            model(batch.to(device).to_dict(), training=False, compute_force=False)
    return {name: ends for name, ends in found.items() if all(map(math.isfinite, ends.values()))}


class Guard:
    """Warns once where a prediction has gains far from those on the training set; after that, it costs nothing.

    The model has ``peft_gains``, the ranges of ``gain_ranges``, or None, and then nothing is watched.
    """

    def __init__(self, model: nn.Module):
        self.ranges = getattr(model, "peft_gains", None) or {}
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.watching = contextlib.ExitStack()
        if self.ranges:
            self.watching.enter_context(watched(model, self.see))

    def see(self, name: str, gains: Tensor) -> None:
        if name in self.ranges and gains.numel():
            self.seen[name] = gains.amin(-1), gains.amax(-1)

    def begin(self) -> None:
        """Forget what was seen of other structures, such as one whose prediction failed."""
        self.seen.clear()

    def check(self, atoms: Atoms) -> None:
        """Warn if gains that were seen since ``begin`` are far from those in training."""
        for name, (low, high) in self.seen.items():
            known = self.ranges[name]
            least, most = limits(**known)
            for gain, atom, far in ((low.min(), low.argmin(), low.min() < least),
                                    (high.max(), high.argmax(), high.max() > most)):
                if far:
                    self.watching.close()
                    warnings.warn(
                        f"the gate at {name} has a gain of {gain:.3g} at atom {atom} ({atoms.symbols[atom]}) of "
                        f"{atoms.get_chemical_formula()}, and {known['low']:.3g} to {known['high']:.3g} on the "
                        "training set: this structure may be unlike all that the adapter was trained for; "
                        "compare with the foundation", stacklevel=2)
                    return


def limits(low: float, high: float) -> tuple[float, float]:
    """Beyond which gains are far from a range."""
    margin = max((high / low) ** MARGIN, LEAST)
    return low / margin, high * margin
