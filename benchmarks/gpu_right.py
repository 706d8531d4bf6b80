"""Part of gpu.py: numbers on the card are those on the CPU.

Every method is at its default placement first, with all that can be done with a model, then at the other placements.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable

import torch
from environment import environment
from gpu_checks import ON_CUEQ, SHORT, WHOLE, Subject, ranks, with_tf32
from gpu_part import Part, arguments
from models import make_model
from torch import nn
from variants import WITH_ADAPTERS, default

from mace_peft.methods import METHODS

BOUNDS = {"float64": 1e-10, "float32": 1e-4}  # of the largest number of its kind
PLACEMENTS = ("products", "linears", "published", "all")
REHEARSED = ("mmea", "small")  # methods
CUEQ = importlib.util.find_spec("cuequivariance_torch") is not None
KERNELS = importlib.util.find_spec("cuequivariance_ops_torch") is not None  # those of cuEquivariance's own


@functools.cache
def base(shape: str, dtype: str) -> nn.Module:
    return make_model(shape, getattr(torch, dtype), "cpu")


@functools.lru_cache(maxsize=1)
def subject(shape: str, dtype: str, device: str, method: str, placement: str) -> Subject:
    torch.set_default_dtype(getattr(torch, dtype))
    return Subject(base(shape, dtype), default(base(shape, dtype), method, placement), device, dtype)


def cases(device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """What comes first is what must not be left out."""
    shape, methods, dtypes, found = "quickstart", tuple(WITH_ADAPTERS), tuple(BOUNDS), {}
    if tiny:
        shape, methods, dtypes = "tiny", REHEARSED, dtypes[:1]

    def add(dtype: str, method: str, placement: str, checks: dict[str, Callable], shape: str = shape,
            bounded: bool = True) -> None:
        for what, check in checks.items():
            found[f"{dtype}, {method} {placement}, {what}"] = lambda check=check: {
                "errors": check(subject(shape, dtype, device, method, placement)),
                "bound": BOUNDS[dtype] if bounded else None}

    for dtype in dtypes:
        for method in methods:
            row = METHODS[method]
            add(dtype, method, row.targets, WHOLE | ({"ranks": ranks} if row.rank == "auto" else {}))
    for method in methods[:1] if tiny else ("mmea", "elora"):
        add("float32", method, METHODS[method].targets, {"TF32": with_tf32}, bounded=False)
    if CUEQ:  # without its kernels it makes large models slowly
        for dtype in dtypes:
            for method in methods[:1] if tiny else methods:
                add(dtype, method, METHODS[method].targets, ON_CUEQ, "quickstart" if KERNELS and not tiny else "tiny")
    for method, row in WITH_ADAPTERS.items():
        for placement in PLACEMENTS if not tiny else ():
            if placement != row.targets:
                add("float64", method, placement, SHORT)
    return found


def main() -> int:
    args = arguments(__doc__)
    warnings.filterwarnings("ignore")
    part = Part("right", args.results, args.seconds, device=args.device, tiny=args.tiny, kernels=KERNELS,
                **environment())
    part.run(cases(args.device, args.tiny))
    return 0


if __name__ == "__main__":
    sys.exit(main())
