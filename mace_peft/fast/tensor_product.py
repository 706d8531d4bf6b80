"""The tensor product that makes MACE's messages, with a backward pass that copies less.

e3nn cuts the inputs of a tensor product into blocks by slices, and joins its blocks by ``torch.cat``. The gradient of a
slice is as wide as what it was cut from, and zero elsewhere; and so, where forces are fitted, is the gradient of the
gradient of ``torch.cat``. For a tensor of (edges, channels of all blocks) that is filled and added once for each block,
they take a third of a training step on a CPU. ``torch.split`` has the gradient ``torch.cat``: here it does the cutting,
and is the gradient of the joining. Values and gradients are the same.
"""

import functools
import operator

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from mace_peft.e3nn import codegen_tensor_product, o3


class SplitProduct(o3.TensorProduct):
    """For training: TorchScript and files take the class that it was."""

    def forward(self, x, y, weight: Tensor | None = None) -> Tensor:
        constants = dict(self._compiled_main_left_right.named_buffers())  # a foundation may have them rounded
        code = split_code(self.irreps_in1, self.irreps_in2, self.irreps_out, tuple(self.instructions),
                          self.shared_weights, self._specialized_code, self._optimize_einsums)
        return functional_call(code, constants, (x, y, self._get_weights(weight)))


def split_messages(model: nn.Module, split: bool = True) -> nn.Module:
    """Give the messages of the model the cheaper product, or e3nn's own again. Returns the model.

    Those of accelerated backends stay.
    """
    for module in model.modules():
        if type(module) in (o3.TensorProduct, SplitProduct):
            module.__class__ = SplitProduct if split else o3.TensorProduct
    return model


@functools.cache
def split_code(*recipe) -> fx.GraphModule:
    """e3nn's code of that tensor product, with other cuts and joins."""
    code = codegen_tensor_product(*recipe)
    for node in list(code.graph.nodes):
        if node.target is torch.cat:
            node.target = join
        cut_by_split(code.graph, [user for user in node.users if is_cut(user)])
    code.recompile()
    return code


def is_cut(node: fx.Node) -> bool:
    """Whether it is ``tensor[:, start:stop]``."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    rows, *columns = node.args[1]
    return rows == slice(None) and len(columns) == 1 and isinstance(columns[0], slice)


def cut_by_split(graph: fx.Graph, cuts: list[fx.Node]) -> None:
    """Replace cuts of one tensor by one split, if they are all its columns, one after the other."""
    cuts = sorted(cuts, key=lambda cut: cut.args[1][1].start)
    columns = [cut.args[1][1] for cut in cuts]
    ends = [0, *(cut.stop for cut in columns)]
    if not cuts or [cut.start for cut in columns] != ends[:-1] or ends[-1] != width(cuts[0].args[0]):
        return
    with graph.inserting_after(cuts[0].args[0]):
        parts = graph.call_method("split", (cuts[0].args[0], [cut.stop - cut.start for cut in columns], 1))
    for index, cut in enumerate(cuts):
        cut.args = (parts, index)


def width(node: fx.Node) -> int | None:
    """Columns of ``tensor.reshape(-1, columns)``."""
    return node.args[2] if node.target == "reshape" and len(node.args) == 3 else None


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [part.shape[dim] for part in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return None, *gradient.split(ctx.sizes, ctx.dim)


def join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``, whose gradient is ``torch.split``."""
    return Join.apply(dim, *parts)
