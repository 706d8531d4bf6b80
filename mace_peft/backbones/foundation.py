"""Foundation models: loading one, and narrowing it to what a run trains."""

import contextlib
import copy
import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from mace.calculators import foundations_models
from mace.tools import AtomicNumberTable
from mace.tools.finetuning_utils import load_foundations_elements
from mace.tools.scripts_utils import extract_config_mace_model, remove_pt_head
from torch import nn

from mace_peft.elements import symbols
from mace_peft.errors import PeftError, one_line
from mace_peft.files import check_regular

MADE: dict[tuple, nn.Module] = {}  # the last ones, see ``new_model``
MOST_MADE = 8
BUILDING = threading.RLock()  # torch's default dtype and ``MADE`` are those of all threads


def load_foundation(name: str, dtype: str = "") -> nn.Module:
    """The MACE model of that file, in its own dtype, or of a name that MACE knows, on the CPU.

    Raises PeftError if there is no such file, or if it holds no MACE model that can be adapted.
    """
    try:
        model = load_by_name(name, dtype)
    except FileNotFoundError:
        raise PeftError(f"foundation model {name} is neither a file nor a name that MACE knows: check the path, or "
                        "use a name such as small, medium_off or mace_omol") from None
    except Exception as error:  # unpickling runs code of any package, and a download fails in many ways
        raise PeftError(f"foundation model {name} cannot be loaded ({one_line(error)}): give the .model file of a "
                        "MACE model") from error
    if isinstance(model, torch.jit.ScriptModule):
        raise PeftError(f"foundation model {name} is compiled to TorchScript, which cannot be trained: give the "
                        ".model file that it was compiled from")
    if not isinstance(model, nn.Module) or not hasattr(model, "interactions") or not hasattr(model, "products"):
        raise PeftError(f"foundation model {name} holds a {type(model).__name__}, not a MACE model: give the .model "
                        "file that mace_run_train wrote")
    try:
        known = "error" not in extract_config_mace_model(model)
    except Exception as error:  # of a shape that this mace-torch does not know
        raise PeftError(f"foundation model {name} is a {type(model).__name__} that this mace-torch cannot read "
                        f"({one_line(error)}): give another, or upgrade mace-torch") from error
    if not known:
        raise PeftError(f"foundation model {name} is a {type(model).__name__}, and mace_run_train cannot fine-tune "
                        "that class: give a ScaleShiftMACE, MACELES or PolarMACE")
    return with_heads(model)


def with_heads(model: nn.Module) -> nn.Module:
    """Models that were saved before MACE had heads have one: say so, as newer ones do. Returns the model."""
    if not hasattr(model, "heads"):
        model.heads = ["Default"]
    return model


def load_by_name(name: str, dtype: str) -> nn.Module:
    """Load as ``mace_run_train`` does, in the same order of preference."""
    options = {"device": "cpu", "default_dtype": dtype, "return_raw_model": True}
    if name in getattr(foundations_models, "polar_model_names", ()):  # mace-torch 0.3.16 and later
        return foundations_models.mace_polar(model=name, **options)
    if name in getattr(foundations_models, "mace_mp_names", ("small", "medium", "large")):  # those of 0.3.13
        return foundations_models.mace_mp(model=name, **options)
    if name in ("small_off", "medium_off", "large_off"):
        return foundations_models.mace_off(model=name.removesuffix("_off"), **options)
    if name == "mace_omol":
        return foundations_models.mace_omol(**options)
    if os.path.isdir(name):
        raise PeftError("it is a directory, as adapters are, and no file")
    check_regular(name)
    return torch.load(name, map_location="cpu", weights_only=False)


def first_E0s(model: nn.Module) -> dict[int, float]:
    """E0s (eV) of the model's first head by atomic number."""
    energies = torch.atleast_2d(model.atomic_energies_fn.atomic_energies)[0].tolist()
    return dict(zip(model.atomic_numbers.tolist(), energies, strict=True))


def rebuild(
    foundation: nn.Module, elements: list[int], heads: list[str], atomic_energies: list[list[float]]
) -> nn.Module:
    """A model of the foundation's class and weights for these elements (atomic numbers), heads and E0s (eV).

    ``mace_run_train`` makes such a model before it trains: the same functions of MACE do it here, so that the numbers
    are the same. It has the foundation's dtype and device. Raises PeftError if the foundation lacks an element.
    """
    missing = set(elements) - set(foundation.atomic_numbers.tolist())
    if missing:
        raise PeftError(f"the foundation does not know {symbols(missing)}, which the adapter was trained for: use the "
                        "foundation that it was trained from")
    with default_dtype_of(foundation):
        config = extract_config_mace_model(foundation) | {
            "atomic_numbers": elements, "num_elements": len(elements), "heads": heads,
            "atomic_energies": np.array(atomic_energies),
            "atomic_inter_scale": [1.0] * len(heads), "atomic_inter_shift": [0.0] * len(heads),
        }
        model = load_foundations_elements(new_model(type(foundation), config), foundation, AtomicNumberTable(elements),
                                          load_readout=True, max_L=config["hidden_irreps"].lmax)
    return take_over_rest(model, foundation).to(next(foundation.parameters()).device)


