"""The epochs of a run, as those of MACE, but that none is forgotten.

A restart goes on after the last epoch, with the weights, their moving average, the optimizer, the order of the batches
and all that is counted, so that it ends as the run that was not cut off. ``--patience`` ends the training of one
process, too, and where it ends stage one, stage two begins with its first epoch. What is not better than the start is
no result.
"""

import contextlib
import importlib
import logging
import math
import types

import torch
from mace.tools import CheckpointState

from mace_peft.adapter.description import versions
from mace_peft.model.adapted import trainable_parameters
from mace_peft.train.checkpoints import AdapterCheckpointHandler, copies, holding
from mace_peft.train.progress import Progress, Stage
from mace_peft.train.stage_two import forget, warm_up
from mace_peft.train.timing import timed

SAME = 1e-4  # losses that differ less, relatively, differ by rounding
# MACE binds that name to a function, too. While a run lasts, what is looked up here are the stand-ins of ``seams``
steps = importlib.import_module("mace.tools.train")


def train(checkpoints: AdapterCheckpointHandler, restart: bool, **arguments) -> Progress:
    """Train from the start, or from where the run of the checkpoints was.

    arguments: those of ``mace.tools.train.train``, and ``self_replay``, the structures that are kept, or None. Raises
    PeftError for checkpoints that do not fit the run.
    """
    run = types.SimpleNamespace(**arguments)
    run.state = CheckpointState(run.model, run.optimizer, run.lr_scheduler)
    if run.max_grad_norm is not None:
        logging.info(f"Using gradient clipping with tolerance={run.max_grad_norm:.3f}")
    progress = checkpoints.resume(run.state, run.ema, run.train_loader, run.swa) if restart else None
    logging.info("")
    logging.info("===========TRAINING===========")
    logging.info(f"Versions: {', '.join(map(' '.join, versions().items()))}")
    logging.info("Started training, reporting errors on validation set")
    logging.info("Loss metrics on validation set")
    with averaged(run):
        loss = validate(run, None, loss_function(run, progress is not None and progress.in_stage_two))
    resumed = progress is not None
    if not resumed:
        start = copies(trainable_parameters(run.model))
        progress = Progress(start, [Stage(loss)], loss=loss, kept=None if run.self_replay is None else 0)
    checkpoints.progress = progress
    if resumed:
        measure_again(run, checkpoints, loss)
        progress.stopped = progress.stopped and progress.waited >= run.patience
    with timed(run, progress) as tell:
        while progress.epoch < run.max_num_epochs and not progress.stopped:
            train_epoch(run, checkpoints, progress)
            tell()
    logging.info("Training complete")
    return progress


def measure_again(run: types.SimpleNamespace, checkpoints: AdapterCheckpointHandler, loss: float) -> None:
    """If another loss or other validation data have come since, measure what the next epochs have to beat by them.

    loss: that of the weights now.
    """
    progress = checkpoints.progress
    stage, before = progress.stage, progress.stages[0] if progress.in_stage_two else None
    start = before if before is not None and before.better else None

    def measure(of: Stage | None) -> float:
        with holding(run.model, checkpoints.weights(run.model, of)):
            return validate(run, None, loss_function(run, progress.in_stage_two), log=False)

    known = stage.start if stage.file is None else stage.best
    now = measure(start if stage.file is None else stage)
    if math.isclose(now, known, rel_tol=SAME):
        return
    what = "the start" if stage.file is None else f"epoch {stage.epoch}"
    logging.warning(f"The validation loss of {what} was {known:.8f} and is {now:.8f} in this run, with another loss or "
                    "other data: losses of before are measured again")
    stage.start = now if stage.file is None else measure(start)
    stage.best = math.inf if stage.file is None else now
    progress.loss, progress.waited = loss, 0
    if hasattr(run.lr_scheduler.lr_scheduler, "best"):
        run.lr_scheduler.lr_scheduler.best = math.inf


