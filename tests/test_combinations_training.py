"""MACE's options for training, with ``--peft``: they do to the adapters what a loop written out here does.

That files are left, that the saved adapter gives the saved model, and the logs: ``test_train.py``.
"""

import contextlib
import copy
import itertools
import shutil

import ase.io
import numpy as np
import pytest
import torch
from combined import PEFT, adapters, assert_same, differ, fine_tune, train_only, write_small
from mace import modules
from mace.cli import run_train
from mace.tools.tables_utils import create_error_table
from releases import since
from runs import arguments, reach_training, relabel, train_here
from schedulefree import AdamWScheduleFree
from torch.optim import LBFGS, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch_ema import ExponentialMovingAverage

pytestmark = pytest.mark.usefixtures("double_precision")

LR, DECAY, EPOCHS = 0.01, 0.1, 3
OPTIONS = {"lr": LR, "weight_decay": DECAY, "max_num_epochs": EPOCHS}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Periodic structures that have a label of every kind."""
    folder = write_small(tmp_path_factory.mktemp("inputs"))
    random = np.random.default_rng(0)
    for part in ("train", "valid", "test"):
        structures = ase.io.read(folder / f"{part}.xyz", ":")
        for atoms in structures:
            atoms.cell, atoms.pbc = [9.0, 9.0, 9.0], True
            stress = random.normal(size=(3, 3))
            atoms.info["REF_stress"] = stress + stress.T
            atoms.info["REF_virials"] = -729 * atoms.info["REF_stress"]
        ase.io.write(folder / f"{part}.xyz", structures)
    return folder


@pytest.fixture(scope="module")
def given(inputs):
    return start_of(inputs)


def start_of(inputs):
    """What MACE's training is given at the start, and the state that says in which order batches come."""
    given = reach_training(inputs, **PEFT)
    return {**given, "order": given["train_loader"].generator.get_state()}


def adam(parameters):
    return Adam(parameters, lr=LR, weight_decay=DECAY, amsgrad=True)


def by_hand(given, make_optimizer=adam, epochs=EPOCHS, loss=None, clip=10.0, scheduler=None, metrics=None, average=None,
            stage_two=None, **quantities):
    """The adapters after a loop over the batches, as plain as can be.

    metrics: what the scheduler takes at the end of each epoch; average: the decay of the moving average; stage_two:
    its first epoch, loss and learning rate, which rises over 50 steps of a new optimizer; quantities: what the model
    computes beside energies and forces.
    """
    model, loader = copy.deepcopy(given["model"]), given["train_loader"]
    learnt = {name: parameter for name, parameter in model.named_parameters() if ".adapter." in name}
    optimizer, loss = make_optimizer(list(learnt.values())), loss or given["loss_fn"]
    scheduler = scheduler and scheduler(optimizer)
    ema = average and ExponentialMovingAverage(learnt.values(), decay=average)
    loader.generator.set_state(given["order"])
    for epoch in range(epochs):
        if stage_two and epoch == stage_two[0]:
            loss, optimizer, warm = stage_two[1], make_optimizer(list(learnt.values())), iter(range(1, 1000))
        getattr(optimizer, "train", lambda: None)()
        for step in [list(loader)] if isinstance(optimizer, LBFGS) else [[batch] for batch in loader]:
            def closure(step=step, loss=loss, optimizer=optimizer):
                optimizer.zero_grad()
                outputs = [model(batch.to_dict(), training=True, compute_force=True, **quantities) for batch in step]
                total = sum(loss(pred=output, ref=batch) for output, batch in zip(outputs, step, strict=True))
                (total / len(step)).backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(learnt.values(), clip)
                return total / len(step)
            if stage_two and epoch >= stage_two[0]:
                optimizer.param_groups[0]["lr"] = stage_two[2] * min(1, next(warm) / 50)
            optimizer.step(closure)
            if ema:
                ema.update()
        if scheduler:
            scheduler.step(*[] if metrics is None else [metrics[epoch]])
    getattr(optimizer, "eval", lambda: None)()
    with ema.average_parameters() if ema else contextlib.nullcontext():
        return {name: parameter.detach().clone() for name, parameter in learnt.items()}


BETAS = {"beta": 0.8}, (0.8, 0.999)
if since("0.3.15"):
    BETAS = {"beta1_schedulefree": 0.8, "beta2_schedulefree": 0.97}, (0.8, 0.97)
