"""``mace_run_train`` in processes of their own that are forked where MACE has been imported already.

Such a run costs a second instead of the six that a new interpreter needs to import MACE. The server that forks is a new
interpreter with the start-up hook, and ``warm``. Each of its processes runs the command's ``main`` from its arguments
to the exit code, so that it can also be killed.
"""

import multiprocessing
import os
import sys
import warnings
from pathlib import Path

PLAIN = "MACE_PEFT_PLAIN_TESTS"  # set where nothing is to be remembered
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mace.cli.run_train", "mace_peft.train.finetune", "mace_peft.train.start", "warm"])


def run_command(folder: Path, argv: list[str]) -> None:
    """What the console script does, with its output in files of the folder."""
    os.chdir(folder)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream.fileno())
    import torch
    from mace.cli import run_train

    warnings.simplefilter("ignore")  # stderr is then what MACE and mace-peft say
    torch.set_num_threads(1)
    sys.argv = ["mace_run_train", *argv]
    sys.exit(run_train.main())


class Forked:
    """A running command, with the part of ``subprocess.Popen`` that tests need."""

    def __init__(self, folder: Path, argv: list[str]):
        os.environ["OMP_NUM_THREADS"] = "1"  # the server is started here, with these
        self.process = SERVER.Process(target=run_command, args=(folder, [str(argument) for argument in argv]))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the command is still running after {timeout} s")
        return self.process.exitcode
