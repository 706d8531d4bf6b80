"""How a module of a model gets an adapter: in place, by a subclass of its own class.

So it stays an instance of its own class, and keeps its attributes and the state-dict keys of its base.
"""

import functools
import importlib
import operator
import types
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mace_peft.e3nn import compile_mode
from mace_peft.methods import Adapter
from mace_peft.restore import restore

# where files find what makes a block an adapted one
MIXINS = {"Updated": "adapted", "GatedLinear": "e3nn", "GatedTensorProduct": "e3nn", "GatedMessages": "e3nn",
          "GatedProduct": "mace", "CueGated": "cuequivariance", "CueGatedMessages": "cuequivariance"}


class Adapted(nn.Module):
    """Marks a block that has an ``adapter``; the block's own class is the last base of its class.

    ``plain_forward`` is the block's own ``forward``, under a name that TorchScript can compile.
    """

    def __reduce_ex__(self, protocol):
        if not getattr(type(self), "is_made_here", False):
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(protocol)
        mixin, plain = type(self).__bases__
        return restore, ("block", mixin.__name__ if mixin.__name__ in MIXINS else mixin, plain), *state


@compile_mode("unsupported")
class Updated(Adapted):
    """A block that runs with the weights that its adapter makes of its own. TorchScript: fold them in first."""

    def own_weights(self) -> dict[str, Tensor]:
        """The block's own weights that the adapter reads, by name."""
        return weights_of(self, self.adapter.names)

    def adapted_weights(self) -> dict[str, Tensor]:
        """The weights, by name, that the adapter makes of these, at its strength."""
        return self.adapter.at_strength(self.own_weights())

    def forward(self, *args, **kwargs):
        return over(self, self.adapted_weights()).forward(*args, **kwargs)

    @torch.no_grad()
    def fold(self) -> None:
        """Put these weights in the place of the block's own for good."""
        own = self.own_weights()
        for name, weight in self.adapted_weights().items():
            own[name].copy_(weight)


def weights_of(block: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The block's own parameters and buffers of these dotted names."""
    return {name: operator.attrgetter(name)(block) for name in names}


def over(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A plain module that runs with these tensors, given by their dotted names, in the place of the module's own.

    It shares all else with the module, which is never changed: another thread may run it meanwhile. Submodules with
    tensors of such names are without their adapters, too.
    """
    inside: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        inside.setdefault(owner, {})[rest] = tensor
    children = {name: over(child, inside[name]) if name in inside else child
                for name, child in module._modules.items() if name != "adapter" or not isinstance(module, Adapted)}
    view = object.__new__(plain(module))
    view.__dict__.update(module.__dict__, _modules=children,
                         _parameters={name: tensors.get(name, held) for name, held in module._parameters.items()},
                         _buffers={name: tensors.get(name, held) for name, held in module._buffers.items()})
    return view


def plain(module: nn.Module) -> type[nn.Module]:
    """The module's class without an adapter; of an adapted model, its own class."""
    return type(module).__bases__[-1] if getattr(type(module), "is_made_here", False) else type(module)


@functools.cache
def adapted_class(mixin: type[Adapted], plain: type[nn.Module]) -> type[Adapted]:
    """The class that a block of the class ``plain`` takes while it has an adapter."""
    own = plain.forward
    forward = types.FunctionType(own.__code__, own.__globals__, "plain_forward", own.__defaults__, own.__closure__)
    forward.__annotations__, forward.__kwdefaults__ = own.__annotations__, own.__kwdefaults__
    return type(plain.__name__, (mixin, plain), {"plain_forward": forward, "is_made_here": True,
                                                 "__module__": plain.__module__, "__doc__": plain.__doc__})


def put_in(block: nn.Module, mixin: type[Adapted], adapter: nn.Module) -> None:
    """Give the plain block that adapter."""
    block.adapter = adapter
    block.__class__ = adapted_class(mixin, type(block))


def take_out(block: Adapted) -> None:
    """Make the block plain again."""
    del block.adapter
    block.__class__ = plain(block)


def adapted_blocks(model: nn.Module) -> dict[str, Adapted]:
    """The adapted blocks by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapters_of(block: Adapted) -> dict[str, Adapter]:
    """The block's adapters: one, under the name ``output``; or several gates, by what they gate."""
    return dict(block.adapter.items()) if isinstance(block.adapter, nn.ModuleDict) else {"output": block.adapter}


def strengthen(model: nn.Module, strength: float) -> None:
    """Give all adapters of the model this strength (0 to 1)."""
    for block in adapted_blocks(model).values():
        for adapter in adapters_of(block).values():
            adapter.strength = strength


def empty_block(mixin: str | type[Adapted], plain: type[nn.Module]) -> Adapted:
    """For ``mace_peft.restore``."""
    if isinstance(mixin, str):  # the class itself where another package brings it
        mixin = getattr(importlib.import_module(f"mace_peft.blocks.{MIXINS[mixin]}"), mixin)
    cls = adapted_class(mixin, plain)
    return cls.__new__(cls)
