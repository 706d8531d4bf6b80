"""The backward pass of the loss, to what trains alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def backward_to(trained: Callable[[], list[nn.Parameter]]) -> Callable[..., None]:
    """A ``torch.Tensor.backward`` that computes the gradients of these parameters and of nothing else.

    MACE's positions are leaves that need gradients, for the forces are gradients: its own ``loss.backward()`` carries
    the gradient of the loss down to them, through the whole network, and nobody reads it there. The gradients of what
    trains are the same to the last bit.
    """
    def backward(loss: Tensor, *args, **kwargs) -> None:
        torch.autograd.backward(loss, *args, inputs=trained(), **kwargs)

    return backward
