"""Trains the two quickstart recipes, and draws what their adapters have learnt, and the figure of the tutorial.

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
import numpy as np
import torch

from mace_peft import load_adapter
from mace_peft.inspect.figures import draw_gains, draw_updates
from mace_peft.inspect.gains import gain_statistics
from mace_peft.inspect.spectra import update_spectra

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "quickstart"
sys.path.append(str(RECIPE.parent))
import tutorial  # noqa: E402

PACKAGES = ("mace-peft", "mace-torch", "e3nn", "torch", "matplotlib")


def train(method: str, folder: Path) -> torch.nn.Module:
    subprocess.run(["mace_run_train", "--config", f"{method}.yaml"], cwd=folder, check=True)
    foundation = torch.load(folder / "foundation.model", weights_only=False).double()
    return load_adapter(foundation, folder / f"run_{method}" / f"glycine_{method}_adapter")


def look(folder: Path) -> dict:
    """What the tutorial's figure shows of the ELoRA run: forces in eV/A, energies in eV, wavenumbers in 1/cm."""
    labels, predicted, energies, spectra = tutorial.look(
        str(folder / "foundation.model"), str(folder / "run_elora" / "glycine_elora_adapter"),
        str(folder / "test.xyz"), frames=str(folder / "dynamics.xyz"))
    rounded = {name: values.round(3).tolist() for name, values in predicted.items()}
    return {"labels": labels.round(3).tolist(), "predicted": rounded, "energies": energies.round(5).tolist(),
            "spectra": {name: values.round(1).tolist() for name, values in spectra.items()}}


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
            "tutorial": look(folder),
        }


def main() -> None:
    file = HERE / "quickstart.json"
    if "--draw" not in sys.argv:
        file.write_text(json.dumps(measure()) + "\n")
    measured = json.loads(file.read_text())
    draw_gains(measured["gains"]).savefig(HERE / "gains.png")
    draw_updates(measured["updates"]).savefig(HERE / "updates.png")
    seen = measured["tutorial"]
    tutorial.draw(np.array(seen["labels"]), {name: np.array(values) for name, values in seen["predicted"].items()},
                  np.array(seen["energies"]), seen["spectra"]).savefig(HERE / "tutorial.png", dpi=80)


if __name__ == "__main__":
    main()
