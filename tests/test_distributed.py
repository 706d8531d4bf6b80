"""``--distributed`` with ``--peft``: two processes on the CPU do what one does with the joined batches.

MACE starts a process group for GPUs only. These processes start one themselves (gloo), which MACE then keeps, and give
``mace_run_train`` a DistributedDataParallel that knows no GPUs: all else is MACE's own.
"""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import ase.io
import pytest
import torch
from forks import SERVER, run_command
from mace import modules
from mace.cli import run_train
from mace.tools import torch_geometric
from releases import since
from runs import Run, arguments, around_training, default_foundation, write_inputs
from tiny import batch, configurations, randomise
from torch.nn.parallel import DistributedDataParallel

from mace_peft import PeftConfig, eject, inject, trainable_parameters
from mace_peft.train.gradients import reach_all

PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products"}


# --- processes --------------------------------------------------------------------------------------------------------


def start_group(folder: Path, rank: int, size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)


def side_by_side(folder: Path, target, size: int, *args) -> list[int]:
    """Run ``target(folder, rank, size, *args)`` in processes of one group; returns their exit codes."""
    (folder / "group").unlink(missing_ok=True)
    processes = [SERVER.Process(target=target, args=(folder, rank, size, *args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # one that hangs
        process.join()
    return [process.exitcode for process in processes]


# --- DistributedDataParallel ------------------------------------------------------------------------------------------

LOSSES = {"weighted": modules.WeightedEnergyForcesLoss, "stress": modules.WeightedEnergyForcesStressLoss,
          "universal": modules.UniversalLoss, "forces_only": modules.WeightedForcesLoss}
CASES = [("mmea", "products", "weighted"), ("mmea", "linears", "forces_only"), ("mmea", "published", "universal"),
         ("elora", "products", "stress"), ("elora", "linears", "universal"), ("elora", "published", "forces_only")]


def halves(loss: str) -> list[list]:
    """What each rank gets. MACE's universal loss weighs the ranks alike, the others weigh all atoms alike."""
    other = "CH3OH" if loss == "universal" else "H2O"
    return [configurations(2, "CH3OH", periodic=True), configurations(2, other, seed=1, periodic=True)]


def loss_of(distributed: torch.nn.Module, model: torch.nn.Module, loss: str, structures: list) -> torch.Tensor:
    labelled = batch(model, structures)
    labelled["stress"] = torch.ones(len(structures), 3, 3, dtype=torch.float64)
    labelled["stress_weight"] = torch.ones(len(structures), dtype=torch.float64)
    output = distributed(labelled, training=True, compute_force=True, compute_stress=True)
    return LOSSES[loss]()(pred=output, ref=torch_geometric.data.Data.from_dict(labelled))


@contextlib.contextmanager
def adapted(method: str, targets: str) -> Iterator[torch.nn.Module]:
    """One model for all cases, which is as it was after each."""
    model = randomise(inject(default_foundation(), PeftConfig(method, rank=2, targets=targets)), scale=0.3)
    yield model
    eject(model)


def train_steps(distributed: torch.nn.Module, model: torch.nn.Module, loss: str, structures: list) -> tuple[dict, dict]:
    """The gradients of the first step, and the parameters after the second."""
    trained = trainable_parameters(model)
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    loss_of(distributed, model, loss, structures).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    optimizer.step()
    optimizer.zero_grad()
    loss_of(distributed, model, loss, structures).backward()
    optimizer.step()
    return gradients, {name: parameter.detach().clone() for name, parameter in trained.items()}


def train_rank(folder: Path, rank: int, size: int) -> None:
    """Two steps of each case."""
    start_group(folder, rank, size)
    results = {}
    for method, targets, loss in CASES:
        with adapted(method, targets) as model:
            distributed = DistributedDataParallel(model)
            if loss == "forces_only":
                distributed.register_forward_hook(reach_all)
            results[method, targets, loss] = train_steps(distributed, model, loss, halves(loss)[rank])
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    assert side_by_side(folder, train_rank, 2) == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method, targets, loss", CASES)
def test_gradients_are_those_of_the_joined_batch(ranks, method, targets, loss):
    """And no parameter goes unused: DistributedDataParallel raises an error at the second step for one that does."""
    gradients = [rank[method, targets, loss][0] for rank in ranks]
    with adapted(method, targets) as model:
        loss_of(model, model, loss, sum(halves(loss), [])).backward()
        for name, parameter in trainable_parameters(model).items():
            assert torch.equal(gradients[0][name], gradients[1][name]), name
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (gradients[0][name] - expected).norm() <= 1e-10 * max(expected.norm(), 1.0), name


@pytest.mark.parametrize("method, targets, loss", CASES)
def test_the_ranks_stay_alike_to_the_last_bit(ranks, method, targets, loss):
    first, second = (rank[method, targets, loss][1] for rank in ranks)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with adapted(method, targets) as model:
        assert any(not torch.equal(p, first[name]) for name, p in trainable_parameters(model).items())


# --- mace_run_train ---------------------------------------------------------------------------------------------------


def environment(launcher: str, rank: int, size: int) -> dict[str, str]:
    """What the launcher tells its processes."""
    return {name: str(value) for name, value in {
        "slurm": {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": 1, "SLURM_NTASKS_PER_NODE": size,
                  "SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        "torchrun": {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "WORLD_SIZE": size, "RANK": rank,
                     "LOCAL_RANK": rank},
        "mpi": {"MASTER_ADDR": "localhost", "OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_RANK": rank,
                "OMPI_COMM_WORLD_LOCAL_SIZE": size},
    }[launcher].items()}


def run_rank(folder: Path, rank: int, size: int, launcher: str, argv: list[str], whole: bool) -> None:
    """``mace_run_train`` in a folder of its own, the whole or up to its files; what it has trained goes there."""
    start_group(folder, rank, size)
    os.environ.update(environment(launcher, rank, size))
    torch.distributed.init_process_group = torch.cuda.set_device = lambda *args, **kwargs: None  # mace-torch 0.3.13
    run_train.DDP = lambda model, device_ids: DistributedDataParallel(model)
    own = folder / f"rank{rank}"

    def observed(train, *, model, **kwargs):
        progress = train(model=model, **kwargs)
        torch.save({name: p.detach() for name, p in trainable_parameters(model).items()}, own / "trained.pt")
        if not whole:
            os._exit(0)
        return progress

    own.mkdir(exist_ok=True)
    with around_training(observed):
        run_command(own, argv)


@dataclasses.dataclass
class Ranks(Run):
    """The run of all ranks."""

    codes: tuple[int, ...] = ()

    def said(self, stream: str) -> list[str]:
        return [(self.folder / f"rank{rank}/{stream}").read_text() for rank in range(len(self.codes))]

    def trained(self) -> list[dict[str, torch.Tensor]]:
        return [torch.load(self.folder / f"rank{rank}/trained.pt") for rank in range(len(self.codes))]


def distribute(folder: Path, size: int, *flags: str, launcher: str = "slurm", whole: bool = True, **options) -> Ranks:
    """Run the command in so many processes, which take four structures a step together.

    mace-torch 0.3.13 knows no launcher but Slurm, and has no option for it.
    """
    if since("0.3.14"):
        options["launcher"] = launcher
    else:
        launcher = "slurm"
    argv = arguments(folder, *flags, "--distributed", **{"batch_size": 4 // size, "valid_file": folder / "train.xyz",
                                                         **options})
    codes = side_by_side(folder, run_rank, size, launcher, [str(word) for word in argv], whole)
    return Ranks(folder, codes=tuple(codes))


def assert_close(tensors: dict, expected: dict) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert (tensors[name] - value).norm() <= 1e-8 * max(value.norm(), 1.0), name


STAGES = {"start_swa": 1, "swa_lr": 0.005, "max_num_epochs": 3, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Ranks, Ranks]:
    """A run of two processes, and one of a single process with twice the batch size, in both stages."""
    runs = []
    for size in (2, 1):
        folder = write_inputs(tmp_path_factory.mktemp(f"size{size}"))
        runs.append(distribute(folder, size, "--ema", "--swa", **PEFT, **STAGES, launcher="mpi"))
        assert set(runs[-1].codes) == {0}, runs[-1].said("stderr")
    return tuple(runs)


def test_two_processes_train_what_one_does_with_twice_the_batch_size(pair):
    for stage in (False, True):
        assert_close(*(run.adapter_tensors(stage) for run in pair))
    two, one = ([line for line in run.metrics if line["mode"] == "eval" and line["epoch"] is not None] for run in pair)
    for line, expected in zip(two, one, strict=True):
        for value in ("epoch", "rmse_e", "rmse_f"):
            assert line[value] == pytest.approx(expected[value], rel=1e-8)


def test_two_processes_measure_what_one_does(pair):
    """Of the validation set, two processes take the same number each."""
    for stage in (False, True):
        two, one = (run.adapter_config(stage)["training"] for run in pair)
        assert two["errors"].keys() == one["errors"].keys() == {"train", "valid", "test"}
        for of in ("start", "result"):
            assert two["errors"]["train"][of] == pytest.approx(one["errors"]["train"][of], rel=1e-8)
    assert [text.count("| foundation |") for text in pair[0].said("stdout")] == [2, 0]


def test_all_ranks_train_the_same_adapters(pair):
    first, second = pair[0].trained()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_first_rank_alone_writes_the_files(pair):
    def files(run):
        names = {path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file()}
        return sorted(str(name) for name in names if not name.parts[0].startswith(("rank", "group")))

    assert files(pair[0]) == files(pair[1])
    assert pair[0].log.count("Saved the adapter to") == 2
    assert [text.count("Saved the adapter to") for text in pair[0].said("stdout")] == [2, 0]


def test_a_restart_goes_on_in_all_ranks(pair, tmp_path):
    runs = []
    for run in pair:
        folder = shutil.copytree(run.folder, tmp_path / f"{len(run.codes)}")
        runs.append(distribute(folder, len(run.codes), "--ema", "--swa", "--restart_latest", whole=False, **PEFT,
                               **STAGES | {"max_num_epochs": 4}))
        assert set(runs[-1].codes) == {0}, runs[-1].said("stderr")
        assert max(runs[-1].checkpoints(stage_two=True)) > max(run.checkpoints(stage_two=True))
    first, second = runs[0].trained()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert_close(first, runs[1].trained()[0])


def test_a_loss_that_misses_adapters_trains_the_others(pair, tmp_path):
    """No force depends on the shift of the E0s. All processes take the ranks that the first has chosen.

    A second run of the name sets the checkpoints of the first aside.
    """
    folder = shutil.copytree(pair[0].folder, tmp_path / "copy")
    before = {path.name for path in (folder / "checkpoints").glob("*.pt")}
    run = distribute(folder, 2, peft="small", peft_targets="all", peft_budget="40%", loss="forces_only",
                     max_num_epochs=1, launcher="torchrun", whole=False)
    assert set(run.codes) == {0}, run.said("stderr")
    assert {path.stem for path in (folder / "checkpoints").glob("*.earlier")} == before
    first, second = run.trained()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(first["atomic_energies_fn.adapter.s.atomic_energies"], torch.zeros(1, 3, dtype=torch.float64))
    assert len({tensor.shape[-1] for name, tensor in first.items() if ".low_rank.A." in name}) > 1


def test_two_processes_keep_what_one_does_with_twice_the_batch_size(tmp_path):
    """With a loss that misses parameters, which the structures that are kept may reach all the same."""
    runs = []
    for size in (2, 1):
        folder = write_inputs(tmp_path / f"size{size}")
        ase.io.write(folder / "kept.xyz", [*configurations(6, "CH4", seed=5), *configurations(6, "CO2", seed=6)])
        runs.append(distribute(folder, size, **PEFT, peft_keep=folder / "kept.xyz", peft_keep_weight=1e4,
                               loss="forces_only", whole=False))
        assert set(runs[-1].codes) == {0}, runs[-1].said("stderr")
    first, second = runs[0].trained()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert_close(first, runs[1].trained()[0])
    moved = [[line for line in (run.folder / "logs/run_run-1.log").read_text().splitlines() if "have moved" in line]
             for run in runs]
    assert len(moved[0]) == len(moved[1]) == 2


def test_two_processes_choose_the_same_method(tmp_path):
    run = distribute(write_inputs(tmp_path), 2, peft="auto", peft_rank=2, lr=None, batch_size=1, max_num_epochs=26,
                     eval_interval=26, whole=False)
    assert set(run.codes) == {0}, run.said("stderr")
    log = (run.folder / "logs/run_run-1.log").read_text()
    assert len(re.findall("Chosen: --peft", log)) == 1
    first, second = run.trained()
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def assert_all_refuse(run: Ranks, words: str) -> None:
    assert run.codes == (2, 2)
    first, second = run.said("stderr")
    assert first == second and first.startswith("mace_run_train: error: ") and first.count("\n") == 1
    assert words in first


def test_a_refusal_ends_all_ranks_with_the_same_line(tmp_path):
    run = distribute(write_inputs(tmp_path / "run"), 2, **PEFT | {"peft_rank": 1000})
    assert_all_refuse(run, "--peft_rank 1000 is more than")


def test_a_checkpoint_that_does_not_fit_ends_all_ranks_with_the_same_line(pair, tmp_path):
    folder = shutil.copytree(pair[0].folder, tmp_path / "copy")
    run = distribute(folder, 2, "--ema", "--swa", "--restart_latest", **PEFT | {"peft_rank": 1}, **STAGES)
    assert_all_refuse(run, "--peft_rank=2")


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_loss_that_is_not_finite_ends_all_ranks(tmp_path, part):
    folder = write_inputs(tmp_path / "run")
    structures = ase.io.read(folder / f"{part}.xyz", ":")
    structures[0].arrays["REF_forces"][0, 0] = 1e200  # its square is no number
    ase.io.write(folder / f"{part}.xyz", structures)
    run = distribute(folder, 2, **PEFT, max_num_epochs=1, valid_file=folder / "valid.xyz")
    assert run.codes == (2, 2)
    assert all(text.startswith("mace_run_train: error: ") and text.count("\n") == 1 for text in run.said("stderr"))
    assert any("loss" in text and " is inf; its data are finite" in text for text in run.said("stderr"))
