"""Runs of ``mace_run_train`` on small data: in a process of its own, as users start it, or in this one."""

import ast
import contextlib
import dataclasses
import functools
import json
import logging
import os
import random
import re
import subprocess
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import torch
from forks import Forked
from mace.cli import run_train
from safetensors.torch import load_file
from tiny import configurations, predict, tiny_mace

from mace_peft.train import finetune, loop, plugin
from mace_peft.train.progress import Progress

NAME, SEED = "run", 1
MOLECULE = "CH3OH"  # all elements of the foundation
FEWER_ELEMENTS = "H2O"
E0S = {MOLECULE: "{1: -0.7, 6: -1.9, 8: -2.6}", FEWER_ELEMENTS: "{1: -0.7, 8: -2.6}"}  # eV
STAGES = {False: "", True: "_stagetwo"}

torch.set_num_threads(1)  # models this small only lose by more


default_foundation = tiny_mace


def write_inputs(folder: Path, molecule: str = MOLECULE, foundation: torch.nn.Module | None = None) -> Path:
    """Write the foundation and labelled data that ``arguments`` names; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    foundation = default_foundation() if foundation is None else foundation
    energies = foundation.atomic_energies_fn
    energies.atomic_energies = torch.atleast_2d(energies.atomic_energies)  # one row per head, as mace_run_train saves
    torch.save(foundation, folder / "foundation.model")
    for seed, (part, count) in enumerate({"train": 8, "valid": 5, "test": 3}.items()):
        ase.io.write(folder / f"{part}.xyz", configurations(count, molecule, seed=seed))
    return folder


def relabel(folder: Path) -> Path:
    """Give the data labels near the foundation's predictions: from others, LBFGS goes astray on some processors."""
    model, noise = torch.load(folder / "foundation.model", weights_only=False), np.random.default_rng(0)
    before = dict(zip(model.atomic_numbers.tolist(), model.atomic_energies_fn.atomic_energies[0].tolist(), strict=True))
    E0s = ast.literal_eval(E0S[MOLECULE])
    for part in ("train", "valid", "test"):
        structures = ase.io.read(folder / f"{part}.xyz", ":")
        for atoms in structures:
            energy, forces = predict(model, [atoms])
            interaction = energy.item() - sum(before[number] for number in atoms.numbers)
            atoms.info["REF_energy"] = 1.2 * interaction + sum(E0s[number] for number in atoms.numbers)
            atoms.arrays["REF_forces"] = 1.2 * forces.numpy() + noise.normal(scale=0.02, size=(len(atoms), 3))
        ase.io.write(folder / f"{part}.xyz", structures)
    return folder


def arguments(folder: Path, *flags: str, **options) -> list[str]:
    """The command's arguments: a fine-tune of the inputs in the folder, changed by the options; None leaves one out."""
    defaults = {
        "name": NAME, "seed": SEED, "work_dir": folder, "device": "cpu", "default_dtype": "float64", "plot": False,
        "foundation_model": folder / "foundation.model", "multiheads_finetuning": False, "E0s": E0S[MOLECULE],
        "train_file": folder / "train.xyz", "valid_file": folder / "valid.xyz", "test_file": folder / "test.xyz",
        "batch_size": 4, "valid_batch_size": 5, "max_num_epochs": 2, "lr": 0.01,
    }
    return [*flags, *(f"--{name}={value}" for name, value in (defaults | options).items() if value is not None)]


@dataclasses.dataclass
class Run:
    """A folder in which the command has run, and what it said."""

    folder: Path
    returncode: int = 0
    stdout: str = ""
    stderr: str = ""

    @property
    def log(self) -> str:
        return (self.folder / f"logs/{NAME}_run-{SEED}.log").read_text()

    @property
    def metrics(self) -> list[dict]:
        """The lines of the results file."""
        lines = (self.folder / f"results/{NAME}_run-{SEED}_train.txt").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def model(self, stage_two: bool = False) -> torch.nn.Module:
        return torch.load(self.folder / f"{NAME}{STAGES[stage_two]}.model", weights_only=False)

    def adapter(self, stage_two: bool = False) -> Path:
        return self.folder / f"{NAME}{STAGES[stage_two]}_adapter"

    def adapter_config(self, stage_two: bool = False) -> dict:
        return json.loads((self.adapter(stage_two) / "adapter_config.json").read_text())

    def adapter_tensors(self, stage_two: bool = False) -> dict[str, torch.Tensor]:
        return load_file(self.adapter(stage_two) / "adapter_model.safetensors")

    def checkpoints(self, stage_two: bool = False) -> dict[int, Path]:
        """Checkpoint files by epoch."""
        pattern = re.compile(rf"{NAME}_run-{SEED}_epoch-(\d+){'_swa' if stage_two else ''}\.pt")
        matches = {path: pattern.fullmatch(path.name) for path in (self.folder / "checkpoints").glob("*.pt")}
        return {int(match[1]): path for path, match in sorted(matches.items()) if match}

    def checkpoint(self, stage_two: bool = False) -> dict:
        """The latest checkpoint."""
        checkpoints = self.checkpoints(stage_two)
        return torch.load(checkpoints[max(checkpoints)], weights_only=False)

    def restart(self) -> dict:
        """What the file holds from which a restart goes on."""
        return torch.load(self.folder / f"checkpoints/{NAME}_run-{SEED}_restart.pt", weights_only=False)

    def progress(self) -> Progress:
        return Progress.from_dict(self.restart()["resume"]["progress"])

    def result(self, stage_two: bool = False) -> dict[str, torch.Tensor]:
        """What trains, as it is in the checkpoint that is the stage's result, or at the start if none is better."""
        progress = self.progress()
        stage = progress.result(stage_two)
        if stage is None:
            return progress.weights
        return torch.load(self.folder / "checkpoints" / stage.file, weights_only=False)["model"]

    def printed_E0s(self) -> dict[int, float]:
        """What the log says of the E0s in eV, by atomic number."""
        pairs = re.findall(r"Atomic Energies used \(z: eV\) for head Default: \{(.*)\}", self.log)[-1].split(", ")
        return {int(z): float(energy) for z, energy in (pair.split(": ") for pair in pairs)}