def train_epoch(run: types.SimpleNamespace, checkpoints: AdapterCheckpointHandler, progress: Progress) -> None:
    """Train the next epoch, evaluate it where that is due, and save what a restart needs."""
    epoch = progress.epoch
    if run.swa is not None and epoch >= run.swa.start and not progress.in_stage_two:
        begin_stage_two(run, checkpoints, progress)
    if progress.in_stage_two:
        for group in run.optimizer.param_groups:  # that of LBFGS has no such rate
            group["lr"] = group.get("swa_lr", group["lr"])
    elif epoch > 0:
        run.lr_scheduler.step(metrics=progress.loss)
    if run.distributed:
        run.train_sampler.set_epoch(epoch)
    schedule_free = hasattr(run.optimizer, "eval")
    if schedule_free:
        run.optimizer.train()
    loss_fn = loss_of_steps = loss_function(run, progress.in_stage_two)
    if run.self_replay is not None:
        run.self_replay.taken = progress.kept
        loss_of_steps = run.self_replay.beside(loss_fn)
    rises = progress.in_stage_two and not isinstance(run.optimizer, torch.optim.LBFGS)  # which chooses its own steps
    with warm_up(run.optimizer) if rises else contextlib.nullcontext():
        steps.train_one_epoch(
            model=run.model, loss_fn=loss_of_steps, data_loader=run.train_loader, optimizer=run.optimizer, epoch=epoch,
            output_args=run.output_args, max_grad_norm=run.max_grad_norm, ema=run.ema, logger=run.logger,
            device=run.device, distributed=run.distributed, distributed_model=run.distributed_model, rank=run.rank)
    if run.self_replay is not None:
        progress.kept = run.self_replay.taken
    wait_for_others(run)
    last = {run.max_num_epochs - 1, *([] if run.swa is None else [run.swa.start - 1])}  # of a stage
    evaluated = epoch % run.eval_interval == 0 or epoch in last
    saved = False
    if evaluated:
        if schedule_free:
            run.optimizer.eval()
        with averaged(run):
            loss = validate(run, epoch, loss_fn)
            if run.self_replay is not None and run.rank == 0:
                run.self_replay.tell(epoch)
            if run.plotter and epoch % run.plotter.plot_frequency == 0:
                run.plotter.plot(epoch, evaluated_model(run), run.rank)
        saved = progress.take(loss, checkpoints.file(epoch)) or run.save_all_checkpoints
    progress.epoch += 1
    if evaluated and progress.waited >= run.patience:
        stop_waiting(run, progress)
    if run.rank == 0:
        checkpoints.save_progress(run.state, run.ema, run.train_loader, averaged(run) if saved else None, epoch)
    wait_for_others(run)


def begin_stage_two(run: types.SimpleNamespace, checkpoints: AdapterCheckpointHandler, progress: Progress) -> None:
    """Change to the loss of stage two, by which the result of stage one is what it has to beat."""
    logging.info("Changing loss based on Stage Two Weights")
    forget(run.optimizer)
    with checkpoints.result_in(run.model, stage_two=False):
        progress.begin_stage_two(validate(run, None, run.swa.loss_fn, log=False))
    logging.info(f"Stage two starts with the loss {progress.stage.start:.8f} for the result of stage one")


def stop_waiting(run: types.SimpleNamespace, progress: Progress) -> None:
    """The validation loss has not fallen for as long as ``--patience`` says: go on with stage two, or stop."""
    said = f"Stopping optimization after {progress.waited} epochs without improvement"
    if run.swa is not None and not progress.in_stage_two and progress.epoch <= run.swa.start < run.max_num_epochs:
        logging.info(f"{said} and starting Stage Two")
        progress.epoch = run.swa.start
    else:
        logging.info(said)
        progress.stopped = True


def loss_function(run: types.SimpleNamespace, stage_two: bool) -> torch.nn.Module:
    return run.swa.loss_fn if stage_two else run.loss_fn


def averaged(run: types.SimpleNamespace) -> contextlib.AbstractContextManager:
    """Meanwhile the model has the moving average of its weights, if there is one."""
    return contextlib.nullcontext() if run.ema is None else run.ema.average_parameters()


def evaluated_model(run: types.SimpleNamespace) -> torch.nn.Module:
    return run.model if run.distributed_model is None else run.distributed_model


def validate(run: types.SimpleNamespace, epoch: int | None, loss_fn: torch.nn.Module, log: bool = True) -> float:
    """The loss on the validation set of the last head, by which MACE chooses, the same in all processes; logs of all.

    epoch: None for the start.
    """
    model = run.model if epoch is None else evaluated_model(run)
    to_wandb = {}
    for name, loader in run.valid_loaders.items():
        loss, metrics = steps.evaluate(model=model, loss_fn=loss_fn, data_loader=loader, output_args=run.output_args,
                                       device=run.device)
        if log and (run.rank == 0 or epoch is None):
            steps.valid_err_log(loss, metrics, run.logger, run.log_errors, epoch, name)
            to_wandb[name] = {"epoch": epoch, "valid_loss": loss, "valid_rmse_e_per_atom": metrics["rmse_e_per_atom"],
                              "valid_rmse_f": metrics["rmse_f"]}
    if run.log_wandb and to_wandb and epoch is not None:
        import wandb

        wandb.log(to_wandb)
    if not run.distributed:
        return loss
    shared = torch.tensor(loss, dtype=torch.float64, device=run.device)
    torch.distributed.broadcast(shared, src=0)
    return shared.item()


def wait_for_others(run: types.SimpleNamespace) -> None:
    if run.distributed:
        torch.distributed.barrier()
