"""``--restart_latest`` with ``--peft``: resumes what fits, stops for what does not."""

import re
import shutil
import time

import pytest
import torch
from runs import (
    E0S,
    MOLECULE,
    NAME,
    SEED,
    Run,
    arguments,
    call,
    reach_training,
    relabel,
    start,
    train_here,
    write_inputs,
)
from tiny import tiny_mace

from mace_peft.train.checkpoints import measures

pytestmark = pytest.mark.usefixtures("uncompiled")

PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products"}
LR, GAMMA, BATCHES = 0.01, 0.9, 2
OPTIONS = {"lr": LR, "scheduler": "ExponentialLR", "lr_scheduler_gamma": GAMMA}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Run:
    """A run that was killed once it had written a few checkpoints."""
    folder = write_inputs(tmp_path_factory.mktemp("killed"))
    process, run = start(folder, arguments(folder, **PEFT, **OPTIONS, max_num_epochs=200)), Run(folder)
    try:
        while max(run.checkpoints(), default=0) < 3:
            assert process.poll() is None, (folder / "stderr").read_text()
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    return run


@pytest.fixture
def folder(killed, tmp_path):
    """A copy of what the killed run left."""
    return shutil.copytree(killed.folder, tmp_path / "copy")


@pytest.fixture
def refusal(capsys):
    """Runs the command in this process; returns the line with which it stops."""

    def refuse(folder, *flags, **options) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train_here(folder, *flags, **options)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("mace_run_train: error: ") and message.endswith("\n") and message.count("\n") == 1
        return message

    return refuse


def latest(run: Run) -> int:
    """Epoch of the latest checkpoint."""
    return max(run.checkpoints())


def epochs_done(run: Run) -> int:
    return run.progress().epoch


def epoch_lines(log: str) -> dict[str, str]:
    """What the log says of the validation errors, by "Initial" or "Epoch 3"."""
    return dict(re.findall(r"INFO: (Initial|Epoch \d+): head: Default, (.*)", log))


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_where_it_was_and_finishes(killed, folder):
    epoch = epochs_done(killed)
    run = call(folder, arguments(folder, "--restart_latest", **PEFT, **OPTIONS, max_num_epochs=epoch + 3))
    assert run.returncode == 0, run.stderr
    path = f"{folder}/checkpoints/{NAME}_run-{SEED}_restart.pt"
    assert f"Loading checkpoint: {path}, to go on with epoch {epoch}" in run.stdout
    before, after = epoch_lines(killed.log), epoch_lines(run.stdout)
    assert after["Initial"] == before[f"Epoch {epoch - 1}"]
    assert list(after) == ["Initial", *(f"Epoch {epoch + i}" for i in range(3))]
    names = {path.name for path in folder.glob(f"{NAME}*")}
    assert names == {f"{NAME}.model", f"{NAME}_compiled.model", f"{NAME}_adapter"}

    checkpoint = run.restart()
    assert epochs_done(run) == epoch + 3
    steps = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
    assert steps == {(epoch + 3) * BATCHES}
    rates = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    assert rates == pytest.approx([LR * GAMMA ** (epoch + 2)] * len(rates))


