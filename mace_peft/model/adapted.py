"""The class that a model takes while it has adapters.

MACE rebuilds models in many places (``mace_select_head``, ``--foundation_model`` with several heads, the conversions to
cuEquivariance and OpenEquivariance, ``MACECalculator(compile_mode=...)``): it calls ``model.__class__(**config)`` and
copies parameters by name. The model's own class would make a model without adapters there. This one makes a model with
the same adapters for MACE to fill, and refuses parameters that would leave an adapter unfilled.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from mace_peft.backbones import backbone_of
from mace_peft.blocks.adapted import Updated, adapted_blocks, over, plain, put_in, strengthen
from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError
from mace_peft.model import isolated
from mace_peft.model.fingerprint import digest
from mace_peft.model.targets import Target, find_parameters, find_targets
from mace_peft.restore import restore

# the classes that live models have
CLASSES: WeakValueDictionary[tuple, type[nn.Module]] = WeakValueDictionary()
COMPILE_MODE = "__e3nn_compile_mode__"  # by which e3nn knows what TorchScript may compile
UNKNOWN = ...  # which is one object in every process
# the models whose adapters are off in this context
SWITCHED_OFF: ContextVar[tuple[nn.Module, ...]] = ContextVar("switched off", default=())


class AdaptedModel(nn.Module):
    """Marks a model that has adapters; its own class is the last base of its subclass, whose name it keeps.

    With the class come the settings, ``peft_config``; ``peft_folded``: whether low-rank updates were folded into the
    base while gates stayed; and ``peft_strength``, see ``set_strength``. The model has
    - ``peft_foundation``, what it started from (a dict of name, head and fingerprint; None is its own base, see
      ``origin``), and ``peft_base``, by which it knows its base again;
    - ``peft_originals``: the parameters of the base that train, and the E0s, scale and shift that ``load_adapter``
      replaces, as they were before. A model that MACE rebuilt has None for these parameters, and its E0s, scale and
      shift are those of its base;
    - ``peft_full``: of these tensors, and of E0s that ``settle_isolated_atoms`` has changed, the values at strength 1,
      where the model holds others;
    - ``peft_isolated``, see ``of_isolated_atoms``;
    - ``peft_gains``, the gains of its gates on the training set, see ``mace_peft.inspect.gain_ranges``; or None.
    """

    is_made_here = True
    peft_folded = False
    peft_strength = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.peft_foundation = self.peft_base = None
        self.peft_isolated = UNKNOWN
        self.peft_gains, self.peft_full = None, {}
        if backbone_of(self).backend(self) == "cuEquivariance":
            self.take_gates(type(self)(*args, **{**kwargs, "cueq_config": None}))
        else:
            backbone_of(self).check_new(self)
            self.peft_originals = dict.fromkeys(find_parameters(self, self.peft_config))
            add_adapters(self, find_targets(self, self.peft_config), self.peft_config)
            strengthen(self, self.peft_strength)

    def take_gates(self, plain: AdaptedModel) -> None:
        """Adapters as the plain model's, on the layers of cuEquivariance, for MACE to fill.

        Raises PeftError for updates of weights, and where all of the base trains: MACE does not fill what belongs to
        the contractions.
        """
        from mace_peft.blocks.cuequivariance import carry_over  # only where it is installed

        blocks = adapted_blocks(plain)
        if plain.peft_config.row.trains_base or any(isinstance(block, Updated) for block in blocks.values()):
            raise PeftError("low-rank updates, scales and full fine-tuning cannot go to cuEquivariance with the model: "
                            "merge them into its weights before you convert it")
        carry_over(blocks, None, self)
        self.peft_originals = dict.fromkeys(plain.peft_originals)

    def __call__(self, *args, **kwargs):
        if is_switched_off(self):
            return base_of(self)(*args, **kwargs)
        of_base = of_isolated_atoms(self)
        if of_base is not None:
            E0s = isolated.E0s(self) - isolated.drift(self, of_base)
            return over(self, {isolated.E0S: E0s})(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return restore, ("model", plain(self), self.peft_config.to_dict(), self.peft_folded, self.peft_strength), *state

    def __copy__(self):
        """A deep copy: to eject, merge or load an adapter, all in place, changes no other model."""
        return copy.deepcopy(self)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        shapes = {name: tensor.shape for name, tensor in state_dict.items()}
        trained = trainable_parameters(self)
        lost = [name for name, tensor in trained.items() if shapes.get(prefix + name) != tensor.shape]
        if lost:
            raise PeftError(f"{len(lost)} adapter tensors ({lost[0]}, ...) are missing or of another shape in what the "
                            "model is to be filled with: keep the model as it is, merge an ELoRA adapter first, or "
                            "give the foundation and the adapter directory (<adapter>)")
        super()._load_from_state_dict(state_dict, prefix, *args)


def adapted_model_class(plain: type[nn.Module], config: PeftConfig, folded: bool = False, strength: float = 1.0
                        ) -> type[AdaptedModel]:
    key = plain, config, folded, strength
    attributes = {"peft_config": config, "peft_folded": folded, "peft_strength": strength,
                  "__module__": plain.__module__, "__doc__": plain.__doc__}
    return CLASSES.get(key) or CLASSES.setdefault(key, type(plain.__name__, (AdaptedModel, plain), attributes))


def empty_model(plain: type[nn.Module], settings: dict, folded: bool, strength: float) -> AdaptedModel:
    """For ``mace_peft.restore``."""
    cls = adapted_model_class(plain, PeftConfig(**settings), folded, strength)
    return cls.__new__(cls)


def settle(model: nn.Module, config: PeftConfig, foundation: dict | None, folded: bool = False) -> None:
    """Give the model the class that keeps these settings, and this origin."""
    model.__class__ = adapted_model_class(plain(model), config, folded, getattr(model, "peft_strength", 1.0))
    model.peft_foundation = foundation
    model.peft_base = base_digest(model)
    model.peft_isolated = UNKNOWN


def origin(model: AdaptedModel) -> dict:
    """What the model started from: name, head and fingerprint of its foundation.

    That is the model's own base where that is no longer what it was: trained, loaded, or rebuilt by MACE.
    """
    known = model.peft_foundation is not None and model.peft_base == base_digest(model)
    return model.peft_foundation if known else {"name": None, "fingerprint": fingerprint(model)}


def add_adapters(model: nn.Module, targets: dict[str, Target], config: PeftConfig) -> None:
    """Give each target its adapter, in the dtype and on the device of the block."""
    for name, target in targets.items():
        block = model.get_submodule(name)
        weight = next(iter([*block.parameters(), *model.parameters()]))  # E0s are a buffer
        adapter = target.make(block, config.of_module(name)).to(weight.device, weight.dtype)
        put_in(block, target.mixin, adapter)


def is_adapted(model: nn.Module) -> bool:
    return isinstance(model, AdaptedModel)


def check_adapted(model: nn.Module) -> None:
    """Raise PeftError if the model has no adapters, if they are switched off in this context, or if it is none."""
    backbone_of(model)
    check_switched_on(model)
    if not is_adapted(model):
        raise PeftError(f"this {type(model).__name__} has no adapters: inject(model, config) puts them in")


def is_switched_off(model: nn.Module) -> bool:
    """Whether the adapters of the model are off in this context, see ``disable_adapter``."""
    return any(off is model for off in SWITCHED_OFF.get())


def check_switched_on(model: nn.Module) -> None:
    if is_switched_off(model):
        raise PeftError("the model's adapter is switched off: leave disable_adapter first")


def base_of(model: AdaptedModel, originals: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The base as a plain model of its own, which shares its tensors with the adapted one, but for the originals."""
    originals = known_originals(model) if originals is None else originals
    tensors = {name: parameter for name, parameter in model.named_parameters() if ".adapter." not in name}
    for name, block in adapted_blocks(model).items():
        tensors |= {f"{name}.{key}": buffer for key, buffer in block._buffers.items()}
    held = tensors | dict(model.named_buffers())
    return over(model, tensors | {name: original.to(held[name]) for name, original in originals.items()})


