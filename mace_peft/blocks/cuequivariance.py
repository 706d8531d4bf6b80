"""cuEquivariance's layers in the places of adapted ones.

MACE converts the base, and ``carry_over`` gives the layers that took the places of adapted ones the same adapters,
under the same names. So what trains is the same on both. Import this module only where cuEquivariance is installed.
"""

import copy

import cuequivariance as cue
import cuequivariance_torch as cuet
import torch
from mace.tools.cg import O3_e3nn
from torch import Tensor, nn

from mace_peft.blocks.adapted import Adapted, Updated, adapters_of, over, plain, put_in
from mace_peft.blocks.e3nn import GatedMessages
from mace_peft.e3nn import o3
from mace_peft.errors import PeftError


class CueGated(Adapted):
    """A layer whose first input's scalars drive, and whose output takes, the gate."""

    def forward(self, features: Tensor, *others: Tensor) -> Tensor:
        return self.adapter(features, self.plain_forward(features, *others))


class CueGatedMessages(Adapted):
    """``GatedMessages`` with cuEquivariance's layer."""

    def forward(self, messages: Tensor) -> Tensor:
        messages = self.adapter["messages"](messages, messages)
        return self.adapter["output"](messages, self.plain_forward(messages))


class CueContractions(cuet.SymmetricContraction):
    """All contractions of a product block in one, whose weights are those of MACE's joined and mapped path by path.

    ``contractions`` holds the adapters, each where MACE has its contraction.
    """

    def forward(self, *args, **kwargs):
        adapted = [contraction for contraction in self.contractions if isinstance(contraction, CueContraction)]
        weight = self.weight + sum(contraction.update() for contraction in adapted)
        layer = over(self, {"weight": weight})
        layer.__class__ = cuet.SymmetricContraction
        return layer.forward(*args, **kwargs)


class CueContraction(Adapted):
    """Has the adapter of one of MACE's contractions, and knows the places of its weights in the joined one.

    joined: the weights' names and shapes (elements, paths, channels), in the order in which MACE joins them.
    path_map: (paths, paths of the joined contraction). base: the weights of MACE's contraction, which the adapter maps.
    """

    def __init__(self, joined: dict[str, torch.Size], path_map: Tensor, base: dict[str, Tensor]):
        super().__init__()
        self.joined = joined
        self.register_buffer("path_map", path_map, persistent=False)
        for name, weight in base.items():
            self.register_buffer(name.replace(".", "_"), weight.detach().clone(), persistent=False)

    def update(self) -> Tensor:
        """What the adapter adds to the joined weight."""
        base = {name: self.get_buffer(name.replace(".", "_")) for name in self.adapter.names}
        return self.mapped({name: weight - base[name] for name, weight in self.adapter.at_strength(base).items()})

    def mapped(self, weights: dict[str, Tensor]) -> Tensor:
        """Weights of the joined contraction from these; those that are not given are zero."""
        of_paths = [weights.get(name, self.path_map.new_zeros(shape)) for name, shape in self.joined.items()]
        return torch.einsum("zau,ab->zbu", torch.cat(of_paths, dim=1), self.path_map)


def carry_over(blocks: dict[str, Adapted], base: nn.Module | None, accelerated: nn.Module) -> None:
    """Give the converted base copies of the adapters of these blocks, by name.

    base: the model that was converted, which the adapters of contractions need.
    """
    layout = accelerated.products[0].cueq_config.layout_str
    for name, block in blocks.items():
        adapter = copy.deepcopy(block.adapter)
        if ".contractions." in name:
            owner, index = name.rsplit(".contractions.", 1)
            carry_contraction(adapter, int(index), base.get_submodule(owner), accelerated.get_submodule(owner))
            continue
        target = accelerated.get_submodule(name)
        put_in(target, mixin_for(block, target), adapter)
        if type(target).__bases__[-1] is not o3.Linear:  # of which PolarMACE keeps some
            for gate in adapters_of(target).values():
                if gate.on_features:
                    gate.set_layout(layout)


def mixin_for(block: Adapted, target: nn.Module) -> type[Adapted]:
    """What makes the layer that took the block's place an adapted one."""
    mixin = type(block).__bases__[0]
    if isinstance(block, Updated) or isinstance(target, plain(block)):
        return mixin
    return CueGatedMessages if mixin is GatedMessages else CueGated


def carry_contraction(adapter: nn.Module, index: int, plain: nn.Module, target: nn.Module) -> None:
    """Give the joined contraction (target) the adapter of one contraction of the plain base.

    Raises PeftError if MACE joins the weights in another way than is known here.
    """
    joined = [joined_weights(contraction, target) for contraction in plain.contractions]
    paths = [sum(shape[1] for shape in weights.values()) for weights in joined]
    path_maps = path_map_of(plain, target, sum(paths)).to(target.weight).split(paths)
    holders = [CueContraction(weights, path_map, {name: contraction.get_parameter(name) for name in weights})
               for contraction, weights, path_map in zip(plain.contractions, joined, path_maps, strict=True)]
    known = sum(holder.mapped(dict(contraction.named_parameters()))
                for holder, contraction in zip(holders, plain.contractions, strict=True))
    if not torch.allclose(known, target.weight, rtol=1e-4, atol=1e-6):
        raise PeftError("this mace-torch joins the contractions for cuEquivariance in a way that is not known to this "
                        "mace-peft: leave out --enable_cueq")
    if not isinstance(target, CueContractions):
        target.__class__ = CueContractions
        target.contractions = nn.ModuleList(nn.Module() for _ in holders)
    target.contractions[index] = holders[index]
    target.contractions[index].adapter = adapter


def joined_weights(contraction: nn.Module, target: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the contraction's weights that MACE joins: not those of paths that do not exist."""
    names = ["weights_max", *(f"weights.{order}" for order in range(len(contraction.weights)))]
    return {name: contraction.get_parameter(name).shape for name in names
            if target.projection is None or not getattr(contraction, f"{name.replace('.', '_')}_zeroed", False)}


def path_map_of(plain: nn.Module, target: nn.Module, paths: int) -> Tensor:
    """The paths of MACE's contractions in terms of those of the joined one (paths x paths of target)."""
    if target.projection is not None:  # it has MACE's paths, and maps them in its forward
        return torch.eye(paths)
    from mace.tools.cg_cueq_tools import symmetric_contraction_proj  # mace-torch 0.3.14 and later

    irreps = [cue.Irreps(O3_e3nn, str(o3.Irreps(ir for _, ir in irreps))) for irreps in
              (plain.irreps_in, plain.irreps_out)]
    return torch.as_tensor(symmetric_contraction_proj(*irreps, list(range(1, target.contraction_degree + 1)))[1])
