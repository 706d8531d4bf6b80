"""A loss that is not finite stops a fine-tune.

At a loss of NaN, MACE would train on to the last epoch, and take it for the lowest one on the validation set: its
checkpoint would replace the last good one.
"""

import math
import types
from collections.abc import Callable, Iterable

import torch

from mace_peft.errors import PeftError


class FiniteLosses:
    """Stand-ins for functions of ``mace.tools.train``, which raise PeftError for a loss of NaN or infinity.

    They look only at numbers that MACE has fetched from the device for its log. original: those functions, by name.
    checkpoints: gives the paths of those that the run has saved.
    """

    def __init__(self, original: types.SimpleNamespace):
        self.original = original
        self.checkpoints: Callable[[], list[str]] = list
        self.epoch = self.batch = self.batches = 0
        self.remedy = "start again with a lower --lr (in stage two --swa_lr) or --clip_grad"
        self.evaluated: Iterable = ()  # the batches of the last evaluation

    def train_one_epoch(self, *, data_loader, epoch: int, **kwargs):
        self.epoch, self.batch, self.batches = epoch, 0, len(data_loader)
        return self.original.train_one_epoch(data_loader=data_loader, epoch=epoch, **kwargs)

    def take_step(self, *, batch, **kwargs):
        self.batch += 1
        loss, metrics = self.original.take_step(batch=batch, **kwargs)
        self.check(metrics["loss"], [batch])
        return loss, metrics

    def check(self, loss: float, batches: Iterable) -> None:
        """Raise PeftError in every process of the run if the training loss of one is not finite."""
        somewhere = somewhere_not_finite(loss)
        what = f"the training loss of epoch {self.epoch}, batch {self.batch} of {self.batches}, is {loss}"
        if not math.isfinite(loss):
            raise self.stopped(what, batches)
        if somewhere:
            raise PeftError(f"{what}, and in another process it is not finite: that one says why")

    def take_step_lbfgs(self, *, loss_fn, data_loader, **kwargs):
        """One step takes all batches, several times: the first time is at the weights that the step starts from."""
        self.remedy = "start again without --lbfgs"
        losses = []

        def noted(*, pred, ref):
            loss = loss_fn(pred=pred, ref=ref)
            if len(losses) < self.batches:
                losses.append(loss.detach())
            return loss

        loss, metrics = self.original.take_step_lbfgs(loss_fn=noted, data_loader=data_loader, **kwargs)
        values = [value.item() for value in losses]
        self.batch = 1 + next((i for i, value in enumerate(values) if not math.isfinite(value)), len(values) - 1)
        self.check(metrics["loss"], data_loader)
        return loss, metrics

    def evaluate(self, *, data_loader, **kwargs):
        """MACE sums the loss over the processes, and only the first of them goes on to ``valid_err_log``."""
        self.evaluated = data_loader
        loss, metrics = self.original.evaluate(data_loader=data_loader, **kwargs)
        if not math.isfinite(loss) and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            raise self.stopped(f"a validation loss in or before epoch {self.epoch} is {loss}", data_loader)
        return loss, metrics

    def valid_err_log(self, valid_loss, eval_metrics, logger, log_errors, epoch=None, valid_loader_name="Default"):
        """MACE calls it between an evaluation and the checkpoint."""
        self.original.valid_err_log(valid_loss, eval_metrics, logger, log_errors, epoch, valid_loader_name)
        if not math.isfinite(valid_loss):
            when = f"after epoch {epoch}"
            if epoch is None:
                when, self.remedy = "before training", "check --foundation_model and --E0s"
            loss = f"the validation loss of head {valid_loader_name} {when} is {valid_loss}"
            raise self.stopped(loss, self.evaluated)

    def stopped(self, loss: str, batches: Iterable) -> PeftError:
        """What to say: which loss, whether the data or the model is to blame, and what is left to go on from."""
        wrong = sorted({name for batch in batches for name, value in batch.to_dict().items()
                        if isinstance(value, torch.Tensor) and not torch.isfinite(value).all()})
        cause = f"its data are finite, but the model is far off: {self.remedy}"
        if wrong:
            cause = f"its data hold NaN or infinity ({', '.join(wrong)}): correct them"
        saved, rest = self.checkpoints(), "no checkpoint has been saved"
        if saved:
            rest = f"the last good checkpoint is {saved[-1]}, from which --restart_latest goes on at the same --lr"
        return PeftError(f"{loss}; {cause}; {rest}")


def somewhere_not_finite(loss: float) -> bool:
    """Whether the loss of any process is not finite. All call it, after each step."""
    if not torch.distributed.is_initialized():
        return not math.isfinite(loss)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    count = torch.tensor(float(not math.isfinite(loss)), device=device)
    torch.distributed.all_reduce(count)
    return count.item() > 0
