"""Part of gpu.py: times and memory of steps and predictions, as in speed.py but for every method at its default.

All variants of a cell take their turns, with and without cuEquivariance.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from environment import environment
from gpu_part import Part, arguments
from models import make_batch, make_model, molecules
from speed import in_turn, predict, training
from torch import nn
from variants import WITH_ADAPTERS, Trainee, adapted, default, floor, full, lora, peft

from mace_peft import trainable_parameters
from mace_peft.fast.messages import fast_messages
from mace_peft.methods import METHODS
from mace_peft.model.inject import eject, fold, freeze

BATCHES = {"5 x 21 atoms": 5, "48 x 21 atoms": 48}  # about 100 and 1,000 atoms
ROUNDS = {"5 x 21 atoms": 5, "48 x 21 atoms": 2}
WARM = 2  # calls of each before the first round, in which TorchScript makes its kernels
ON_CUEQ = ("mmea", "elora")
CUEQ = importlib.util.find_spec("cuequivariance_torch") is not None
KERNELS = importlib.util.find_spec("cuequivariance_ops_torch") is not None  # without them it makes large models slowly


@functools.lru_cache(maxsize=1)
def base(shape: str, dtype: str, device: str) -> nn.Module:
    return make_model(shape, getattr(torch, dtype), device)


@functools.lru_cache(maxsize=1)
def on_cueq(shape: str, dtype: str, device: str) -> nn.Module:
    """The base on cuEquivariance's layers, as ``mace_run_train --enable_cueq`` makes it."""
    from mace.cli.convert_e3nn_cueq import run as convert

    return convert(copy.deepcopy(base(shape, dtype, device)), device=torch.device(device))


def make_trainees(shape: str, dtype: str, device: str, methods: tuple[str, ...], cueq: bool) -> dict[str, Trainee]:
    """Full fine-tuning and that of each method; MACE's own LoRA and the floors; or those on cuEquivariance."""
    plain = base(shape, dtype, device)
    if not cueq:
        placements = dict.fromkeys(METHODS[method].targets for method in methods)
        return {"full": full(plain), "MACE LoRA": lora(plain),
                **{named(method): peft(plain, default(plain, method)) for method in methods},
                **{f"floor {placement}": floor(plain, placement) for placement in placements}}
    from mace_peft.train.cuequivariance import accelerate

    made = {"full": full(plain), "full, cuEquivariance": full(on_cueq(shape, dtype, device))}
    for method in methods:
        model = adapted(plain, default(plain, method))
        model = freeze(accelerate(model, eject(copy.deepcopy(model)),
                                  lambda _: copy.deepcopy(on_cueq(shape, dtype, device))))
        trained = list(trainable_parameters(model).values())
        made[f"{named(method)}, cuEquivariance"] = Trainee(model, trained, restricted=True, fast=True, peft=True)
    return made


def named(method: str) -> str:
    return f"{method} {METHODS[method].targets}"


# of one model at a time: its variants are made once for all batches
trainees = functools.lru_cache(maxsize=1)(make_trainees)


@functools.lru_cache(maxsize=1)
def predictors(shape: str, dtype: str, device: str, methods: tuple[str, ...], cueq: bool) -> dict[str, nn.Module]:
    """What predicts when the trainees have done their steps: low-rank updates are folded, as a run leaves them, but on
    cuEquivariance's layers, where they are as they train.
    """
    found = {"base": copy.deepcopy(base(shape, dtype, device))}  # of which trainees of the other kind are made later
    if cueq:
        found["base, cuEquivariance"] = on_cueq(shape, dtype, device)
    for name, trainee in trainees(shape, dtype, device, methods, cueq).items():
        if trainee.peft:
            found[name] = trainee.model if cueq else fold(fast_messages(trainee.model, fast=False))
    return found


def steps(rounds: int, batch: str, *model) -> dict:
    """Of all trainees: seconds, and bytes."""
    structures = make_batch(molecules(BATCHES[batch]), getattr(torch, model[1]), model[2])
    made = trainees(*model)
    warm(lambda trainee=trainee: trainee.step(structures) for trainee in made.values())
    return training(made, structures, rounds, model[2], lambda: None)


def predictions(rounds: int, batch: str, *model) -> dict:
    structures = make_batch(molecules(BATCHES[batch]), getattr(torch, model[1]), model[2])
    calls = {key: predict(made, structures) for key, made in predictors(*model).items()}
    warm(calls.values())
    return {"predict": in_turn(calls, 2 * rounds, model[2], lambda: None)}


def warm(calls: Iterable[Callable]) -> None:
    for call in calls:
        for _ in range(WARM):
            call()


def cases(device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """What comes first is what must not be left out."""
    found = {}

    def add(shape: str, dtype: str, methods: tuple[str, ...], cueq: bool) -> None:
        of = ", cuEquivariance" if cueq else ""
        for what, measure in {"steps": steps, "predictions": predictions}.items():
            for batch in list(BATCHES)[:1] if tiny else BATCHES:
                cell = {"model": shape, "batch": batch, "dtype": dtype, "device": device, "cuEquivariance": cueq}
                found[f"{shape}, {dtype}, {batch}, {what}{of}"] = lambda measure=measure, cell=cell: cell | measure(
                    1 if tiny else ROUNDS[cell["batch"]], cell["batch"], shape, dtype, device, methods, cueq)

    shapes, dtypes = (("tiny",), ("float32",)) if tiny else (("medium", "small"), ("float32", "float64"))
    cueq = CUEQ and (KERNELS or tiny)
    methods = {"medium": tuple(WITH_ADAPTERS), "small": ON_CUEQ, "tiny": ("mmea", "small")}
    for shape in shapes:
        for dtype in dtypes:
            add(shape, dtype, methods[shape], cueq=False)
            if cueq:
                add(shape, dtype, ON_CUEQ[:1] if tiny else ON_CUEQ, cueq=True)
    return found


def main() -> int:
    args = arguments(__doc__)
    warnings.filterwarnings("ignore")
    Part("fast", args.results, args.seconds, device=args.device, tiny=args.tiny, kernels=KERNELS,
         **environment()).run(cases(args.device, args.tiny))
    return 0


if __name__ == "__main__":
    sys.exit(main())
