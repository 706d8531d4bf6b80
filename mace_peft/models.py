"""The class that a MACE model takes while it has adapters.

MACE rebuilds models in many places (``mace_select_head``, ``--foundation_model`` with several heads, the conversions to
cuEquivariance and OpenEquivariance, ``MACECalculator(compile_mode=...)``): it calls ``model.__class__(**config)`` and
copies parameters by name. The model's own class would make a model without adapters there. This one makes a model with
the same adapters for MACE to fill, and refuses parameters that would leave an adapter unfilled.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import nn

from mace_peft.adapted import Adapted, Mergeable
from mace_peft.config import PeftConfig, PeftError
from mace_peft.targets import find_parameters, find_targets

# where MACE keeps the settings of a backend, and its tool for the way back
BACKENDS = {"cuEquivariance": ("cueq_config", "mace_cueq_to_e3nn"),
            "OpenEquivariance": ("oeq_config", "mace.cli.convert_oeq_e3nn")}


class AdaptedModel(nn.Module):
    """Marks a model that has adapters; its own class is the last base of its subclass, whose name it keeps.

    With the class come the settings, ``peft_config``. The model has ``peft_foundation``, what it started from (a dict
    of name, head and fingerprint; None is its own base, see ``origin``); ``peft_base``, the fingerprint of its base
    then; and ``peft_originals``: the parameters of ``train_also``, and the E0s, scale and shift that ``load_adapter``
    replaces, as they were before. A model that MACE rebuilt has None for these parameters, and its E0s, scale and shift
    are those of its base.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.peft_foundation = self.peft_base = None
        if backend(self) == "cuEquivariance":
            self.take_gates(type(self)(*args, **{**kwargs, "cueq_config": None}))
        else:
            check_backend(self)
            self.peft_originals = dict.fromkeys(find_parameters(self, self.peft_config.train_also))
            add_adapters(self, find_targets(self, self.peft_config), self.peft_config)

    def take_gates(self, plain: AdaptedModel) -> None:
        """Adapters as the plain model's, on the layers of cuEquivariance, for MACE to fill.

        Raises PeftError for low-rank updates: MACE does not fill those of the contractions.
        """
        from mace_peft.accelerated import carry_over

        if any(isinstance(block, Mergeable) for _, block in adapted_blocks(plain)):
            raise PeftError("ELoRA updates and static gains cannot go to cuEquivariance with the model: merge them "
                            "into its weights before you convert it")
        carry_over(plain, None, self)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return restore, (plain_class(self), self.peft_config), *state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        shapes = {name: tensor.shape for name, tensor in state_dict.items()}
        trained = trainable_parameters(self)
        lost = [name for name, tensor in trained.items() if shapes.get(prefix + name) != tensor.shape]
        if lost:
            raise PeftError(f"{len(lost)} adapter tensors ({lost[0]}, ...) are missing or of another shape in what the "
                            "model is to be filled with: keep the model as it is, merge an ELoRA adapter first, or "
                            "give the foundation and the adapter directory (--peft_adapter)")
        super()._load_from_state_dict(state_dict, prefix, *args)


def adapt(model: nn.Module, targets: dict[str, type], config: PeftConfig, foundation: dict) -> None:
    """Put adapters into the targets of a plain model, and give it the class that keeps them."""
    originals = {name: model.get_parameter(name).detach().clone() for name in
                 find_parameters(model, config.train_also)}
    add_adapters(model, targets, config)
    model.peft_originals = originals
    settle(model, config, foundation)


def settle(model: nn.Module, config: PeftConfig, foundation: dict | None) -> None:
    """Give the model the class that keeps these settings, and this origin."""
    model.__class__ = adapted_class(plain_class(model), config)
    model.peft_foundation = foundation
    model.peft_base = fingerprint(model)


