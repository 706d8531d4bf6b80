"""MACE's messages: a tensor product for each edge, summed over the edges of each atom, at a fraction of the cost.

With the features x of an edge's sender, the spherical harmonics Y of its direction, and weights w of its length, each
path from one of x's irreps to one of the messages' gives each receiver and each channel u

    A_ku = sum_edges sum_i M_ik w_u x_iu,        M_ik = sum_j C_ijk Y_j

with Clebsch-Gordan coefficients C. M belongs to the edge, not to its channels: all is products of small matrices, path
by path. e3nn makes x_iu Y_j for each channel and messages of all paths for all edges, and its code, differentiated
twice as forces need it, goes over such tensors dozens of times: they take half a training step on a CPU. Here none is
made. Values and gradients are the same.
"""

import itertools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from mace.modules import blocks as mace_blocks
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from mace_peft.e3nn import o3

SUM_OF_MACE = mace_blocks.scatter_sum
SMALL = 6  # entries of a matrix: up to these, torch's product of many of them takes 5 to 20 times as long as a sum
# of each tensor product: its blocks, its buffers, and their state when the blocks were read
KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Path(NamedTuple):
    """weights: their columns; columns: of the messages; coefficients: those of M that belong to it."""

    weights: slice
    columns: slice
    coefficients: slice


class Block(NamedTuple):
    """One of the irreps of x, and the paths from it.

    columns: of x; C: (components of Y, components of x times those of all its messages).
    """

    columns: slice
    channels: int
    C: Tensor
    paths: list[Path]


class FastProduct(o3.TensorProduct):
    """For training: TorchScript and files take the class that it was."""

    def forward(self, x, y, weight: Tensor) -> Tensor:
        if mace_blocks.scatter_sum is not summed:
            return super().forward(x, y, weight)
        return Unsummed(blocks_of(self), self.irreps_out.dim, x, y, weight)


def fast_messages(model: nn.Module, fast: bool = True) -> nn.Module:
    """Give the messages of the model the cheaper product, or e3nn's own again. Returns the model.

    Those of accelerated backends stay, and tensor products of another kind than MACE's.
    """
    for module in model.modules():
        if type(module) is FastProduct and not fast:
            module.__class__ = o3.TensorProduct
        elif type(module) is o3.TensorProduct and fast and is_of_messages(module):
            module.__class__ = FastProduct
    return model


def is_of_messages(product: o3.TensorProduct) -> bool:
    """Whether each path has weights for each edge and channel, and messages of its own."""
    paths = product.instructions
    return not product.shared_weights and all(mul == 1 for mul, _ in product.irreps_in2) and len(paths) == len(
        product.irreps_out) == len({i.i_out for i in paths}) and all(
        i.connection_mode == "uvu" and i.has_weight for i in paths)


def blocks_of(product: o3.TensorProduct) -> list[Block]:
    """The product's blocks, read again where its buffers have changed since."""
    buffers = list(product.buffers())
    state = [buffer._version for buffer in buffers]
    if product in KNOWN:
        blocks, known_buffers, known_state = KNOWN[product]
        if all(map(operator.is_, buffers, known_buffers)) and state == known_state:
            return blocks
    KNOWN[product] = read_blocks(product), buffers, state
    return KNOWN[product][0]


@torch.no_grad()
def read_blocks(product: o3.TensorProduct) -> list[Block]:
    """The constants are those of the product's own code, which a foundation may have rounded: its messages of units."""
    Y = torch.eye(product.irreps_in2.dim).to(product.output_mask)
    ends = list(itertools.accumulate((product.irreps_in1[i.i_in1].mul for i in product.instructions), initial=0))
    weights, columns = [slice(*pair) for pair in itertools.pairwise(ends)], product.irreps_out.slices()
    blocks = []
    for number, (part, (channels, ir)) in enumerate(zip(product.irreps_in1.slices(), product.irreps_in1, strict=True)):
        found = [(index, i) for index, i in enumerate(product.instructions) if i.i_in1 == number]
        if not found:  # the messages have none of its irreps
            continue
        units = []
        for component in range(ir.dim):
            x = Y.new_zeros(len(Y), product.irreps_in1.dim)
            x[:, part].view(-1, channels, ir.dim)[..., component] = 1
            messages = o3.TensorProduct.forward(product, x, Y, Y.new_ones(len(Y), product.weight_numel))
            units.append([messages[:, columns[i.i_out]].unflatten(1, (channels, -1))[:, 0] for _, i in found])
        C = torch.stack([torch.cat(unit, 1) for unit in units], 1)
        ends = itertools.accumulate((unit.shape[1] for unit in units[0]), initial=0)
        paths = [Path(weights[index], columns[i.i_out], slice(*pair))
                 for (index, i), pair in zip(found, itertools.pairwise(ends), strict=True)]
        blocks.append(Block(part, channels, C, paths))
    return blocks


class Unsummed(NamedTuple):
    """What the messages of the edges are made of, for ``summed``: in the layouts of e3nn's tensor product."""

    blocks: list[Block]
    width: int
    x: Tensor
    Y: Tensor
    w: Tensor


def summed(src: Tensor | Unsummed, index: Tensor, **options) -> Tensor:
    """MACE's ``scatter_sum``, and messages (receivers, width) from what they are made of."""
    if not isinstance(src, Unsummed):
        return SUM_OF_MACE(src, index, **options)
    return Messages.apply(src.blocks, src.width, index, options["dim_size"], src.x, src.Y, src.w)


