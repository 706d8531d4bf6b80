"""Seconds of an epoch of ``mace_run_train``, validation included, with each method and without.

    python benchmarks/epochs.py                     measures, and writes the table of docs/performance.md
    python benchmarks/epochs.py --against CLONE     beside another version of mace-peft, in turn

60 molecules of 21 atoms train, 20 validate, in batches of 5; a foundation of 64 channels, in float64. The first epoch
does not count. Runs take turns, three of each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median

import ase.io
import mace  # noqa: F401  before e3nn
import torch
from environment import environment
from models import ELEMENTS, make_model, molecules
from pages import DOCS, fill, table, versions
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "epochs.json"
METHODS = {
    "full fine-tuning": [],
    "MACE's `--lora`": ["--lora=True", "--lora_rank=16"],
    "`--peft elora`": ["--peft=elora"],
    "`--peft scales`": ["--peft=scales"],
    "`--peft mmea`": ["--peft=mmea"],
}
EPOCHS, ROUNDS = 3, 3
TIME = re.compile(r"^(\S+ \S+) INFO: Epoch (\d+): ", re.MULTILINE)


def write_inputs(folder: Path) -> None:
    foundation = make_model("small", torch.float64, "cpu")
    foundation.atomic_energies_fn.atomic_energies = torch.atleast_2d(foundation.atomic_energies_fn.atomic_energies)
    torch.save(foundation, folder / "foundation.model")
    structures = molecules(80)
    ase.io.write(folder / "train.xyz", structures[:60])
    ase.io.write(folder / "valid.xyz", structures[60:])


def seconds_of_an_epoch(options: list[str], inputs: Path, clone: Path) -> float:
    """The median over the epochs of one run, with the mace-peft of that clone."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--name=run", f"--work_dir={folder}", f"--foundation_model={inputs / 'foundation.model'}",
                f"--train_file={inputs / 'train.xyz'}", f"--valid_file={inputs / 'valid.xyz'}", "--batch_size=5",
                f"--E0s={dict.fromkeys(ELEMENTS, 0.0)}", "--multiheads_finetuning=False", "--valid_batch_size=10",
                f"--max_num_epochs={EPOCHS}", "--default_dtype=float64", "--ema", "--plot=False", "--seed=1", *options]
        code = "from mace_peft.run_train import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(clone)}, check=False)
        if done.returncode:
            raise SystemExit(f"mace_run_train {' '.join(options)} failed: {done.stderr.strip().splitlines()[-1]}")
    ends = [datetime.fromisoformat(time) for time, _ in TIME.findall(done.stdout)]
    return median((later - sooner).total_seconds() for sooner, later in zip(ends[1:-1], ends[2:], strict=True))


def measure(clones: dict[str, Path]) -> dict:
    seconds: dict[str, dict[str, list[float]]] = {clone: {name: [] for name in METHODS} for clone in clones}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=ROUNDS * len(METHODS) * len(clones), unit="run") as bar:
        write_inputs(Path(folder))
        for _ in range(ROUNDS):
            for name, options in METHODS.items():
                for clone, path in clones.items():
                    if clone == "this" or options[:1] and options[0].startswith("--peft"):
                        seconds[clone][name].append(seconds_of_an_epoch(options, Path(folder), path))
                    bar.update()
    return {**environment(), "seconds": seconds}


def report(result: dict) -> None:
    """Ratios within a round, for the machine's speed drifts: their median, and all of them."""
    full, rows = result["seconds"]["this"]["full fine-tuning"], []
    for name in METHODS:
        cells = []
        for seconds in (result["seconds"]["this"][name], result["seconds"].get("before", {}).get(name, [])):
            ratios = sorted(one / whole for one, whole in zip(seconds, full, strict=bool(seconds)))
            cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else "")
        rows.append([name, f"{median(result['seconds']['this'][name]):.1f}", *cells])
    fill(DOCS / "performance.md", {"epochs": table(["", "epoch, s", "full = 1", "before"], rows) + "\n\n" + versions(
        [result])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CLONE", help="another version of mace-peft, beside this one")
    parser.add_argument("--report", action="store_true", help="only write the table again")
    args = parser.parse_args()
    if not args.report:
        clones = {"this": ROOT} | ({"before": args.against.resolve()} if args.against else {})
        RESULT.write_text(json.dumps(measure(clones), indent=1) + "\n")
    report(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