def without_E0s(model: nn.Module) -> nn.Module:
    """A plain model that predicts as the model does now, with E0s of zero: its energies are interaction energies.

    They are exact also where E0s are large. The model is for calls before the next step of a training.
    """
    E0s = torch.zeros_like(model.get_buffer(isolated.E0S))
    of_base = of_isolated_atoms(model) if is_adapted(model) else None
    return over(model, {isolated.E0S: E0s if of_base is None else E0s - isolated.drift(model, of_base)})


def of_isolated_atoms(model: AdaptedModel) -> torch.Tensor | None:
    """What the base adds to the E0s of atoms without neighbours (eV); None where no adapter changes it.

    None also at strength 0, and for ``exp``, the published gate, whose predictions are the published ones, shift of
    such atoms included.
    """
    if model.peft_isolated is UNKNOWN:
        known = {name: original for name, original in model.peft_originals.items() if original is not None}
        free = model.peft_config.gate == "exp" or model.peft_strength == 0
        model.peft_isolated = None if free else isolated.kept_by(base_of(model, known))
        if model.peft_isolated is not None:
            known_originals(model)  # raises if one is lost
            # of forward, which knows nothing of this: settle_isolated_atoms first
            setattr(model, COMPILE_MODE, "unsupported")
    return model.peft_isolated


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a fine-tune trains, by name: all parameters of the adapters and those of ``train_also``.

    Derived from the model's structure, not from ``requires_grad``, which MACE switches while it evaluates. Freezing,
    counting, the optimizer, the EMA and saving all come from here. Raises PeftError if the model has no adapters.
    """
    if not is_adapted(model):
        check_adapted(model)
    names = {f"{name}.adapter.{key}" for name, block in adapted_blocks(model).items() for key, _ in
             block.adapter.named_parameters()}
    names.update(model.peft_originals)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def known_originals(model: nn.Module) -> dict[str, torch.Tensor]:
    """The ``peft_originals`` of the model. Raises PeftError if one is lost, see ``AdaptedModel``."""
    unknown = [name for name, original in model.peft_originals.items() if original is None]
    if unknown:
        raise PeftError(f"{unknown[0]} trained along, and its value before is not in this model, which MACE rebuilt "
                        "from another: load the adapter onto its foundation instead")
    return model.peft_originals


def fingerprint(model: nn.Module) -> str:
    """What tells one model from another whose predictions differ, see ``mace_peft.model.fingerprint``.

    Of an adapted model it is that of its base: without the adapters, with ``train_also``, E0s, scale and shift as they
    were before.
    """
    return digest(model, known_originals(model) if is_adapted(model) else {})


def base_digest(model: nn.Module) -> str:
    """The fingerprint, but for E0s, scale and shift, which an adapter directory has itself."""
    carried = {name: torch.zeros(0) for name, _ in backbone_of(model).constants(model).values()}
    return digest(model, known_originals(model) | carried)
