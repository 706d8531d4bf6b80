"""Time and memory of a training step and of a prediction, against full fine-tuning and the bare base.

    python benchmarks/speed.py                 measures everything (more than an hour on 2 CPU cores), and reports
    python benchmarks/speed.py --shapes small --batches "5 x 21 atoms" --dtypes float32 --repeats 3
    python benchmarks/speed.py --report        writes the tables and the figure again from results/speed.json

All variants of a cell are in memory, and take their turns: one step of each, then again.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
import warnings
from pathlib import Path

import mace  # noqa: F401  before e3nn
import torch
from e3nn.util.jit import script
from environment import environment
from models import BATCHES, SHAPES, make_batch, make_model
from speed_report import write_report
from tqdm import tqdm
from variants import LEVERS, PREDICTS, SCRIPTED, TRAINED

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "speed.json"
MEASURED = ("medium", "small")  # of the shapes


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(calls: dict, repeats: int, device: str, progress) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, and again in another order; one round first is not counted."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        gc.collect()
        for name in random.Random(turn).sample(list(calls), len(calls)):
            start = now(device)
            calls[name]()
            seconds = now(device) - start
            if turn > 0:
                times[name].append(seconds)
            progress()
    return times


def peak_memory(call, device: str) -> int:
    """Bytes that the call, not its first, holds at most, beyond what there was before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = highest = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def predict(model: torch.nn.Module, batch):
    for parameter in model.parameters():  # as MACECalculator does
        parameter.requires_grad_(False)
    inputs = batch.to_dict()
    return lambda: model(inputs, training=False, compute_force=True)


def training(trainees: dict, batch, repeats: int, device: str, progress) -> dict[str, dict]:
    """Of each trainee the seconds of its steps, and in bytes what it holds in them, between them, in a checkpoint."""
    steps = {key: lambda trainee=trainee: trainee.step(batch) for key, trainee in trainees.items()}
    return {"step": in_turn(steps, repeats, device, progress),
            "peak": {key: peak_memory(step, device) for key, step in steps.items()},
            "resident": {key: trainee.resident() for key, trainee in trainees.items()},
            "checkpoint": {key: trainee.checkpoint() for key, trainee in trainees.items()},
            "parameters": {key: sum(p.numel() for p in trainee.trained) for key, trainee in trainees.items()}}


def measure(shape: str, name: str, dtype: str, device: str, repeats: int, closely: bool, progress) -> dict:
    """All figures of one cell; closely: each lever by itself, TorchScript, and more rounds."""
    repeats = repeats if closely else (repeats + 1) // 2
    base = make_model(shape, getattr(torch, dtype), device)
    batch = make_batch(BATCHES[name](), getattr(torch, dtype), device)
    trainees = {key: make(base) for key, make in TRAINED.items() if closely or key not in LEVERS}
    cell = {"model": shape, "batch": name, "dtype": dtype, "device": device, **environment(),
            **training(trainees, batch, repeats, device, progress)}
    del trainees
    calls = {key: predict(make(base), batch) for key, make in PREDICTS.items()}
    repeats *= 4 if closely else 2
    cell["predict"] = in_turn(calls, repeats, device, progress)
    if closely:
        calls = {key: predict(script(PREDICTS[key](base).eval()), batch) for key in SCRIPTED}
        cell["predict, TorchScript"] = in_turn(calls, repeats, device, progress)
    return cell


def key_of(cell: dict) -> tuple:
    """Which cell it is: one that is measured again takes the place of the old one."""
    places = {"model": list(SHAPES), "batch": list(BATCHES), "dtype": ["float64", "float32"], "device": ["cpu", "cuda"]}
    return tuple(values.index(cell[name]) for name, values in places.items())


def slowest(cell: dict) -> str:
    return max((key for key in cell["step"] if key.startswith(("mmea", "elora")) and key not in LEVERS),
               key=lambda key: sorted(cell["step"][key])[len(cell["step"][key]) // 2])


def profile(cell: dict) -> dict:
    """The operations that take most of a step of the slowest adapter."""
    key = slowest(cell)
    dtype = getattr(torch, cell["dtype"])
    trainee = TRAINED[key](make_model(cell["model"], dtype, cell["device"]))
    batch = make_batch(BATCHES[cell["batch"]](), dtype, cell["device"])
    trainee.step(batch)
    with torch.profiler.profile() as profiled:
        trainee.step(batch)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
    return {"variant": key, "cell": {name: cell[name] for name in ("model", "batch", "dtype", "device")},
            "operations": [[event.key, event.count, event.self_cpu_time_total * 1e-6] for event in events]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(MEASURED))
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float64", "float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true", help="only write docs/performance.md's tables and figure")
    args = parser.parse_args()
    if not args.report:
        warnings.filterwarnings("ignore")
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        cells = [(shape, batch, dtype, device) for device in devices for shape in args.shapes
                 for batch in args.batches for dtype in args.dtypes]
        result = json.loads(args.out.read_text()) if args.out.exists() else {"cells": []}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for shape, batch, dtype, device in cells:
            with tqdm(desc=f"{shape}, {batch}, {dtype}, {device}", unit=" calls") as progress:
                cell = measure(shape, batch, dtype, device, args.repeats, batch == next(iter(BATCHES)), progress.update)
            result["cells"] = [old for old in result["cells"] if key_of(old) != key_of(cell)] + [cell]
            result["cells"].sort(key=key_of)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        result["profile"] = profile(result["cells"][0])
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    write_report(json.loads(args.out.read_text()))


if __name__ == "__main__":
    main()
