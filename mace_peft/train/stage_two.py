"""Stage two (``--swa``) starts with an optimizer of its own.

MACE goes on with the moments that the optimizer has gathered from the loss of stage one. Those of the new loss have
another scale, so that the first steps are several times too long, and what they spoil takes the rest of the run to
mend; with AMSGrad, MACE's default, the largest moment ever seen keeps the later steps too short for that. Here the
optimizer forgets stage one, and the learning rate rises from zero over the first steps: the first moments are of a few
batches alone, and Adam moves every parameter by the full learning rate whatever their size.

How far the rise is, the optimizer's own state tells, which checkpoints hold. Nothing here is about adapters: a full
fine-tune can do the same.
"""

import contextlib
from collections.abc import Iterator

import torch

WARM_UP = 50  # steps


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Leave the optimizer no moments and no steps."""
    if hasattr(optimizer, "eval"):  # schedule-free: the averaged weights are those that it has trained
        optimizer.eval()
    optimizer.state.clear()
    for group in optimizer.param_groups:
        anew = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}  # what a schedule-free one counts beside its state
        group.update({name: value for name, value in anew.items() if name in group})


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How many steps the optimizer has in its state."""
    if "k" in optimizer.param_groups[0]:  # schedule-free
        return optimizer.param_groups[0]["k"]
    return next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)


@contextlib.contextmanager
def warm_up(optimizer: torch.optim.Optimizer, steps: int = WARM_UP) -> Iterator[None]:
    """The learning rate of the optimizer's first steps is lower: it rises in proportion to their number."""
    rates: list[float] = []

    def lower(optimizer, *_):
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        share = min(1.0, (1 + steps_taken(optimizer)) / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate

    def put_back(optimizer, *_):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    hooks = [optimizer.register_step_pre_hook(lower), optimizer.register_step_post_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
