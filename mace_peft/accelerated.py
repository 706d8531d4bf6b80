"""Adapted models on the layers of cuEquivariance.

MACE converts the base, and ``carry_over`` gives the layers that took the places of adapted ones the same adapters,
under the same names. So what trains is the same on both, and ``copy_trained`` is the way back. Import this module only
where cuEquivariance is installed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import cuequivariance as cue
import cuequivariance_torch as cuet
import torch
from e3nn import o3
from mace.tools.cg import O3_e3nn
from torch import Tensor, nn

from mace_peft.adapted import (
    Adapted,
    GatedLinear,
    GatedMessages,
    GatedTensorProduct,
    LowRank,
    LowRankContraction,
    LowRankLinear,
    LowRankTensorProduct,
    Updated,
    gates,
)
from mace_peft.config import PeftError, one_line
from mace_peft.methods import Gains, ScaledUpdate
from mace_peft.models import adapted_blocks, adapted_class, trainable_parameters
from mace_peft.scaled import (
    Scaled,
    ScaledContraction,
    ScaledLinear,
    ScaledLowRankContraction,
    ScaledLowRankLinear,
    ScaledLowRankTensorProduct,
    ScaledTensorProduct,
)


class CueGatedLinear(Adapted, cuet.Linear):
    """``GatedLinear`` with cuEquivariance's layer."""

    def forward(self, features: Tensor) -> Tensor:
        return self.adapter(features, super().forward(features))


class CueGatedMessages(Adapted, cuet.Linear):
    """``GatedMessages`` with cuEquivariance's layer."""

    def forward(self, messages: Tensor) -> Tensor:
        messages = self.adapter["messages"](messages, messages)
        return self.adapter["output"](messages, super().forward(messages))


class CueGatedTensorProduct(Adapted, cuet.FullyConnectedTensorProduct):
    """``GatedTensorProduct`` with cuEquivariance's."""

    def forward(self, features: Tensor, elements: Tensor) -> Tensor:
        return self.adapter(features, super().forward(features, elements))


class CueLowRank(LowRank):
    """Weights in the same order as e3nn's, with a first dimension of 1."""

    def updates(self) -> dict[str, Tensor]:
        return {name: update.reshape(self.get_parameter(name).shape) for name, update in self.adapter().items()}


class CueLowRankLinear(CueLowRank, cuet.Linear):
    pass


class CueLowRankTensorProduct(CueLowRank, cuet.FullyConnectedTensorProduct):
    pass


class CueScaledLinear(Scaled, cuet.Linear):
    pass


class CueScaledTensorProduct(Scaled, cuet.FullyConnectedTensorProduct):
    pass


class CueContractions(Updated, cuet.SymmetricContraction):
    """All contractions of a product block in one, whose weights are those of MACE's joined and mapped path by path.

    ``contractions`` holds the adapters, each where MACE has its contraction.
    """

    def updates(self) -> dict[str, Tensor]:
        adapted = [contraction for contraction in self.contractions if isinstance(contraction, Contraction)]
        return {"weight": sum(contraction.mapped(contraction.updates()) for contraction in adapted)}


class Contraction(Adapted):
    """Has the adapter of one of MACE's contractions, and knows the places of its weights in the joined one.

    joined: the weights' names and shapes (elements, paths, channels), in the order in which MACE joins them.
    path_map: (paths, paths of the joined contraction). base: the weights of MACE's contraction, which gains scale.
    """

    def __init__(self, adapter: nn.Module, joined: dict[str, torch.Size], path_map: Tensor, base: dict[str, Tensor]):
        super().__init__()
        self.adapter = adapter
        self.joined = joined
        self.register_buffer("path_map", path_map, persistent=False)
        self.base = nn.Module()
        for name, weight in base.items():
            self.base.register_buffer(name.replace(".", "_"), weight.detach().clone(), persistent=False)

    def updates(self) -> dict[str, Tensor]:
        if isinstance(self.adapter, (Gains, ScaledUpdate)):
            return self.adapter({name: self.base.get_buffer(name.replace(".", "_")) for name in self.adapter.names})
        return self.adapter()

    def mapped(self, weights: dict[str, Tensor]) -> Tensor:
        """Weights of the joined contraction from these; those that are not given are zero."""
        of_paths = [weights.get(name, self.path_map.new_zeros(shape)) for name, shape in self.joined.items()]
        return torch.einsum("zau,ab->zbu", torch.cat(of_paths, dim=1), self.path_map)


