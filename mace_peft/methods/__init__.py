"""The mathematics of the methods: modules over plain irreps and tensors that know nothing of MACE or of training."""

import mace  # noqa: F401  before e3nn: it sets the environment variable that e3nn 0.4.4 needs with torch >= 2.6

from mace_peft.methods.elora import ContractionUpdate, LinearUpdate, MatrixUpdate, TensorProductUpdate
from mace_peft.methods.gains import (
    ContractionGains,
    EnergyShift,
    Gains,
    LinearGains,
    MatrixGains,
    ScaledUpdate,
    TensorProductGains,
)
from mace_peft.methods.mmea import MMEA

__all__ = ["MMEA", "ContractionGains", "ContractionUpdate", "EnergyShift", "Gains", "LinearGains", "LinearUpdate",
           "MatrixGains", "MatrixUpdate", "ScaledUpdate", "TensorProductGains", "TensorProductUpdate"]
