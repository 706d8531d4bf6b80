"""Trains the two quickstart recipes, measures what their adapters have learnt, and draws it.

    python docs/figures/quickstart.py          trains (minutes), writes quickstart.json and the figures
    python docs/figures/quickstart.py --draw   draws the figures again from quickstart.json
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import ase.io
import torch

from mace_peft import load_adapter
from mace_peft.inspect.figures import draw_gains, draw_updates
from mace_peft.inspect.gains import gain_statistics
from mace_peft.inspect.spectra import update_spectra

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "quickstart"
PACKAGES = ("mace-peft", "mace-torch", "e3nn", "torch", "matplotlib")


def train(method: str, folder: Path) -> torch.nn.Module:
    subprocess.run(["mace_run_train", "--config", f"{method}.yaml"], cwd=folder, check=True)
    foundation = torch.load(folder / "foundation.model", weights_only=False).double()
    return load_adapter(foundation, folder / f"run_{method}" / f"glycine_{method}_adapter")


def measure() -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(RECIPE, Path(temporary) / "quickstart"))
        structures = ase.io.read(folder / "test.xyz", ":")
        return {
            "commit": subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=HERE,
                                     capture_output=True, text=True, check=True).stdout.strip(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {package: version(package) for package in PACKAGES},
            "gains": gain_statistics(train("mmea", folder), structures),
            "updates": update_spectra(train("elora", folder)),
        }


def main() -> None:
    file = HERE / "quickstart.json"
    if "--draw" not in sys.argv:
        file.write_text(json.dumps(measure(), indent=1) + "\n")
    measured = json.loads(file.read_text())
    draw_gains(measured["gains"]).savefig(HERE / "gains.png")
    draw_updates(measured["updates"]).savefig(HERE / "updates.png")


if __name__ == "__main__":
    main()