# the options of a run, and the same by hand
SAME = {
    "adam": ([], {}, {}),
    "adamw": ([], {"optimizer": "adamw"},
              {"make_optimizer": lambda p: AdamW(p, lr=LR, weight_decay=DECAY, amsgrad=True)}),
    "schedulefree": ([], {"optimizer": "schedulefree"} | BETAS[0],
                     {"make_optimizer": lambda p: AdamWScheduleFree(p, lr=LR, weight_decay=DECAY, betas=BETAS[1])}),
    "beta": ([], {"beta": 0.5},
             {"make_optimizer": lambda p: Adam(p, lr=LR, weight_decay=DECAY, amsgrad=True, betas=(0.5, 0.999))}),
    "ExponentialLR": ([], {"scheduler": "ExponentialLR", "lr_scheduler_gamma": 0.5},
                      {"scheduler": lambda optimizer: ExponentialLR(optimizer, 0.5)}),
    "ema": (["--ema"], {"ema_decay": 0.8}, {"average": 0.8}),
    "clip_grad": ([], {"clip_grad": 0.01, "num_workers": 1}, {"clip": 0.01}),
    "no clip_grad": ([], {"clip_grad": "None", "eval_interval": 2, "forces_weight": 1e5},  # gradients above 10
                     {"clip": None, "loss": modules.WeightedEnergyForcesLoss(1.0, 1e5)}),
    "swa, ema, amsgrad and clip_grad": (
        ["--swa", "--ema", "--amsgrad"],
        {"start_swa": 1, "swa_lr": 0.02, "swa_energy_weight": 50.0, "swa_forces_weight": 5.0, "clip_grad": 0.1},
        {"average": 0.99, "clip": 0.1, "stage_two": (1, modules.WeightedEnergyForcesLoss(50.0, 5.0), 0.02)}),
}


@pytest.mark.parametrize("flags, options, hand", SAME.values(), ids=SAME)
def test_optimizers_schedulers_averages_and_clipping(inputs, given, tmp_path, flags, options, hand):
    expected = by_hand(given, **hand)
    run, _ = train_only(inputs, tmp_path, "--save_all_checkpoints", *flags, **OPTIONS | options)
    assert_same(adapters(run, stage_two="stage_two" in hand), expected, 1e-12)
    assert hand == {} or differ(expected, by_hand(given, loss=hand.get("loss")))


def test_lbfgs(inputs, tmp_path):
    inputs = relabel(shutil.copytree(inputs, tmp_path / "inputs"))
    expected = by_hand(start_of(inputs), epochs=1, make_optimizer=lambda p: LBFGS(
        p, history_size=200, max_iter=20, line_search_fn="strong_wolfe"))
    run, _ = train_only(inputs, tmp_path, "--lbfgs", **OPTIONS | {"max_num_epochs": 1})
    assert_same(adapters(run), expected, 1e-7)


def test_the_learning_rate_falls_on_a_plateau(inputs, given, tmp_path):
    options = {"lr": 0.3, "lr_factor": 0.1, "scheduler_patience": 0, "max_num_epochs": 5}
    run, _ = train_only(inputs, tmp_path, "--save_all_checkpoints", **OPTIONS | options)
    losses = [line["loss"] for line in run.metrics if line["mode"] == "eval" and line["epoch"] is not None]
    assert any(later > loss for loss, later in itertools.pairwise(losses[:-1]))  # the last epoch has another rate
    expected = by_hand(given, lambda p: Adam(p, lr=0.3, weight_decay=DECAY, amsgrad=True), 5, metrics=losses,
                       scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.1, patience=0))
    assert_same(adapters(run), expected, 1e-12)


SINCE = {"pseudolabel_replay": "0.3.14", "real_pt_data_ratio_threshold": "0.3.14", "beta1_schedulefree": "0.3.15",
         "freeze": "0.3.15", "lora": "0.3.15"}


@pytest.mark.parametrize("option, first", SINCE.items())
def test_options_that_mace_does_not_have_yet(inputs, capsys, option, first):
    parser = run_train.tools.build_default_arg_parser()
    if since(first):
        assert option in vars(parser.parse_args(arguments(inputs)))
    else:
        with pytest.raises(SystemExit):
            parser.parse_args(arguments(inputs, **{option: 1}))
        assert f"unrecognized arguments: --{option}=1" in capsys.readouterr().err