def command() -> list[str]:
    script = Path(sys.executable).with_name("mace_run_train")
    return [str(script)] if script.exists() else [sys.executable, "-m", "mace.cli.run_train"]


def environment(**variables: str) -> dict[str, str]:
    """One thread, so that runs side by side neither slow nor change one another."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | variables


def start(folder: Path, argv: list[str], hook: bool = True) -> subprocess.Popen:
    """Start the command; its output goes to files in the folder, so that no pipe fills up.

    Without the hook, Python starts without its ``.pth`` files, and the packages are on ``PYTHONPATH`` instead.
    """
    program = command() if hook else [sys.executable, "-S", "-m", "mace.cli.run_train"]
    variables = {} if hook else {"PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
        return subprocess.Popen([*program, *argv], cwd=folder, env=environment(**variables), stdout=stdout,
                                stderr=stderr)


def finish(folder: Path, process) -> Run:
    """Wait for the command that runs in the folder."""
    returncode = process.wait(timeout=600)
    return Run(folder, returncode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def call(folder: Path, argv: list[str], hook: bool = True) -> Run:
    """Run the command with these arguments in an interpreter of its own, as users do."""
    return finish(folder, start(folder, argv, hook))


def fork(folder: Path, *flags: str, **options) -> Run:
    """Fine-tune in a process of its own, without the seconds that imports take."""
    return finish(folder, Forked(folder, arguments(folder, *flags, **options)))


def train(folder: Path, *flags: str, hook: bool = True, **options) -> Run:
    """Fine-tune in an interpreter of its own."""
    return call(folder, arguments(folder, *flags, **options), hook)


def train_here(folder: Path, *flags: str, **options) -> Run:
    """Fine-tune in this process, which saves the seconds that imports take."""
    plugin.install(run_train)
    argv = arguments(folder, *flags, **options)
    with process_state_restored():
        run_train.run(run_train.tools.build_default_arg_parser().parse_args(argv))
    return Run(folder)


def reach_training(folder: Path, *flags: str, **options) -> dict:
    """Run the command in this process up to MACE's training loop; returns what that is given: model, optimizer, ...

    Its log and other files go to a folder of their own.
    """
    given = {}

    def of_mace(**arguments):
        given.update(arguments)
        raise KeyboardInterrupt

    def of_peft(run, checkpoints, progress):  # after a restart has put back what it goes on from
        of_mace(**vars(run) | {"start_epoch": progress.epoch})

    with (unittest.mock.patch.object(run_train.tools, "train", of_mace), contextlib.suppress(KeyboardInterrupt),
          unittest.mock.patch.object(loop, "train_epoch", of_peft)):
        train_here(folder, *flags, **{"work_dir": folder / "reached"} | options)
    return given


@contextlib.contextmanager
def around_training(call: Callable):
    """In the place of the training loop, MACE's or that of ``--peft``, call this with it and its keyword arguments."""
    of_mace, of_peft = run_train.tools.train, finetune.train

    def stand_in(checkpoints, restart, **arguments):
        return call(functools.partial(of_peft, checkpoints, restart), **arguments)

    with (unittest.mock.patch.object(run_train.tools, "train", functools.partial(call, of_mace)),
          unittest.mock.patch.object(finetune, "train", stand_in)):
        yield


@contextlib.contextmanager
def process_state_restored():
    """Take back what a run changes for the whole process: logging, the default dtype and the random numbers."""
    logger, dtype = logging.getLogger(), torch.get_default_dtype()
    handlers, filters, level = logger.handlers[:], logger.filters[:], logger.level
    numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.setLevel(level)
        torch.set_default_dtype(dtype)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
