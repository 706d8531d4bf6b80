"""Fine-tune with every method, by mace_run_train, and compare the errors.

    python recipes/data.py rmd17/ethanol rmd17/malonaldehyde rmd17/benzene rmd17/aspirin acac
    python benchmarks/accuracy.py --foundation foundation.model --pretraining pretrain_valid.xyz

runs the cells that have no result yet, stopped ones from their last checkpoint, and writes docs/results.md. The
learning rates come first (--experiments sweep): the others take the best.

    --list                           the keys of the cells
    --only 'aspirin-mmea_products-*' those whose key matches, anew if they have a result
    --report                         only writes docs/results.md from results/accuracy.json
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import ase.io
import torch
import train
from accuracy_report import write_report
from cells import EXPERIMENTS, METHODS, Cell, learning_rates
from environment import environment
from mace.tools.scripts_utils import extract_config_mace_model
from safetensors.torch import load_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
# glibc would return memory after each step of a run and ask for it again: a third of the time on a CPU
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
RESULT = HERE / "results" / "accuracy.json"


def command(cell: Cell, args) -> list[str]:
    """The fine-tune's command line."""
    options = {
        "train_file": "train.xyz", "valid_file": args.data / cell.folder / "valid.xyz", "device": args.device,
        **(architecture(args.foundation) if cell.method == "scratch" else
           {"foundation_model": args.foundation, "multiheads_finetuning": "False"}),
        **cell.options()}
    return [sys.executable, str(HERE / "train.py"), cell.ablation or "whole",
            *(f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items())]


@functools.cache
def architecture(foundation: Path) -> dict:
    """Options that give a new model the foundation's shape."""
    config = extract_config_mace_model(torch.load(foundation, map_location="cpu", weights_only=False))
    return {"model": "ScaleShiftMACE", "hidden_irreps": config["hidden_irreps"], "r_max": config["r_max"],
            "max_ell": config["max_ell"], "correlation": config["correlation"],
            "num_interactions": config["num_interactions"], "MLP_irreps": config["MLP_irreps"],
            "num_radial_basis": config["num_bessel"], "num_cutoff_basis": int(config["num_polynomial_cutoff"]),
            "radial_MLP": list(config["radial_MLP"])}


def call(line: list[str], folder: Path, name: str, threads: int) -> str:
    """What the program prints; it and its errors go to a file too. Raises RuntimeError with the last line."""
    with (folder / f"{name}.err").open("w") as errors:
        done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True, check=False,
                              env=os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(threads)})
    (folder / f"{name}.out").write_text(done.stdout)
    if done.returncode:
        said = ((folder / f"{name}.err").read_text() + done.stdout).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"exit code {done.returncode}, see {folder}/{name}.err: {said[-1]}")
    return done.stdout


def run(cell: Cell, args) -> dict:
    """Fine-tune, test, and say what came out."""
    folder = args.work / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    data = args.data / cell.folder
    ase.io.write(folder / "train.xyz", ase.io.read(data / "train.xyz", f":{cell.train}"))
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    start = time.time()
    said = call(command(cell, args), folder, "train", threads)
    result = {**vars(cell), "seconds": time.time() - start, "environment": environment(), "curve": curve(folder)}
    line = [sys.executable, HERE / "errors.py", "--model", cell.model, "--device", args.device,
            *(data / f"{name}.xyz" for name in cell.tests)]
    if cell.tests and args.pretraining:
        line += ["--refit", args.pretraining]
    found = json.loads(call([*map(str, line)], folder, "errors", threads).splitlines()[-1])
    names = {str(args.pretraining): "pretraining", **{str(data / f"{name}.xyz"): name for name in cell.tests}}
    return {**result, "errors": {names[path]: rounded(errors) for path, errors in found["errors"].items()},
            "parameters": trained(cell, found, said, folder)}


def trained(cell: Cell, found: dict, said: str, folder: Path) -> int:
    """Parameters that the run has changed."""
    if cell.ablation:
        return train.learnt(cell.ablation, load_file(folder / "run_adapter" / "adapter_model.safetensors"))
    if "peft" in METHODS[cell.method]:
        return int(re.search(r"Trainable: ([\d,]+) parameters", said)[1].replace(",", ""))
    if cell.method == "MACE LoRA":
        before, after = re.findall(r"(?:Original model|Model with LoRA) has (\d+) trainable", said)
        return int(after) - int(before)  # MACE counts the frozen base too
    return {"foundation": 0, "readouts": found["readouts"]}.get(cell.method, found["parameters"])


def curve(folder: Path) -> dict[str, list[float]]:
    """Validation errors after each epoch, from MACE's results; a restart writes an epoch again."""
    (path,) = folder.glob("results/*_train.txt")
    epochs = {line["epoch"]: line for line in map(json.loads, path.read_text().splitlines()) if line["mode"] == "eval"}
    epochs.pop(None, None)
    return {name: [float(f"{epochs[epoch][name]:.4g}") for epoch in sorted(epochs)] for name in ("mae_e", "mae_f")}


def one_line_each(results: dict[str, dict]) -> str:
    """As JSON, with a line for each cell."""
    lines = [f"{json.dumps(key)}: {json.dumps(result)}" for key, result in results.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(errors: dict[str, float]) -> dict[str, float]:
    return {name: value if name == "count" else float(f"{value:.5g}") for name, value in errors.items()}


def pending(results: dict[str, dict], args) -> list[Cell]:
    """In the order of the experiments, each cell once."""
    rates = learning_rates(results)
    cells = {cell.key: cell for name in args.experiments for cell in EXPERIMENTS[name](results, rates)}
    if args.only:
        return [cell for key, cell in cells.items() if any(fnmatch.fnmatchcase(key, only) for only in args.only)]
    return [cell for key, cell in cells.items() if key not in results]


def run_all(args, results: dict[str, dict]) -> list[str]:
    """Run what is pending; returns what failed. A finished sweep makes more cells pending."""
    failed, started, running = [], set(), {}
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(unit="cell") as progress:
        while True:
            waiting = [cell for cell in pending(results, args) if cell.key not in started]
            progress.total = len(started) + len(waiting)
            for cell in waiting[:args.jobs - len(running)]:
                started.add(cell.key)
                if cell.key in results:
                    shutil.rmtree(args.work / cell.key, ignore_errors=True)
                running[pool.submit(run, cell, args)] = cell
            if not running:
                return failed
            progress.set_postfix_str(", ".join(cell.key for cell in running.values()))
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(job)
                try:
                    results[cell.key] = job.result()
                except Exception as error:  # the other cells go on
                    failed.append(f"{cell.key}: {type(error).__name__}: {error}")
                    progress.write(failed[-1])
                progress.update()
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(one_line_each(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundation", type=Path, help="foundation model, float64")
    parser.add_argument("--pretraining", type=Path, help="structures that it was trained on, to see what is forgotten")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that recipes/data.py wrote")
    parser.add_argument("--work", type=Path, default=Path("accuracy_runs"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--only", nargs="+", metavar="GLOB")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.list:
        print(*(cell.key for cell in pending(results, args)), sep="\n")
        return
    failed = []
    if not args.report:
        if not args.foundation or not args.foundation.exists():
            parser.error(f"--foundation {args.foundation}: no such file; give the foundation model to fine-tune")
        for name in ("foundation", "data", "work", "pretraining"):
            setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
        architecture(args.foundation)  # here, for e3nn's models cannot be read by two threads at once
        failed = run_all(args, results)
    write_report(results)
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
