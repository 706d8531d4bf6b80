"""Part of gpu.py: ``mace_run_train --device=cuda`` on the quickstart, restarts on the other device, and NCCL."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ase.io
from environment import ROOT, environment
from gpu_part import Part, arguments

QUICKSTART = ROOT / "recipes" / "quickstart"
FILES = ("foundation.model", "train.xyz", "test.xyz", "mmea.yaml", "elora.yaml")
FEW, WHOLE = 12, 100  # structures: for a test and in a rehearsal, and for training
EPOCHS = 2
BOUND = 1e-6  # of validation losses after epochs of training in float64
LAST = 12  # lines of a run's output that are kept


class Runs:
    """Runs of the command in one folder, each of which has to be over by some time."""

    def __init__(self, folder: Path, tiny: bool, ends: float):
        self.folder, self.ends = folder, ends
        for name in FILES:
            shutil.copy(QUICKSTART / name, folder)
        for name, count in {"train.xyz": FEW if tiny else WHOLE, "test.xyz": FEW}.items():
            ase.io.write(folder / name, ase.io.read(QUICKSTART / name, f":{count}"))

    def train(self, method: str, name: str, device: str, epochs: int, *flags: str, **variables: str) -> dict:
        """Run ``mace_run_train`` with the quickstart's settings. Raises RuntimeError for an exit code other than 0."""
        command = [sys.executable, *entrance(), "--config", f"{method}.yaml", f"--name={name}", f"--work_dir={name}",
                   f"--device={device}", f"--max_num_epochs={epochs}", "--plot=False", *flags]
        began = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=self.ends - began, env=os.environ | variables)
        said = done.stdout.splitlines()[-LAST:]
        if done.returncode:
            raise RuntimeError("\n".join([f"the exit code is {done.returncode} of {' '.join(command)}", *said]))
        return {"command": " ".join(command[1:]), "seconds": round(time.monotonic() - began, 1),
                "last lines": said, "losses": self.losses(name)}

    def losses(self, name: str) -> list[float]:
        """Of the validation set, after each epoch."""
        (path,) = (self.folder / name / "results").glob("*_train.txt")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line["loss"] for line in lines if line["mode"] == "eval" and line["epoch"] is not None]

    def go_on(self, method: str, name: str, device: str) -> dict:
        """Restart a run, with one epoch more, on the device."""
        return self.train(method, name, device, EPOCHS + 1, "--restart_latest")


@functools.cache
def entrance() -> list[str]:
    """The command as a script, where mace-peft is installed beside it; else as a module."""
    script = Path(sys.executable).with_name("mace_run_train")
    try:
        importlib.metadata.version("mace-peft")
    except importlib.metadata.PackageNotFoundError:
        script = None
    return [str(script)] if script is not None and script.exists() else ["-m", "mace_peft.run_train"]


def compared(found: dict, expected: list[float]) -> dict:
    """A run whose losses have to be those expected."""
    far = [abs(one - other) / abs(other) for one, other in zip(found["losses"], expected, strict=True)]
    return {**found, "errors": {"validation losses": max(far)}, "bound": BOUND}


def cases(runs: Runs, device: str) -> dict[str, Callable[[], dict]]:
    """The card is compared with the CPU by the losses of a run, and of what two runs, one of each, go on to."""
    found = {
        "mmea on the device": lambda: runs.train("mmea", "mmea_there", device, EPOCHS),
        "elora on the device": lambda: runs.train("elora", "elora_there", device, EPOCHS),
        "NCCL": lambda: compared(runs.train("mmea", "mmea_nccl", device, EPOCHS, "--distributed",
                                            "--launcher=torchrun", **one_process()), runs.losses("mmea_there")),
        "mmea on the CPU": lambda: compared(runs.train("mmea", "mmea_here", "cpu", EPOCHS), runs.losses("mmea_there")),
        "a run of the device goes on on the CPU": lambda: runs.go_on("mmea", "mmea_there", "cpu"),
        "a run of the CPU goes on on the device": lambda: compared(runs.go_on("mmea", "mmea_here", device),
                                                                   runs.losses("mmea_there")),
    }
    if device == "cpu":  # on which MACE starts no group of processes
        del found["NCCL"]
    return found


def one_process() -> dict[str, str]:
    """What torchrun tells the only process of a group."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "NCCL_SOCKET_IFNAME": "lo"}


def main() -> int:
    args = arguments(__doc__)
    part = Part("command", args.results, args.seconds, device=args.device, tiny=args.tiny, **environment())
    with tempfile.TemporaryDirectory() as folder:
        part.run(cases(Runs(Path(folder), args.tiny, time.monotonic() + args.seconds), args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