def test_weights_optimizer_and_learning_rate_are_those_of_the_checkpoint(killed, folder):
    checkpoint = killed.restart()
    given = reach_training(folder, "--restart_latest", **PEFT, **OPTIONS, checkpoints_dir=folder / "checkpoints",
                           max_num_epochs=200)
    assert given["start_epoch"] == epochs_done(killed)
    weights = given["model"].state_dict()
    assert weights.keys() == checkpoint["model"].keys() | checkpoint["base"].keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in checkpoint["model"].items())
    assert all(measures(weights[key]) == measured for key, measured in checkpoint["base"].items())
    optimizer = given["optimizer"].state_dict()
    assert optimizer["param_groups"] == checkpoint["optimizer"]["param_groups"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(LR * GAMMA ** (epochs_done(killed) - 1))
    for index, state in checkpoint["optimizer"]["state"].items():
        assert all(torch.equal(optimizer["state"][index][key], state[key]) for key in state)


def test_a_restart_with_another_start_of_the_adapters_is_refused(killed, folder, capsys):
    """Which the adapter directory would name in the place of the one that the weights have had."""
    with pytest.raises(SystemExit):
        reach_training(folder, "--restart_latest", **PEFT, **OPTIONS, peft_init_std=0.5,
                       checkpoints_dir=folder / "checkpoints", max_num_epochs=200)
    assert re.search("was made with .*, and this run asks for .*--peft_init_std=0.5", capsys.readouterr().err)


def test_without_a_checkpoint_a_restart_starts_at_epoch_0(tmp_path):
    given = reach_training(write_inputs(tmp_path), "--restart_latest", **PEFT)
    assert given["start_epoch"] == 0


def test_stage_two_resumes_in_stage_two(tmp_path):
    options = {**PEFT, "start_swa": 1, "checkpoints_dir": tmp_path / "checkpoints"}
    run = train_here(write_inputs(tmp_path), "--swa", **options, max_num_epochs=3)
    given = reach_training(tmp_path, "--swa", "--restart_latest", **options, max_num_epochs=5)
    assert given["start_epoch"] == epochs_done(run) == 3
    weights, checkpoint = given["model"].state_dict(), run.restart()["model"]
    assert all(torch.equal(weights[key], checkpoint[key]) for key in checkpoint)


@pytest.mark.parametrize("method, targets", [("mmea", "products"), ("elora", "published")])
def test_an_lbfgs_run_resumes_with_its_history(tmp_path, method, targets):
    options = {"peft": method, "peft_rank": 2, "peft_targets": targets, "checkpoints_dir": tmp_path / "checkpoints"}
    run = train_here(relabel(write_inputs(tmp_path)), "--lbfgs", **options, max_num_epochs=1)
    given = reach_training(tmp_path, "--lbfgs", "--restart_latest", **options, max_num_epochs=4)
    assert given["start_epoch"] == epochs_done(run) == 1
    expected = run.restart()["optimizer"]["state"][0]["n_iter"]
    assert [state["n_iter"] for state in given["optimizer"].state.values()] == [expected]


# --- stopping ---------------------------------------------------------------------------------------------------------

OTHER_SETTINGS = {
    "method": ({"peft": "elora"}, "--peft=mmea", "--peft=elora"),
    "rank": ({"peft_rank": 3}, "--peft_rank=2", "--peft_rank=3"),
    "placement": ({"peft_targets": "linears"}, "--peft_targets=products", "--peft_targets=linears"),
    "gate": ({"peft_gate": "exp"}, "--peft_gate=bounded", "--peft_gate=exp"),
    "alpha": ({"peft_alpha": 9, "peft_targets": "published"}, "--peft_alpha=2.0", "--peft_alpha=9.0"),
    "train_also": ({"peft_train_also": "readouts.*"}, "--peft=mmea", "--peft_train_also=readouts.*"),
}


@pytest.mark.parametrize("other, made, asked", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_a_checkpoint_of_other_settings_stops_and_names_both(folder, refusal, other, made, asked):
    message = refusal(folder, "--restart_latest", **PEFT | other, **OPTIONS)
    assert made in message and asked in message
    assert str(folder / "checkpoints") in message
    assert "restart with the options it was made with, or give this run another --name" in message


@pytest.mark.parametrize("peft", [PEFT, {"peft": "small", "peft_budget": "100%"}], ids=["mmea", "small"])
def test_a_checkpoint_made_without_peft_stops(tmp_path, refusal, peft):
    train_here(write_inputs(tmp_path), max_num_epochs=1)
    message = refusal(tmp_path, "--restart_latest", **peft)
    assert "was made without --peft" in message and "--name" in message


@pytest.mark.parametrize("keep", [0, 100, 0.5])
@pytest.mark.parametrize("which", ["restart", "best"])
def test_a_damaged_checkpoint_stops(killed, folder, refusal, which, keep):
    """That of the best epoch, too, which is needed in the end."""
    best = killed.progress().stage.file
    path = folder / "checkpoints" / (best if which == "best" else f"{NAME}_run-{SEED}_restart.pt")
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    message = refusal(folder, "--restart_latest", **PEFT, **OPTIONS)
    assert str(path) in message
    assert "cannot be read" in message and "delete it" in message


@pytest.mark.parametrize("foundation", [{"channels": 6}, {"seed": 1}], ids=["other_shapes", "other_weights"])
def test_a_checkpoint_of_another_foundation_stops(folder, refusal, foundation):
    write_inputs(folder, foundation=tiny_mace(**foundation))
    message = refusal(folder, "--restart_latest", **PEFT, **OPTIONS)
    assert str(folder / "checkpoints") in message
    assert "does not fit this run" in message or "was made from another foundation" in message
    assert "restart with the options it was made with, or give this run another --name" in message


def test_a_checkpoint_of_a_foundation_with_the_same_tensors_and_another_setting_stops(folder, refusal):
    foundation = tiny_mace()
    foundation.interactions[1].avg_num_neighbors *= 2
    write_inputs(folder, foundation=foundation)
    message = refusal(folder, "--restart_latest", **PEFT, **OPTIONS)
    assert "another foundation, whose settings such as r_max or avg_num_neighbors differ" in message


@pytest.mark.parametrize("E0s", ["average", E0S[MOLECULE].replace("-0.7", "-0.700001")])
def test_a_checkpoint_of_other_E0s_stops(folder, refusal, E0s):
    message = refusal(folder, "--restart_latest", **PEFT, **OPTIONS, E0s=E0s)
    assert "restart with the options it was made with" in message
    assert ("train_also" if E0s == "average" else "other E0s") in message  # those of a fit train along


# --- a fresh run of the same name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"peft_rank": 3}, {"peft": "elora"}, {}], ids=["rank", "method", "same_settings"])
def test_a_fresh_run_uses_no_checkpoint_of_an_earlier_one_and_leaves_those_of_other_names(killed, folder, other):
    earlier = Run(folder).checkpoints()[latest(killed)]
    of_another_name = shutil.copy(earlier, earlier.with_name(earlier.name.replace(NAME, "another", 1)))
    run = train_here(folder, **PEFT | other, max_num_epochs=2)
    assert of_another_name.exists()
    fresh = run.log.removeprefix(killed.log)
    (evaluated,) = re.findall(r"Loaded Stage one model from epoch (\d+) for evaluation", fresh)
    assert int(evaluated) <= 1 < latest(killed)
    assert list(epoch_lines(fresh)) == ["Initial", "Epoch 0", "Epoch 1"]
    made = torch.load(run.checkpoints()[int(evaluated)], weights_only=False)
    tensors = run.adapter_tensors()
    assert all(torch.equal(tensor, made["model"][key]) for key, tensor in tensors.items())
    assert run.adapter_config()["peft"]["rank"] == (PEFT | other)["peft_rank"]


@pytest.mark.parametrize("flags", [[], ["--restart_latest"]], ids=["fresh", "restart"])
def test_a_run_without_peft_refuses_a_checkpoint_of_one_with(killed, folder, refusal, flags):
    message = refusal(folder, *flags)
    assert any(path.name in message for path in Run(folder).checkpoints().values())
    assert "add the --peft options it was made with, or give this run another --name" in message
    assert Run(folder).checkpoints().keys() == killed.checkpoints().keys()


def test_a_run_without_peft_minds_no_other_files(killed, folder):
    for path in Run(folder).checkpoints().values():
        path.rename(path.with_name(path.name.replace(NAME, "another", 1)))
    (folder / f"checkpoints/{NAME}_run-{SEED}_epoch-7.pt").write_text("damaged")
    assert reach_training(folder, checkpoints_dir=folder / "checkpoints")["start_epoch"] == 0


def test_a_dry_run_leaves_the_checkpoints_for_a_restart(killed, folder):
    train_here(folder, "--dry_run", **PEFT, **OPTIONS)
    assert Run(folder).checkpoints().keys() == killed.checkpoints().keys()
