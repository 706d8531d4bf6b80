"""The backward pass of the loss, to what trains alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mace_peft.replaced import replaced


@contextlib.contextmanager
def backward_to(trained: Callable[[], list[nn.Parameter]]) -> Iterator[None]:
    """``loss.backward()`` computes the gradients of these parameters and of nothing else, for a while.

    MACE's positions are leaves that need gradients, for the forces are gradients: its own ``loss.backward()`` carries
    the gradient of the loss down to them, through the whole network, and nobody reads it there. The gradients of what
    trains are the same to the last bit.
    """
    def backward(loss: Tensor, *args, **kwargs) -> None:
        torch.autograd.backward(loss, *args, inputs=trained(), **kwargs)

    with replaced(torch.Tensor, "backward", backward):
        yield
