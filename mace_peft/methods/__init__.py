"""The mathematics of the methods, over plain irreps and tensors, and the table of methods by name.

Nothing here knows MACE, a module that is adapted, or training.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mace_peft.methods.adapter import Adapter, Full
from mace_peft.methods.low_rank import STARTS, LowRank
from mace_peft.methods.mmea import GATES, MMEA
from mace_peft.methods.scales import ScaledLowRank, Scales
from mace_peft.methods.weights import Part, assemble, join, matrices, matrix_shapes

__all__ = ["GATES", "METHODS", "MMEA", "STARTS", "Adapter", "Full", "LowRank", "Method", "Part", "ScaledLowRank",
           "Scales", "assemble", "empty_adapter", "join", "matrices", "matrix_shapes"]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    title: what figures call it.
    adapters: which adapter an operation of each role takes (``mace_peft.blocks.operation``). What has no entry, passes
        a placement on to what it is made of. A method without any trains all parameters of the base.
    targets: the default placement; None where it has none.
    lr: the learning rate that was best for it where rates were swept (docs/results.md).
    rank: the default rank; None where it has none. budget: the default of rank ``auto``.
    start: how low-rank updates begin unless given (``LowRank``).
    paper: a link to what to cite for it, in Markdown.
    """

    title: str
    adapters: Mapping[str, type[Adapter]]
    targets: str | None
    lr: float
    rank: int | str | None = 16
    budget: str = "5%"
    start: str = STARTS[0]
    paper: str | None = None

    @property
    def settings(self) -> set[str]:
        """The settings that act on it: where its adapters go, and theirs."""
        return {setting for adapter in self.adapters.values() for setting in ("targets", *adapter.settings)}

    @property
    def trains_base(self) -> bool:
        """Whether all parameters of the base train, but for E0s, which do where ``train_also`` names them."""
        return not self.adapters

    @property
    def has_gates(self) -> bool:
        return any(adapter.on_features for adapter in self.adapters.values())


def with_weights(adapter: type[Adapter]) -> dict[str, type[Adapter]]:
    """The adapter for every operation that has weights."""
    return dict.fromkeys(("linear", "tensor product", "layer", "contraction"), adapter)


PAPERS = {"MMEA": "[MMEA, arXiv 2511.06696](https://arxiv.org/abs/2511.06696)",
          "ELoRA": "[ELoRA, ICML 2025](https://openreview.net/forum?id=hcoxm3Vwgy)"}
METHODS = {
    # as the paper: linear layers and product blocks are gated, all else is updated by low rank
    "mmea": Method("MMEA", with_weights(LowRank) | {"linear": MMEA, "product": MMEA}, "published", 0.005,
                   paper=PAPERS["MMEA"]),
    "gates": Method("gates", dict.fromkeys(("linear", "product", "tensor product", "convolution"), MMEA), "all", 0.005,
                    paper=PAPERS["MMEA"]),
    "elora": Method("ELoRA", with_weights(LowRank), "linears", 0.01, paper=PAPERS["ELoRA"]),
    "scales": Method("scales", with_weights(Scales) | {"energies": Full}, "all", 0.02, rank=None),
    "elora+scales": Method("ELoRA and scales", with_weights(ScaledLowRank) | {"energies": Full}, "linears", 0.02,
                           paper=PAPERS["ELoRA"]),
}
# what did best with 5 % of the base's parameters
METHODS["small"] = Method("small", METHODS["elora+scales"].adapters, "linears", 0.02, rank="auto",
                          paper=PAPERS["ELoRA"])
# the lowest errors of what was tried with 20 % (docs/results/kinds.md)
METHODS["best"] = Method("ELoRA with chosen ranks", METHODS["elora"].adapters, "linears", 0.02, rank="auto",
                         budget="20%", start="gradient", paper=PAPERS["ELoRA"])
METHODS["full"] = Method("full fine-tuning", {}, None, 0.005, rank=None)


def empty_adapter(name: str) -> Adapter:
    """For ``mace_peft.restore``."""
    cls = globals()[name]
    return cls.__new__(cls)
