"""What a fine-tune of the quickstart has learnt: forces, dynamics and vibrations, beside its foundation.

    cd recipes/quickstart && python ../tutorial.py run_elora/glycine_elora_adapter

writes tutorial.png and dynamics.xyz. docs/tutorial.md goes through it.
"""

import argparse
import tempfile

import ase.io
import matplotlib
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from mace.calculators import MACECalculator
from tqdm import tqdm

from mace_peft import calculator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEP, STEPS = 0.5, 2000  # fs, and how many of them
TEMPERATURE = 300  # K


def forces(structures: list[Atoms], model: Calculator) -> np.ndarray:
    """Of all atoms of all structures, in eV/A."""
    predicted = []
    for atoms in tqdm(structures, desc="test forces"):
        atoms = atoms.copy()
        atoms.calc = model
        predicted.append(atoms.get_forces())
    return np.concatenate(predicted)


def dynamics(atoms: Atoms, model: Calculator, steps: int, file: str) -> np.ndarray:
    """Potential and total energy (eV) after each step without thermostat; the frames go to the file."""
    atoms = atoms.copy()
    atoms.calc = model
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(1))
    Stationary(atoms)
    run, energies, frames = VelocityVerlet(atoms, STEP * units.fs), [], []
    for step in tqdm(range(steps), desc="dynamics"):
        run.run(1)
        energies.append((atoms.get_potential_energy(), atoms.get_total_energy()))
        if step % 10 == 0:
            frames.append(Atoms(atoms.symbols, atoms.positions))
    ase.io.write(file, frames)
    return np.array(energies)


def wavenumbers(atoms: Atoms, model: Calculator) -> np.ndarray:
    """Of the vibrations at the nearest minimum, in 1/cm, without the six of translation and rotation."""
    atoms = atoms.copy()
    atoms.calc = model
    BFGS(atoms, logfile=None).run(fmax=0.005, steps=200)
    with tempfile.TemporaryDirectory() as folder:
        vibrations = Vibrations(atoms, name=f"{folder}/vibrations")
        vibrations.run()
        return np.sort(vibrations.get_frequencies().real)[6:]


def look(foundation: str, adapter: str, structures: str, steps: int = STEPS, frames: str = "dynamics.xyz") -> tuple:
    """What ``draw`` takes: labels, forces of both models, energies of the dynamics, and vibrations of both."""
    read = ase.io.read(structures, ":")
    models = {"foundation": MACECalculator(foundation, device="cpu", default_dtype="float64"),
              "fine-tuned": calculator(foundation, adapter, device="cpu")}
    return (np.concatenate([atoms.arrays["REF_forces"] for atoms in read]),
            {name: forces(read, model) for name, model in models.items()},
            dynamics(read[0], models["fine-tuned"], steps, frames),
            {name: wavenumbers(read[0], model) for name, model in models.items()})


def draw(labels: np.ndarray, predicted: dict[str, np.ndarray], energies: np.ndarray,
         spectra: dict[str, np.ndarray]) -> plt.Figure:
    """Forces against their labels, energies of the dynamics, and the vibrations."""
    figure, (parity, course, sticks) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    colors = dict(zip(predicted, ("0.6", "tab:blue"), strict=True))
    for name, values in predicted.items():
        error = 1e3 * np.abs(values - labels).mean()
        parity.plot(labels.ravel(), values.ravel(), ".", markersize=2, color=colors[name],
                    label=f"{name}: MAE {error:.0f} meV/A")
    parity.axline((0, 0), slope=1, color="black", linewidth=0.6)
    parity.set(xlabel="force, DFT (eV/A)", ylabel="force, predicted (eV/A)", title="test forces")
    parity.legend(fontsize=8, markerscale=4)
    time = STEP * np.arange(1, len(energies) + 1) / 1000
    for values, label in zip((energies - energies[0, 1]).T, ("potential", "total"), strict=True):
        course.plot(time, values, label=label, linewidth=0.8)
    course.set(xlabel="time (ps)", ylabel="energy (eV)", title="dynamics without thermostat")
    course.legend(fontsize=8)
    for height, (name, values) in enumerate(spectra.items()):
        sticks.vlines(values, height, height + 0.8, color=colors[name])
    sticks.set(xlabel="wavenumber (1/cm)", title="harmonic vibrations")
    sticks.set_yticks([0.4, 1.4], labels=list(spectra), rotation="vertical", va="center")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="directory that the fine-tune left")
    parser.add_argument("--foundation", default="foundation.model")
    parser.add_argument("--structures", default="test.xyz", help="with REF_forces")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {STEP} fs")
    args = parser.parse_args()
    labels, predicted, energies, spectra = look(args.foundation, args.adapter, args.structures, args.steps)
    draw(labels, predicted, energies, spectra).savefig("tutorial.png", dpi=110)
    for name, values in predicted.items():
        print(f"{name}: force MAE {1e3 * np.abs(values - labels).mean():.1f} meV/A, highest vibration "
              f"{spectra[name][-1]:.0f} 1/cm")
    drift, time = 1e3 * np.ptp(energies[:, 1]), STEP * len(energies) / 1000
    print(f"The total energy stays within {drift:.1f} meV over {time:g} ps")


if __name__ == "__main__":
    main()
