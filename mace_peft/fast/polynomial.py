"""A symmetric polynomial of up to third order, for many atoms and channels, with derivatives that share its sums.

x: (channels, components, atoms). Coefficients of each order: (channels, outputs times components, 1 | components |
pairs), symmetric in all components, where the last of third order are for pairs j <= k, twice for j < k.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def polynomial(x: Tensor, *K: Tensor) -> Tensor:
    """sum_i x_i (K1_oi + sum_j K2_oij x_j + sum_jk K3_oijk x_j x_k): (channels, outputs, atoms)."""
    out = Polynomial.apply(x, *K)
    if any(coefficient.requires_grad for coefficient in K):
        out = out + Coefficients.apply(x.detach(), *K)
    return out


class Polynomial(torch.autograd.Function):
    """The polynomial, whose gradient goes to x alone. Forces are such a gradient: those of K would be made in vain."""

    @staticmethod
    def forward(ctx, x: Tensor, *K: Tensor) -> Tensor:
        terms = [coefficient if order == 0 else torch.bmm(coefficient, monomials)
                 for order, (coefficient, monomials) in enumerate(zip(K, powers(x, len(K)), strict=True))]
        inner, slope = terms[0], terms[0]
        for order, term in enumerate(terms[1:], start=2):
            inner, slope = inner + term, slope + order * term
        ctx.save_for_backward(x, slope, *K)
        return (by_component(inner, x) * x.unsqueeze(1)).sum(2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return Slope.apply(gradient, *ctx.saved_tensors), *[None] * (len(ctx.saved_tensors) - 2)


class Slope(torch.autograd.Function):
    """The gradient of the polynomial for x: sum_o gradient_o slope_oi, where slope = d out / d x is known."""

    @staticmethod
    def forward(ctx, gradient: Tensor, x: Tensor, slope: Tensor, *K: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, x, slope, *K)
        return (gradient.unsqueeze(2) * by_component(slope, x)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor) -> tuple:
        """v: (channels, components, atoms), the gradient of what ``forward`` gave."""
        gradient, x, slope, *K = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_gradient = (by_component(slope, x) * v.unsqueeze(1)).sum(2)
        y = (gradient.unsqueeze(2) * v.unsqueeze(1)).flatten(1, 2)
        of_x = None
        if needed[1]:
            of_x = torch.zeros_like(x)
            if len(K) > 1:
                of_x = of_x.baddbmm_(K[1].mT, y, alpha=2)
            if len(K) > 2:
                add_gradient_of_pairs(of_x, x, 3 * torch.bmm(K[2].mT, y))
        of_K = [None] * len(K)
        if any(needed[3:]):
            of_K = [order * gradient for order, gradient in enumerate(of_coefficients(y, x, len(K)), start=1)]
        return of_gradient, of_x, None, *of_K


class Coefficients(torch.autograd.Function):
    """Zero, with the gradient that the polynomial has for K."""

    @staticmethod
    def forward(ctx, x: Tensor, *K: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.orders = len(K)
        channels, components, atoms = x.shape
        return x.new_zeros(()).expand(channels, K[0].shape[1] // components, atoms)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        x, = ctx.saved_tensors
        return None, *of_coefficients((gradient.unsqueeze(2) * x.unsqueeze(1)).flatten(1, 2), x, ctx.orders)


def of_coefficients(y: Tensor, x: Tensor, orders: int) -> list[Tensor]:
    """The gradients of K from those of what it gives for each output and component, y."""
    return [y.sum(2, keepdim=True) if order == 0 else torch.bmm(y, monomials.mT)
            for order, monomials in enumerate(powers(x, orders))]


def by_component(values: Tensor, x: Tensor) -> Tensor:
    """(channels, outputs times components, atoms or 1) as (channels, outputs, components, atoms or 1)."""
    return values.unflatten(1, (-1, x.shape[1]))


def powers(x: Tensor, orders: int) -> list[Tensor]:
    """What the coefficients of each order are multiplied by: 1, x_j, x_j x_k for j <= k."""
    return [x[:, :0], x, pairs(x) if orders > 2 else x][:orders]


def pairs_of(components: int) -> Tensor:
    """(2, pairs): all j <= k, in the order of ``pairs``."""
    return torch.triu_indices(components, components)


def pairs(x: Tensor) -> Tensor:
    """x_j x_k for j <= k: (channels, pairs, atoms)."""
    channels, components, atoms = x.shape
    products, start = x.new_empty(channels, components * (components + 1) // 2, atoms), 0
    for j in range(components):
        stop = start + components - j
        torch.mul(x[:, j : j + 1], x[:, j:], out=products[:, start:stop])
        start = stop
    return products


def add_gradient_of_pairs(total: Tensor, x: Tensor, gradient: Tensor) -> None:
    """Add to the total (as x) the gradient for x of ``pairs``, from that of the pairs."""
    components = x.shape[1]
    for j, part in enumerate(gradient.split(list(range(components, 0, -1)), 1)):
        total[:, j:].addcmul_(part, x[:, j : j + 1])
        total[:, j].add_((part * x[:, j:]).sum(1))