def test_an_unknown_scheduler_is_refused_by_mace(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_here(inputs, scheduler="CosineAnnealingLR", work_dir=tmp_path, **PEFT)
    assert "Unknown scheduler: 'CosineAnnealingLR'" in capsys.readouterr().err


# the loss of each value of --loss, and what the model computes for it beside energies and forces
E, F, V, S, DELTA = 2.0, 30.0, 0.5, 4.0, 0.02
LOSSES = {
    "weighted": (modules.WeightedEnergyForcesLoss(E, F), {}),
    "ef": (modules.WeightedEnergyForcesLoss(1.0, 1.0), {}),  # MACE's default, whatever the weights
    "forces_only": (modules.WeightedForcesLoss(F), {}),
    "virials": (modules.WeightedEnergyForcesVirialsLoss(E, F, V), {"compute_virials": True}),
    "stress": (modules.WeightedEnergyForcesStressLoss(E, F, S), {"compute_stress": True}),
    "huber": (modules.WeightedHuberEnergyForcesStressLoss(E, F, S, DELTA), {"compute_stress": True}),
    "universal": (modules.UniversalLoss(E, F, S, DELTA), {"compute_stress": True}),
    "l1l2energyforces": (modules.WeightedEnergyForcesL1L2Loss(E, F), {}),
}
(LOSS,) = [action for action in run_train.tools.build_default_arg_parser()._actions if action.dest == "loss"]
DIPOLE_LOSSES = set(LOSS.choices) - LOSSES.keys()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(inputs, given, tmp_path, loss):
    function, quantities = LOSSES[loss]
    expected = by_hand(given, loss=function.double(), **quantities)
    run, _ = train_only(inputs, tmp_path, "--save_all_checkpoints", loss=loss, energy_weight=E, forces_weight=F,
                        virials_weight=V, stress_weight=S, huber_delta=DELTA, **OPTIONS)
    assert_same(adapters(run), expected, 1e-12)
    assert differ(expected, by_hand(given))


@pytest.mark.parametrize("loss", sorted(DIPOLE_LOSSES))
def test_losses_of_dipoles_are_refused(inputs, tmp_path, capsys, loss):
    """They would need a model that predicts dipoles."""
    with pytest.raises(SystemExit) as stopped:
        train_here(inputs, loss=loss, work_dir=tmp_path, **PEFT)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"mace_run_train: error: --loss {loss} ") and message.count("\n") == 1
    assert "predicts no dipoles" in message and "leave it out" in message


# --- checkpoints and when training ends -------------------------------------------------------------------------------


def test_the_latest_checkpoint_stays_or_all_do(inputs, given, tmp_path):
    """Those of the epochs that were the best so far: ``--save_all_checkpoints`` is for all others too."""
    run, _ = train_only(inputs, tmp_path / "latest", **OPTIONS)
    losses = [line["loss"] for line in run.metrics if line["mode"] == "eval"][1:]
    best = [epoch for epoch, loss in enumerate(losses) if loss == min(losses[:epoch + 1])]
    assert list(run.checkpoints()) == best[-1:]
    kept, _ = train_only(inputs, tmp_path / "kept", "--keep_checkpoints", **OPTIONS)
    assert list(kept.checkpoints()) == best and len(best) > 1
    for epoch, path in kept.checkpoints().items():
        state = torch.load(path, weights_only=False)["model"]
        expected = by_hand(given, epochs=epoch + 1)
        assert_same({key: state[key] for key in expected}, expected, 1e-12)


# --- what evaluation and saving are told ------------------------------------------------------------------------------


def test_error_tables_and_saving_for_the_cpu(inputs, given, tmp_path):
    run = fine_tune(inputs, tmp_path, "--save_cpu", error_table="TotalMAE", log_level="DEBUG", **OPTIONS)
    loaders = {"train_Default": given["train_loader"], "valid_Default": given["valid_loaders"]["Default"]}
    table = create_error_table("TotalMAE", loaders, run.model(), given["loss_fn"], given["output_args"],
                               log_wandb=False, device="cpu")
    assert f"Error-table on TRAIN and VALID:\n{table}" in run.log
    assert "Error-table on TEST:" in run.log and "MAE_E=" in run.log