CLASSES = {
    GatedLinear: CueGatedLinear,
    GatedMessages: CueGatedMessages,
    GatedTensorProduct: CueGatedTensorProduct,
    LowRankLinear: CueLowRankLinear,
    LowRankTensorProduct: CueLowRankTensorProduct,
    ScaledLinear: CueScaledLinear,
    ScaledTensorProduct: CueScaledTensorProduct,
    ScaledLowRankLinear: CueScaledLinear,
    ScaledLowRankTensorProduct: CueScaledTensorProduct,
}


def accelerate(model: nn.Module, base: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The adapted model on cuEquivariance's layers, with copies of its adapters.

    base: the model without its adapters, which ``convert`` (MACE's) converts. Raises PeftError if MACE cannot convert
    it, or if something trains that the converted model does not have.
    """
    try:
        accelerated = convert(base)
    except Exception as error:  # a model of an unexpected shape fails in many ways
        raise PeftError(f"MACE cannot convert this model to cuEquivariance ({one_line(error)}): leave out "
                        "--enable_cueq") from error
    held = dict(accelerated.named_parameters())
    lost = [name for name in model.peft_originals if name not in held and model.get_parameter(name).numel()]
    if lost:
        raise PeftError(f"{lost[0]} trains along, and cuEquivariance's layers hold it in another form: leave it out of "
                        "--peft_train_also, or leave out --enable_cueq")
    carry_over(model, base, accelerated)
    accelerated.__class__ = adapted_class(type(accelerated), model.peft_config)
    accelerated.peft_foundation = accelerated.peft_base = None
    return copy_trained(model, accelerated)


def carry_over(model: nn.Module, base: nn.Module, accelerated: nn.Module) -> None:
    """Give the converted base copies of the adapters of the model."""
    layout = accelerated.products[0].cueq_config.layout_str
    for name, block in adapted_blocks(model):
        adapter = copy.deepcopy(block.adapter)
        if isinstance(block, (LowRankContraction, ScaledContraction, ScaledLowRankContraction)):
            owner, index = name.rsplit(".contractions.", 1)
            carry_contraction(adapter, int(index), base.get_submodule(owner), accelerated.get_submodule(owner))
            continue
        target = accelerated.get_submodule(name)
        target.adapter = adapter
        if type(target) is not o3.Linear:  # of which PolarMACE keeps some
            for gate in gates(target).values():
                gate.set_layout(layout)
        same = type(target) is type(block).__bases__[-1]
        target.__class__ = type(block) if same else CLASSES[type(block)]
    accelerated.peft_originals = dict.fromkeys(model.peft_originals)


def carry_contraction(adapter: nn.Module, index: int, plain: nn.Module, target: nn.Module) -> None:
    """Give the joined contraction (target) the adapter of one contraction of the plain base.

    Raises PeftError if MACE joins the weights in another way than is known here.
    """
    joined = [joined_weights(contraction, target) for contraction in plain.contractions]
    ends = list(itertools.accumulate(sum(shape[1] for shape in weights.values()) for weights in joined))
    path_map = path_map_of(plain, target, ends[-1]).to(target.weight)
    holders = [Contraction(None, weights, path_map[end - sum(shape[1] for shape in weights.values()):end],
                           {name: contraction.get_parameter(name) for name in weights})
               for contraction, weights, end in zip(plain.contractions, joined, ends, strict=True)]
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
    absent = {name for name in names if target.projection is not None
              and getattr(contraction, f"{name.replace('.', '_')}_zeroed", False)}
    return {name: contraction.get_parameter(name).shape for name in names if name not in absent}


def path_map_of(plain: nn.Module, target: nn.Module, paths: int) -> Tensor:
    """The paths of MACE's contractions in terms of those of the joined one (paths x paths of target)."""
    if target.projection is not None:  # it has MACE's paths, and maps them in its forward
        return torch.eye(paths)
    from mace.tools.cg_cueq_tools import symmetric_contraction_proj  # mace-torch 0.3.14 and later

    irreps = [cue.Irreps(O3_e3nn, str(o3.Irreps(ir for _, ir in irreps))) for irreps in
              (plain.irreps_in, plain.irreps_out)]
    return torch.as_tensor(symmetric_contraction_proj(*irreps, list(range(1, target.contraction_degree + 1)))[1])


@torch.no_grad()
def copy_trained(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give one form of an adapted model what the other has learnt. Returns the target."""
    learnt = trainable_parameters(source)
    for name, parameter in trainable_parameters(target).items():
        if name in learnt:  # cuEquivariance's layers leave out biases of no elements
            parameter.copy_(learnt[name].reshape(parameter.shape))
    return target