def origin(model: AdaptedModel) -> dict:
    """What the model started from: name, head and fingerprint of its foundation.

    That is the model's own base where its weights are no longer those it had: trained, loaded, or rebuilt by MACE.
    """
    base = fingerprint(model)
    known = model.peft_foundation is not None and model.peft_base == base
    return model.peft_foundation if known else {"name": None, "fingerprint": base}


def add_adapters(model: nn.Module, targets: dict[str, type], config: PeftConfig) -> None:
    """Give each target (``find_targets``) its adapter, in the dtype and on the device of the block."""
    for name, adapted in targets.items():
        block = model.get_submodule(name)
        weight = next(iter([*block.parameters(), *model.parameters()]))  # E0s are a buffer
        block.adapter = adapted.make_adapter(block, config.of_module(name)).to(weight.device, weight.dtype)
        block.__class__ = adapted


def check_backend(model: nn.Module) -> None:
    """Raise PeftError if the model is built for an accelerated backend, whose layers hold other weights."""
    name = backend(model)
    if name:
        raise PeftError(f"the model is built for {name}, whose layers take no new adapters: convert it back with "
                        f"{BACKENDS[name][1]} first")


def backend(model: nn.Module) -> str | None:
    """The accelerated backend that the model is built for, if any."""
    for name, (attribute, _) in BACKENDS.items():
        if any(getattr(getattr(module, attribute, None), "enabled", False) for module in model.modules()):
            return name
    return None


@functools.cache
def adapted_class(plain: type[nn.Module], config: PeftConfig) -> type[AdaptedModel]:
    attributes = {"peft_config": config, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (AdaptedModel, plain), attributes)


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The model's class without adapters."""
    return type(model).__bases__[-1] if is_adapted(model) else type(model)


def restore(plain: type[nn.Module], config: PeftConfig) -> AdaptedModel:
    """An empty adapted model for ``pickle`` and ``copy`` to fill."""
    from mace_peft.plugin import guard

    guard()
    cls = adapted_class(plain, config)
    return cls.__new__(cls)


def is_adapted(model: nn.Module) -> bool:
    return isinstance(model, AdaptedModel)


def is_switched_off(model: nn.Module) -> bool:
    """Whether ``disable_adapter`` makes it count as a plain model."""
    return not is_adapted(model) and hasattr(model, "peft_originals")


def check_switched_on(model: nn.Module) -> None:
    if is_switched_off(model):
        raise PeftError("the model's adapter is switched off: leave disable_adapter first")


def check_model(model: object) -> None:
    """Raise PeftError for what is no model."""
    if not isinstance(model, nn.Module):
        raise PeftError(f"{str(model)!r:.80} is no model: give one that torch.load has loaded, for example")


def check_adapted(model: nn.Module) -> None:
    """Raise PeftError if the model has no adapters, if they are switched off, or if it is none."""
    check_model(model)
    check_switched_on(model)
    if not is_adapted(model):
        raise PeftError(f"this {type(model).__name__} has no adapters: inject(model, config) puts them in")


def adapted_blocks(model: nn.Module) -> list[tuple[str, Adapted]]:
    """The adapted blocks by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Adapted)]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a fine-tune trains, by name: all parameters of the adapters and those of ``train_also``.

    Derived from the model's structure, not from ``requires_grad``, which MACE switches while it evaluates. Freezing,
    counting, the optimizer, the EMA and saving all come from here. Raises PeftError if the model has no adapters.
    """
    check_adapted(model)
    names = {f"{name}.adapter.{key}" for name, block in adapted_blocks(model) for key, _ in
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
    """SHA-256 of the parameters by name, rounded to float32: the same for a model's float64 and float32 file.

    Of an adapted model it is that of its base: without the adapters, and with ``train_also`` as it was before.
    """
    parameters = dict(model.named_parameters())
    if is_adapted(model):
        learnt = trainable_parameters(model)
        for name in learnt:
            del parameters[name]
        parameters |= {name: original for name, original in known_originals(model).items() if name in learnt}
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
