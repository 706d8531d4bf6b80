"""mace_run_train in the time that the accuracy benchmark has, and with the ablations of arXiv 2511.06696.

    python benchmarks/train.py whole --foundation_model=foundation.model --train_file=train.xyz ...

whole: as it is, but that contractions of every method are computed by element, for the same numbers in two thirds of
the time. The others hold back a part of MMEA's gate. static: the gain of a channel and the shift of a scalar are learnt
constants. scalars: scalars are shifted, and nothing else is scaled. shared: one gain for all channels. What is held
back stays where it starts, at a gain of 1 and no shift: its gradients are zero, and those of a shared gain are the same
for every channel. senders: gates of messages see the scalars of the atom that sends, not of the one that receives.
"""

import sys

import torch
from senders import BY_SENDERS

from mace_peft import run_train
from mace_peft.blocks.mace import OPERATIONS
from mace_peft.e3nn import o3
from mace_peft.fast.arithmetic import fast_arithmetic
from mace_peft.methods import MMEA


def hold(gradient: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(gradient)


def share(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sum(-1, keepdim=True).expand_as(gradient)


HELD = {
    "whole": {},
    "static": {"W1": hold, "b1": hold, "W2": hold, "W0": hold},
    "scalars": {"W2": hold, "b2": hold},
    "shared": {"W2": share, "b2": share},
    "senders": {},
}


def learnt(kind: str, adapter: dict[str, torch.Tensor]) -> int:
    """How many numbers are learnt, from the tensors of an adapter's gates."""
    count = 0
    for name, tensor in adapter.items():
        held = HELD[kind].get(name.rpartition(".")[2])
        count += 0 if held is hold else tensor[..., :1].numel() if held is share else tensor.numel()
    return count


def main() -> None:
    kind = sys.argv.pop(1)
    initialise = MMEA.__init__

    def __init__(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        for name, change in HELD[kind].items():
            getattr(self, name).register_hook(change)

    MMEA.__init__ = __init__
    if kind == "senders":
        OPERATIONS[o3.TensorProduct] = BY_SENDERS
    with fast_arithmetic():
        run_train.main()


if __name__ == "__main__":
    main()
