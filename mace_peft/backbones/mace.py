"""What is special to MACE models: elements, heads, E0s, the takers of messages, and accelerated backends."""

from mace.modules.blocks import EquivariantProductBasisBlock, InteractionBlock
from torch import Tensor, nn

from mace_peft.backbones.batches import isolated_atoms
from mace_peft.backbones.e3nn import LINEARS, PUBLISHED, Backbone
from mace_peft.backbones.foundation import first_E0s, rebuild, single_head, with_heads
from mace_peft.blocks import mace
from mace_peft.errors import PeftError

UPDATED_AS_PUBLISHED = PUBLISHED | {"contractions"}
# where MACE keeps the settings of a backend, and its tool for the way back
BACKENDS = {"cuEquivariance": ("cueq_config", "mace_cueq_to_e3nn"),
            "OpenEquivariance": ("oeq_config", "mace.cli.convert_oeq_e3nn")}
CONSTANTS = {"E0s": "atomic_energies_fn.atomic_energies", "scale": "scale_shift.scale", "shift": "scale_shift.shift"}


class Mace(Backbone):
    """``ScaleShiftMACE``, ``MACELES`` and ``PolarMACE``."""

    name = "mace"
    operations = mace.OPERATIONS
    placements = {"products": {"product", "energies"}, "linears": LINEARS, "published": UPDATED_AS_PUBLISHED,
                  "all": UPDATED_AS_PUBLISHED | {"convolution"}}
    pattern = "interactions.*.linear"
    # a buffer, which becomes a parameter where MACE takes over a foundation, and which its optimizer leaves out
    untrained = ("radial_embedding.bessel_fn.bessel_weights",)

    def fits(self, model: nn.Module) -> bool:
        return any(isinstance(module, (EquivariantProductBasisBlock, InteractionBlock)) for module in model.modules())

    def receivers(self, model: nn.Module) -> dict[str, str]:
        return {f"{name}.conv_tp": f"{name}.linear" if hasattr(block, "linear") else f"{name}.linear_1"
                for name, block in model.named_modules() if isinstance(block, InteractionBlock)}

    def backend(self, model: nn.Module) -> str | None:
        for name, (attribute, _) in BACKENDS.items():
            if any(getattr(getattr(module, attribute, None), "enabled", False) for module in model.modules()):
                return name
        return None

    def check_new(self, model: nn.Module) -> None:
        name = self.backend(model)
        if name:
            raise PeftError(f"the model is built for {name}, whose layers take no new adapters: convert it back with "
                            f"{BACKENDS[name][1]} first")

    def describe(self, model: nn.Module) -> dict:
        return {"model_class": type(model).__name__, "elements": model.atomic_numbers.tolist(),
                "heads": list(getattr(model, "heads", ["Default"]))}

    def constants(self, model: nn.Module) -> dict[str, tuple[str, Tensor]]:
        buffers = dict(model.named_buffers())
        return {field: (name, buffers[name]) for field, name in CONSTANTS.items() if name in buffers}

    def isolated_atoms(self, model: nn.Module) -> dict[str, Tensor] | None:
        if not hasattr(model, "atomic_energies_fn"):
            return None
        weight = next(model.parameters())
        described = self.describe(model)
        atoms = isolated_atoms(tuple(described["elements"]), tuple(described["heads"]), weight.dtype)
        # copies, for MACE asks for gradients of some
        return {name: value.to(weight.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in atoms.items()}

    def is_narrowed(self, foundation: nn.Module, description: dict) -> bool:
        heads = list(with_heads(foundation).heads)
        # a run gives the head that it takes to each of its own heads, also to one of the same name
        took_one = "head" in description["foundation"] and len(heads) > 1
        same = foundation.atomic_numbers.tolist() == description["elements"] and heads == description["heads"]
        return same and not took_one

    def narrow(self, foundation: nn.Module, description: dict) -> nn.Module:
        elements, heads = description["elements"], description["heads"]
        foundation = single_head(foundation, description["foundation"].get("head"))
        E0s = first_E0s(foundation)
        return rebuild(foundation, elements, heads, [[E0s.get(element) for element in elements]] * len(heads))
