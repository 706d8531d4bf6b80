"""A run that is killed again and again, each time restarted with ``--restart_latest``, ends as a run that was not."""

import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from forks import Forked
from runs import NAME, SEED, Run, arguments, finish, fork, write_inputs
from tiny import configurations, predict

from mace_peft import PeftError, load_adapter
from mace_peft.adapter.directory import read_adapter
from mace_peft.files import complete
from mace_peft.train.checkpoint_files import CompleteCheckpointIO

EPOCHS, STAGE_TWO, KILLS = 20, 10, 7
OPTIONS = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products", "max_num_epochs": EPOCHS,
           "start_swa": STAGE_TWO}
FLAGS = ("--swa", "--ema", "--restart_latest")
RESTART = f"checkpoints/{NAME}_run-{SEED}_restart.pt"

# For each phase of a run, how far the log says that it has come.
PHASES = {
    "starting": lambda log: log.count("INFO: "),
    "training": lambda log: max(map(int, re.findall(r"INFO: Epoch (\d+): ", log)), default=-1),
    "writing": lambda log: log.partition("INFO: Training complete")[2].count("INFO: "),
}


def random_moments(seed: int) -> list[tuple[str, int, float]]:
    """When to kill: the phase, how far in it (``PHASES``), and the seconds that pass then.

    Epochs ascend, for a restart goes on where the run was, and the models are written last. Each restart has to start.
    """
    choice = random.Random(seed)
    moments = [("training", epoch) for epoch in sorted(choice.sample(range(EPOCHS), KILLS - 3))]
    moments += [("writing", choice.randint(1, 19)) for _ in range(2)]  # of about 26 lines
    moments.insert(choice.randint(0, len(moments)), ("starting", choice.randint(1, 40)))  # of about 50
    return [(phase, far, choice.uniform(0, 0.03)) for phase, far in moments]  # an epoch takes 0.05


def kill_at(folder: Path, phase: str, far: int, seconds: float) -> str:
    """Start the command, kill it at the moment; returns its log."""
    (folder / "stdout").write_text("")  # or the log of the last one counts until the process has started
    process = Forked(folder, arguments(folder, *FLAGS, **OPTIONS))
    while PHASES[phase]((folder / "stdout").read_text()) < far and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    run = finish(folder, process)
    assert run.returncode == -signal.SIGKILL, (phase, far, run.stderr)
    return run.stdout


def contents(folder: Path) -> dict[str, object]:
    """What the files that a restart or a user reads hold, by their paths in the folder: a damaged one fails here."""
    held = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            held[name] = torch.load(path, weights_only=True)
        elif path.name.endswith("_compiled.model"):
            held[name] = torch.jit.load(path)
        elif path.suffix == ".model":
            held[name] = torch.load(path, weights_only=False)
        elif path.name.endswith("_adapter"):
            try:
                held[name] = read_adapter(path)
            except PeftError as error:
                assert "is no adapter directory" in str(error)  # nothing has been saved there yet
    return held


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The run in the end; for each kill its phase, the log until then, the files after it and the next epoch."""
    folder, kills = write_inputs(tmp_path_factory.mktemp("chain")), []
    for phase, far, seconds in random_moments(seed=0):
        log = kill_at(folder, phase, far, seconds)
        files = contents(folder).keys()
        kills.append((phase, log, files, Run(folder).progress().epoch if RESTART in files else 0))
    return fork(folder, *FLAGS, **OPTIONS), kills


def test_the_kills_came_in_every_phase_and_at_many_moments(chain):
    _, kills = chain
    assert len(kills) == KILLS and {phase for phase, *_ in kills} == set(PHASES)
    last_lines = [re.sub(r"^.*? INFO: ", "", log.splitlines()[-1]) if log else "" for _, log, *_ in kills]
    print("\n".join(f"{phase:9} {line:.80}" for (phase, *_), line in zip(kills, last_lines, strict=True)))
    assert len(set(last_lines)) >= KILLS // 2
    killed_in = {PHASES["training"](log) for phase, log, *_ in kills if phase == "training"}
    assert len(killed_in) >= 4 and min(killed_in) < STAGE_TWO < max(killed_in)


def test_no_kill_costs_a_checkpoint_or_an_adapter(chain):
    _, kills = chain
    epochs = [epoch for *_, epoch in kills]
    assert epochs == sorted(epochs) and epochs[-1] > STAGE_TWO
    kept = [{name for name in files if not name.endswith(".pt")} for *_, files, _ in kills]
    for before, after in zip(kept, kept[1:], strict=False):
        assert before <= after
    assert f"{NAME}_adapter" in kept[-1]


def test_every_restart_goes_on_after_the_last_epoch(chain):
    """Or with that epoch, if the kill came before it was saved."""
    _, kills = chain
    done = -1
    for _, log, *_ in kills:
        begins = re.search(r"Loading checkpoint: .*_restart\.pt, to go on with epoch (\d+)", log)
        if begins:
            assert int(begins[1]) in (done, done + 1)
        done = max(done, PHASES["training"](log))
    assert done > STAGE_TWO


def test_the_run_ends_complete(chain):
    run, _ = chain
    assert run.returncode == 0 and run.stderr == ""
    assert {line["epoch"] for line in run.metrics if line["mode"] == "eval"} == {None, *range(EPOCHS)}
    epochs = [epoch for stage_two in (False, True) for epoch in run.checkpoints(stage_two)]
    assert min(epochs) < STAGE_TWO <= max(epochs) < EPOCHS
    kinds = (".model", "_compiled.model", "_adapter")
    names = {f"{NAME}{stage}{kind}" for stage in ("", "_stagetwo") for kind in kinds}
    assert names <= contents(run.folder).keys()
    assert not [path for path in run.folder.rglob("*") if "unfinished" in path.name]


@pytest.mark.parametrize("stage_two", [False, True])
def test_foundation_and_adapter_are_the_model_and_the_checkpoint(chain, stage_two):
    run, _ = chain
    adapter, checkpoint = run.adapter_tensors(stage_two), run.result(stage_two)
    assert all(torch.equal(tensor, checkpoint[key]) for key, tensor in adapter.items())
    assert any(tensor.any() for key, tensor in adapter.items() if key.endswith("W0"))  # zeros at the start
    foundation = torch.load(run.folder / "foundation.model", weights_only=False)
    structures = configurations(3, seed=5)
    loaded, saved = (predict(model, structures) for model in
                     (load_adapter(foundation, run.adapter(stage_two)), run.model(stage_two)))
    torch.testing.assert_close(loaded, saved, rtol=1e-12, atol=1e-12)


# --- killed within a file ---------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, epoch: int) -> None:
    CompleteCheckpointIO(folder, tag=NAME).write(f"{NAME}.pt", {"epoch": epoch, "data": torch.zeros(1000)})


def save_model(folder: Path, epoch: int) -> None:
    complete(torch.save)({"epoch": epoch, "data": torch.zeros(1000)}, folder / f"{NAME}.model")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("save", [save_checkpoint, save_model])
@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_file_that_is_cut_short_does_not_take_the_place_of_a_good_one(tmp_path, save, size):
    """The process is killed when the file that it writes reaches the size."""
    save(tmp_path, 1)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(tmp_path, 2)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ
    assert [held["epoch"] for held in contents(tmp_path).values()] == [1]
    save(tmp_path, 2)
    assert {held["epoch"] for held in contents(tmp_path).values()} <= {1, 2}
    assert not list(tmp_path.glob("*unfinished"))