class Messages(torch.autograd.Function):
    """Messages (atoms, width) of x (edges, irreps_in1), Y (edges, irreps_in2) and w (edges, weights)."""

    @staticmethod
    def forward(ctx, blocks: list[Block], width: int, receivers: Tensor, atoms: int, x: Tensor, Y: Tensor, w: Tensor):
        ctx.blocks = blocks
        ctx.save_for_backward(receivers, x, Y, w)
        messages = x.new_empty(atoms, width)
        for block, x_b, M in each(blocks, x, Y):
            for path in block.paths:
                put(messages, path, block, receivers, times(M[:, :, path.coefficients].mT, x_b * of_path(w, path)))
        return messages

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple:
        return None, None, None, None, *Gradients.apply(ctx.blocks, g, *ctx.saved_tensors)


class Gradients(torch.autograd.Function):
    """The gradients of the messages for x, Y and w, from that for the messages, g."""

    @staticmethod
    def forward(ctx, blocks: list[Block], g: Tensor, receivers: Tensor, x: Tensor, Y: Tensor, w: Tensor) -> tuple:
        ctx.blocks = blocks
        ctx.save_for_backward(g, receivers, x, Y, w)
        of_x, of_Y, of_w = torch.zeros_like(x), torch.zeros_like(Y), torch.empty_like(w)
        for block, x_b, M in each(blocks, x, Y):
            of_x_b, of_M = torch.zeros_like(x_b), torch.empty_like(M)
            for path in block.paths:
                g_p, w_p = get(g, path, block, receivers), of_path(w, path)
                h = times(M[:, :, path.coefficients], g_p)
                of_x_b.addcmul_(h, w_p)
                torch.sum(h * x_b, 1, out=of_w[:, path.weights])
                of_M[:, :, path.coefficients] = (x_b * w_p) @ g_p.mT
            of_x[:, block.columns] = of_x_b.mT.flatten(1)
            of_Y.addmm_(of_M.flatten(1), block.C.flatten(1).T)
        return of_x, of_Y, of_w

    @staticmethod
    @once_differentiable
    def backward(ctx, v_x: Tensor, v_Y: Tensor, v_w: Tensor) -> tuple:
        """Of the sum of v_x of_x + v_Y of_Y + v_w of_w, in which each argument is linear."""
        g, receivers, x, Y, w = ctx.saved_tensors
        of_g, of_x, of_Y, of_w = torch.empty_like(g), torch.zeros_like(x), torch.zeros_like(Y), torch.empty_like(w)
        for (block, x_b, M), (_, v_b, M_v) in zip(each(ctx.blocks, x, Y), each(ctx.blocks, v_x, v_Y), strict=True):
            components = x_b.shape[1]
            both = torch.cat([M, M_v], 1)
            of_x_b, of_M = torch.zeros_like(x_b), torch.empty_like(M)
            for path in block.paths:
                g_p, w_p, v_p = get(g, path, block, receivers), of_path(w, path), of_path(v_w, path)
                both_p = both[:, :, path.coefficients]
                z = torch.cat([torch.addcmul(v_b * w_p, x_b, v_p), x_b * w_p], 1)
                put(of_g, path, block, receivers, times(both_p.mT, z))
                h, h_v = times(both_p, g_p).split(components, 1)
                of_x_b.addcmul_(h, v_p).addcmul_(h_v, w_p)
                torch.sum(torch.addcmul(v_b * h, x_b, h_v), 1, out=of_w[:, path.weights])
                of_M[:, :, path.coefficients] = z[:, :components] @ g_p.mT
            of_x[:, block.columns] = of_x_b.mT.flatten(1)
            of_Y.addmm_(of_M.flatten(1), block.C.flatten(1).T)
        return None, of_g, None, of_x, of_Y, of_w


def each(blocks: list[Block], x: Tensor, Y: Tensor) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each block with its part of x (edges, components, channels) and M (edges, components, those of its messages)."""
    for block in blocks:
        M = (Y @ block.C.flatten(1)).unflatten(1, block.C.shape[1:])
        yield block, x[:, block.columns].unflatten(1, (block.channels, -1)).mT.contiguous(), M


def times(M: Tensor, x: Tensor) -> Tensor:
    """M (edges, rows, components) @ x (edges, components, channels)."""
    rows, components = M.shape[1:]
    if components > 1 and rows * components > SMALL:
        return M @ x
    product = M[:, :, :1] * x[:, :1]
    for i in range(1, components):
        product.addcmul_(M[:, :, i : i + 1], x[:, i : i + 1])
    return product


def of_path(w: Tensor, path: Path) -> Tensor:
    return w[:, path.weights].unsqueeze(1)


def get(messages: Tensor, path: Path, block: Block, receivers: Tensor) -> Tensor:
    """For each edge, those of the path at its receiver: (edges, components, channels)."""
    return messages[:, path.columns].unflatten(1, (block.channels, -1)).mT.contiguous()[receivers]


def put(messages: Tensor, path: Path, block: Block, receivers: Tensor, of_edges: Tensor) -> None:
    """The sum at each receiver of those of the path, in the layout of e3nn's tensor product."""
    sums = of_edges.new_zeros(len(messages), *of_edges.shape[1:]).index_add_(0, receivers, of_edges)
    messages[:, path.columns].unflatten(1, (block.channels, -1)).copy_(sums.mT)