def new_model(cls: type[nn.Module], config: dict) -> nn.Module:
    """``cls(**config)``, but a model of one of the last calls is copied where only E0s differ. Its weights may be any.

    Each model that is made costs memory until the process ends: TorchScript keeps what it has once compiled.
    """
    shape = {name: value for name, value in config.items() if name != "atomic_energies"}
    key = cls, torch.get_default_dtype(), repr(sorted(shape.items()))
    made = MADE.pop(key, None)
    if made is None:
        with torch.random.fork_rng(devices=()):  # or what is drawn next would depend on what was loaded before
            made = cls(**config)
    MADE[key] = made  # at the end: the first one was used longest ago
    if len(MADE) > MOST_MADE:
        del MADE[next(iter(MADE))]
    code = [module for module in made.modules() if isinstance(module, torch.fx.GraphModule) and not module.state_dict()]
    model = copy.deepcopy(made, {id(module): module for module in code})  # which has no state, and costs memory, too
    energies = model.atomic_energies_fn.atomic_energies
    energies.copy_(torch.as_tensor(config["atomic_energies"]).reshape(energies.shape))
    return model


def take_over_rest(model: nn.Module, foundation: nn.Module) -> nn.Module:
    """Give the model that MACE made from the foundation what MACE does not take over. Returns the model.

    These are constants, which are rounded where the foundation was made in float32 (mace-torch 0.3.16 takes them over,
    earlier releases compute them anew); and the settings of LES, and its charges where the heads are as many.

    Raises PeftError if the model has not the same layers, from the foundation's weights: MACE takes the correlation of
    all layers from the first one, leaves LES charges of several heads at random, and before 0.3.15 forgets that a model
    has no cutoff.
    """
    constants = dict(foundation.named_buffers())
    for name, buffer in model.named_buffers():
        if name in constants and constants[name].shape == buffer.shape and not name.startswith("atomic_energies_fn."):
            buffer.copy_(constants[name])
    if hasattr(foundation, "les_readouts") and len(model.heads) == len(foundation.heads):
        model.les_readouts.load_state_dict(foundation.les_readouts.state_dict())
    for name in ("les", "compute_bec", "bec_output_index"):
        if hasattr(foundation, name):
            setattr(model, name, copy.deepcopy(getattr(foundation, name)))

    def taken_over(name: str) -> bool:
        if name not in made or name not in held:
            return False
        if made[name].shape != held[name].shape:  # of fewer elements, or of several heads
            return not name.startswith("les_readouts.")
        # MACE leaves some weights of the new model on the CPU until it moves the whole
        return torch.equal(made[name].cpu(), held[name].cpu())

    made, held = model.state_dict(), foundation.state_dict()  # a file of an older MACE lacks buffers of the newer one
    odd = [name for either in (foundation, model) for name, parameter in either.named_parameters()
           if parameter.numel() and not taken_over(name)]
    if getattr(model, "apply_cutoff", True) != getattr(foundation, "apply_cutoff", True):
        odd.append("apply_cutoff")
    if odd:
        heads = "" if len(model.heads) == 1 else f" for the heads {', '.join(model.heads)}"
        raise PeftError(f"mace_run_train cannot take {odd[0]} of this {type(foundation).__name__} over{heads}: "
                        "give another foundation model, or one head")
    return model


def single_head(foundation: nn.Module, head: str | None) -> nn.Module:
    """The foundation with that head alone, as ``--foundation_head`` makes it; itself where it has no others."""
    if len(foundation.heads) == 1:
        return foundation
    with default_dtype_of(foundation):
        return remove_pt_head(foundation, head).to(next(foundation.parameters()).device)


def default_dtype_of(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """``dtype_for_building`` of the model's own."""
    return dtype_for_building(next(model.parameters()).dtype)


@contextlib.contextmanager
def dtype_for_building(dtype: torch.dtype) -> Iterator[None]:
    """MACE builds models and batches in torch's default dtype: make it this one, for one thread at a time."""
    with BUILDING:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

